"""Steps of Hugging Face models: where one begins and ends, and which rows of `model(...)` belong to which request.

A step is opened and closed by hooks of the root module. They run outside compiled code wherever the model itself is
what was compiled: `torch.compile(model)` before or after attaching, `model.compile()`, `model.forward =
torch.compile(...)`, and `generate`'s own compiled call for static caches. `skip_code` tells Dynamo not to compile these
hooks as frames of their own; where Dynamo inlines them, into a function of the user's that calls the model, they do
nothing, and the captures count as `outside`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmi.batching import Batches
from dmi.generation import Generations
from dmi.hook import Collector, HookError
from dmi.rows import Decoding, Forward, Requests, Row, kept_columns, packed, padded, spans


@dataclass(frozen=True)
class _Again:
    """The last step by hand, if it had one token a request: the next is mostly the same, a token later."""

    rows: Any
    version: int
    numbers: list[int]
    decoding: Decoding
    keys: int

    def fits(self, rows: Any) -> bool:
        """Whether a step of these rows is the next. `rows` is another list each time, perhaps, but mostly the same tensor."""
        if isinstance(rows, Tensor):
            return rows is self.rows and rows._version == self.version
        return type(rows) is type(self.rows) and bool(rows == self.rows)


class _ByHand:
    """What `Steps.by_hand` gives. No generator: that would cost as much again as all that it does."""

    __slots__ = ("_asked", "_step", "_steps")

    def __init__(self, steps: Steps, rows: Any, requests: Sequence[int] | None, keys: int | None) -> None:
        self._steps = steps
        self._asked = rows, requests, keys
        self._step = 0

    def __enter__(self) -> list[int]:
        self._steps._lock.acquire()
        try:
            numbers = self._steps._enter(*self._asked)
        except BaseException:
            self._steps._lock.release()
            raise
        self._step = self._steps._step
        return numbers

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            self._steps._leave(self._step, aborted=kind is not None)
        finally:
            self._steps._lock.release()


class Steps:
    """Opens and closes the steps of one model. A step belongs to the thread that runs it; forwards of an attached model
    take turns, because one step at a time collects."""

    def __init__(self, model: nn.Module, ring: Any, requests: Requests, collector: Collector, *, keyed: bool) -> None:
        self._model = model
        self._ring = ring
        self._requests = requests
        self._collector = collector
        self._keyed = keyed
        self._lock = threading.RLock()
        self._owner: str | None = None  # under _lock: "forward" or "hand" while a step is open
        self._step = 0
        self._rows: list[Row] = []
        self._conversation: Any = None
        self._in_flight: BaseException | None = None
        self._local = threading.local()
        self._caches: dict[int, tuple[weakref.ref[Any], list[Row]]] = {}
        self._gone: deque[int] = deque()  # keys whose cache died; filled by the garbage collector, in any thread
        self._hand: dict[int, Row] = {}
        self._hand_again: _Again | None = None
        self._handles: list[Any] = []
        self._batches = Batches(model, requests, self._lock, self._opened, keyed=keyed)
        self._generations = Generations(model, requests, self._lock, self._batches)
        self._names = _parameters(model)
        self._cuda = ring.tensor.device.type == "cuda"
        self._open_eagerly: Callable[..., None]
        self._close_eagerly: Callable[..., None]

    # -------------------------------------------------------------- placing
    def install(self) -> None:
        from torch._dynamo.eval_frame import skip_code

        for hook in (Steps._before, Steps._after):
            skip_code(hook.__code__)
        # Called from frames that Dynamo skips while it may still be compiling what they call.
        disable: Any = torch.compiler.disable
        self._open_eagerly = disable(self._open, reason="DMI opens a step outside compiled code")
        self._close_eagerly = disable(self._close, reason="DMI closes a step outside compiled code")
        self._handles = [
            self._model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            self._model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        self._generations.install()
        self._batches.install()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._generations.remove()
        self._batches.remove()
        with self._lock:
            self._gone.extend(self._caches)
            self.settle()
            for row in self._hand.values():
                self._requests.end(row.request)
            self._hand.clear()

    def settle(self) -> None:
        """Tell the tokens of the requests that go on over plain forwards, and end those whose cache is gone."""
        with self._lock:
            for _, rows in self._caches.values():
                self._tell(rows)
            self._end_gone()
        self._batches.settle()

    def _end_gone(self) -> None:
        while self._gone:
            _, rows = self._caches.pop(self._gone.popleft(), (None, []))
            self._tell(rows)
            for row in rows:
                self._requests.end(row.request, "finished", self._step)

    def _tell(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.tokens and row.tokens != row.told:
                row.told = list(row.tokens)
                self._requests.update(row.request, tokens=row.told)

    # -------------------------------------------------------------- the root's hooks
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._open_eagerly(args, kwargs)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._close_eagerly(output)

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._lock.acquire()
        held = self._held()
        if held and held[-1] == "forward":  # a KeyboardInterrupt went past the closing hook
            held.pop()
            self._owner = None
            self._collector.clear()
            self._ring.close_step(self._step, aborted=True)
            self._lock.release()
        if self._owner == "hand":
            held.append("nested")
            return
        if self._cuda and torch.cuda.is_current_stream_capturing():
            # A graph's recording is no step: what it records is captured when it is replayed, in session.step(rows=...).
            self._collector.clear()
            held.append("recording")
            return
        try:
            self._in_flight = sys.exc_info()[1]
            self._begin({**dict(zip(self._names, args, strict=False)), **kwargs}, args)
        except BaseException:
            self._lock.release()
            raise
        held.append("forward")

    def _close(self, output: Any) -> None:
        held = self._held()
        if not held:  # opening it failed
            return
        kind = held.pop()
        try:
            if kind == "recording":
                self._collector.flush()
            if kind == "forward":
                self._owner = None
                error = sys.exc_info()[1]
                error = None if error is self._in_flight else error
                self._in_flight = None
                try:
                    if error is None:
                        self._collector.flush()  # of a forward that did not come by the last of its hooks
                    else:
                        self._collector.clear()
                    self._ring.close_step(self._step, aborted=error is not None)
                finally:
                    self._finish(output, error)
        finally:
            self._lock.release()

    def _held(self) -> list[str]:
        """Steps that this thread's forwards hold the lock for, innermost last."""
        held: list[str] = self._local.__dict__.setdefault("held", [])
        return held

    # -------------------------------------------------------------- one forward
    def _begin(self, inputs: dict[str, Any], args: tuple[Any, ...]) -> None:
        self._end_gone()
        if any(inputs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "block_table")):
            raise HookError(
                "this forward packs several sequences into one row (cu_seq_lens): DMI cannot tell its requests apart; "
                "detach, or wrap the call in session.step(rows=[...])"
            )
        generation = self._generations.current()
        pending = None
        if generation is not None:
            pending, generation.pending = generation.pending, None
        forward = _forward(inputs, pending, args)
        self._collector.clear()
        self._conversation = None
        skip: list[bool] = []
        if generation is not None and pending is not None:
            rows = self._generations.rows(generation, forward, cached=inputs.get("past_key_values") is not None)
            skip = generation.ended()
        else:
            generation = None
            rows = self._plain_rows(forward, inputs)
        try:
            keys, width = forward.past + forward.tokens, (forward.tokens, forward.logits, 0)
            decoding = _going_on(forward, skip, generation)
            if decoding is not None:
                self._step = self._requests.next_step()
                self._ring.open_next(decoding.next(), self._step, keys)
            else:
                table = spans(forward, rows, skip=skip, keyed=self._keyed)
                if generation is not None and forward.decoding:
                    going = [row for row, over in zip(rows, skip or [False] * len(rows), strict=True) if not over]
                    generation.decoding = (skip, Decoding(going, self._ring.series(table, width=width)))
                if self._conversation == "new":
                    self._tell(rows)
                self._step = self._requests.next_step()
                self._ring.open_step(self._step, table, width=width, keys=keys)
        except BaseException:
            if self._conversation == "new":
                for row in rows:
                    self._requests.end(row.request, "error")
            raise
        if generation is not None and pending is not None:
            self._generations.opened(generation, pending["input_ids"].shape[1], self._step)
        self._rows = rows
        self._owner = "forward"

    def _plain_rows(self, forward: Forward, inputs: dict[str, Any]) -> list[Row]:
        aside = self._generations.current() is not None  # a logits processor's own forward, for guidance say
        cache = inputs.get("past_key_values")
        known = self._caches.get(id(cache)) if cache is not None else None
        if known is not None and known[0]() is cache and len(known[1]) == forward.batch and forward.past > 0:
            self._conversation = "known"
            if not aside:
                self._requests.batch([row.request for row in known[1]])
            for row in known[1]:
                if forward.mask is None and forward.past - row.key_first < row.valid:  # the cache was cropped
                    row.valid = max(0, forward.past - row.key_first)
            return known[1]
        rows = [Row(request) for request in self._requests.begin(forward.batch, hidden=aside)]
        self._conversation = "new"
        if not aside:
            self._requests.batch([row.request for row in rows])
        return rows

    def _finish(self, output: Any, error: BaseException | None) -> None:
        """After a plain forward: its requests go on as long as the cache that it gave, or end now."""
        if self._conversation is None:
            return
        cache = None if error is not None else _cache_of(output)
        key = id(cache)
        if cache is not None:
            known = self._caches.get(key)
            if known is None or known[0]() is not cache or known[1] is not self._rows:
                if known is not None:
                    self._gone.append(key)
                    self._end_gone()
                with contextlib.suppress(TypeError):  # what cannot be watched ends now
                    self._caches[key] = (weakref.ref(cache, functools.partial(self._lost, key)), self._rows)
                    return
            else:
                return
        if self._conversation == "new":
            for row in self._rows:
                self._requests.end(row.request, "finished" if error is None else "error", self._step)

    def _lost(self, key: int, _: Any) -> None:
        self._gone.append(key)

    # -------------------------------------------------------------- by hand
    def by_hand(self, rows: Any, requests: Sequence[int] | None = None, keys: int | None = None) -> contextlib.AbstractContextManager[list[int]]:
        """Open a step for a graph that is replayed by hand, or a model that DMI does not drive; yields its requests'
        numbers.

        `rows`: a number of rows of one request; a list, rows of several requests one after another; or a mask
        [batch, tokens] of a padded batch, 1 for tokens. `requests`: numbers that an earlier step yielded, to go on
        with. `keys`: slots of the key-value cache in use after the step, pads included."""
        return _ByHand(self, rows, requests, keys)

    def _enter(self, rows: Any, requests: Sequence[int] | None, keys: int | None) -> list[int]:
        if self._owner is not None:
            raise HookError("session.step: a step is open already on this thread; close it first")
        again = self._hand_again
        if again is not None and again.fits(rows) and (requests is again.numbers or requests == again.numbers):
            step = self._starting(again.numbers)
            self._ring.open_next(again.decoding.next(), step, again.keys if keys is None else keys)
            self._owner = "hand"
            return again.numbers
        numbers, table, opening = self._rows_by_hand(rows, requests)
        self._start(numbers, table, opening if keys is None else {**opening, "keys": keys})
        return numbers

    def _starting(self, numbers: list[int]) -> int:
        """A number for a step that is about to open, of these requests."""
        self._requests.batch(numbers)
        self._collector.clear()
        self._step = self._requests.next_step()
        return self._step

    def _start(self, numbers: list[int], table: bytes, opening: dict[str, Any]) -> int:
        """Open a step whose rows are known before its forward begins. The lock is held."""
        step = self._starting(numbers)
        self._ring.open_step(step, table, **opening)
        self._owner = "hand"
        return step

    def _leave(self, step: int, *, aborted: bool) -> None:
        """Close it."""
        whole = False
        try:
            if not aborted:
                self._collector.flush()
                whole = True
        finally:
            if not whole:
                self._collector.clear()
            self._owner = None
            self._ring.close_step(step, aborted=not whole)

    @contextlib.contextmanager
    def _opened(self, numbers: list[int], table: bytes, opening: dict[str, Any]) -> Iterator[int]:
        """Such a step; yields its number."""
        step = self._start(numbers, table, opening)
        try:
            yield step
        except BaseException:
            self._leave(step, aborted=True)
            raise
        self._leave(step, aborted=False)

    def _rows_by_hand(self, rows: Any, requests: Sequence[int] | None) -> tuple[list[int], bytes, dict[str, Any]]:
        """Request numbers, spans, and how the step is opened."""
        if self._hand_again is not None:
            self._hand_again.decoding.leave()
            self._hand_again = None
        forward = None
        if isinstance(rows, Tensor):
            mask = rows.tolist()
            forward = Forward(rows.shape[0], rows.shape[1], mask=mask)
            counts = [sum(1 for flag in line if flag) for line in mask]
        else:
            counts = [int(rows)] if isinstance(rows, int) else [int(count) for count in rows]
        if not counts or min(counts) < 0:
            raise HookError(
                f"session.step(rows={rows!r}): give the number of rows, a list of them, or a mask [batch, tokens]"
            )
        if requests is not None and (len(requests) != len(counts) or any(r not in self._hand for r in requests)):
            raise HookError(
                f"session.step(requests={list(requests)}): pass the {len(counts)} numbers that an earlier "
                "session.step yielded"
            )
        numbers = list(requests) if requests is not None else self._requests.begin(len(counts))
        for number in numbers:
            self._hand.setdefault(number, Row(number, tokens=None))
        using = [self._hand[number] for number in numbers]
        opening: dict[str, Any]
        if forward is None:
            total = sum(counts)
            table, opening = packed(using, counts), {"width": (total, total, 0), "packed": True}
        else:
            table = padded(using, forward)
            opening = {"width": (forward.tokens, forward.tokens, 0), "keys": forward.tokens}
        # The next is mostly the same. An inference tensor does not say whether it is.
        same = forward is None or (forward.tokens == 1 and not rows.is_inference())
        if same and set(counts) == {1}:
            series = self._ring.series(table, width=opening["width"], packed=opening.get("packed", False))
            version = 0 if forward is None else rows._version
            self._hand_again = _Again(list(rows) if isinstance(rows, list) else rows, version, numbers, Decoding(using, series), opening.get("keys", 0))
        return numbers, table, opening


def _parameters(model: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return []


def _forward(inputs: dict[str, Any], pending: dict[str, Any] | None, args: tuple[Any, ...]) -> Forward:
    """The shape of a forward pass, from the arguments of the root module."""
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    source = ids if ids is not None else embeds
    if source is None:
        source = next(
            (value for value in (*args, *inputs.values()) if isinstance(value, Tensor) and value.ndim > 0), None
        )
    if source is None:
        raise HookError(
            "the model was called without input_ids, inputs_embeds or any other tensor: its rows cannot be told; "
            "wrap the call in session.step(rows=...)"
        )
    sequence = source.ndim > 2 or (source.ndim == 2 and not source.is_floating_point())
    batch, tokens = int(source.shape[0]), int(source.shape[1]) if sequence else 1
    # Read as seldom as may be: on a device each is a wait for all that the model has under way. A token that generate adds
    # to a cache is one in its mask, and stands in the sequences that it returns; the columns before it are in the cache.
    known = pending is not None and pending["decoding"] and tokens == 1
    past = 0
    cache: Any = inputs.get("past_key_values")
    if hasattr(cache, "get_seq_length"):
        past = pending["input_ids"].shape[1] - 1 if pending is not None and known else int(cache.get_seq_length())
    known = known and past > 0
    mask = inputs.get("attention_mask") if pending is None else pending["attention_mask"]
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        what = f"a tensor of {mask.ndim} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise HookError(
            f"attention_mask is {what}: which columns are pads cannot be told from it; pass the mask as "
            "[batch, tokens], 1 for tokens, or wrap the call in session.step(rows=that mask)"
        )
    mask = mask.tolist() if mask is not None and not known else None
    return Forward(
        batch, tokens, past, mask, kept_columns(inputs.get("logits_to_keep", 0), tokens),
        ids.tolist() if isinstance(ids, Tensor) and ids.ndim == 2 and not known else None, decoding=known,
    )  # fmt: skip


def _going_on(forward: Forward, skip: list[bool], generation: Any) -> Decoding | None:
    """The steps that this one is the next of."""
    if generation is None or generation.decoding is None:
        return None
    decoding: Decoding
    over, decoding = generation.decoding
    if forward.decoding and over == skip:
        return decoding
    decoding.leave()
    generation.decoding = None
    return None


def _cache_of(output: Any) -> Any:
    """The key-value cache in a model's output, or None."""
    cache: Any = getattr(output, "past_key_values", None)
    if cache is None and isinstance(output, tuple):
        cache = next((item for item in output if hasattr(item, "get_seq_length")), None)
    return cache if hasattr(cache, "get_seq_length") else None
