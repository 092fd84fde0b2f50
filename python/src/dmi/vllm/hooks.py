"""Hooks on vLLM's modules. They are traced with the model and live in its CUDA graphs; each captures at once, because vLLM's fused
norms take over the memory of what they are given. Sites of one module share a call of the op.

The ring's tensor is an attribute of each hooked module, not of the hook: what vLLM compiled and stored for another process looks it up
there again. Site numbers are the sites' places in the plan, which the digest in vLLM's cache key covers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dmi.instrument import Plan
from dmi.sites import Tap
from dmi.vllm.sites import taken

RING = "dmi_ring"


class _Hook:
    def __init__(self, taps: Sequence[tuple[int, Tap]]) -> None:
        self.taps = tuple(taps)

    def take(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tensors: list[Tensor] = []
        sites: list[int] = []
        for site, tap in self.taps:
            tensor = taken(tap, args, kwargs, output)
            if tensor is not None:
                tensors.append(tensor)
                sites.append(site)
        if len(tensors) > 0:
            torch.ops.dmi.capture(module.dmi_ring, tensors, sites)


class _Before(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.take(module, args, kwargs, None)


class _After(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.take(module, args, kwargs, output)


class Hooks:
    """Hooks of a plan that are in place."""

    def __init__(self, model: nn.Module, plan: Plan, ring: Tensor, numbers: Sequence[int]) -> None:
        self._handles: list[Any] = []
        self._modules: list[nn.Module] = []
        places: dict[tuple[str, str], list[tuple[int, Tap]]] = {}
        for site, number in zip(plan.sites, numbers, strict=True):
            places.setdefault((site.tap.path, site.tap.side), []).append((number, site.tap))
        for (path, side), taps in places.items():
            module = model.get_submodule(path)
            object.__setattr__(module, RING, ring)
            self._modules.append(module)
            if side == "in":
                self._handles.append(module.register_forward_pre_hook(_Before(taps), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(_After(taps), with_kwargs=True))

    def remove(self) -> None:
        """The ring stays where compiled code looks for it: it is closed, and captures nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
