"""Attention from the inside, through the library's registry of attention functions.

A module asks the registry for the function that its configuration names. An observed module gets a copy of its
configuration that names ours, which calls the very function that it would have called, with the same arguments, and
captures: queries and keys from the arguments; for `eager`, the weights that it returns and the scores that it hands to
softmax. The model's own configuration, its masks and every unobserved module stay as they are.
"""

from __future__ import annotations

import copy
import itertools
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dmi.hook import Group, HookError, symbolic_sites

_numbers = itertools.count()
PAGED = "paged|"
"""What continuous batching puts before an implementation's name while it runs: the same over a cache of pages, which it reads itself."""


class AttentionHook:
    """A forward pre-hook of an attention module: tells our function which sites this layer has.

    `places`: index in the group of rot_q, rot_k, scores, pattern; absent ones are not captured.
    """

    def __init__(self, group: Group, places: dict[str, int], source: Any, implementation: str) -> None:
        self.group = group
        self.places = places
        self.source = source
        self.implementation = implementation

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if self.source._attn_implementation.removeprefix(PAGED) != self.implementation.removeprefix(PAGED):
            raise HookError(
                f"the model's attention implementation changed from {self.implementation!r} to "
                f"{self.source._attn_implementation!r} while attached: detach, change it, attach again"
            )
        cache = kwargs.get("dmi_cache")
        if cache is None:
            cache = Given(kwargs.get("past_key_values", kwargs.get("layer_past")))
        if "rot_k" in self.places and not torch.compiler.is_compiling():
            cache.watch()
            self.group.collector.watching = weakref.ref(cache)  # weak, because a cache's end ends its requests
        return args, {**kwargs, "dmi_hooks": (*kwargs.get("dmi_hooks", ()), self), "dmi_cache": cache}

    def take(self, module: nn.Module, query: Tensor, key: Tensor, cache: Given, scores: Any, weights: Any) -> None:
        places, group = self.places, self.group
        if "rot_q" in places:
            group.put(places["rot_q"], query.transpose(1, 2), module.training)
        if "rot_k" in places:
            keys = cache.keys if cache.keys is not None else new_keys(module, key, query.shape[2], cache.cache)
            group.put(places["rot_k"], keys.transpose(1, 2), module.training)
        if "scores" in places:
            group.put(places["scores"], scores, module.training)
        if "pattern" in places:
            group.put(places["pattern"], weights, module.training)


class Given:
    """The key-value cache that a module was called with, and the keys that the module gave it.

    Attention is given the whole cache, out of which a kernel a layer would have to gather this step's keys: it costs more than their capture
    does. So, but in compiled code, the cache's `update` is watched for the one call that the module makes; where that is never made, because something raised, until
    the step closes."""

    def __init__(self, cache: Any) -> None:
        self.cache = getattr(cache, "self_attention_cache", cache)
        self.keys: Tensor | None = None

    def watch(self) -> None:
        own = getattr(self.cache, "__dict__", None)  # an object that has none: then the keys are gathered
        if own is None or not hasattr(self.cache, "update"):
            return
        self.leave()  # another session's, or what was left where no step was open
        own["update"] = _Update(self, self.cache.update, "update" in own)

    def leave(self) -> None:
        """The cache as it was."""
        own = getattr(self.cache, "__dict__", {})
        update = own.get("update")
        if isinstance(update, _Update):
            if update.own:
                own["update"] = update.watched
            else:
                del own["update"]


class _Update:
    """In place of a cache's `update`. `own`: it is the object's and not its class's."""

    def __init__(self, given: Given, watched: Callable[..., Any], own: bool) -> None:
        self.given = given
        self.watched = watched
        self.own = own

    def __call__(self, key_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.given.leave()
        self.given.keys = key_states
        return self.watched(key_states, *args, **kwargs)


class _Seen:
    """What softmax was last given."""

    scores: Tensor | None = None


def new_keys(module: nn.Module, key: Tensor, tokens: int, cache: Any) -> Tensor:
    """This step's keys, out of those that attention was given: all of the cache's. [B, heads, tokens, d_head].

    Dynamic caches, and sliding windows that overflow, have them last; static ones at the slots where they were written.
    """
    layers = getattr(cache, "layers", None)
    if layers is not None:
        layer = layers[module.layer_idx]
        length = getattr(layer, "cumulative_length", None)
        full = getattr(layer, "cumulative_length_int", 0) > getattr(layer, "max_cache_len", 0)
        if isinstance(length, Tensor) and not full:
            slots = length.reshape(1) - tokens
            if tokens > 1:
                slots = slots + torch.arange(tokens, device=key.device)
            return key.index_select(2, slots)
    return key[:, :, key.shape[2] - tokens :]


def eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """The eager attention function of a model's own file: what the registry falls back to."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def registry(module: nn.Module) -> Any:
    """The registry that a module's own file asks, or None."""
    return getattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS", None)


def seeing_softmax(eager: Callable[..., Any], seen: _Seen) -> Callable[..., Any]:
    """The same function, the library's code untouched, in a namespace whose softmax remembers what it was given."""

    def softmax(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.scores = scores
        return torch.nn.functional.softmax(scores, *args, **kwargs)

    functional = types.SimpleNamespace(**{k: v for k, v in vars(nn.functional).items() if not k.startswith("__")})
    functional.softmax = softmax
    neural = types.SimpleNamespace(**{k: v for k, v in vars(nn).items() if not k.startswith("__")})
    neural.functional = functional
    assert isinstance(eager, types.FunctionType)
    # Without __name__, Dynamo looks names up in this very namespace and not in the module that the name says.
    names = {k: v for k, v in eager.__globals__.items() if k != "__name__"}
    names.update(nn=neural, F=functional)
    return types.FunctionType(eager.__code__, names, eager.__name__, eager.__defaults__, eager.__closure__)


def why_not(module: nn.Module, what: str, flag: bool) -> str:
    """Why an attention module cannot give `what` (rot_q, rot_k, scores or pattern); "" where it can."""
    implementation = getattr(original(getattr(module, "config", None)), "_attn_implementation", None)
    functions = registry(module)
    if functions is None or implementation is None:
        return f"{type(module).__name__} does not call the library's registered attention functions"
    if flag and implementation == "eager":
        return "this configuration computes attention by itself, not through the registered functions"
    if what in ("rot_q", "rot_k"):
        return ""
    if implementation.removeprefix(PAGED) != "eager":
        return f"attention implementation {implementation!r} never materialises it"
    eager = eager_function(module) if implementation == "eager" else functions[implementation]
    if not isinstance(eager, types.FunctionType):
        return f"no eager attention function in {type(module).__module__}"
    if what == "scores" and "softmax" not in eager.__code__.co_names:
        return "its eager attention does not call softmax"
    return ""


class _Rerouted:
    """A function of ours in the registry, and the modules that call it. Sessions on one model share it."""

    def __init__(self, functions: Any, name: str) -> None:
        self.functions = functions
        self.name = name
        self.modules = 0


def original(config: Any) -> Any:
    """The configuration that a rerouted module had."""
    return getattr(config, "_dmi_original", config)


class Rerouting:
    """Attention modules that call our function, for one session. `undo` gives those that no other session reroutes
    their configuration back, and takes functions that nobody calls out of the registry."""

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._shared: dict[tuple[int, str], _Rerouted] = {}

    def add(self, module: nn.Module) -> None:
        config: Any = module.config
        self._modules.append(module)
        if config is not original(config):
            config._dmi_sessions += 1
            return
        functions, implementation = registry(module), config._attn_implementation
        eager = eager_function(module)
        key = (id(eager), implementation)
        if key not in self._shared:
            rerouted = self._shared[key] = _Rerouted(functions, f"dmi-{next(_numbers)}-{implementation}")
            functions[rerouted.name] = _observed(functions, implementation, eager)
        ours = copy.copy(config)
        ours._attn_implementation_internal = self._shared[key].name
        ours._dmi_original, ours._dmi_rerouted, ours._dmi_sessions = config, self._shared[key], 1
        self._shared[key].modules += 1
        module.config = ours

    def undo(self) -> None:
        for module in self._modules:
            config: Any = module.config
            if config is original(config):
                continue  # somebody gave it another
            config._dmi_sessions -= 1
            if config._dmi_sessions == 0:
                module.config = config._dmi_original
                config._dmi_rerouted.modules -= 1
                if config._dmi_rerouted.modules == 0:
                    config._dmi_rerouted.functions.pop(config._dmi_rerouted.name, None)
        self._modules.clear()
        self._shared.clear()


def _observed(functions: Any, implementation: str, eager: Any) -> Callable[..., Any]:
    """The function that goes into the registry."""
    seen = _Seen()
    name = implementation.removeprefix(PAGED)
    calls = {n: _seeing(functions, n, eager, seen) for n in (name, PAGED + name) if n == "eager" or n in functions}

    def attention(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        hooks, cache = kwargs.pop("dmi_hooks", ()), kwargs.pop("dmi_cache", None)
        if cache is not None and not torch.compiler.is_compiling():
            cache.leave()
        output = calls[original(module.config)._attn_implementation](module, query, key, *args, **kwargs)
        scores, seen.scores = seen.scores, None
        for hook in hooks:
            if torch.compiler.is_compiling():
                with symbolic_sites():
                    hook.take(module, query, key, cache, scores, output[1])
            else:
                hook.take(module, query, key, cache, scores, output[1])
        return output

    return attention


def _seeing(functions: Any, implementation: str, eager: Any, seen: _Seen) -> Callable[..., Any]:
    """An implementation's function; where it forms scores, one that remembers them."""
    function = eager if implementation == "eager" else functions[implementation]
    if implementation.removeprefix(PAGED) == "eager" and isinstance(function, types.FunctionType):
        return seeing_softmax(function, seen)
    return function  # type: ignore[no-any-return]
