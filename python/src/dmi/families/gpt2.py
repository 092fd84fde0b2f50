"""GPT-2: learned positions, fused qkv, a plain MLP."""

from dmi.families.mapping import Fused, Mapping

MAPPING = Mapping(
    name="gpt2",
    model_types=("gpt2",),
    backbone=("transformer", ""),
    embed="wte",
    pos_embed=("wpe", "drop"),
    blocks="h",
    norm="ln_f",
    ln1="ln_1",
    ln2="ln_2",
    attn="attn",
    qkv=Fused("attn.c_attn"),
    o="attn.c_proj",
    rotary=False,
    upcast_flag="reorder_and_upcast_attn",
    gate="mlp.c_fc",
    up=None,
    down="mlp.c_proj",
)
