"""An attached model: hooks on it, a ring that they fill, and an engine that drains it. `attaching.py` makes it."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import platform
import secrets
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from dmi import _abi, control, instrument, native
from dmi import lens as lenses
from dmi.cache import Cache
from dmi.client import Client
from dmi.control import PROTOCOL, Link
from dmi.errors import CaptureWarning, EngineError, NotCapturedError
from dmi.families import Mapping as Family
from dmi.inspection import SessionInspector
from dmi.notebook import outcomes, table
from dmi.policy import Policy
from dmi.recompute import attention_of
from dmi.requests import Message, Requests, RunRecord, new_run
from dmi.terminal import progress
from dmi.version import VERSION

FLUSH_TIMEOUT_S = 120.0
"""How long flush and detach wait for the engine in complete mode."""
PARTING_TIMEOUT_S = 10.0
"""How long detach waits for the engine in best-effort mode."""
ATTACH_TIMEOUT_S = 40.0
"""How long attach tries again while an engine is just stopping."""
ABORTED = {"aborted"}
"""Reasons of missing rows that are the model's own doing: its forward raised."""

PAGE = 4096
LEAST_BYTES = 1 << 20
"""Of a ring's payload or staging where a budget leaves little. Smaller ones are for those who ask for them."""

log = logging.getLogger("dmi")
T = TypeVar("T")


class Instrumentation(Protocol):
    """Hooks that are in place, and who opens their steps. See `instrument.Instrumentation`."""

    def outside(self) -> int: ...
    def step(self, rows: Any, *, requests: Sequence[int] | None = None, keys: int | None = None) -> contextlib.AbstractContextManager[list[int]]: ...
    def settle(self) -> None: ...
    def remove(self) -> None: ...


Install = Callable[[nn.Module, instrument.Plan, native.Ring, Sequence[int], Requests], Instrumentation]


class Run:
    """A group of requests, made by `session.record()`."""

    def __init__(self, session: Session, record: RunRecord) -> None:
        self._session = session
        self._record = record

    @property
    def id(self) -> str:
        return self._record.id

    @property
    def labels(self) -> dict[str, str]:
        return dict(self._record.labels)

    @property
    def tags(self) -> list[str]:
        return list(self._record.tags)

    @property
    def requests(self) -> list[str]:
        """Ids of its requests, in the order they began."""
        return list(self._record.requests)

    @property
    def cache(self) -> Cache:
        """Captures of the run's last forward or `generate`, [batch, ...]; flushes first."""
        if not self._record.batch:
            raise NotCapturedError(f"cache of run {self.id}: nothing was captured in it; run the model inside `with session.record()`")
        return self._session._cache_of(self._record.batch, batch=True)

    def __repr__(self) -> str:
        return f"Run({self.id}, {len(self._record.requests)} requests, labels={self._record.labels}, tags={self._record.tags})"

    def _repr_html_(self) -> str:
        facts = {"requests": len(self._record.requests), "labels": self._record.labels, "tags": self._record.tags}
        return table(f"Run {self.id}", facts, ("request",), [(request,) for request in self._record.requests])


class Session:
    """An attached model. Made by `attach`; ends with `detach()` or its `with` block, which leave the model exactly as it was."""

    def __init__(self, own: RunRecord, mode: str, text: str, decode: Callable[[list[int]], str] | None) -> None:
        self.id = "s" + secrets.token_hex(4)
        self.mode = mode
        self.requests: Requests = Requests(own, text, decode)
        """Ids of the requests, in the order they began; a batch's rows in order."""
        self._own = own
        self._text = text
        self._decode = decode
        self._detached = False
        self._ring: native.Ring | None = None
        self._link: Link | None = None
        self._instrumentation: Instrumentation | None = None
        self._model: nn.Module | None = None
        self._mapping: Family | None = None
        self._lens_saved = False
        self._client: Client | None = None
        self._keep: Any = None
        self._flushed: dict[int, int] = {}
        self._is_copy = False  # in a forked child
        self._absent_s = 30.0
        self.memory_mib: dict[str, float] = {}
        """Between model and engine: `ring`, on the model's device, and `staging`, of the host."""
        self.sites: list[str] = []
        """Canonical names of what is captured, in the order in which the model computes them."""
        self.skipped: list[str] = []
        """What a glob matched and the model cannot give, with reasons."""
        self.store = ""
        """The store's absolute path, as the engine sees it."""

    # -------------------------------------------------------------- using it
    @contextlib.contextmanager
    def record(self, *, labels: Mapping[str, str] | None = None, tags: Sequence[str] = ()) -> Iterator[Run]:
        """Requests that begin inside are a run of their own, with labels and tags to find it by."""
        record = new_run(labels, tags)
        token = self.requests.enter(record)
        try:
            yield Run(self, record)
        finally:
            self.requests.leave(record, token)

    def step(self, rows: Any, *, requests: Sequence[int] | None = None, keys: int | None = None) -> contextlib.AbstractContextManager[list[int]]:
        """Around one replay of a graph, or one forward of a model that DMI does not drive. `rows`: a number of rows of one request; a
        list, rows of several one after another; or a mask [batch, tokens], 1 for tokens. `keys`: where attention rows are captured and there
        is a key-value cache, its slots in use after the step, pads included. Yields its requests' numbers, to go on with as `requests`."""
        return self._working("step")[1].step(rows, requests=requests, keys=keys)

    def flush(self, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        """Return when everything captured so far is durable: it survives whatever happens to the engine. On a GPU, once it has come to the
        end of the steps under way: CaptureError where it does not within `timeout_s`. Raises EngineError when the engine did not say so in time,
        or its disk failed."""
        if self._detached:
            return
        ring, instrumentation, link = self._working("flush")
        instrumentation.settle()
        with progress("flush: waiting for the device"):
            ring.settle(timeout_s)
        steps = ring.closed_steps()
        with self.requests.lock:
            self.requests.tell()
            durable = self.requests.mark()
        with progress("flush: waiting for the engine"):
            link.barrier(steps, timeout_s, self._absent_s)
        durable()
        self._flushed = steps

    def cache(self, request: str | None = None) -> Cache:
        """Captures of one request; without one, of the last forward's or `generate`'s batch, with a leading [batch, ...]. Flushes first,
        so that what is read is all there. Works after `detach` too."""
        if request is not None:
            if request not in self.requests:
                raise NotCapturedError(f"cache of request {request!r}: this session has none of that id; session.requests lists them")
            return self._cache_of([request], batch=False)
        if not self.requests.latest:
            raise NotCapturedError("cache: nothing was captured yet; run the model first")
        return self._cache_of(self.requests.latest, batch=True)

    def _cache_of(self, requests: Sequence[str], *, batch: bool) -> Cache:
        if not self._detached:
            ring, instrumentation, _ = self._working("cache")
            instrumentation.settle()
            if ring.closed_steps() != self._flushed or not self._flushed:
                self.flush()
            else:
                self.requests.tell()
        assert self._client is not None
        return Cache(self._client, requests, batch=batch, keep=self._keep)

    @property
    def inspect(self) -> SessionInspector:
        """Tools that find structure: distributions, kinds of attention heads, ... Of what was captured so far: they flush first."""
        return SessionInspector(self._asked, self.id, self._probe, lambda: self._modelled("inspect").config, self._save_lens)

    def _asked(self) -> Client:
        """Who answers, once what was captured so far is there."""
        self._cache_of([], batch=False)
        assert self._client is not None
        return self._client

    def _modelled(self, what: str) -> Any:
        self._working(what)
        return self._model

    def _save_lens(self) -> None:
        """Put the model's final norm and unembedding beside the captures, once. After `detach` there is no model to take them from."""
        if self._model is None or self._lens_saved:
            return
        with progress("saving the model's unembedding"):
            found = lenses.of_model(getattr(self._model, "_orig_mod", self._model), self._mapping)
            decode, tokens = self._decode, len(found.tensors["unembed.weight"])
            lenses.save(found, Path(self.store), self.id, None if decode is None else [decode([token]) for token in range(tokens)])
        self._lens_saved = True

    def _probe(self, ids: torch.Tensor, labels: Mapping[str, str]) -> Run:
        """Run the model on some tokens, as a run of its own."""
        model = self._modelled("run the model")
        ids = ids.to(next(iter(model.parameters())).device)
        with self.record(labels=labels) as run, torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return run

    def coverage(self) -> dict[str, Any]:
        """What became of every row of the session: `rows, complete, outcomes` {outcome: {reason, or level where captured: rows}}, and `repeated`."""
        return dict(self._asked().get("/coverage", {"session": self.id}))

    @property
    def policy(self) -> Policy:
        """What is captured, to read and to change while the model runs; of every model attached to the same engine."""
        return Policy(self._answering)

    def _answering(self) -> Client:
        if self._client is None:
            raise EngineError("policy: this session has no engine, so nothing is captured")
        return self._client

    def status(self) -> dict[str, Any]:
        """`attached`, `connected`, `engine`, `reconnections`, `requests`, and the producer's own counters under `ring` (see
        `native.Ring.counters`), empty after detach."""
        link, ring = self._link, self._ring
        return {
            "session": self.id,
            "mode": self.mode,
            "store": self.store,
            "attached": not self._detached,
            "connected": link is not None and link.connected,
            "engine": "" if link is None else str(link.welcome.get("engine", "")),
            "reconnections": 0 if link is None else link.reconnections,
            "sites": len(self.sites),
            "requests": len(self.requests),
            "ring": ring.counters() if ring is not None and not ring.closed else {},
        }

    def detach(self) -> None:
        """Take the hooks away, and wait until what they gave is durable. Idempotent. In complete mode raises CaptureError when
        rows were not captured (they are on the books), EngineError when the engine is gone; in best-effort mode warns."""
        self._finish(raising=True)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._finish(raising=kind is None)

    def __repr__(self) -> str:
        state = "detached" if self._detached else "attached"
        return f"Session({self.id}, {state}, {self.mode}, {len(self.sites)} sites, {len(self.requests)} requests, store={self.store!r})"

    def _repr_html_(self) -> str:
        facts = {"mode": self.mode, "state": "detached" if self._detached else "attached", "sites": len(self.sites), "requests": len(self.requests), "store": self.store}
        try:
            return table(f"Session {self.id}", facts, ("outcome", "reason or level", "rows"), outcomes(self.coverage()))
        except Exception as error:  # a table that raises hides what it was asked about
            return table(f"Session {self.id}", {**facts, "books": f"cannot be asked for: {error}"}, (), ())

    # -------------------------------------------------------------- beginning
    def _working(self, what: str) -> tuple[native.Ring, Instrumentation, Link]:
        if self._detached or self._ring is None or self._instrumentation is None or self._link is None:
            raise RuntimeError(f"{what}: the session is detached; attach the model again")
        return self._ring, self._instrumentation, self._link

    def _begin(self, model: nn.Module, plan: instrument.Plan, hooks: Sequence[str], find: Callable[[], str], starts: bool, token: Callable[[], str],
               ring: dict[str, Any], install: Install = instrument.install) -> None:  # fmt: skip
        """`find` gives the control socket's path; `starts`: it starts an engine where there is none. `ring`: what the ring is made with.
        `install` places the hooks."""
        self._model, self._mapping = model, plan.mapping
        self.sites = [site.name for site in plan.sites]
        self.skipped = [str(refusal) for refusal in plan.skipped]
        self._absent_s = ring["wait_bound_s"] if "wait_bound_s" in ring else self._absent_s
        ring = {"site_capacity": max(4096, len(plan.sites)), **ring}
        keep_gil = ring.pop("keep_gil", False)
        ring = self._fitted(ring, token, find, starts)
        self.memory_mib = {"ring": float(ring.get("payload_mib", native.USUAL_MIB)), "staging": float(ring.get("staging_mib", native.USUAL_MIB))}
        self._ring = native.Ring(mode=self.mode, keep_gil=keep_gil, **ring)
        try:
            numbers = [
                self._ring.add_site(site.name, layer=site.layer, space=site.space, roles=site.roles, row_axis=site.row_axis, fill=site.fill, flags=site.flags)
                for site in plan.sites
            ]
            run = self._own.message()
            del run["type"]
            hello = {
                "type": "hello", "protocol": PROTOCOL, "abi": _abi.ABI_VERSION, "session": self.id,
                "producer": self._ring.producer.hex(), "resume": False, "mode": self.mode, "text": self._text,
                "process": {"pid": os.getpid(), "host": socket.gethostname(), "argv0": sys.argv[0] if sys.argv else ""},
                "versions": _versions(), "model": _facts(model, plan), "aliases": plan.aliases, "hooks": list(hooks), "run": run,
                "skipped": [str(refusal) for refusal in sorted(plan.skipped, key=lambda refusal: refusal.foreign)],
            }  # fmt: skip
            self._connect(hello, token, find, starts)
            self._instrumentation = install(model, plan, self._ring, numbers, self.requests)
        except BaseException:
            self._detached = True
            if self._link is not None:
                self._link.close()
            self._ring.close()
            raise
        with _sessions_lock:
            _sessions.add(self)

    def _fitted(self, ring: dict[str, Any], token: Callable[[], str], find: Callable[[], str], starts: bool) -> dict[str, Any]:
        """Sizes that were left open (None): the usual ones, of which `usual_mib` may be the payload's, or what the policy's budgets leave."""
        payload_mib = ring.pop("usual_mib", native.USUAL_MIB)
        if None not in (ring.get("payload_mib", 0), ring.get("staging_mib", 0)):
            return ring
        device, pinned = self._reached(find, starts, lambda path: control.memory_left(path, token()))
        usual: dict[str, Any] = {name: native.USUAL_MIB if size is None else size for name, size in ring.items()}

        def fit(key: str, mib: float, left: int | None, besides: int) -> float:
            if left is None or mib * (1 << 20) <= left - besides:
                return mib
            room = (left - besides) // PAGE * PAGE
            if room < LEAST_BYTES:
                raise EngineError(f"attach: the policy's budget {key} leaves {left} bytes, of which {besides} are for what a ring needs besides, and {LEAST_BYTES} are the least; "
                                  "raise the budget (dmi policy set), or detach other sessions", code="memory")  # fmt: skip
            return room / (1 << 20)

        if ring["payload_mib"] is None:
            usual["payload_mib"] = fit("device_bytes", payload_mib, device, 0)
        if ring["staging_mib"] is None:
            options, _ = native.ring_options(mode=self.mode, **usual)
            usual["staging_mib"] = fit("pinned_bytes", native.USUAL_MIB, pinned, native.shared_bytes(options) - int(options.staging_bytes))
        return usual

    @staticmethod
    def _reached(find: Callable[[], str], starts: bool, ask: Callable[[str], T]) -> T:
        """What an engine answers, that may be stopping because nobody needed it any more."""
        deadline = time.monotonic() + ATTACH_TIMEOUT_S
        while True:
            try:
                return ask(find())
            except EngineError as error:
                if error.code not in ("stopping", "hang-up", "unreachable") or time.monotonic() > deadline or not starts:
                    raise
                time.sleep(0.05)

    def _connect(self, hello: Message, token: Callable[[], str], find: Callable[[], str], starts: bool) -> None:
        assert self._ring is not None
        ring = self._ring
        self.requests.grouped = ring.set_groups

        def open_link(path: str) -> Link:
            link = Link(lock=self.requests.lock, hello=hello, token=token, fds=ring.fds, find=find, state=self.requests.state,
                        attached=self._attached, event=self._event, groups=self.requests.regroup)  # fmt: skip
            try:
                link.open(path)
            except EngineError:
                link.close()
                raise
            return link

        link = self._reached(find, starts, open_link)
        self._link = link
        self.store = str(link.welcome.get("store", ""))
        self.requests.found_in = {"session": self.id, "store": self.store}
        self.requests.send = link.send
        self.requests.crowded = self._confirm

    def _confirm(self) -> None:
        """Ask, without waiting, what is durable, so that the engine need not be told of it again. Under the requests' lock."""
        assert self._link is not None and self._ring is not None
        if not self._ring.closed:
            self._link.begin_barrier(self._ring.closed_steps(), self.requests.mark())

    # -------------------------------------------------------------- what the link tells
    def _attached(self, attached: bool) -> None:
        if self._ring is not None and not self._ring.closed:
            self._ring.set_attached(attached)

    def _event(self, level: str, code: str, message: str) -> None:
        if level not in ("warning", "error"):
            log.info("session %s: %s", self.id, message)
            return
        try:
            warnings.warn(f"dmi session {self.id}: {message}", CaptureWarning, stacklevel=2)
        except CaptureWarning:  # where warnings are errors: this may be the link's thread, which has to go on
            log.warning("session %s: %s", self.id, message)

    # -------------------------------------------------------------- ending
    def _finish(self, *, raising: bool) -> None:
        if self._detached:
            return
        ring, instrumentation, link = self._working("detach")
        self._detached, self._model = True, None
        with _sessions_lock:
            _sessions.discard(self)
        problems: list[Exception] = []
        try:
            instrumentation.remove()  # first: whatever happens to the engine, the model is as it was
        finally:
            try:
                if not self._is_copy:
                    self._report_outside(instrumentation)
                    problems = self._part(ring, link)
            finally:
                link.close()
                ring.close()
        if not problems:
            return
        if raising and self.mode == "complete":
            raise problems[0]
        for problem in problems:
            warnings.warn(f"dmi session {self.id}: {problem}", CaptureWarning, stacklevel=3)

    def _report_outside(self, instrumentation: Instrumentation) -> None:
        outside = instrumentation.outside()
        if outside:
            self._event("warning", "outside", f"{outside} tensors came by while no step was open, and are not captured: the model ran inside a "
                        "function that was compiled as a whole, or a part of it alone; wrap such calls in session.step(rows=...)")  # fmt: skip

    def _part(self, ring: native.Ring, link: Link) -> list[Exception]:
        """Drain, settle the books, say bye. Returns what went wrong, gravest first."""
        timeout_s = FLUSH_TIMEOUT_S if self.mode == "complete" else PARTING_TIMEOUT_S
        problems: list[Exception] = []
        deadline = time.monotonic() + timeout_s
        try:
            ring.settle(timeout_s)
            ring.finish(min(timeout_s, 5.0))
        except native.CaptureError as error:
            problems.append(error)
        try:
            self.requests.finish()
            with progress("detach: waiting for the engine to make everything durable"):
                link.barrier(ring.closed_steps(), timeout_s, min(self._absent_s, timeout_s))
                problems += self._missing()
                if not link.leave(max(1.0, deadline - time.monotonic())):
                    problems.append(EngineError(f"detach: the engine did not answer within {timeout_s:g} s; what it has is in {self.store}; see engine.log there", code="timeout"))
        except EngineError as error:
            problems.append(error)
        return problems

    def _missing(self) -> list[Exception]:
        """Rows that were owed and are not there, by the engine's books."""
        assert self._client is not None
        coverage = self._client.get("/coverage", {"session": self.id})
        lines = [
            f"{rows} {outcome}({reason})"
            for outcome in ("dropped", "lost")
            for reason, rows in coverage["outcomes"].get(outcome, {}).items()
            if rows and reason not in ABORTED
        ]
        if not lines:
            return []
        return [native.CaptureError(f"{', '.join(lines)} of {coverage['rows']} rows: not captured; `dmi coverage --store {self.store} --session {self.id}` has the books")]

    def _forked(self) -> None:
        """In a forked child: the session is the parent's; here the hooks do nothing, and detaching only takes them away."""
        self.requests.lock = threading.RLock()
        self.requests.send = lambda *messages: None
        self.requests.crowded = lambda: None
        if self._link is not None:
            self._link.forked(self.requests.lock)
        self._is_copy = True


_sessions: set[Session] = set()  # so that a session lives until it is detached, or the process ends
_sessions_lock = threading.Lock()


def _at_exit() -> None:
    for session in list(_sessions):
        with contextlib.suppress(Exception):
            session._finish(raising=False)


def _after_fork() -> None:
    global _sessions_lock
    _sessions_lock = threading.Lock()
    for session in _sessions:
        session._forked()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_after_fork)


def _versions() -> dict[str, str]:
    versions = {"dmi": VERSION, "python": platform.python_version(), "torch": torch.__version__}
    transformers = sys.modules.get("transformers")
    if transformers is not None:
        versions["transformers"] = transformers.__version__
    return versions


def _facts(model: nn.Module, plan: instrument.Plan) -> dict[str, Any]:
    """What the engine is told of the model."""
    model = getattr(model, "_orig_mod", model)
    config = getattr(model, "config", None)
    text = getattr(config, "text_config", None) or config
    first = next(iter(model.parameters()), None)
    facts: dict[str, Any] = {
        "name": str(getattr(config, "name_or_path", "") or type(model).__name__),
        "class": type(model).__name__,
        "family": str(getattr(config, "model_type", "")),
        "dtype": "" if first is None else str(first.dtype).removeprefix("torch."),
        **plan.facts,
    }
    attention = None if config is None else attention_of(config)
    if attention is not None:
        facts["attention"] = attention
    for name, theirs in (("d_mlp", "intermediate_size"), ("d_vocab", "vocab_size")):
        value = getattr(text, theirs, None)
        if isinstance(value, int):
            facts[name] = value
    return facts
