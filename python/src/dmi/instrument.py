"""From patterns to hooks: `plan` says what will be captured, `install` places it, `Instrumentation.remove` takes it
away."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dmi.attention import AttentionHook, Rerouting, original, why_not
from dmi.families import Mapping, mapping_for
from dmi.hook import Alone, Collector, Entry, Group, HookError, InputHook, OutputHook, Spread, Whole
from dmi.huggingface import Steps
from dmi.native import SpansAt
from dmi.rows import Requests
from dmi.sites import CONTEXT_TOKENS, KEY, Refusal, SiteSpec, Tap, Vocabulary, find, hook_points, module_point


class Ring(Protocol):
    """What the hooks and steps need of native.Ring."""

    tensor: Tensor

    def open_step(
        self, step: int, spans: bytes | SpansAt, *, width: tuple[int, int, int], keys: int = 0, packed: bool = False
    ) -> bool: ...
    def series(self, spans: bytes, *, width: tuple[int, int, int], packed: bool = False) -> Any: ...
    def open_next(self, series: Any, step: int, keys: int = 0) -> bool: ...
    def close_step(self, step: int, *, aborted: bool = False) -> None: ...
    def counters(self) -> dict[str, Any]: ...
    def branch(self, may: bool) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What a list of patterns selects in a model."""

    sites: tuple[SiteSpec, ...]
    skipped: tuple[Refusal, ...] = ()
    """What a glob matched and the model cannot give."""
    mapping: Mapping | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """n_layers, n_heads, n_kv_heads, d_model, d_head: of a known family."""

    @property
    def aliases(self) -> dict[str, list[str]]:
        return {site.name: list(site.aliases) for site in self.sites if site.aliases}

    def estimated_bytes(self, tokens: int = CONTEXT_TOKENS) -> int:
        """Estimate for a request of so many tokens; users' own points count nothing, attention grows with the
        square."""
        total = 0
        for site in self.sites:
            each = site.bytes_per_token or 0
            total += each * tokens * tokens // CONTEXT_TOKENS if KEY in site.roles else each * tokens
        return total


def plan(
    model: nn.Module,
    patterns: Sequence[str],
    *,
    mapping: Mapping | None = None,
    budget_bytes: int | None = None,
    tokens: int = CONTEXT_TOKENS,
) -> Plan:
    """Resolve patterns: canonical names, aliases, HookPoints, module paths, and globs over them (`*` within a
    component, `**` across). Raises HookError for an empty list, a name that does not exist (with close matches), one
    that the model cannot give (with the reason), a pattern that matches nothing, and sites that exceed `budget_bytes`
    in a request of `tokens` tokens."""
    if isinstance(patterns, str):
        patterns = [patterns]
    if not patterns:
        raise HookError(
            'no hooks: name at least one, for example hooks=["blocks.*.hook_resid_post", "logits"]; '
            "docs/sites.md lists them"
        )
    model = getattr(model, "_orig_mod", model)
    mapping = mapping or mapping_for(model)
    vocabulary = None if mapping is None else Vocabulary(model, mapping)
    known = list(hook_points(model)) + ([] if vocabulary is None else _attainable(vocabulary))
    refusals = [] if vocabulary is None else vocabulary.refusals
    result = resolve(model, patterns, known, refusals, mapping)
    if vocabulary is not None:
        names = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head")
        result = replace(result, facts={name: getattr(vocabulary, name) for name in names})
    total = result.estimated_bytes(tokens)
    if budget_bytes is not None and total > budget_bytes:
        costs = {p: resolve(model, [p], known, refusals, mapping).estimated_bytes(tokens) for p in patterns}
        largest = max(costs, key=lambda pattern: costs[pattern])
        raise HookError(
            f"the hooks would capture about {_size(total)} for a request of {tokens} tokens, over the budget of "
            f"{_size(budget_bytes)}; "
            f"{largest!r} alone is {_size(costs[largest])}: select fewer layers or sites, or raise the budget"
        )
    return result


def resolve(
    model: nn.Module,
    patterns: Sequence[str],
    known: Sequence[SiteSpec],
    refusals: Sequence[Refusal],
    mapping: Mapping | None = None,
) -> Plan:
    """What patterns select among the sites that a model has, in the order of `known`, the user's own points last."""
    chosen: dict[str, SiteSpec] = {}
    skipped: dict[str, Refusal] = {}
    for pattern in patterns:
        found, lacking = _match(model, pattern, known, refusals, mapping)
        for site in found:
            chosen.setdefault(site.name, site)
        for refusal in lacking:
            skipped.setdefault(refusal.name, refusal)
    order = {site.name: index for index, site in enumerate(known)}
    sites = tuple(sorted(chosen.values(), key=lambda site: order.get(site.name, len(order))))
    return Plan(sites, tuple(skipped.values()), mapping)


def _size(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"


def _attainable(vocabulary: Vocabulary) -> list[SiteSpec]:
    """The sites, less those that this attention implementation cannot give, which become refusals."""
    sites = []
    flag = bool(getattr(vocabulary.config, vocabulary.mapping.upcast_flag or "", False))
    reasons: dict[tuple[str, str], str] = {}
    for site in vocabulary.sites:
        if site.tap.side == "attention":
            what = str(site.tap.which)
            module = vocabulary.model.get_submodule(site.tap.path)
            key = (type(module).__name__, what)
            if key not in reasons:
                reasons[key] = why_not(module, what, flag)
            if reasons[key]:
                block = site.name.rpartition(".")[0]
                nearest = (
                    f'load the model with attn_implementation="eager", or capture {block}.hook_rot_q and '
                    f"{block}.hook_rot_k"
                    if what in ("scores", "pattern") and vocabulary.mapping.rotary
                    else 'load the model with attn_implementation="eager"'
                    if what in ("scores", "pattern")
                    else f"{block}.hook_q, {block}.hook_k"
                )
                vocabulary.refusals.append(Refusal(site.name, reasons[key], nearest, site.aliases))
                continue
        sites.append(site)
    return sites


# ------------------------------------------------------------------ patterns
def glob(pattern: str) -> re.Pattern[str]:
    """A dotted glob: `*` and `?` within a component, `**` across components (none included: `blocks.**.hook_q`)."""
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**.", i):
            out, i = out + r"(?:[^.]+\.)*", i + 3
        elif pattern.startswith("**", i):
            out, i = out + ".*", i + 2
        elif pattern[i] == "*":
            out, i = out + "[^.]*", i + 1
        elif pattern[i] == "?":
            out, i = out + "[^.]", i + 1
        elif pattern[i] == "[" and "]" in pattern[i:]:
            end = pattern.index("]", i)
            out, i = out + "[" + re.escape(pattern[i + 1 : end]).replace(r"\-", "-") + "]", end + 1
        else:
            out, i = out + re.escape(pattern[i]), i + 1
    return re.compile(out + r"\Z")


def _match(
    model: nn.Module, pattern: str, known: Sequence[SiteSpec], refusals: Sequence[Refusal], mapping: Mapping | None
) -> tuple[list[SiteSpec], list[Refusal]]:
    if not isinstance(pattern, str):
        raise HookError(f"hook pattern {pattern!r} is no text: name a site; docs/sites.md lists them")
    if not pattern.strip():
        raise HookError(f"hook pattern {pattern!r} is empty: name a site; docs/sites.md lists them")
    if not any(mark in pattern for mark in "*?["):
        for site in known:
            if pattern == site.name or pattern in site.aliases:
                return [site], []
        for refusal in refusals:
            if pattern == refusal.name or pattern in refusal.aliases:
                raise HookError(f"cannot capture {refusal}")
        point = module_point(model, pattern)
        if point is not None:
            return [point], []
        raise HookError(_unknown(model, pattern, known, refusals, mapping))
    # Globs select by canonical name first; aliases, which other sites may share a component with, only where none
    # matches.
    expression = glob(pattern)
    found = [site for site in known if expression.match(site.name)]
    lacking = [refusal for refusal in refusals if expression.match(refusal.name)]
    if not found:
        found = [site for site in known if any(expression.match(alias) for alias in site.aliases)]
    if not found and not lacking:
        path, colon, place = pattern.partition(":")
        modules = glob(path)
        names = [name for name, _ in model.named_modules() if name and modules.match(name)]
        found = [point for name in names if (point := module_point(model, name + colon + place)) is not None]
    if not found and lacking:
        reasons = "\n  ".join(str(refusal) for refusal in lacking[:4])
        more = f"\n  and {len(lacking) - 4} more" if len(lacking) > 4 else ""
        raise HookError(f"hook pattern {pattern!r} matches only what this model cannot give:\n  {reasons}{more}")
    if not found:
        raise HookError(_unknown(model, pattern, known, refusals, mapping))
    return found, lacking


def _unknown(
    model: nn.Module, pattern: str, known: Sequence[SiteSpec], refusals: Sequence[Refusal], mapping: Mapping | None
) -> str:
    names = {n for s in known for n in (s.name, *s.aliases)} | {r.name for r in refusals}
    paths = {name for name, _ in model.named_modules() if name}
    candidates = sorted(names) + sorted(paths - names)
    near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.5)
    if not near:  # the last component may be right where the rest is not
        last = pattern.rpartition(".")[2]
        near = [name for name in candidates if name.rpartition(".")[2] == last][:3]
    text = f"hook pattern {pattern!r} matches nothing in {type(model).__name__}"
    if near:
        text += f"; close: {', '.join(near)}"
    elif candidates:
        text += f"; there are {', '.join(candidates[:3])}{f' and {len(candidates) - 3} more' if len(candidates) > 3 else ''}"
    if mapping is None:
        text += (
            "; DMI does not know this model's family: name module paths, place HookPoints, "
            "or pass mapping=dmi.Mapping(...)"
        )
    return text


# ------------------------------------------------------------------ installation
class Instrumentation:
    """Hooks that are in place. `remove` takes them away; the model is then as it was."""

    def __init__(self, model: nn.Module, ring: Ring, steps: Steps) -> None:
        self._model = model
        self._ring = ring
        self._steps = steps
        self._handles: list[Any] = []
        self._rerouting = Rerouting()
        self._removed = False

    def outside(self) -> int:
        """Tensors that hooks offered while no step was open, so far: the model ran where no step can be opened (inside
        a function that was compiled as a whole, or one of its parts alone). They are not captured and on nobody's
        books."""
        return int(self._ring.counters()["outside"])

    def step(self, rows: Any, *, requests: Sequence[int] | None = None, keys: int | None = None) -> AbstractContextManager[list[int]]:
        """Open a step by hand, for graphs that are replayed: see `Steps.by_hand`."""
        return self._steps.by_hand(rows, requests, keys)

    def settle(self) -> None:
        """End the requests whose cache is gone. Called at every step; a session calls it before it flushes."""
        self._steps.settle()

    def remove(self) -> None:
        """Idempotent. Ends the requests that are still open."""
        if self._removed:
            return
        self._removed = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._rerouting.undo()
        self._steps.remove()
        forget_compiled()


def install(
    model: nn.Module, plan: Plan, ring: Ring, site_ids: Sequence[int] | dict[str, int], requests: Requests
) -> Instrumentation:
    """Place the hooks of a plan. `site_ids`: the ring's numbers, in the order of plan.sites or by name. On an exception
    everything that was placed is gone again."""
    model = getattr(model, "_orig_mod", model)
    ids = site_ids if isinstance(site_ids, dict) else dict(zip((s.name for s in plan.sites), site_ids, strict=True))
    collector = Collector(ring.tensor)
    steps = Steps(model, ring, requests, collector, keyed=any(KEY in site.roles for site in plan.sites))
    instrumentation = Instrumentation(model, ring, steps)
    try:
        instrumentation._handles += _place(model, plan, ids, collector, instrumentation._rerouting)
        steps.install()  # last: the step closes after the root's own captures
    except BaseException:
        instrumentation.remove()
        raise
    forget_compiled()
    return instrumentation


def _place(
    model: nn.Module, plan: Plan, ids: dict[str, int], collector: Collector, rerouting: Rerouting
) -> Iterator[Any]:
    """Register the hooks; yields their handles."""
    blocks: dict[int, list[SiteSpec]] = {}
    behind: list[SiteSpec] = []  # the blocks
    alone = Alone(collector)
    for site in plan.sites:
        if site.grouped and site.layer is not None:
            blocks.setdefault(site.layer, []).append(site)
        elif site.grouped:
            behind.append(site)
        else:
            for tap in (site.tap, *site.others):
                target: Alone | Spread = alone
                if tap.spread is not None:
                    target = Spread(alone)
                    yield model.get_submodule(tap.spread).register_forward_pre_hook(target, with_kwargs=True)
                yield from _register(model, target, {(tap.path, tap.side): [(ids[site.name], tap)]})
    for index, site in enumerate(behind):
        group = Group(collector, [ids[site.name]], last=index == len(behind) - 1)
        yield from _register(model, group, {(site.tap.path, site.tap.side): [(0, site.tap)]}, ends=site.tap.path)
    if blocks:
        assert plan.mapping is not None
        holder = model.get_submodule(_block_path(model, plan.mapping, min(blocks)).rpartition(".")[0].rpartition(".")[0])
        yield holder.register_forward_pre_hook(Whole(collector))
    for layer, sites in blocks.items():
        group = Group(collector, [ids[site.name] for site in sites], last=not behind and layer == max(blocks))
        taps: dict[tuple[str, str], list[tuple[int, Tap]]] = {}
        for place, site in enumerate(sites):
            taps.setdefault((site.tap.path, site.tap.side), []).append((place, site.tap))
        assert plan.mapping is not None
        block = _block_path(model, plan.mapping, layer)
        taps.setdefault((block, "out"), [])
        yield from _register(model, group, taps, ends=block)
        for (path, side), entries in taps.items():
            if side == "attention":
                module = model.get_submodule(path)
                config: Any = original(module.config)
                places = {str(tap.which): place for place, tap in entries}
                hook = AttentionHook(group, places, config, config._attn_implementation)
                rerouting.add(module)
                yield module.register_forward_pre_hook(hook, with_kwargs=True)


def _register(
    model: nn.Module, target: Group | Alone | Spread, taps: dict[tuple[str, str], list[tuple[int, Tap]]], ends: str | None = None
) -> Iterator[Any]:
    for (path, side), found in taps.items():
        module = model.get_submodule(path)
        entries: list[Entry] = [(place, tap.which, tap.transform) for place, tap in found]
        if side == "in":
            yield module.register_forward_pre_hook(InputHook(target, entries, ends=path == ends), with_kwargs=True)
        elif side == "out":
            yield module.register_forward_hook(OutputHook(target, entries, ends=path == ends))


def _block_path(model: nn.Module, mapping: Mapping, layer: int) -> str:
    for backbone in mapping.backbone:
        path = ".".join(part for part in (backbone, mapping.blocks, str(layer)) if part)
        if find(model, path) is not None:
            return path
    raise HookError(f"{type(model).__name__} has no block {layer}")


def forget_compiled() -> None:
    """Make torch.compile trace anew whatever it compiled so far in this process: its guards leave hooks out, so what
    was compiled without ours, or with them, would go on as it is. Costs a recompilation, not correctness."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
