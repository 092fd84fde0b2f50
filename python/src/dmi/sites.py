"""The vocabulary: which named sites a model has, where each is taken, and which it lacks and why.

Names and values are TransformerLens's without compatibility mode; docs/sites.md is the page. Shapes in comments are
those of what is handed to the op: B is the batch, T this step's tokens, padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dmi.families.mapping import Fused, Mapping
from dmi.hook import HookError, HookPoint

# Values of abi/ring.h: dmi_space, dmi_role, DMI_SITE_*.
TOKENS, LOGITS = 0, 1
ROW, INNER, KEY = 1, 2, 3
OPTIONAL = 1
FILL_ZERO, FILL_MINUS_INFINITY = 0, 1

CONTEXT_TOKENS = 2048
"""Length of the request for which `bytes_per_token` of a keyed site is estimated."""

Transform = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Tap:
    """Where a site is taken. `side`: "in", "out" of the module at `path` (relative to the model), or "attention": the
    arguments, scores or weights of the registered attention function that the module at `path` calls."""

    path: str
    side: str
    which: int | str | None = None
    transform: Transform | None = None
    spread: str | None = None
    """Of what may be computed once for a whole batch: the module whose input it has become part of, with a row for each request."""


@dataclass(frozen=True)
class SiteSpec:
    """A site that a model has. `roles` and `space` are the ring's; `row_axis` is where the row axis stands for a
    reader."""

    name: str
    tap: Tap = field(compare=False)
    aliases: tuple[str, ...] = ()
    others: tuple[Tap, ...] = field(default=(), compare=False)
    """Other places where it may come by, never in the same forward."""
    layer: int | None = None
    space: int = TOKENS
    roles: tuple[int, ...] = (ROW, ROW, INNER)
    row_axis: int = 0
    fill: int = FILL_ZERO
    flags: int = 0
    grouped: bool = False
    """May wait for the end of the forward: nothing rewrites it before."""
    bytes_per_token: int | None = None
    """Estimate for a request of CONTEXT_TOKENS tokens; None where only a run can tell (a user's own point)."""


@dataclass(frozen=True)
class Refusal:
    """A name of the vocabulary that this model cannot give."""

    name: str
    reason: str
    nearest: str = ""
    aliases: tuple[str, ...] = ()
    foreign: bool = False
    """Only other families have such a thing: of no interest to who asked for everything."""

    def __str__(self) -> str:
        hint = f"; nearest: {self.nearest}" if self.nearest else ""
        return f"{self.name}: {self.reason}{hint}"


def find(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, or None."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def join(*parts: str | None) -> str:
    return ".".join(part for part in parts if part)


# ------------------------------------------------------------------ what is done to a tensor before the op sees it
def heads(d_head: int) -> Transform:
    """[B, T, n * d_head] -> [B, T, n, d_head], a view."""
    return lambda x: x.reshape(*x.shape[:-1], -1, d_head)


def piece(start: int, stop: int, d_head: int | None = None) -> Transform:
    """Part of a fused projection, a view; by head where `d_head` is given."""
    if d_head is None:
        return lambda x: x[..., start:stop]
    return lambda x: x[..., start:stop].reshape(*x.shape[:-1], -1, d_head)


def per_head_piece(index: int, d_head: int) -> Transform:
    """q, k or v of [B, T, n * (q | k | v)], a view [B, T, n, d_head]."""
    return lambda x: x.reshape(*x.shape[:-1], -1, 3 * d_head)[..., index * d_head : (index + 1) * d_head]


def norm_statistics(norm: nn.Module) -> tuple[Transform, Transform]:
    """The scale [B, T, 1] and the normalised input [B, T, d_model] of a LayerNorm or RMSNorm, in float32 at least.

    No module exposes them, so they are computed again from its input, as TransformerLens does.
    """
    epsilon = next((getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), 1e-5)
    centred = isinstance(norm, nn.LayerNorm) or type(norm).__name__ == "LayerNorm"  # vLLM has one of its own

    def prepared(x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        if centred:
            x = x - x.mean(-1, keepdim=True)
        return x, x.pow(2).mean(-1, keepdim=True) + epsilon

    def scale(x: Tensor) -> Tensor:
        return prepared(x)[1].sqrt()

    def normalized(x: Tensor) -> Tensor:
        x, variance = prepared(x)
        return x * torch.rsqrt(variance)

    return scale, normalized


# ------------------------------------------------------------------ the sites of a known family
class Vocabulary:
    """Sites and refusals of one model, in the order in which the model computes them."""

    def __init__(self, model: nn.Module, mapping: Mapping) -> None:
        self.model = model
        self.mapping = mapping
        self.sites: list[SiteSpec] = []
        self.refusals: list[Refusal] = []
        config: Any = getattr(model, "config", None)
        self.config: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
        if getattr(self.config, "is_encoder_decoder", False):
            raise HookError(
                f"{type(model).__name__} is an encoder-decoder model: its rows belong to two sequences, which DMI "
                "does not tell apart; "
                "attach to a decoder-only model"
            )
        self.backbone = self._backbone()
        parameter = next(model.parameters(), None)
        self.item_bytes = 4 if parameter is None else parameter.element_size()
        self.d_model = self._config("hidden_size", "n_embd")
        self.n_heads = self._config("num_attention_heads", "n_head")
        self.n_kv_heads = self._config("num_key_value_heads") or self.n_heads
        self.d_head = self._config("head_dim") or (self.d_model // self.n_heads if self.n_heads else 0)
        self.n_layers = len(self._blocks())
        self.gated = mapping.gate_up is not None or mapping.up is not None
        self._build()

    def _config(self, *names: str) -> int:
        return next((v for n in names if isinstance(v := getattr(self.config, n, None), int)), 0)

    def _backbone(self) -> str:
        for path in self.mapping.backbone:
            root = self.model if path == "" else find(self.model, path)
            if root is not None and isinstance(find(root, self.mapping.blocks), nn.ModuleList):
                return path
        raise HookError(
            f"{type(self.model).__name__}: the {self.mapping.name} mapping expects the blocks at "
            f"{' or '.join(repr(join(b, self.mapping.blocks)) for b in self.mapping.backbone)}, and none is there; "
            "pass dmi.attach(..., mapping=dmi.Mapping(...)) with this model's paths"
        )

    def _blocks(self) -> nn.ModuleList:
        blocks = find(self.model, join(self.backbone, self.mapping.blocks))
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def _flag(self, name: str | None) -> bool:
        return name is not None and bool(getattr(self.config, name, False))

    def add(
        self, name: str, tap: Tap, *, items: int, aliases: tuple[str, ...] = (), dtype_bytes: int = 0, **rest: Any
    ) -> None:
        """`items`: elements a token, for the estimate."""
        size = items * (dtype_bytes or self.item_bytes)
        self.sites.append(SiteSpec(name, tap, aliases=aliases, bytes_per_token=size, **rest))

    def refuse(self, name: str, reason: str, nearest: str = "", *, aliases: tuple[str, ...] = (), foreign: bool = False) -> None:
        self.refusals.append(Refusal(name, reason, nearest, aliases, foreign))

    def _build(self) -> None:
        m, root = self.mapping, self.backbone
        embed = join(root, m.embed)
        self.add(
            "tokens",
            Tap(embed, "in"),
            items=1,
            dtype_bytes=8,
            aliases=("embed.hook_in",),
            roles=(ROW, ROW),
            flags=OPTIONAL,
        )
        given = Tap(root, "in", "inputs_embeds")
        # Where something around the backbone looks the tokens up, it hands them over as embeddings, always.
        tap, others = (given, ()) if "." in root else (Tap(embed, "out"), (given,))
        self.add("hook_embed", tap, items=self.d_model, aliases=("embed.hook_out", embed), others=others)
        if m.pos_embed is None:
            self.refuse("hook_pos_embed", "this family adds no positions to its embeddings: it rotates queries and keys by them", "blocks.0.attn.hook_rot_q",
                        aliases=("pos_embed.hook_out",), foreign=True)  # fmt: skip
        else:
            positions, whole = (join(root, part) for part in m.pos_embed)
            self.add("hook_pos_embed", Tap(positions, "out", spread=whole), items=self.d_model, aliases=("pos_embed.hook_out", positions))
        for layer in range(self.n_layers):
            self._block(layer, join(root, m.blocks, str(layer)))
        if m.norm is not None:
            if self.n_layers > 0:
                last = self.sites[-1]
                self.sites[-1] = replace(last, aliases=(*last.aliases, "ln_final.hook_in"))
            self._norm("ln_final", join(root, m.norm), None, out_aliases=("unembed.hook_in", join(root, m.norm)))
        self._logits()

    def _logits(self) -> None:
        m = self.mapping
        if m.unembed is None or find(self.model, m.unembed) is None:
            for name in ("unembed.hook_out", "logits"):
                self.refuse(name, f"{type(self.model).__name__} has no unembedding", "ln_final.hook_out")
            return
        vocabulary = self._config("vocab_size")
        capped = m.logit_cap is not None and getattr(self.config, m.logit_cap, None) is not None
        aliases = ("hook_unembed", m.unembed) + (() if capped else ("logits",))
        tap = Tap(m.unembed, "out")
        self.add("unembed.hook_out", tap, items=vocabulary, aliases=aliases, space=LOGITS, grouped=True)
        if capped:
            self.add("logits", Tap("", "out", "logits"), items=vocabulary, space=LOGITS)

    def _norm(
        self,
        name: str,
        path: str,
        layer: int | None,
        *,
        out_aliases: tuple[str, ...] = (),
        in_aliases: tuple[str, ...] = (),
    ) -> None:
        norm = self.model.get_submodule(path)
        scale, normalized = norm_statistics(norm)
        wide = max(4, self.item_bytes)
        rest: dict[str, Any] = {"layer": layer, "grouped": True}
        self.add(f"{name}.hook_scale", Tap(path, "in", None, scale), items=1, dtype_bytes=wide, **rest)
        self.add(
            f"{name}.hook_normalized", Tap(path, "in", None, normalized), items=self.d_model, dtype_bytes=wide, **rest
        )
        self.add(f"{name}.hook_out", Tap(path, "out"), items=self.d_model, aliases=out_aliases, **rest)

    def _block(self, layer: int, path: str) -> None:
        m, name = self.mapping, f"blocks.{layer}"
        rest: dict[str, Any] = {"layer": layer, "grouped": True}
        parallel = self._flag(m.parallel_flag)
        # What goes into a part has the name of where it came from; TransformerLens also names it by where it goes.
        into_attention = (f"{name}.attn.hook_in", *(f"{name}.attn.{part}.hook_in" for part in "qkv"))
        dense = self._dense(path)
        into_mlp = (f"{name}.mlp.hook_in", *(f"{name}.mlp.{part}.hook_in" for part in ((f"{dense}gate", f"{dense}in") if self.gated or m.router is not None else ("in",))))
        before = [f"{name}.hook_in", *([f"{name}.ln1.hook_in"] if m.ln1 is not None else into_attention)]
        if parallel and m.ln2 is not None:
            before.append(f"{name}.ln2.hook_in")
        self.add(f"{name}.hook_resid_pre", Tap(path, "in", 0), items=self.d_model, aliases=tuple(before), **rest)
        self._block_norm(layer, path, "ln1", m.ln1, into_attention)
        self._attention(layer, path)
        self._added(layer, path, "attn", m.attn, m.ln1_post, m.attn_dropout)
        if parallel:
            self.refuse(
                f"{name}.hook_resid_mid",
                "attention and MLP run in parallel in this model: there is no residual stream between them",
                f"{name}.hook_resid_pre or {name}.hook_resid_post",
            )
        elif m.mid is not None:
            middle = m.ln2 if m.mid == "ln2" else m.mid
            aliases = (f"{name}.ln2.hook_in",) if m.mid == "ln2" else into_mlp
            self.add(
                f"{name}.hook_resid_mid", Tap(join(path, middle), "in"), items=self.d_model, aliases=aliases, **rest
            )
        self._block_norm(layer, path, "ln2", m.ln2, into_mlp)
        self._mlp(layer, path)
        self._added(layer, path, "mlp", m.mlp, m.ln2_post, m.mlp_dropout)
        self.add(
            f"{name}.hook_resid_post", Tap(path, "out"), items=self.d_model, aliases=(f"{name}.hook_out", path), **rest
        )

    def _block_norm(self, layer: int, path: str, which: str, part: str | None, out_aliases: tuple[str, ...]) -> None:
        name = f"blocks.{layer}.{which}"
        if part is None:
            for hook in ("hook_scale", "hook_normalized", "hook_out"):
                self.refuse(
                    f"{name}.{hook}",
                    "this family has no norm there: it normalises what comes out",
                    f"blocks.{layer}.{which}_post.{hook}",
                )
            return
        self._norm(name, join(path, part), layer, out_aliases=(*out_aliases, join(path, part)))

    def _added(self, layer: int, path: str, part: str, module: str, norm: str | None, dropout: str | None) -> None:
        """What attention or MLP adds to the residual stream: after a post-norm or a dropout where there is one."""
        name = f"blocks.{layer}"
        rest: dict[str, Any] = {"layer": layer, "grouped": True, "items": self.d_model}
        raw = (f"{name}.{part}.hook_out", join(path, module))
        projected = (f"{name}.attn.o.hook_out", f"{name}.attn.hook_hidden_states") if part == "attn" else (f"{name}.mlp.{self._dense(path)}out.hook_out",)
        ln = "ln1_post" if part == "attn" else "ln2_post"
        if norm is None:
            for hook in ("hook_scale", "hook_normalized", "hook_out"):
                self.refuse(f"{name}.{ln}.{hook}", "this family has no norm after it", f"{name}.hook_{part}_out", foreign=True)
        if norm is None and dropout is None:
            self.add(f"{name}.hook_{part}_out", Tap(join(path, module), "out"), aliases=(*raw, *projected), **rest)
            return
        into_norm = () if norm is None else (f"{name}.{ln}.hook_in",)
        self.add(raw[0], Tap(join(path, module), "out"), aliases=(raw[1], *projected, *into_norm), **rest)
        if norm is not None:
            self._norm(f"{name}.{ln}", join(path, norm), layer)
            last = self.sites.pop()
            self.add(f"{name}.hook_{part}_out", last.tap, aliases=(f"{name}.{ln}.hook_out", join(path, norm)), **rest)
        else:
            assert dropout is not None
            self.add(f"{name}.hook_{part}_out", Tap(join(path, dropout), "out"), aliases=(join(path, dropout),), **rest)

    def _attention(self, layer: int, path: str) -> None:
        m, name, d = self.mapping, f"blocks.{layer}.attn", self.d_head
        rest: dict[str, Any] = {"layer": layer, "grouped": True, "roles": (ROW, ROW, INNER, INNER)}
        counts = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}
        start = 0
        for index, part in enumerate("qkv"):
            size = counts[part] * d
            if isinstance(m.qkv, Fused):
                split = piece(start, start + size, d) if m.qkv.layout == "concat" else per_head_piece(index, d)
                tap = Tap(join(path, m.qkv.path), "out", None, split)
            elif m.qkv is not None:
                tap = Tap(join(path, m.qkv[index]), "out", None, heads(d))
            else:
                self.refuse(f"{name}.hook_{part}", "the mapping names no projection for it")
                continue
            start += size
            self.add(f"{name}.hook_{part}", tap, items=size, aliases=(f"{name}.{part}.hook_out",), **rest)
        attention = join(path, m.attn)
        for part in "qk":
            if not m.rotary:
                self.refuse(f"{name}.hook_rot_{part}", "this family has no rotary embedding", f"{name}.hook_{part}")
                continue
            self.add(
                f"{name}.hook_rot_{part}", Tap(attention, "attention", f"rot_{part}"), items=counts[part] * d, **rest
            )
        keyed: dict[str, Any] = {**rest, "roles": (ROW, INNER, ROW, KEY), "row_axis": 1}
        items = self.n_heads * CONTEXT_TOKENS // 2
        self.add(
            f"{name}.hook_attn_scores",
            Tap(attention, "attention", "scores"),
            items=items,
            fill=FILL_MINUS_INFINITY,
            **keyed,
        )
        self.add(f"{name}.hook_pattern", Tap(attention, "attention", "pattern"), items=items, **keyed)
        if m.o is None:
            self.refuse(f"{name}.hook_z", "the mapping names no output projection")
        else:
            self.add(
                f"{name}.hook_z",
                Tap(join(path, m.o), "in", None, heads(d)),
                items=self.n_heads * d,
                aliases=(f"{name}.o.hook_in",),
                **rest,
            )

    def _mlp(self, layer: int, path: str) -> None:
        m, name = self.mapping, f"blocks.{layer}.mlp"
        rest: dict[str, Any] = {"layer": layer, "grouped": True}
        if m.router is not None and self._routed(path):
            router = self.model.get_submodule(join(path, m.router))
            experts = self._config("num_local_experts", "num_experts")
            chosen = int(getattr(router, "top_k", 0)) or self._config("num_experts_per_tok")
            packed: dict[str, Any] = {**rest, "roles": (ROW, INNER)}
            where = join(path, m.router)
            self.add(
                f"{name}.gate.hook_out",
                Tap(where, "out", 0),
                items=experts,
                aliases=(f"{name}.hook_router_logits",),
                **packed,
            )
            self.add(
                f"{name}.hook_expert_indices",
                Tap(where, "out", 2),
                items=chosen,
                dtype_bytes=8,
                aliases=(f"{name}.gate.hook_expert_indices", f"{name}.hook_router_choices"),
                **packed,
            )
            for hook in ("hook_pre", "hook_pre_linear", "hook_post"):
                self.refuse(
                    f"{name}.{hook}",
                    "the MLP is a mixture of experts: there is no one such vector a token",
                    f"{name}.gate.hook_out, {name}.hook_expert_indices or blocks.{layer}.hook_mlp_out",
                )
            return
        if m.router is not None:
            self.refuse(f"{name}.gate.hook_out", "this layer's MLP is dense", f"{name}.hook_pre", aliases=(f"{name}.hook_router_logits",))
        else:  # `gate.hook_out` is the gate's, where a dense MLP has one
            logits = (f"{name}.hook_router_logits", f"{name}.gate.hook_out")[: 1 if self.gated else 2]
            self.refuse(logits[0], "the MLP is dense: nothing is routed", f"{name}.hook_post", aliases=logits[1:], foreign=True)
        self.refuse(f"{name}.hook_expert_indices", "the MLP is dense: there are no experts to choose", f"{name}.hook_post",
                    aliases=(f"{name}.gate.hook_expert_indices", f"{name}.hook_router_choices"), foreign=m.router is None)  # fmt: skip
        width = self._width(path)
        # TransformerLens names a plain MLP's one projection `in`, and a gated MLP's two `gate` and `in`.
        dense = self._dense(path)
        parts = {"hook_pre": (m.gate, 0, f"{dense}gate" if self.gated else "in"), "hook_pre_linear": (m.up, 1, f"{dense}in")}
        for hook, (module, index, alias) in parts.items():
            if m.gate_up is not None:
                tap = Tap(join(path, m.gate_up.path), "out", None, piece(index * width, (index + 1) * width))
            elif module is not None and find(self.model, join(path, module)) is not None:
                tap = Tap(join(path, module), "out")
            else:
                self.refuse(
                    f"{name}.{hook}", "this family's MLP has no such projection", f"{name}.hook_pre, {name}.hook_post"
                )
                continue
            paths = () if m.gate_up is not None else (join(path, module),)
            self.add(f"{name}.{hook}", tap, items=width, aliases=(f"{name}.{alias}.hook_out", *paths), **rest)
        if m.down is None:
            self.refuse(f"{name}.hook_post", "the mapping names no output projection")
        else:
            self.add(
                f"{name}.hook_post",
                Tap(join(path, m.down), "in"),
                items=width,
                aliases=(f"{name}.{dense}out.hook_in",),
                **rest,
            )

    def _routed(self, path: str) -> bool:
        """Whether this block's MLP is a mixture of experts."""
        return self.mapping.router is not None and find(self.model, join(path, self.mapping.router)) is not None

    def _dense(self, path: str) -> str:
        """What TransformerLens puts before the parts of a dense MLP in a family of mixtures, where `gate` is the router."""
        return "dense_" if self.mapping.router is not None and not self._routed(path) else ""

    def _width(self, path: str) -> int:
        """d_mlp of this block, from the weights: layers of one model may differ."""
        m = self.mapping
        down = None if m.down is None else find(self.model, join(path, m.down))
        if isinstance(down, nn.Linear):
            return down.in_features
        weight = getattr(down, "weight", None)
        return int(weight.shape[0]) if isinstance(weight, Tensor) else self._config("intermediate_size", "n_inner")


# ------------------------------------------------------------------ points that users placed or name by module path
def point_transform(rows: int | None) -> Transform:
    """A user's tensor as [rows, ...]: the first two dimensions are one where both count rows."""
    if rows == 1:
        return lambda x: x
    if rows == 2:
        return lambda x: x.flatten(0, 1)
    return lambda x: x.flatten(0, 1) if x.ndim > 2 else x


def hook_points(model: nn.Module) -> Iterator[SiteSpec]:
    """The HookPoint modules of a model."""
    seen: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, HookPoint):
            continue
        name = module.name or path
        if name in seen:
            raise HookError(
                f"two HookPoints are called {name!r} ({seen[name]} and {path}): give each its own name, or none"
            )
        seen[name] = path
        tap = Tap(path, "out", None, point_transform(module.rows))
        yield SiteSpec(name, tap, aliases=() if name == path else (path,), roles=())


def module_point(model: nn.Module, pattern: str) -> SiteSpec | None:
    """A site by module path: `model.layers.3.mlp`, `...:out`, `...:in`, `...:out.1` (element),
    `...:in.hidden_states`."""
    path, _, place = pattern.partition(":")
    side, _, which = (place or "out").partition(".")
    if side not in ("in", "out") or path == "" or find(model, path) is None:
        return None
    element: int | str | None = None if which == "" else int(which) if which.isdecimal() else which
    return SiteSpec(pattern, Tap(path, side, element, point_transform(None)), roles=())
