"""The vocabulary in vLLM's own model trees: which of the names of docs/sites.md they give, where, and which not and why. `grouped` are those that nothing in
vLLM writes over before the forward ends.

vLLM packs the tokens of all requests into one dimension, T here; carries the residual stream as two tensors, whose sum is what
Hugging Face's models call the hidden state; and fuses projections. Values are those of the unfused model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dmi.families import mapping_for
from dmi.hook import HookError, Transform
from dmi.instrument import Plan, resolve
from dmi.sites import (
    INNER,
    LOGITS,
    OPTIONAL,
    ROW,
    Refusal,
    SiteSpec,
    Tap,
    find,
    heads,
    hook_points,
    norm_statistics,
    piece,
)

RESIDUAL = "residual"
"""`Tap.which` of a sum of two tensors: a block's arguments or output, or a norm's arguments."""
PAGED = "vLLM's attention kernels read a paged cache and never form them; dmi.recompute_attention makes them on reading"
SHARDED = "each of the tensor-parallel ranks has a part of it, and DMI does not gather parts yet"


@dataclass(frozen=True)
class _Tree:
    """Where a vLLM decoder keeps its parts; of a block, relative to it. The defaults are Llama's."""

    backbone: str = "model"
    embed: str = "embed_tokens"
    scaled: bool = False
    """What comes out of the embedding is multiplied by the root of d_model before the first block."""
    positions: str | None = None
    """Learned positions, which are added to the embeddings."""
    blocks: str = "layers"
    norm: str = "norm"
    logits: str = "logits_processor"
    ln1: str = "input_layernorm"
    ln2: str = "post_attention_layernorm"
    ln1_post: str | None = None
    """A norm of the attention's output, before it is added."""
    ln2_post: str | None = None
    attn: str = "self_attn"
    qkv: str = "self_attn.qkv_proj"
    kernel: str = "self_attn.attn"
    o: str = "self_attn.o_proj"
    rotary: bool = True
    mlp: str = "mlp"
    up: str = "mlp.gate_up_proj"
    gated: bool = True
    """`up` gives the gate first."""
    down: str = "mlp.down_proj"


_GEMMA = _Tree(scaled=True, ln2="pre_feedforward_layernorm", ln1_post="post_attention_layernorm", ln2_post="post_feedforward_layernorm")
_GPT2 = _Tree(backbone="transformer", embed="wte", positions="wpe", blocks="h", norm="ln_f", ln1="ln_1", ln2="ln_2", attn="attn", qkv="attn.c_attn", kernel="attn.attn",
              o="attn.c_proj", rotary=False, up="mlp.c_fc", gated=False, down="mlp.c_proj")  # fmt: skip
TREES = {**dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _Tree()), **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA), "gpt2": _GPT2}
"""By `config.model_type`."""


def plan(model: nn.Module, patterns: Sequence[str], ranks: int = 1) -> Plan:
    """What patterns select in a vLLM model that `ranks` tensor-parallel ranks share. Raises HookError as `dmi.attach` does."""
    mapping = mapping_for(model)
    tree = TREES.get(getattr(getattr(model, "config", None), "model_type", ""))
    known = [_packed(site) for site in hook_points(model)]
    refusals: list[Refusal] = []
    facts: dict[str, Any] = {}
    blocks = None if tree is None else find(model, f"{tree.backbone}.{tree.blocks}")
    if tree is not None and isinstance(blocks, nn.ModuleList):
        vocabulary = _Vocabulary(model, tree, len(blocks), ranks)
        known += vocabulary.sites
        refusals = vocabulary.refusals
        facts = vocabulary.facts
    else:
        mapping = None
    result = resolve(model, patterns, known, refusals, mapping)
    named = {site.name for site in known}
    sites = tuple(site if site.name in named else _packed(site) for site in result.sites)
    return replace(result, sites=sites, facts=facts)


def _packed(site: SiteSpec) -> SiteSpec:
    """A user's point: the first dimension counts rows, and any others are inner ones."""
    return replace(site, tap=replace(site.tap, transform=None))


class _Vocabulary:
    def __init__(self, model: nn.Module, tree: _Tree, layers: int, ranks: int) -> None:
        config: Any = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.model = model
        self.tree = tree
        self.ranks = ranks
        self.sites: list[SiteSpec] = []
        self.refusals: list[Refusal] = []
        self.n_heads = int(config.num_attention_heads)
        self.n_kv_heads = int(getattr(config, "num_key_value_heads", None) or self.n_heads)
        self.d_model = int(config.hidden_size)
        self.d_head = int(getattr(config, "head_dim", None) or self.d_model // self.n_heads)
        self.d_mlp = int(getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * self.d_model)
        self.facts = {"n_layers": layers, "n_heads": self.n_heads, "n_kv_heads": self.n_kv_heads, "d_model": self.d_model, "d_head": self.d_head}
        parameter = next(model.parameters(), None)
        self.item_bytes = 4 if parameter is None else parameter.element_size()
        embed = f"{tree.backbone}.{tree.embed}"
        self.add("tokens", Tap(embed, "in"), 1, aliases=("embed.hook_in",), flags=OPTIONAL, roles=(ROW,), grouped=True)
        dtype = torch.float32 if parameter is None else parameter.dtype
        scale = times(torch.tensor(self.d_model**0.5, dtype=dtype).item()) if tree.scaled else None
        self.add("hook_embed", Tap(embed, "out", None, scale), self.d_model, aliases=("embed.hook_out", embed), flags=OPTIONAL, grouped=tree.scaled)
        if tree.positions is not None:
            positions = f"{tree.backbone}.{tree.positions}"
            self.add("hook_pos_embed", Tap(positions, "out"), self.d_model, aliases=("pos_embed.hook_out", positions))
        for layer in range(layers):
            self._block(layer, f"{tree.backbone}.{tree.blocks}.{layer}")
        self._norm("ln_final", f"{tree.backbone}.{tree.norm}", None, ("unembed.hook_in",))
        processor: Any = model.get_submodule(tree.logits)
        capped = getattr(processor, "soft_cap", None) is not None or getattr(processor, "scale", 1.0) != 1.0
        if capped:
            self.refuse("unembed.hook_out", "vLLM scales or caps the logits in the module that computes them", "logits")
        # vLLM puts the softmax's input together in one module; what it samples from comes after it.
        aliases = () if capped else ("unembed.hook_out", "hook_unembed")
        self.add("logits", Tap(tree.logits, "out"), int(config.vocab_size), aliases=aliases, space=LOGITS)

    def add(self, name: str, tap: Tap, items: int, *, roles: tuple[int, ...] = (ROW, INNER), **rest: Any) -> None:
        self.sites.append(SiteSpec(name, tap, bytes_per_token=items * self.item_bytes, roles=roles, **rest))

    def shard(self, name: str, tap: Tap, items: int, **rest: Any) -> None:
        """A site that is whole on one rank only where there is no other."""
        if self.ranks == 1:
            self.add(name, tap, items, **rest)
        else:
            self.refuse(name, SHARDED)

    def refuse(self, name: str, reason: str, nearest: str = "") -> None:
        self.refusals.append(Refusal(name, reason, nearest))

    def _norm(self, name: str, path: str, layer: int | None, aliases: tuple[str, ...]) -> None:
        scale, normalized = norm_statistics(self.model.get_submodule(path))
        wider = max(4, self.item_bytes) // self.item_bytes  # float32 at least
        self.add(f"{name}.hook_scale", Tap(path, "in", RESIDUAL, scale), wider, layer=layer, grouped=True)
        self.add(f"{name}.hook_normalized", Tap(path, "in", RESIDUAL, normalized), wider * self.d_model, layer=layer, grouped=True)
        self.add(f"{name}.hook_out", Tap(path, "out"), self.d_model, layer=layer, aliases=(*aliases, path), grouped=True)

    def _block(self, layer: int, path: str) -> None:
        tree, name, d = self.tree, f"blocks.{layer}", self.d_model
        at: dict[str, Any] = {"layer": layer}
        self.add(f"{name}.hook_resid_pre", Tap(path, "in", RESIDUAL), d, aliases=(f"{name}.hook_in",), **at)
        self._norm(f"{name}.ln1", f"{path}.{tree.ln1}", layer, (f"{name}.attn.hook_in",))
        self._attention(layer, path)
        self._added(layer, path, "attn", tree.attn, tree.ln1_post, f"{name}.attn.o.hook_out")
        ln2 = f"{path}.{tree.ln2}"
        self.add(f"{name}.hook_resid_mid", Tap(ln2, "in", RESIDUAL), d, aliases=(f"{name}.ln2.hook_in",), **at)
        self._norm(f"{name}.ln2", ln2, layer, (f"{name}.mlp.hook_in",))
        if tree.gated:
            for index, (hook, alias) in enumerate((("hook_pre", "gate"), ("hook_pre_linear", "in"))):
                part = piece(index * self.d_mlp, (index + 1) * self.d_mlp)
                self.shard(f"{name}.mlp.{hook}", Tap(f"{path}.{tree.up}", "out", None, part), self.d_mlp, aliases=(f"{name}.mlp.{alias}.hook_out",), grouped=True, **at)
        else:
            self.shard(f"{name}.mlp.hook_pre", Tap(f"{path}.{tree.up}", "out"), self.d_mlp, aliases=(f"{name}.mlp.in.hook_out",), grouped=True, **at)
            self.refuse(f"{name}.mlp.hook_pre_linear", "this family's MLP has no such projection", f"{name}.mlp.hook_pre, {name}.mlp.hook_post")
        self.shard(f"{name}.mlp.hook_post", Tap(f"{path}.{tree.down}", "in"), self.d_mlp, aliases=(f"{name}.mlp.out.hook_in",), grouped=True, **at)
        self._added(layer, path, "mlp", tree.mlp, tree.ln2_post, f"{name}.mlp.out.hook_out")
        self.add(f"{name}.hook_resid_post", Tap(path, "out", RESIDUAL), d, aliases=(f"{name}.hook_out", path), **at)

    def _added(self, layer: int, path: str, part: str, module: str, norm: str | None, projected: str) -> None:
        """What attention or MLP adds to the residual stream: after a norm where there is one."""
        name = f"blocks.{layer}"
        at: dict[str, Any] = {"layer": layer}
        raw, whole = f"{name}.{part}.hook_out", f"{path}.{module}"
        if norm is None:
            self.add(f"{name}.hook_{part}_out", Tap(whole, "out"), self.d_model, aliases=(raw, whole, projected), **at)
            return
        ln = f"{name}.ln{1 if part == 'attn' else 2}_post"
        self.add(raw, Tap(whole, "out"), self.d_model, aliases=(whole, projected, f"{ln}.hook_in"), grouped=True, **at)
        self._norm(ln, f"{path}.{norm}", layer, ())
        last = self.sites.pop()
        # The norm that follows adds it to the residual stream, and may do so where it is.
        self.sites.append(replace(last, name=f"{name}.hook_{part}_out", aliases=(last.name, *last.aliases), grouped=False))

    def _attention(self, layer: int, path: str) -> None:
        tree, name, d = self.tree, f"blocks.{layer}.attn", self.d_head
        rest: dict[str, Any] = {"layer": layer, "roles": (ROW, INNER, INNER)}
        counts = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}
        start = 0
        for part, count in counts.items():
            split = piece(start, start + count * d, d)
            self.shard(f"{name}.hook_{part}", Tap(f"{path}.{tree.qkv}", "out", None, split), count * d, aliases=(f"{name}.{part}.hook_out",), **rest)
            start += count * d
        for index, part in enumerate("qk"):
            if not tree.rotary:
                self.refuse(f"{name}.hook_rot_{part}", "this family has no rotary embedding", f"{name}.hook_{part}")
                continue
            # The rotary module is one for all layers; what comes out of it goes into the layer's own attention.
            self.shard(f"{name}.hook_rot_{part}", Tap(f"{path}.{tree.kernel}", "in", index, heads(d)), counts[part] * d, grouped=True, **rest)
        for hook in ("hook_attn_scores", "hook_pattern"):
            rotated = "rot_" if tree.rotary else ""
            self.refuse(f"{name}.{hook}", PAGED, f"{name}.hook_{rotated}q and {name}.hook_{rotated}k")
        self.shard(f"{name}.hook_z", Tap(f"{path}.{tree.o}", "in", None, heads(d)), self.n_heads * d, aliases=(f"{name}.o.hook_in",), grouped=True, **rest)


# ------------------------------------------------------------------ where a tap finds its tensor
def taken(tap: Tap, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
    """The tensor of a tap that is no sum, in a module's arguments or its output, before anything is done to it; None where there is none, in this forward."""
    if tap.side == "in":
        value = _argument(args, kwargs, tap.which)
    elif tap.which is None:
        value = output[0] if isinstance(output, tuple) else output
    else:
        value = output[tap.which] if isinstance(tap.which, int) else getattr(output, tap.which)
    return value if isinstance(value, Tensor) else None


def residual(tap: Tap, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> tuple[Tensor, Tensor | None]:
    """The two tensors whose sum is the residual stream: a block (positions, hidden_states, residual) or a norm (x, residual) is given them, a block returns them.
    There is no second one at the first block, and nowhere in GPT-2."""
    if tap.side == "out":
        return (output, None) if isinstance(output, Tensor) else (output[0], output[1])
    names = [value for value in args if isinstance(value, Tensor) and value.is_floating_point()]
    hidden: Tensor | None = kwargs.get("hidden_states", names[0] if names else None)
    if hidden is None:
        raise HookError("a vLLM block was called without hidden states")
    return hidden, kwargs.get("residual", names[1] if len(names) > 1 else None)


def times(factor: float) -> Transform:
    return lambda x: x * factor


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], which: int | str | None) -> Any:
    if isinstance(which, str):
        return kwargs.get(which)
    if which is not None:
        return args[which] if which < len(args) else None
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def last_norm(model: nn.Module) -> str | None:
    """The module with which the backbone's forward ends, of a known tree."""
    tree = TREES.get(getattr(getattr(model, "config", None), "model_type", ""))
    return None if tree is None else f"{tree.backbone}.{tree.norm}"
