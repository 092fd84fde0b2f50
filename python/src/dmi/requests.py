"""The requests and runs of a session: who they are, and what the engine is told of them.

A request is one sequence of tokens that the model works on; a run groups requests for people. Adapters begin, update and end
requests on the model's thread, so nothing here waits for the engine.
"""

from __future__ import annotations

import contextvars
import itertools
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from dmi.groups import Groups

IDS_KEPT = 100_000
"""Request ids that a session lists; a store lists all."""
UNCONFIRMED = 1024
"""Ended requests that the engine has not reported as durable before a barrier is asked for, so that little has to be told again
to an engine that comes back."""
TEXTS = ("none", "ids", "text")
ID_BYTES = 256
"""Of a request's id at most, without control characters: clients choose them, and the engine ends a session that sends others."""

Message = dict[str, Any]


@dataclass
class RunRecord:
    """A run as the engine is told of it."""

    id: str
    labels: dict[str, str]
    tags: list[str]
    begun_ns: int
    ended_ns: int = 0
    count: int = 0
    slots: int = 0
    requests: list[str] = field(default_factory=list)
    batch: list[str] = field(default_factory=list)
    confirmed: bool = False

    def message(self) -> Message:
        return {"type": "run", "id": self.id, "labels": self.labels, "tags": self.tags, "begun_unix_ns": self.begun_ns}

    def end_message(self) -> Message:
        return {"type": "run_end", "id": self.id, "ended_unix_ns": self.ended_ns}


@dataclass(slots=True)
class _Request:
    number: int
    id: str
    run: RunRecord
    begun_ns: int
    hidden: bool
    tokens: list[int] | None = None
    labels: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    path: list[tuple[int, int, int]] | None = None
    dirty: bool = False
    ended_ns: int = 0
    reason: str = ""
    last_step: int = 0
    confirmed: bool = False


def new_run(labels: Mapping[str, str] | None, tags: Sequence[str]) -> RunRecord:
    """Raises TypeError for labels and tags that are no strings."""
    labels = dict(labels or {})
    if isinstance(tags, str) or not all(isinstance(tag, str) for tag in tags):
        raise TypeError(f"tags={tags!r}: give a list of strings")
    for key, value in labels.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"labels={{{key!r}: {value!r}}}: give strings")
    return RunRecord("r" + secrets.token_hex(4), labels, list(tags), time.time_ns())


def _can_be_id(name: str) -> bool:
    if name.isascii() and name.isprintable():  # as nearly all are
        return 0 < len(name) <= ID_BYTES
    return 0 < len(name.encode(errors="replace")) <= ID_BYTES and all(ord(c) >= 32 and c not in "\x7f\ufffd" and not 0xD800 <= ord(c) < 0xE000 for c in name)


class Requests(Sequence[str]):
    """The ids of a session's requests, in the order they began (a batch's rows in order): the newest 100,000.

    The methods are for adapters, which know requests by number. Any thread.
    """

    def __init__(self, own: RunRecord, text: str = "none", decode: Callable[[list[int]], str] | None = None) -> None:
        self.lock = threading.RLock()
        self.send: Callable[..., None] = lambda *messages: None
        """Tells the engine, without waiting; called under the lock."""
        self.crowded: Callable[[], None] = lambda: None
        """Called under the lock when many ended requests are not known to be durable."""
        self.grouped: Callable[[int, dict[int, int | None]], None] = lambda groups, members: None
        """Told, under the lock, which groups of those the engine named requests are in; None: such a request is over."""
        self._groups: Groups | None = None
        self._text = text
        self._decode = decode
        self._pieces: dict[int, str] = {}
        self._own = own
        self._runs = {own.id: own}
        self._open: list[RunRecord] = []  # record() blocks, outermost first
        self._entered: contextvars.ContextVar[RunRecord | None] = contextvars.ContextVar("dmi_run", default=None)
        self._requests: dict[int, _Request] = {}
        self._ids: list[str] = []
        self._batch: list[str] = []
        self._batch_numbers: list[int] = []
        self._numbers = itertools.count()
        self._steps = itertools.count()
        self._unconfirmed = 0
        self._held: list[Message | list[_Request]] | None = None
        self.found_in: dict[str, str] = {}
        """Session and store, for a reference to a request's captures."""

    # -------------------------------------------------------------- a list of ids
    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._ids[index]

    def __repr__(self) -> str:
        shown = ", ".join(self._ids[-8:])
        return f"Requests({len(self)}: {'… ' if len(self) > 8 else ''}{shown})"

    # -------------------------------------------------------------- for adapters
    @property
    def tells_tokens(self) -> bool:
        """Whether anybody is told what tokens a request has."""
        return self._text != "none"

    def hold(self) -> None:
        """What the engine is to be told of requests goes out together, with `release`: a message is a system call, which wakes the engine up. It waits a second for
        those whose rows it has."""
        with self.lock:
            if self._held is None:
                self._held = []

    def release(self) -> None:
        """Tell what was held."""
        with self.lock:
            held, self._held = self._held, None
            if held:
                self.send(*map(self._worded, held))

    def _say(self, *messages: Message | list[_Request]) -> None:
        """A list: these requests, as they are when it goes out."""
        if self._held is None:
            self.send(*map(self._worded, messages))
        else:
            self._held.extend(messages)

    def _worded(self, message: Message | list[_Request]) -> Message:
        return {"type": "requests", "requests": [self._describe(record) for record in message]} if isinstance(message, list) else message

    def next_step(self) -> int:
        """A number for the next forward; they grow."""
        return next(self._steps)

    def begin(
        self, count: int, *, tokens: Sequence[list[int] | None] | None = None, hidden: bool = False, names: Sequence[str] = (),
        labels: Sequence[dict[str, str]] = (), tags: Sequence[list[str]] = (),
    ) -> list[int]:  # fmt: skip
        """Requests that begin together, to be told before the first step that has rows of them; returns their numbers.
        `hidden`: not listed (a beam's slot). `names`: ids, where somebody else gave them; they are this session's only once,
        and one that the engine would not take (`ID_BYTES`) is replaced by one of ours. `labels`, `tags`: of each, to find them by; not changed any more."""
        with self.lock:
            run = self._entered.get() or (self._open[-1] if self._open else self._own)
            if run.ended_ns:
                run = self._own
            now = time.time_ns()
            batch = []
            for index in range(count):
                if hidden:
                    name, run.slots = f"{run.id}.slot{run.slots}", run.slots + 1
                else:
                    name, run.count = names[index] if names and _can_be_id(names[index]) else f"{run.id}.{run.count}", run.count + 1
                    self._list(run, name)
                request = _Request(next(self._numbers), name, run, now, hidden, None if tokens is None else tokens[index], labels[index] if labels else {}, tags[index] if tags else [])
                self._requests[request.number] = request
                batch.append(request)
            if self._groups is not None:
                self._place(batch)
            self._say(batch)
            return [request.number for request in batch]

    def regroup(self, name: int, sets: list[Message]) -> None:
        """The engine's policy names these groups of requests from now on. Under the lock."""
        self._groups = Groups(name, sets) if sets else None
        self._place([request for request in self._requests.values() if not request.ended_ns])

    def _place(self, requests: Sequence[_Request]) -> None:
        if self._groups is not None:
            self.grouped(self._groups.name, {request.number: self._groups.of(request.id, [*request.tags, *request.run.tags]) for request in requests})

    def _list(self, run: RunRecord, name: str) -> None:
        for ids in (self._ids, run.requests):
            ids.append(name)
            if len(ids) > IDS_KEPT + IDS_KEPT // 8:
                del ids[:-IDS_KEPT]

    def update(self, request: int, *, tokens: list[int] | None = None, path: list[tuple[int, int, int]] | None = None) -> None:
        """What is now known of a request. Told when it ends, or when the session is flushed."""
        with self.lock:
            record = self._requests[request]
            if tokens is not None:
                record.tokens, record.dirty = tokens, True
            if path is not None:
                record.path, record.dirty = path, True

    def end(self, request: int, reason: str = "finished", step: int | None = None) -> None:
        """No rows of it after `step`."""
        with self.lock:
            record = self._requests[request]
            if record.ended_ns:
                return
            record.ended_ns, record.reason, record.last_step = time.time_ns(), reason, step or 0
            told = [[record]] if record.dirty else []
            record.dirty = False
            if self._groups is not None:
                self.grouped(self._groups.name, {request: None})
            self._say(*told, self._ending(record))
            self._unconfirmed += 1
            if self._unconfirmed >= UNCONFIRMED:
                self._unconfirmed = 0
                self.release()  # a barrier says what was told before it
                self.crowded()

    def batch(self, requests: list[int]) -> None:
        """These are the last forward's, or generate's. The list is not changed any more."""
        if requests is self._batch_numbers:
            return
        with self.lock:
            if requests == self._batch_numbers:
                self._batch_numbers = requests
                return
            records = [self._requests[number] for number in requests]
            self._batch = [record.id for record in records if not record.hidden]
            for run in {record.run.id: record.run for record in records}.values():
                run.batch = [record.id for record in records if record.run is run and not record.hidden]
            self._batch_numbers = requests

    def reference(self, label: str, value: str) -> dict[str, Any]:
        """Where the captures of the newest request with that label are; or the reason why there are none."""
        with self.lock:
            for record in reversed(self._requests.values()):
                if record.labels.get(label) == value:
                    break
            else:
                return {"observed": False, "reason": "no row of the request was computed while the model was observed"}
            if record.labels.get("dmi.capture") == "off":
                return {"observed": False, "reason": record.labels.get("dmi.error") or "the request asked for nothing to be captured"}
            return {"observed": True, "request": record.id, **self.found_in, label: value}

    # -------------------------------------------------------------- for the session
    @property
    def latest(self) -> list[str]:
        """Ids of the last forward's or generate's batch."""
        return list(self._batch)

    def enter(self, run: RunRecord) -> contextvars.Token[RunRecord | None]:
        """Requests that begin from here on belong to the run: in this context, and in threads that have none of their own."""
        with self.lock:
            self._runs[run.id] = run
            self._open.append(run)
            self.send(run.message())
        return self._entered.set(run)

    def leave(self, run: RunRecord, token: contextvars.Token[RunRecord | None]) -> None:
        try:
            self._entered.reset(token)
        except ValueError:  # left in another context than it was entered
            self._entered.set(None)
        with self.lock:
            if run in self._open:
                self._open.remove(run)
            self._end_run(run)

    def _end_run(self, run: RunRecord) -> None:
        if not run.ended_ns:
            run.ended_ns = time.time_ns()
            self.send(run.end_message())

    def finish(self) -> None:
        """End what is still open."""
        with self.lock:
            self.release()
            for record in list(self._requests.values()):
                self.end(record.number, "aborted")
            for run in list(self._runs.values()):
                self._end_run(run)

    def tell(self) -> None:
        """Send what is known and was held back."""
        with self.lock:
            self.release()
            held = [record for record in self._requests.values() if record.dirty]
            for record in held:
                record.dirty = False
            for start in range(0, len(held), 256):
                self.send({"type": "requests", "requests": [self._describe(record) for record in held[start : start + 256]]})

    def state(self) -> list[Message]:
        """All that an engine which comes back may not know. Under the lock."""
        if self._held is not None:
            self._held.clear()  # it is in what follows
        messages: list[Message] = []
        for run in self._runs.values():
            if not run.confirmed:
                messages.append(run.message())
        unknown = [record for record in self._requests.values() if not record.confirmed]
        for start in range(0, len(unknown), 256):
            messages.append({"type": "requests", "requests": [self._describe(record) for record in unknown[start : start + 256]]})
        messages += [self._ending(record) for record in unknown if record.ended_ns]
        messages += [run.end_message() for run in self._runs.values() if run.ended_ns and not run.confirmed]
        for record in unknown:
            record.dirty = False
        return messages

    def mark(self) -> Callable[[], None]:
        """To be called once everything told so far is durable: forgets what is over. Under the lock, as is the answer's call."""
        requests = [record for record in self._requests.values() if record.ended_ns and not record.confirmed]
        runs = [run for run in self._runs.values() if run.ended_ns and not run.confirmed]

        def durable() -> None:
            with self.lock:
                for record in requests:
                    record.confirmed = True
                for run in runs:
                    run.confirmed = True
                self._unconfirmed = sum(1 for record in self._requests.values() if record.ended_ns and not record.confirmed)
                newest = max(self._requests, default=0)
                for number in [n for n, record in self._requests.items() if record.confirmed and n < newest - UNCONFIRMED]:
                    del self._requests[number]
                for run_id in [i for i, run in self._runs.items() if run.confirmed]:
                    del self._runs[run_id]

        return durable

    # -------------------------------------------------------------- messages
    def _describe(self, record: _Request) -> Message:
        message: Message = {"request": record.number, "id": record.id, "run": record.run.id, "begun_unix_ns": record.begun_ns,
                            "labels": record.labels, "tags": record.tags}  # fmt: skip
        if record.hidden:
            message["hidden"] = True
        if record.path is not None:
            message["path"] = [list(part) for part in record.path]
        if record.tokens is not None and self._text != "none":
            message["tokens"] = record.tokens
            if self._text == "text" and self._decode is not None and not record.hidden:
                message["text"] = self._decode(record.tokens)
                message["pieces"] = [self._piece(token) for token in record.tokens]
        return message

    def _piece(self, token: int) -> str:
        """What a token is written as. A vocabulary's worth is remembered."""
        piece = self._pieces.get(token)
        if piece is None:
            assert self._decode is not None
            piece = self._pieces[token] = self._decode([token])
        return piece

    def _ending(self, record: _Request) -> Message:
        return {"type": "request_end", "request": record.number, "reason": record.reason, "step": record.last_step, "ended_unix_ns": record.ended_ns}
