"""One small file per model family: where its parts are (`Mapping`). docs/sites.md says what is made of them."""

from __future__ import annotations

from typing import Any

from dmi.families import gemma, gpt2, gpt_neox, llama, mixtral, olmo2, phi3, qwen3, qwen3_moe
from dmi.families.mapping import Fused, Mapping

_FAMILIES = (llama, qwen3, gpt2, gemma, mixtral, qwen3_moe, gpt_neox, olmo2, phi3)
MAPPINGS: tuple[Mapping, ...] = tuple(family.MAPPING for family in _FAMILIES)

__all__ = ["MAPPINGS", "Fused", "Mapping", "mapping_for"]


def mapping_for(model: Any) -> Mapping | None:
    """The family of a Hugging Face model, by its configuration; None where DMI knows none."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for mapping in MAPPINGS:
        if model_type in mapping.model_types:
            return mapping
    return None
