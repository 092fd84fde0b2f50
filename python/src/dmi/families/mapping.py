"""What DMI needs to know about a model family: where its parts are. Nothing else is written per family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fused:
    """One projection that computes several of q, k, v or gate, up.

    `concat`: [q of all heads | k | v], [gate | up]. `per_head`: q, k, v of head 0, then of head 1, ...
    """

    path: str
    layout: str = "concat"


@dataclass(frozen=True)
class Mapping:
    """Where a family keeps its parts. Paths in a block are relative to the block; `unembed` is relative to the model,
    the others to the backbone. None: the family has no such part, and sites that need it are refused with the reason.

    The defaults are Llama's. Pass one to `dmi.attach(..., mapping=dmi.Mapping(...))` for a model that DMI does not
    know."""

    name: str
    model_types: tuple[str, ...] = ()
    """`config.model_type` of the models that it fits."""
    backbone: tuple[str, ...] = ("model", "")
    """Where the decoder stack is; the first that has `blocks` is taken, "" is the model itself."""
    embed: str = "embed_tokens"
    pos_embed: tuple[str, str] | None = None
    """Learned positions, and the module that is given their sum with the embeddings."""
    blocks: str = "layers"
    norm: str | None = "norm"
    unembed: str | None = "lm_head"
    logit_cap: str | None = None
    """Config field: where it is set, the model caps what `unembed` gives, and `logits` is a site of its own."""

    ln1: str | None = "input_layernorm"
    ln2: str | None = "post_attention_layernorm"
    ln1_post: str | None = None
    """A norm of the attention's output, before it is added."""
    ln2_post: str | None = None
    attn: str = "self_attn"
    qkv: tuple[str, str, str] | Fused | None = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: str | None = "self_attn.o_proj"
    attn_dropout: str | None = None
    """A module between the attention's output and the sum."""
    rotary: bool = True
    upcast_flag: str | None = None
    """Config field: where it is true, attention does not go through the registered functions."""
    mid: str | None = "ln2"
    """The module whose input is the residual stream between attention and MLP: a path, or `ln2`."""
    parallel_flag: str | None = None
    """Config field: where it is true, attention and MLP read the same input and there is no such place."""
    mlp: str = "mlp"
    gate: str | None = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    gate_up: Fused | None = None
    down: str | None = "mlp.down_proj"
    mlp_dropout: str | None = None
    router: str | None = None
    """A module that gives (logits, weights, choices) a token."""
