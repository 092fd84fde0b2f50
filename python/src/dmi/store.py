"""`dmi.open`: reading a store, through the engine that owns it, or through one of our own that only reads."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import weakref
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from dmi.cache import Cache
from dmi.client import Client
from dmi.engine import Engine, await_owner, live, start_own
from dmi.errors import EngineError, NotCapturedError
from dmi.inspection import Inspector
from dmi.policy import Policy
from dmi.terminal import progress


class Reader:
    """Whoever answers for a store, found anew when it has gone. A reader of our own ends with this object."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).absolute()
        self._lock = threading.Lock()
        self._own: Engine | None = None  # under _lock
        self._seen: tuple[int, ...] = ()
        self._pid = os.getpid()

    def find(self) -> str:
        """Its address. Raises EngineError."""
        with self._lock:
            if self._pid != os.getpid():  # in a forked child our parent's reader is not ours to keep
                self._pid, self._own = os.getpid(), None
            self._stop()
            found = live(self.folder)
            if found is None:
                self._seen = self._state()
                found = self._own = start_own(self.folder, read_only=True)
                weakref.finalize(self, Engine.stop, found)
            return "unix:" + found.http_unix

    def stale(self) -> bool:
        """Whether a reader of our own has been overtaken: the store has an engine again, or had one."""
        with self._lock:
            return self._own is not None and (self._state() != self._seen or live(self.folder) is not None)

    def _state(self) -> tuple[int, ...]:
        state = []
        for name in ("catalogue.sqlite", "catalogue.sqlite-wal", "segments", "manifest"):
            try:
                state.append((self.folder / name).stat().st_mtime_ns)
            except OSError:
                state.append(0)
        return tuple(state)

    def _stop(self) -> None:
        if self._own is not None:
            self._own.stop()
            self._own = None

    def close(self) -> None:
        with self._lock:
            self._stop()


class Temporary:
    """A store for one cache, with an engine of its own; both go when nothing refers to this, or at exit."""

    def __init__(self, folder: str, engine: Engine) -> None:
        self.folder = folder
        self.engine = engine
        self._finalizer = weakref.finalize(self, Temporary._discard, folder, engine)

    @staticmethod
    def _discard(folder: str, engine: Engine) -> None:
        if engine.child is not None:  # what it still holds need not reach the disk
            with contextlib.suppress(OSError):
                engine.child.kill()
            engine.stop()
        shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        self._finalizer()


class Store:
    """A store open for reading, and for deleting. `close()`, leaving its `with` block, or the garbage collector ends it.

    Lists are of dictionaries, as docs/api.md describes them, oldest first.
    """

    def __init__(self, client: Client, reader: Reader | None, name: str) -> None:
        self._client = client
        self._reader = reader
        self._name = name

    def _fresh(self) -> Client:
        if self._reader is not None and self._reader.stale():
            self._client.close()
        return self._client

    def _steered(self) -> Client:
        if self._reader is not None:
            await_owner(self._reader.folder)
        return self._fresh()

    def sessions(self) -> list[dict[str, Any]]:
        """Sessions: `id, mode, text, state, model, versions, process, hooks, sites, begun_unix_ns, ended_unix_ns`, ..."""
        return list(self._fresh().list("/sessions"))

    def runs(self, *, session: str | None = None, tag: str | None = None, labels: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """Runs: `id, session, labels, tags, requests, begun_unix_ns, ended_unix_ns, rows, bytes`."""
        return list(self._fresh().list("/runs", {"session": session, "tag": tag, "label": _labels(labels)}))

    def requests(self, *, run: str | None = None, session: str | None = None, tag: str | None = None, labels: Mapping[str, str] | None = None,
                 latest: int | None = None) -> list[dict[str, Any]]:  # fmt: skip
        """Requests: `id, run, session, labels, tags, begun_unix_ns, ended_unix_ns, reason, positions, rows, bytes`."""
        return list(self._fresh().list("/requests", {"run": run, "session": session, "tag": tag, "label": _labels(labels), "latest": latest}))

    def cache(self, *, run: str | None = None, request: str | None = None) -> Cache:
        """What was captured of a request; or, with a leading [batch, ...], of the requests that began together last, in a run or in all.
        Raises NotCapturedError where there is none."""
        client = self._fresh()
        if request is not None:
            info = client.get(f"/requests/{request}")
            if run is not None and info["run"] != run:
                raise NotCapturedError(f"request {request} belongs to run {info['run']}, not to {run}")
            return Cache(client, [request], batch=False, keep=self._reader)
        count = 64
        while True:
            found = self.requests(run=run, latest=count)
            if not found:
                raise NotCapturedError(f"{self._name}: no requests" + (f" in run {run}; runs() lists those that have" if run else ""))
            last = found[-1]
            batch = [info["id"] for info in found if (info["session"], info["begun_unix_ns"]) == (last["session"], last["begun_unix_ns"])]
            if len(batch) < len(found) or len(found) < count:
                return Cache(client, batch, batch=True, keep=self._reader)
            count *= 8

    @property
    def inspect(self) -> Inspector:
        """Tools that find structure: distributions, kinds of attention heads, ..."""
        return Inspector(self._fresh)

    def coverage(self, *, run: str | None = None, session: str | None = None) -> dict[str, Any]:
        """What became of every row of a run, a session, or the whole store: `rows, complete, outcomes`."""
        return dict(self._fresh().get("/coverage", {"run": run, "session": session}))

    def delete(self, *requests: str, tag: str | None = None, before: datetime | None = None) -> dict[str, Any]:
        """Remove what is kept of requests, for good: by id; or of all with a tag, or begun before a time (aware, or local), or both.

        Rows, token ids and text go, from every file; the books stay, and say since when the rows are gone. Returns
        `requests, active, rows, bytes, segments, prompts`. Where no engine has the store, one of our own deletes. Cut off, it leaves a part: call it again.
        """
        if bool(requests) == (tag is not None or before is not None):
            raise ValueError('delete: name requests, delete("r1a2b3c4.0"), or all of a kind with tag= or before=, or both')
        at = None if before is None else round(before.timestamp() * 1e9)
        arguments = {"request": list(requests), "tag": tag, "before": at}
        client = self._fresh()
        own: Engine | None = None
        try:
            if self._reader is not None and live(self._reader.folder) is None:
                own = start_own(self._reader.folder)
                address = "unix:" + own.http_unix
                client = Client(lambda: address)
            with progress(f"deleting from {self._name}"):
                return dict(client.work("/delete", arguments))
        finally:
            if own is not None:
                client.close()
                own.stop()

    def watch(self, site: str | None = None, *, session: str | None = None, request: str | None = None) -> Iterator[dict[str, Any]]:
        """What passes at every site while a model runs, at most ten times a second, until the engine stops: `session, sent_unix_ns, seconds, tokens, dropped,
        sites`, the last lines as of `Cache.stats`, a site's rows since the one before summed up. `site` may be a glob. Raises NotCapturedError where nothing is captured."""
        for name, came in self._fresh().follow("/live/map", {"site": site, "session": session, "request": request}):
            if name == "map":
                yield came

    def events(self) -> Iterator[dict[str, Any]]:
        """What happens to the engine: attach, detach, drops, policy, governor, disk: `id, time, level, code, session, message`. The latest 256 first, then as
        they come, until the engine stops; and `dropped` where some were lost before one, because this reader was slow. Raises NotCapturedError where nothing is captured."""
        yield from self._fresh().happenings()

    def status(self) -> dict[str, Any]:
        """What the engine says of itself: version, books, rates, attached sessions, disk."""
        return dict(self._fresh().get("/status"))

    @property
    def policy(self) -> Policy:
        """What is captured by the models attached to the store's engine, to read and to change. One that has just been started is waited for."""
        return Policy(self._steered)

    def close(self) -> None:
        self._client.close()
        if self._reader is not None:
            self._reader.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({self._name})"


def _labels(labels: Mapping[str, str] | None) -> list[str]:
    return [f"{key}={value}" for key, value in (labels or {}).items()]


def address_of(engine: str) -> str:
    """`engine=` of a reader as an address: http(s)://HOST:PORT, unix:PATH, or the path of an HTTP socket."""
    if engine.startswith(("http://", "https://", "unix:")):
        return engine
    return "unix:" + os.path.abspath(engine)


def open(store: str | os.PathLike[str] | None = None, *, engine: str | None = None, token: str = "") -> Store:
    """Open a store for reading: a folder, live or finished, or a running `engine` (http(s)://HOST:PORT with a token, or its HTTP socket).

    Without a token $DMI_TOKEN is sent. Raises EngineError for a store that is not there, unreadable, or newer than this version.
    """
    if (store is None) == (engine is None):
        raise ValueError('open: give a store, dmi.open("captures/"), or engine="http://HOST:PORT"')
    if engine is not None:
        address = address_of(engine)
        opened = Store(Client(lambda: address, token), None, engine)
    else:
        assert store is not None
        reader = Reader(store)
        opened = Store(Client(reader.find), reader, str(reader.folder))
    try:
        opened._client.get("/sessions", {})
    except EngineError:
        opened.close()
        raise
    return opened
