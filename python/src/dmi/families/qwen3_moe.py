"""Qwen3-MoE: mixtures of experts, dense MLPs in the layers that the configuration names."""

from dmi.families.mapping import Mapping

MAPPING = Mapping(name="qwen3_moe", model_types=("qwen3_moe",), router="mlp.gate")
