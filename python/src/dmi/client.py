"""The HTTP API (docs/api.md) over a Unix socket or TCP, with nothing but the standard library.

Tensors are received straight into the memory that they are returned in.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import math
import os
import socket
import ssl
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlencode, urlsplit

import torch

from dmi.errors import EngineError, IncompleteError, NotCapturedError

TIMEOUT_S = 120.0
"""How long an answer may take to begin, or to go on. At the bound: EngineError."""
IDLE_CONNECTIONS = 4
"""Connections kept for the next question."""

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16, "U32": torch.uint32,
    "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64, "C128": torch.complex128,
}  # fmt: skip
"""safetensors' names."""

Arguments = Mapping[str, Any]


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Answer:
    """Bytes of a tensor, not yet received, and what they are."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self.dtype = DTYPES[headers["Dmi-Dtype"]]
        self.shape = [int(n) for n in headers["Dmi-Shape"].split(",") if n]
        self.axes = headers["Dmi-Axes"].split(",")
        self.site = headers.get("Dmi-Site", "")
        self.complete = headers.get("Dmi-Complete") != "false"
        self.positions = _spans(headers.get("Dmi-Positions") or "")
        self.levels = [(name, int(rows)) for name, _, rows in (part.partition(":") for part in (headers.get("Dmi-Levels") or "").split(",") if part)]
        self.next = headers.get("Dmi-Next") or ""
        whose = (part.split(":") for part in (headers.get("Dmi-Requests") or "").split(",") if part)
        self.whose = [(unquote(request), int(rows)) for request, _, rows in whose]
        self.tensor = torch.empty(0, device="cpu")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _spans(text: str) -> list[tuple[int, int]]:
    """`a:b,c:d` as half-open pairs."""
    return [(int(a), int(b)) for a, _, b in (part.partition(":") for part in text.split(",") if part)]


class Client:
    """Asks an engine. `find` says where it is: called at first, and again when it has gone, so that a reader outlives an engine.
    Any thread may ask."""

    def __init__(self, find: Callable[[], str], token: str = "") -> None:
        self._find = find
        self._token = token or os.environ.get("DMI_TOKEN", "")
        self._lock = threading.Lock()
        self._address: str | None = None  # under _lock
        self._idle: list[http.client.HTTPConnection] = []  # under _lock
        self._pid = os.getpid()

    def close(self) -> None:
        with self._lock:
            for connection in self._idle:
                connection.close()
            self._idle.clear()
            self._address = None

    # -------------------------------------------------------------- questions
    def get(self, path: str, arguments: Arguments | None = None) -> Any:
        """A JSON answer."""
        with self._ask("GET", path, arguments or {}) as response:
            return json.load(response)

    def post(self, path: str) -> Any:
        with self._ask("POST", path, {}) as response:
            return json.load(response)

    def work(self, path: str, arguments: Arguments) -> Any:
        """The result of work that takes a while, and tells how far it is. Raises EngineError where it fails on the way."""
        for name, said in self._events("POST", path, arguments):
            if name == "result":
                return said
        raise AssertionError("unreachable")

    def found(self, path: str, arguments: Arguments, tell: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
        """The items of a list that takes a while to find, however long that is; `tell` hears how far the engine has come: `stage, share, bytes`."""
        items: list[dict[str, Any]] = []
        for name, said in self._events("GET", path, arguments):
            if name == "items":
                items += said
            elif name == "progress":
                tell(said)
        return items

    def follow(self, path: str, arguments: Arguments) -> Iterator[tuple[str, Any]]:
        """Events as they come, until the engine stops."""
        yield from self._events("GET", path, arguments, endless=True)

    def happenings(self, codes: Container[str] | None = None) -> Iterator[dict[str, Any]]:
        """The engine's latest events, then those that come, until it stops: all, or those of some codes. One has `dropped` where events
        of any code were lost before it, because this reader was slow: how many."""
        dropped = 0
        for name, event in self.follow("/live/events", {}):
            if name == "dropped":
                dropped += event["events"]
            elif name == "event" and (codes is None or event["code"] in codes):
                yield {**event, "dropped": dropped} if dropped else event
                dropped = 0

    def _events(self, method: str, path: str, arguments: Arguments, *, endless: bool = False) -> Iterator[tuple[str, Any]]:
        """Events up to the result, and that. Raises EngineError where the work fails on the way."""
        with self._ask(method, path, arguments, accept="text/event-stream") as response:
            name = ""
            for line in response:
                field, _, value = line.decode().rstrip("\n").partition(": ")
                if field == "event":
                    name = value
                elif field == "data":
                    said = json.loads(value)
                    if name == "error":
                        raise EngineError(said["message"] + (f"; {said['hint']}" if said["hint"] else ""), code=said["code"])
                    if name == "result":
                        response.read()
                        yield name, said
                        return
                    yield name, said
        if not endless:
            raise EngineError(f"{method} {path}: the engine ended before it was done; ask again", code="unreachable")

    def put(self, path: str, body: bytes) -> Any:
        with self._ask("PUT", path, {}, body) as response:
            return json.load(response)

    def list(self, path: str, arguments: Arguments | None = None) -> Iterator[dict[str, Any]]:
        """The items of a list, page by page."""
        given = dict(arguments or {})
        while True:
            page = self.get(path, given)
            yield from page["items"]
            if not page["next"]:
                return
            given["after"] = page["next"]

    def tensor(self, path: str, arguments: Arguments, into: torch.Tensor | None = None) -> Answer:
        """A tensor, contiguous, on the CPU, in its own dtype; its bytes go to `into` (uint8, contiguous) where given."""
        with self._ask("GET", path, arguments) as response:
            answer = Answer(dict(response.headers))
            flat = torch.empty(answer.nbytes, dtype=torch.uint8, device="cpu") if into is None else into
            if flat.nbytes != answer.nbytes:
                raise EngineError(f"read {answer.site}: {answer.nbytes} bytes where {flat.nbytes} were expected; the request is still growing: flush, and ask again")
            if answer.nbytes:
                view = memoryview((ctypes.c_char * answer.nbytes).from_address(flat.data_ptr())).cast("B")
                done = 0
                while done < answer.nbytes:
                    count = response.readinto(view[done:])
                    if count == 0:
                        raise EngineError(f"read {answer.site}: the engine sent {done} of {answer.nbytes} bytes; its log says why")
                    done += count
            answer.tensor = flat.view(answer.dtype).view(answer.shape) if answer.nbytes else torch.empty(answer.shape, dtype=answer.dtype, device="cpu")
            return answer

    def describe(self, path: str, arguments: Arguments) -> Answer:
        """What a tensor would be, without its bytes."""
        with self._ask("HEAD", path, arguments) as response:
            return Answer(dict(response.headers))

    # -------------------------------------------------------------- transport
    @contextlib.contextmanager
    def _ask(self, method: str, path: str, arguments: Arguments, body: bytes | None = None, accept: str | None = None) -> Iterator[http.client.HTTPResponse]:
        given: list[tuple[str, str]] = []
        for name, value in arguments.items():
            for item in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
                if item is not None:
                    given.append((name, str(item).lower() if isinstance(item, bool) else str(item)))
        target = "/v1" + path + ("?" + urlencode(given) if given else "")
        connection, response = self._send(method, target, body, accept)
        if method == "HEAD" and response.status >= 300:  # what went wrong is in the body that HEAD leaves out
            connection.close()
            connection, response = self._send("GET", target)
        try:
            if response.status >= 300:
                raise _failure(method, target, response)
            yield response
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise EngineError(f"{method} {target}: the answer broke off: {error}; the engine may have stopped", code="unreachable") from error
        except BaseException:
            connection.close()
            raise
        if not response.isclosed():  # what was asked about has a body that nobody wants
            connection.close()
            return
        with self._lock:
            if len(self._idle) < IDLE_CONNECTIONS and connection.sock is not None and self._address is not None:
                self._idle.append(connection)
                return
        connection.close()

    def _send(self, method: str, target: str, body: bytes | None = None, accept: str | None = None) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Every question may be asked again, so an idle connection that has died, or an engine that has gone, costs another attempt."""
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        if accept is not None:
            headers["Accept"] = accept
        attempts = 3
        for attempt in range(attempts):
            address, connection = self._connection(fresh=attempt > 0)
            try:
                connection.request(method, target, body, headers)
                return connection, connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                with self._lock:
                    if self._address == address:
                        self._address = None
                if attempt == attempts - 1 or isinstance(error, TimeoutError):
                    raise EngineError(f"ask the engine at {address}: {error or type(error).__name__}; is it running?", code="unreachable") from error
        raise AssertionError("unreachable")

    def _connection(self, fresh: bool) -> tuple[str, http.client.HTTPConnection]:
        with self._lock:
            if self._pid != os.getpid():  # a forked child must not share its parent's connections
                self._pid, self._idle = os.getpid(), []
            if fresh:
                for connection in self._idle:
                    connection.close()
                self._idle.clear()
            address = self._address
            if address is not None and self._idle:
                return address, self._idle.pop()
        if address is None:
            address = self._find()
            with self._lock:
                self._address = address
        return address, _connect(address)


def _connect(address: str) -> http.client.HTTPConnection:
    if address.startswith("unix:"):
        return _UnixConnection(address[len("unix:") :], TIMEOUT_S)
    parts = urlsplit(address)
    if parts.scheme == "https":
        return http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S, context=ssl.create_default_context())
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)


def _failure(method: str, target: str, response: http.client.HTTPResponse) -> Exception:
    """The engine's error as ours."""
    text = response.read(16 << 20)
    body: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        loaded = json.loads(text)
        body = loaded if isinstance(loaded, dict) else {}
    error = body.get("error") or {}
    message = error.get("message") or f"{method} {target}: {response.status} {response.reason}"
    if error.get("hint"):
        message += f"; {error['hint']}"
    if response.status == 409 and error.get("code") != "read_only":
        return IncompleteError(message, body.get("coverage"))
    if response.status == 404:
        return NotCapturedError(message)
    if response.status in (400, 413):
        return ValueError(message)
    return EngineError(message, code=str(error.get("code", "")))
