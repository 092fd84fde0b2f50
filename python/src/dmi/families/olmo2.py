"""OLMo-2: no norms before attention and MLP, norms after them."""

from dmi.families.mapping import Mapping

MAPPING = Mapping(
    name="olmo2",
    model_types=("olmo2",),
    ln1=None,
    ln2=None,
    ln1_post="post_attention_layernorm",
    ln2_post="post_feedforward_layernorm",
    mid="mlp",
)
