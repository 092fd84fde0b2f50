"""Llama, and what copies its layout to the letter."""

from dmi.families.mapping import Mapping

MAPPING = Mapping(name="llama", model_types=("llama", "mistral", "qwen2"))
