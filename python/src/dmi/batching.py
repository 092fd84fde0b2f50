"""Continuous batching of Hugging Face models: which row of a packed forward is which token of which request.

`generate_batch`, a `ContinuousBatchingManager` and `transformers serve` run one generation loop, whose processor puts chunks of prompts
and single tokens of any number of requests one after another into one row. While a model is attached, the library's processor has
functions of ours in front of some of its own: a step opens around what the loop calls a generation step, whether a plain forward, a
compiled one or a graph's replay does it. Managers that are there already are observed too, so it is the class that is wrapped, and only
steps of attached models that we look at.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from dmi._abi import SPAN_CHOSEN
from dmi.hook import HookError
from dmi.options import REFERENCE, Options, Prompt, asking, given_in, options_of
from dmi.requests import IDS_KEPT
from dmi.rows import DECODE, PREFILL, SPANS, Requests
from dmi.sites import LOGITS, TOKENS

LABEL = "hf_request"
"""Label of a request under which it has the id that Hugging Face knows it by."""
LABEL_LENGTH = 1024
"""Characters of it at most; clients choose them, and the engine takes 4096 bytes."""
_NUMBERED = re.compile(r"req_\d+(__child#\d+)?")
"""Ids that a manager gave by itself, counting from 0: the next manager gives them again."""


log = logging.getLogger("dmi.batching")


@dataclass
class _Served:
    """A request that a processor has under way."""

    number: int
    state: Any
    """The library's, the newest: a request that lost its cache goes on as another one of the same id."""
    done: int = 0
    """Positions below were computed, or came out of the cache. Computing one again is another attempt."""
    attempt: int = 0
    flags: int = 0
    """Of its spans."""


Opening = Callable[[list[int], bytes, dict[str, Any]], AbstractContextManager[int]]
"""Opens a step of these requests, with these spans; gives its number."""


class Batches:
    """The requests of one model's processors, and the row tables of their steps. `lock` is the model's steps'."""

    def __init__(self, model: nn.Module, requests: Requests, lock: threading.RLock, opening: Opening, *, keyed: bool) -> None:
        self._model = model
        self._requests = requests
        self._lock = lock
        self._opening = opening
        self._keyed = keyed
        self._step = 0
        self._under_way: weakref.WeakKeyDictionary[Any, dict[str, _Served]] = weakref.WeakKeyDictionary()
        self._named: dict[str, None] = {}

    def install(self) -> None:
        if hasattr(self._model, "init_continuous_batching"):
            _watch(self)

    def remove(self) -> None:
        _unwatch(self)
        with self._lock:
            for served in self._under_way.values():
                for one in served.values():
                    self._end(one, "aborted")
            self._under_way.clear()

    def reference(self, key: str) -> dict[str, Any]:
        """Where the captures of a request of the library's are."""
        return self._requests.reference(LABEL, key[:LABEL_LENGTH])

    def settle(self) -> None:
        """Tell the tokens of those that are under way."""
        with self._lock:
            for served in self._under_way.values():
                for one in served.values():
                    self._requests.update(one.number, tokens=_tokens(one.state))

    def check(self, manager: Any) -> None:
        """Raises HookError for a manager that runs attention in which what is captured is never formed."""
        model: Any = self._model
        config = model.config
        text = config.get_text_config()
        kinds = set(getattr(text, "layer_types", None) or ()) | ({"sliding_attention"} if getattr(text, "sliding_window", None) else set())
        if self._keyed and (config._attn_implementation != "paged|eager" or "sliding_attention" in kinds):
            manager.destroy()
            if manager._original_attn_impl is not None:
                model.set_attn_implementation(manager._original_attn_impl)
            raise HookError(
                f"continuous batching with {config._attn_implementation} attention{' and sliding windows' if 'sliding_attention' in kinds else ''}: "
                "attn.hook_attn_scores and attn.hook_pattern come out of paged|eager attention without sliding windows only; load the model with "
                'attn_implementation="eager", or leave them out (hook_rot_q and hook_rot_k can be had)'
            )

    # -------------------------------------------------------------- what the loop calls
    @contextlib.contextmanager
    def step(self, processor: Any, model: Any) -> Iterator[None]:
        """Around a generation step of the batch that the processor has prepared."""
        if model is not self._model:
            yield
            return
        with self._lock:
            numbers, table, opening = self._table(processor)
            with self._opening(numbers, table, opening) as self._step:
                yield

    @contextlib.contextmanager
    def unseen(self, runner: Any, model: Any) -> Iterator[None]:
        """Around a forward over made-up requests: a step without rows."""
        if model is not self._model:
            yield
            return
        with self._lock, self._opening([], b"", {"width": (0, 0, 0)}):
            yield

    def left(self, processor: Any) -> None:
        """End what the processor has no more."""
        with self._lock:
            served = self._under_way.get(processor)
            if not served:
                return
            scheduler = processor.scheduler
            for key in [key for key in served if key not in scheduler.active_requests and key not in scheduler.waiting_requests]:
                one = served.pop(key)
                reasons = {"FINISHED": "finished", "FAILED": "error"}
                self._end(one, reasons.get(one.state.status.name, "aborted"))

    def _end(self, one: _Served, reason: str) -> None:
        self._requests.update(one.number, tokens=_tokens(one.state))
        self._requests.end(one.number, reason, self._step)

    # -------------------------------------------------------------- rows
    def _table(self, processor: Any) -> tuple[list[int], bytes, dict[str, Any]]:
        """Requests, spans, and how the step is opened."""
        batch = processor.inputs_and_outputs
        if hasattr(batch, "io_pairs"):  # asynchronous: this step's of two
            batch = batch.io_pairs[batch.current_pair].host_io
        known = self._under_way.setdefault(processor, {})
        few = processor.model_runner.supports_logits_to_keep(self._model)
        going: list[_Served] = []
        rows: list[tuple[Any, ...]] = []
        logits: list[tuple[Any, ...]] = []
        first = key_first = predicted = 0
        for future in batch.requests_in_batch:
            state, count = future.state, future.query_length
            position = state.position_offset - count
            one = self._known(known, state)
            going.append(one)
            if position < one.done:
                one.attempt += 1
            one.done = position + count
            prompt = state._true_initial_tokens or len(state.initial_tokens)
            phase = DECODE if count == 1 and position >= prompt else PREFILL
            rest = (key_first, one.attempt, phase, one.flags, prompt)
            rows.append((one.number, TOKENS, 0, first, count, position, *rest))
            if not few:
                logits.append((one.number, LOGITS, 0, first, count, position, *rest))
            elif future.has_new_token:  # a chunk that a prompt goes on after has none
                logits.append((one.number, LOGITS, 0, predicted, 1, position + count - 1, *rest))
                predicted += 1
            first += count
            key_first += position + count
        spans = np.array(rows + logits, SPANS).tobytes()
        # What is behind the last request pads the step, for shapes that recur; it is nobody's.
        padded = batch.num_q_tokens if processor.model_runner.pad_inputs else first
        keys = batch.max_kv_read + batch.num_q_tokens if processor.model_runner.pad_inputs else key_first
        return [one.number for one in going], spans, {"width": (padded, 0, 0), "keys": keys}

    def _known(self, known: dict[str, _Served], state: Any) -> _Served:
        key = state.request_id
        one = known.get(key)
        if one is None:
            names = [] if _NUMBERED.fullmatch(key) or key in self._named else [key]
            self._named.update(dict.fromkeys(names))
            if len(self._named) > IDS_KEPT:
                del self._named[next(iter(self._named))]
            options = told(key, options_of(state.logit_processor_kwargs))
            labels = {**options.labels, LABEL: key[:LABEL_LENGTH]}
            (number,) = self._requests.begin(1, names=names, labels=[labels], tags=[options.tags])
            one = known[key] = _Served(number, state, flags=SPAN_CHOSEN if options.chosen else 0)
        one.state = state
        return one


def told(key: str, options: Options) -> Options:
    """Options that cannot be meant are told of, in the log."""
    if options.wrong:
        log.warning("request %s: nothing of it is captured: %s", key, options.wrong)
    return options


def _tokens(state: Any) -> list[int]:
    """Prompt and what was generated."""
    return [*state.initial_tokens, *state.generated_tokens]


# ------------------------------------------------------------------ the library's classes
_watching: list[Batches] = []
_watching_lock = threading.Lock()
_plain: list[tuple[type, str, Any]] = []
"""What was there before the first of us came."""


_managers: weakref.WeakSet[Any] = weakref.WeakSet()
"""That were given requests with options."""


def _watch(batches: Batches) -> None:
    from transformers.generation.continuous_batching import cb_logits_processors, continuous_api, model_runner, requests

    processor, runner, manager = continuous_api.ContinuousBatchProcessor, model_runner.ModelRunner, continuous_api.ContinuousBatchingManager
    with _watching_lock:
        _watching.append(batches)
        if _plain:
            return
        for owner, name, wrap in (
            (processor, "_generation_step", functools.partial(_around, Batches.step)),
            (processor, "prepare_next_batch", _before_left),
            (processor, "update_batch", _before_left),
            (processor, "fail_all_requests", _before_left),
            (processor, "reset", _before_left),
            (runner, "run_one_warmup", functools.partial(_around, Batches.unseen)),
            (manager, "add_request", _with_options),
            (continuous_api.ContinuousMixin, "generate_batch", _with_the_same_options),
            (cb_logits_processors.ContinuousBatchingLogitsProcessorList, "check_kwargs", _but_options),
            (requests.RequestState, "to_generation_output", _with_reference),
        ):
            plain = getattr(owner, name)
            _plain.append((owner, name, plain))
            setattr(owner, name, functools.wraps(plain)(wrap(plain)))


def _unwatch(batches: Batches) -> None:
    with _watching_lock:
        if batches not in _watching:
            return
        _watching.remove(batches)
        if not _watching:
            for manager in _managers:  # nobody looks over options from here on, and the library fails requests for arguments that it does not know
                with manager.input_queue.mutex:
                    for state in manager.input_queue.queue:
                        state.logit_processor_kwargs = _plainly(state.logit_processor_kwargs)
            for owner, name, plain in _plain:
                setattr(owner, name, plain)
            _plain.clear()


def _around(context: Callable[[Batches, Any, Any], AbstractContextManager[None]], plain: Callable[..., Any]) -> Callable[..., Any]:
    def around(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for batches in tuple(_watching):
                stack.enter_context(context(batches, self, model))
            return plain(self, model, *args, **kwargs)

    return around


def _before_left(plain: Callable[..., Any]) -> Callable[..., Any]:
    def left(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return plain(self, *args, **kwargs)
        finally:
            for batches in tuple(_watching):
                batches.left(self)

    return left


# ------------------------------------------------------------------ options
# They travel among a request's arguments for logits processors, which the library keeps through forks and restarts.
def _with_options(plain: Callable[..., Any]) -> Callable[..., Any]:
    def add_request(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        server = asking.get()
        options = {**(server.given if server is not None else {}), **(input_ids.options if isinstance(input_ids, Prompt) else {})}
        if options or given_in(kwargs):
            _managers.add(self)
        return plain(self, input_ids, *args, **{**options, **kwargs})

    return add_request


def _with_the_same_options(plain: Callable[..., Any]) -> Callable[..., Any]:
    def generate_batch(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        options = given_in(kwargs)
        if options:
            own = [prompt.options if isinstance(prompt, Prompt) else {} for prompt in inputs]
            inputs = [Prompt(prompt, **{**options, **more}) for prompt, more in zip(inputs, own, strict=True)]
        return plain(self, inputs, *args, **_plainly(kwargs))

    return generate_batch


def _but_options(plain: Callable[..., Any]) -> Callable[..., Any]:
    def check_kwargs(self: Any, kwargs: dict[str, Any]) -> Any:
        return plain(self, _plainly(kwargs))

    return check_kwargs


def _with_reference(plain: Callable[..., Any]) -> Callable[..., Any]:
    def to_generation_output(self: Any) -> Any:
        output = plain(self)
        if self.logit_processor_kwargs.get(REFERENCE):
            found = [batches.reference(self.request_id) for batches in tuple(_watching)]
            output.dmi = next((reference for reference in found if reference["observed"]), found[0] if found else None)
        return output

    return to_generation_output


def _plainly(kwargs: dict[str, Any]) -> dict[str, Any]:
    options = given_in(kwargs)
    return {key: value for key, value in kwargs.items() if key not in options} if options else kwargs
