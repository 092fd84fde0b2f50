"""What runs inside the model: hooks that collect tensors, and the op call that captures them.

Hooks of known sites only collect; at the end of a block, or of several on a device, where it is launches that cost, the
whole group goes to the op. A tensor waits in a group only where the family's mapping says that nothing rewrites it before
the forward ends, and never while training (jitter and dropout write in place). Everything else is captured at once.

All of it is traced by torch.compile: no graph breaks, and nothing here may differ from layer to layer except site
numbers, which reach the op as symbolic integers (see `symbolic_sites`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

GROUP_BYTES = 128 << 20
"""Bytes that a group may keep alive; at the bound what is there is captured and a new group begins."""
ENOUGH_BYTES = {"cpu": 0, "cuda": 64 << 20}
"""Bytes that end a group at the end of a block: a copy of so many takes longer than a launch."""
LAUNCH_TENSORS = 128
"""Tensors that a launch takes: a group ends where the next block's would need another one."""
ENOUGH_TRACED = 16
"""In compiled code, where sizes would become guards: tensors that end a group at the end of a block."""

Transform = Callable[[Tensor], Tensor]
Entry = tuple[int, "int | str | None", "Transform | None"]
"""Index in the group (or the site's number, ungrouped), which element or argument, and what is done to it."""


class HookError(ValueError):
    """A hook that cannot be placed, or a forward pass that cannot be attributed: what, where, why, what to do."""


class HookPoint(nn.Module):
    """A place in a forward pass: returns its input. `dmi.attach(..., hooks=["name"])` captures what flows through.

    `rows` says how many leading dimensions count rows (tokens): 2 for [batch, tokens, ...], 1 for [tokens, ...].
    Left out, tensors of three dimensions or more have two, others one.
    """

    def __init__(self, name: str | None = None, *, rows: int | None = None) -> None:
        super().__init__()
        if rows not in (None, 1, 2):
            raise HookError(f"HookPoint({name!r}): rows is {rows!r}; it must be 1 or 2, or left out")
        self.name = name
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return "" if self.name is None else repr(self.name)


class Collector:
    """Tensors that wait for the end of their group, and where the op finds the ring.

    Belongs to one session; used by the one thread that has a step open."""

    def __init__(self, ring: Tensor, bound_bytes: int = GROUP_BYTES) -> None:
        self.ring = ring
        self.bound_bytes = bound_bytes
        self.enough_bytes = ENOUGH_BYTES[ring.device.type]
        self.tensors: list[Tensor] = []
        self.groups: list[Group] = []
        self.places: list[int] = []
        self.held_bytes = 0
        self.block_begun = 0
        """Tensors that waited when the block began."""
        self.whole = False
        """Whether the forward is traced as a whole, so that a group may go on into the next block. Where blocks are compiled one by
        one, each has to begin with nothing waiting, or no two would be compiled alike."""
        self.watching: Callable[[], Any] | None = None
        """A weak reference to the cache that attention watches last (attention.Given)."""

    def put(self, group: Group, place: int, tensor: Tensor, training: bool, traced: bool | None = None) -> None:
        self.tensors.append(tensor.detach() if tensor.requires_grad else tensor)
        self.groups.append(group)
        self.places.append(place)
        if not (torch.compiler.is_compiling() if traced is None else traced):  # shapes would become guards
            self.held_bytes += tensor.nbytes
        if training or self.held_bytes > self.bound_bytes:
            self.flush()

    def block_ends(self, traced: bool) -> None:
        """A place where a group may end."""
        if traced:
            if not self.whole or self.enough_bytes == 0 or len(self.tensors) >= ENOUGH_TRACED:
                self.flush()
            return
        if self.held_bytes >= self.enough_bytes or 2 * len(self.tensors) - self.block_begun > LAUNCH_TENSORS:
            self.flush()
        self.block_begun = len(self.tensors)

    def flush(self) -> None:
        """Capture what waits. At the latest when the step closes."""
        if len(self.tensors) > 0:
            # The numbers are looked up here and not before: an int that Dynamo finds early it takes for a constant.
            sites = [group.sites[place] for group, place in zip(self.groups, self.places, strict=True)]
            torch.ops.dmi.capture.default(self.ring, self.tensors, sites)
            self._let_go()

    def clear(self) -> None:
        """Begin anew: forget what the forward before, or one that was aborted, left behind."""
        if len(self.tensors) > 0:
            self._let_go()
        if self.watching is None:
            return
        given = self.watching()
        if given is not None:
            given.leave()
        self.watching = None

    def _let_go(self) -> None:
        self.tensors.clear()
        self.groups.clear()
        self.places.clear()
        self.held_bytes = self.block_begun = 0


class Group:
    """Some sites whose tensors may wait, in the order of their places: a block's, or those around the blocks. Hooks name them by
    place, so that they are the same constants in every layer."""

    def __init__(self, collector: Collector, sites: Sequence[int], *, last: bool = False) -> None:
        self.collector = collector
        self.sites = tuple(sites)
        self.last = last
        """Nothing of the forward is captured after it."""

    def put(self, place: int, tensor: Tensor, training: bool, traced: bool | None = None) -> None:
        self.collector.put(self, place, tensor, training, traced)

    def end(self, traced: bool) -> None:
        if self.last:
            self.collector.flush()
        else:
            self.collector.block_ends(traced)


class Alone:
    """Captures at once: users' points, which anything may rewrite right after."""

    def __init__(self, collector: Collector) -> None:
        self.collector = collector

    def put(self, site: int, tensor: Tensor, training: bool, traced: bool | None = None) -> None:
        torch.ops.dmi.capture.default(self.collector.ring, [tensor.detach()], [site])

    def end(self, traced: bool) -> None:
        pass


class Spread:
    """Between an OutputHook and its target, for what is computed once for a whole batch, as learned positions are: it waits for the tensor that it becomes part
    of, which has a row for each request. Itself the forward pre-hook (with kwargs) of the module that is given that tensor."""

    def __init__(self, target: Alone) -> None:
        self.target = target
        self.waiting: list[tuple[int, Tensor]] = []

    def put(self, site: int, tensor: Tensor, training: bool, traced: bool | None = None) -> None:
        self.waiting.clear()  # what a forward that was aborted left behind
        self.waiting.append((site, tensor))

    def end(self, traced: bool) -> None:
        pass

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        whole = argument(args, kwargs, None)
        for site, tensor in self.waiting:
            self.target.put(site, tensor.expand(whole.shape[0], *tensor.shape[1:]), module.training)
        self.waiting.clear()


class Whole:
    """A forward pre-hook of the module that holds all blocks: tells how they are going to be traced."""

    def __init__(self, collector: Collector) -> None:
        self.collector = collector

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.collector.whole = torch.compiler.is_compiling()


def symbolic_sites() -> Any:
    """Entered in traced hooks: Dynamo takes integers that it reaches through a module for constants, and would compile
    every layer anew where layers are compiled one by one. Within this, a second layer makes site numbers symbolic."""
    from torch._dynamo.decorators import patch_dynamo_config

    return patch_dynamo_config(allow_unspec_int_on_nn_module=True)


def element(value: Any, which: int | str | None) -> Any:
    """The tensor in a module's output: itself, an item of a tuple, or a field of a ModelOutput."""
    if isinstance(which, str):
        return value[which] if isinstance(value, dict) else getattr(value, which)
    if which is not None:
        return value[which]
    return value[0] if isinstance(value, tuple) else value


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], which: int | str | None) -> Any:
    """The tensor among a module's arguments: by position, by name, or the first one."""
    if isinstance(which, str):
        return kwargs.get(which)
    if which is not None and which < len(args):
        return args[which]
    if len(args) > 0:
        return args[0]
    for value in kwargs.values():
        if isinstance(value, Tensor):
            return value
    return None


class OutputHook:
    """A forward hook that takes sites from a module's output; the last of a block also ends the group."""

    def __init__(self, target: Group | Alone | Spread, entries: Sequence[Entry], *, ends: bool = False) -> None:
        self.target = target
        self.entries = tuple(entries)
        self.ends = ends

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        # Asked once: to a model that has filled the caches, every Python function that is called is one that has to be fetched from memory.
        if torch.compiler.is_compiling():
            with symbolic_sites():
                self.take(module, output, True)
        else:
            self.take(module, output, False)

    def take(self, module: nn.Module, output: Any, traced: bool) -> None:
        for place, which, transform in self.entries:
            tensor = element(output, which)
            if isinstance(tensor, Tensor):
                self.target.put(place, tensor if transform is None else transform(tensor), module.training, traced)
        if self.ends:
            self.target.end(traced)


class InputHook:
    """A forward pre-hook (with kwargs) that takes sites from a module's arguments."""

    def __init__(self, target: Group | Alone | Spread, entries: Sequence[Entry], *, ends: bool = False) -> None:
        self.target = target
        self.entries = tuple(entries)
        self.ends = ends

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            with symbolic_sites():
                self.take(module, args, kwargs, True)
        else:
            self.take(module, args, kwargs, False)

    def take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], traced: bool) -> None:
        for place, which, transform in self.entries:
            tensor = argument(args, kwargs, which)
            if isinstance(tensor, Tensor):
                self.target.put(place, tensor if transform is None else transform(tensor), module.training, traced)
        if self.ends:
            self.target.end(traced)
