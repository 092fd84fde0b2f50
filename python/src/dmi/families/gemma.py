"""Gemma-2 and Gemma-3: norms before and after attention and MLP, capped scores and logits, sliding windows."""

from dmi.families.mapping import Mapping

MAPPING = Mapping(
    name="gemma",
    model_types=("gemma2", "gemma3_text", "gemma3"),
    backbone=("model.language_model", "model", "language_model", ""),
    logit_cap="final_logit_softcapping",
    ln2="pre_feedforward_layernorm",
    ln1_post="post_attention_layernorm",
    ln2_post="post_feedforward_layernorm",
)
