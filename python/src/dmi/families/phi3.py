"""Phi-3 and Phi-4: qkv and gate, up fused."""

from dmi.families.mapping import Fused, Mapping

MAPPING = Mapping(
    name="phi3",
    model_types=("phi3",),
    qkv=Fused("self_attn.qkv_proj"),
    attn_dropout="resid_attn_dropout",
    gate=None,
    up=None,
    gate_up=Fused("mlp.gate_up_proj"),
    mlp_dropout="resid_mlp_dropout",
)
