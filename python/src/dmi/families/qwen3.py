"""Qwen3: Llama's layout; q and k have a norm per head, after `hook_q` and `hook_k`."""

from dmi.families.mapping import Mapping

MAPPING = Mapping(name="qwen3", model_types=("qwen3",))
