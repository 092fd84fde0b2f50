"""Hooks on vLLM's modules. They are traced with the model and live in its CUDA graphs.

A call of the op is a launch, which costs as much as copying megabytes: so tensors wait, and a group of them goes to the op in one call. Where groups end
is decided when the hooks are placed, by what the plan and the scheduler's bounds say, and not by what flows: a traced size would become a guard, and all
batch sizes run the same code. Nothing waits for longer than a forward of the backbone.

A group's tensors are held until the next group is captured. So a CUDA graph of a whole forward has its captures on a branch beside what follows, where a launch's ten microseconds hold up
nobody; the last group alone stands in the way. Graphs of pieces, which end anywhere, have no branches.

What vLLM may write over is copied before it waits: a fused norm gives its results in the memory of what it was given, a rotary embedding turns queries and keys
where they are. By `dmi::copy`, and not by a clone: Inductor drops clones and moves what it may to where that is used, and then vLLM's passes make operations in place without asking who
reads later. Of norms they do so only where those quantise or reduce ("careful"): elsewhere sums, and what blocks add to the residual stream, are results that the compiler makes in the norm's own kernel. What users
declare may be anything, and is captured at once.

The ring and what waits are attributes of each hooked module, not of the hooks: what vLLM compiled and stored for another process looks them up there again. Site numbers
are the sites' places in the plan. The digest in vLLM's cache key covers both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dmi.hook import LAUNCH_TENSORS
from dmi.instrument import Plan
from dmi.native import AS
from dmi.sites import LOGITS, SiteSpec, Tap
from dmi.vllm.sites import RESIDUAL, last_norm, residual, taken

WAITING_BYTES = 512 << 20
"""Of what waits, in a step of as many tokens as the scheduler gives. vLLM's profiling run, which is such a step, counts it."""
WAITING_SHARE = 32
"""One part in so many of a GPU's memory may wait and be held, if that is more."""

RING, WAITING, HELD, STREAM, ZERO = "dmi_ring", "dmi_waiting", "dmi_held", "dmi_stream", "dmi_zero"
"""The third: tensors of the group before. The fourth: the two that it is the sum of, and that. The last: a zero that no compiler knows to be one."""

AT_ONCE, COPIED, REMADE, KEPT = "at once", "copied", "remade", "kept"
ADDED = ("hook_attn_out", "hook_mlp_out")
"""To the residual stream, by the norm that follows, which may do so where they are."""


def may_wait(device: torch.device) -> int:
    """Bytes, on a device."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    return max(WAITING_BYTES, memory // WAITING_SHARE)


def _how(site: SiteSpec) -> str:
    """A user's own point has no size that is known before, and logits are computed outside of what is compiled."""
    if site.bytes_per_token is None or site.space == LOGITS:
        return AT_ONCE
    if site.grouped:
        return KEPT
    return REMADE if site.name.endswith(ADDED) and site.tap.transform is None else COPIED  # remade bits are no numbers to compute with


@dataclass
class Place:
    """A module's arguments or its output, and what is taken there: the index of the site in the plan, where its tensor is, and how it waits."""

    path: str
    side: str
    taps: list[tuple[int, Tap, str]] = field(default_factory=list)
    begins: bool = False
    """What waited before is captured first."""
    ends: bool = False
    """All that waits is captured then."""
    given: bool = False
    """It is a norm's arguments, which hold something else afterwards."""


class Arrangement:
    """What of a plan is taken where, in the order of a forward, and where groups end."""

    def __init__(self, model: nn.Module, plan: Plan, tokens: int, *, most: int = WAITING_BYTES, careful: bool = False) -> None:
        """`tokens`: of a step, at most; `most`: bytes that may wait and be held in it. `careful`: compilers may have norms that write over what a sum is made of, unseen by those that decide when
        it is made."""
        self.careful = careful
        self.places: list[Place] = []
        self._names = [f"{site.name} {_how(site)}" for site in plan.sites]
        found: dict[tuple[str, str], Place] = {}
        waiting = held = 0
        for index, site in enumerate(plan.sites):
            found.setdefault((site.tap.path, site.tap.side), Place(site.tap.path, site.tap.side)).taps.append((index, site.tap, _how(site)))
        for place in found.values():
            wait = [plan.sites[index] for index, _, how in place.taps if how != AT_ONCE]
            size = sum(site.bytes_per_token or 0 for site in wait)
            if waiting and wait and (waiting + len(wait) > LAUNCH_TENSORS or (held + size) * tokens > most // 2):
                place.begins, waiting, held = True, 0, 0
            waiting, held = waiting + len(wait), held + size
            place.given = place.side == "in" and any(site.tap.which == RESIDUAL and not site.name.endswith("hook_resid_pre") for site in wait)
            self.places.append(place)
        if waiting:
            path = last_norm(model)
            assert path is not None, "only sites of a known tree wait"
            if (path, "out") not in found:
                self.places.append(Place(path, "out"))
                found[path, "out"] = self.places[-1]
            found[path, "out"].ends = True

    @property
    def calls(self) -> int:
        """Of the op, in a forward, logits included."""
        alone = sum(any(how == AT_ONCE for _, _, how in place.taps) for place in self.places)
        return alone + sum(place.begins + place.ends for place in self.places)

    def words(self) -> list[str]:
        """All that compiled code depends on. The first: how the op is called."""
        return ["held", *(["careful"] if self.careful else []), *self._names, *(f"{place.path} {place.side}" for place in self.places if place.begins)]


class _Hook:
    def __init__(self, place: Place, numbers: Sequence[int], careful: bool) -> None:
        self.careful = careful
        self.taps = tuple((numbers[index], tap, how) for index, tap, how in place.taps)
        self.begins, self.ends, self.given = place.begins, place.ends, place.given
        self.together = sum(how == COPIED and tap.which is None for _, tap, how in self.taps) > 1
        """Parts of one tensor are copied as a whole."""

    def take(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.begins:
            _capture(module)
        now: list[tuple[Tensor, int]] = []
        copied: Tensor | None = None
        for site, tap, how in self.taps:
            wait = how != AT_ONCE
            if tap.which == RESIDUAL:
                tensor = _stream(module, self.careful, tap, args, kwargs, output)
                keep = True
            else:
                found = taken(tap, args, kwargs, output)
                if found is None:
                    continue
                tensor, keep = found, how not in (COPIED, REMADE)
                if how == REMADE and not self.careful:
                    tensor, site, keep = _remade(module, tensor), site + AS[tensor.dtype], True
                elif not keep and self.together and tap.which is None:
                    if copied is None:
                        copied = torch.ops.dmi.copy(module.dmi_ring, tensor)
                    tensor, keep = copied, True
            if tap.transform is not None:
                tensor = tap.transform(tensor)
            if not wait:
                now.append((tensor, site))
            else:
                module.dmi_waiting.append((tensor if keep else torch.ops.dmi.copy(module.dmi_ring, tensor), site))
        if self.given:
            module.dmi_stream.clear()
        if len(now) > 0:
            torch.ops.dmi.capture(module.dmi_ring, [tensor for tensor, _ in now], [site for _, site in now])
        if self.ends:
            _capture(module, last=True)
            module.dmi_stream.clear()


def _remade(module: Any, tensor: Tensor) -> Tensor:
    """The same bits, as integers, an ordinary result that the compiler makes together with what else reads the tensor: a copy is a kernel of its own."""
    same: Tensor = tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]) | module.dmi_zero
    return same


def _capture(module: Any, *, last: bool = False) -> None:
    """What waits, which is held from here on."""
    waiting, held = module.dmi_waiting, module.dmi_held
    if len(waiting) > 0 or (last and len(held) > 0):
        tensors = [tensor for tensor, _ in waiting]
        torch.ops.dmi.capture(module.dmi_ring, [*tensors, *held], [site for _, site in waiting], len(held), not last)
        held.clear()
        if not last:
            held.extend(tensors)
        waiting.clear()


def _stream(module: Any, careful: bool, tap: Tap, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    """The residual stream, a tensor of ours. A block's output, and what the next block and its norm are given, are one."""
    hidden, other = residual(tap, args, kwargs, output)
    last = module.dmi_stream
    if len(last) > 0 and last[0] is hidden and last[1] is other:
        return last[2]  # type: ignore[no-any-return]
    if other is None:
        ours: Tensor = torch.ops.dmi.copy(module.dmi_ring, hidden)
    else:
        if careful:
            ours = torch.ops.dmi.copy(module.dmi_ring, hidden) + torch.ops.dmi.copy(module.dmi_ring, other)
        else:
            ours = hidden + other
    last.clear()
    last.extend((hidden, other, ours))
    return ours


class _Before(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.take(module, args, kwargs, None)


class _After(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.take(module, args, kwargs, output)


class Hooks:
    """Hooks of an arrangement that are in place."""

    def __init__(self, model: nn.Module, arrangement: Arrangement, ring: Tensor, numbers: Sequence[int], branch: Callable[[bool], None] = lambda may: None) -> None:
        """`branch`: the ring's, which says whether what is recorded may have branches."""
        self._handles: list[Any] = []
        self._waiting: list[tuple[Tensor, int]] = []
        self._held: list[Tensor] = []
        self._stream: list[Any] = []
        self._branch, self._branching = branch, False
        with torch.inference_mode(False):
            zero = torch.zeros((), dtype=torch.int8, device=ring.device)
        for place in arrangement.places:
            module = model.get_submodule(place.path)
            for name, value in ((RING, ring), (WAITING, self._waiting), (HELD, self._held), (STREAM, self._stream), (ZERO, zero)):
                object.__setattr__(module, name, value)
            if place.side == "in":
                self._handles.append(module.register_forward_pre_hook(_Before(place, numbers, arrangement.careful), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(_After(place, numbers, arrangement.careful), with_kwargs=True))
        if ring.device.type == "cuda":
            self._handles.append(model.register_forward_pre_hook(self._begins))
            self._handles.append(model.register_forward_hook(self._is_over, always_call=True))

    def _begins(self, *_: Any) -> None:
        """The whole model: where it is recorded, so are all groups, and the last of them."""
        if not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
            self._branching = True
            self._branch(True)

    def _is_over(self, *_: Any) -> None:
        if self._branching:
            self._branching = False
            self._branch(False)

    def clear(self) -> None:
        """Begin anew: forget what a forward that was aborted left behind."""
        self._waiting.clear()
        self._held.clear()
        self._stream.clear()

    def remove(self) -> None:
        """The ring stays where compiled code looks for it: it is closed, and captures nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()
