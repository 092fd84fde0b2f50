"""GPT-NeoX and Pythia: attention and MLP in parallel (by default), qkv fused head by head."""

from dmi.families.mapping import Fused, Mapping

MAPPING = Mapping(
    name="gpt_neox",
    model_types=("gpt_neox",),
    backbone=("gpt_neox", ""),
    embed="embed_in",
    norm="final_layer_norm",
    attn="attention",
    qkv=Fused("attention.query_key_value", layout="per_head"),
    o="attention.dense",
    attn_dropout="post_attention_dropout",
    parallel_flag="use_parallel_residual",
    gate="mlp.dense_h_to_4h",
    up=None,
    down="mlp.dense_4h_to_h",
    mlp_dropout="post_mlp_dropout",
)
