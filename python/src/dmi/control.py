"""The producer's end of the control socket (docs/format/control.md): names and barriers beside the ring.

Nothing here may hold up the model: what is sent goes out without blocking, or waits in a bounded outbox for the link's thread.
Nothing sent is needed twice either: when the engine goes, the link finds it again and the session says its state anew, so
that an outbox that overflows only costs a reconnection.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from dmi.errors import EngineError

PROTOCOL = 1
MAX_MESSAGE_BYTES = 16 << 20
OUTBOX_BYTES = 64 << 20
"""What may wait to be sent. At the bound the connection is given up and made anew."""
CONNECT_TIMEOUT_S = 10.0
SOCKET_PATH_BYTES = 107  # sun_path of unix(7), less its NUL
BACKOFF_S = (0.05, 5.0)
"""First and longest pause between attempts to find an engine again."""
FATAL = {"protocol", "abi", "token", "ring"}
"""Refusals that another attempt cannot change."""

_LENGTH = struct.Struct("<I")
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode  # json.dumps makes one each time
Message = dict[str, Any]


def frame(message: Message) -> bytes:
    """A message as it goes over the socket. Raises ValueError over the bound."""
    body = _encode(message).encode()
    if len(body) > MAX_MESSAGE_BYTES:
        raise ValueError(f"control message {message.get('type')!r} of {len(body)} bytes: at most {MAX_MESSAGE_BYTES}")
    return _LENGTH.pack(len(body)) + body


class Unframer:
    """Messages out of a stream of bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that are whole with `data`. Raises EngineError on what no engine sends."""
        self._buffer += data
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_MESSAGE_BYTES:
                raise EngineError(f"read the control socket: a message of {length} bytes, at most {MAX_MESSAGE_BYTES}; is it an engine?")
            if len(self._buffer) < _LENGTH.size + length:
                break
            body = bytes(self._buffer[_LENGTH.size : _LENGTH.size + length])
            del self._buffer[: _LENGTH.size + length]
            try:
                message = json.loads(body)
            except ValueError as error:
                raise EngineError(f"read the control socket: {error}; is it an engine?") from error
            if not isinstance(message, dict) or not isinstance(message.get("type"), str):
                raise EngineError("read the control socket: a message without a type; is it an engine?")
            messages.append(message)
        return messages


def dial(
    path: str, hello: Message, fds: Sequence[int], timeout_s: float = CONNECT_TIMEOUT_S
) -> tuple[socket.socket, Message, Unframer, list[Message]]:
    """Connect, say hello with the ring's descriptors, and read the welcome; what else came is returned too. Raises EngineError. Also for who asks for the memory that is left."""
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES:
        raise EngineError(f"attach to the engine at {path}: its path has {length} bytes, and that of a Unix socket may have {SOCKET_PATH_BYTES}; start the engine with a "
                          "shorter one, or name it by a symbolic link to its folder")  # fmt: skip
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect(path)
        data = frame(hello)
        sent = socket.send_fds(connection, [data], list(fds)) if fds else 0
        if sent < len(data):
            connection.sendall(data[sent:])
        unframer = Unframer()
        early: list[Message] = []  # events that overtook the welcome, and what followed it
        welcome: Message | None = None
        while welcome is None:
            data = connection.recv(1 << 16)
            if not data:
                raise EngineError(f"attach to the engine at {path}: it hung up before it answered; see its log", code="hang-up")
            for message in unframer.feed(data):
                if message["type"] == "error" and welcome is None:
                    raise EngineError(f"attach to the engine at {path}: {message.get('message')}", code=str(message.get("code", "")))
                if message["type"] in ("welcome", "memory"):
                    welcome = message
                elif welcome is None and message["type"] not in ("event", "groups"):
                    raise EngineError(f"attach to the engine at {path}: it answered {message['type']!r} to hello; is it an engine?")
                else:
                    early.append(message)
        connection.setblocking(False)
        return connection, welcome, unframer, early
    except OSError as error:
        connection.close()
        raise EngineError(f"attach to the engine at {path}: {error}; is it running?", code="unreachable") from error
    except BaseException:
        connection.close()
        raise


def memory_left(path: str, token: str, timeout_s: float = CONNECT_TIMEOUT_S) -> tuple[int | None, int | None]:
    """How many bytes of payload, and of shared memory, the policy of the engine at `path` leaves a ring. None: it does not say. Raises EngineError."""
    connection, answer, _, _ = dial(path, {"type": "memory", "protocol": PROTOCOL, "token": token}, (), timeout_s)
    connection.close()
    return answer["device_bytes"], answer["pinned_bytes"]


class _Barrier:
    def __init__(self, message: Message, then: Callable[[], None] | None) -> None:
        self.message = message
        self.then = then
        self.done = threading.Event()
        self.error = ""


class Link:
    """A session's connection to its engine, which comes back when the engine does.

    `lock` guards the session's state and everything here; whoever changes state holds it while sending the change, so that
    messages go out in the order of the changes. Callbacks: `find` gives the control socket's path, starting an engine if
    it is the session's to start (raises EngineError, may take seconds, called without the lock); `token` is asked after it; `state` says all that a new
    engine has to know (under the lock); `attached` is told whether an engine has the ring; `event` gets its events;
    `groups` the groups of requests that its policy names, and their name (under the lock).
    """

    def __init__(self, *, lock: threading.RLock, hello: Message, token: Callable[[], str], fds: Sequence[int], find: Callable[[], str],
                 state: Callable[[], list[Message]], attached: Callable[[bool], None], event: Callable[[str, str, str], None],
                 groups: Callable[[int, list[Message]], None]) -> None:  # fmt: skip
        self._lock = lock
        self._hello = hello
        self._token = token
        self._fds = tuple(fds)
        self._find = find
        self._state = state
        self._attached = attached
        self._event = event
        self._groups = groups
        self._socket: socket.socket | None = None  # under _lock, as all below
        self._unframer = Unframer()
        self._early: list[Message] = []
        self._outbox: deque[memoryview] = deque()
        self._outbox_bytes = 0
        self._barriers: dict[str, _Barrier] = {}
        self._numbers = itertools.count()
        self._closing = False
        self._leaving: Message | None = None
        self._trouble = ""  # what keeps the engine from writing, as it said last; "": nothing does
        self._left = threading.Event()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._run, name="dmi-control", daemon=True)
        self._stopped = threading.Event()
        self.welcome: Message = {}
        self.failure: EngineError | None = None
        """Why the link is over for good, or None."""
        self.reconnections = 0

    # -------------------------------------------------------------- life
    def open(self, path: str) -> None:
        """Connect for the first time, and start the thread. Raises EngineError."""
        connection, self.welcome, self._unframer, self._early = dial(path, {**self._hello, "token": self._token()}, self._fds)
        with self._lock:
            self._socket = connection
            self._attached(True)
        for message in self._early:  # of the policy among it, before there is a step
            self._receive(message)
        self._early = []
        self._thread.start()

    @property
    def connected(self) -> bool:
        return self._socket is not None

    def close(self) -> None:
        """Hang up and end the thread. Idempotent."""
        with self._lock:
            self._closing = True
            self._wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=CONNECT_TIMEOUT_S)
        with self._lock:
            self._hang_up()
            if self._wake_read >= 0 and not self._thread.is_alive():
                os.close(self._wake_read)
                os.close(self._wake_write)
                self._wake_read = self._wake_write = -1

    def forked(self, lock: threading.RLock) -> None:
        """In a forked child: drop the descriptors, which are the parent's business. Its thread does not exist here, and its lock may be held."""
        self._lock = lock
        self._closing = True
        if self._socket is not None:
            self._socket.close()  # does not shut the parent's connection down
            self._socket = None
        for barrier in self._barriers.values():
            barrier.done.set()

    # -------------------------------------------------------------- sending
    def send(self, *messages: Message) -> None:
        """Send without blocking; called under the lock. Without an engine nothing is sent: the state says it later."""
        if self._socket is None or self._closing:
            return
        self._put(b"".join([frame(message) for message in messages]))

    def _put(self, data: bytes) -> None:
        view = memoryview(data)
        if not self._outbox and self._socket is not None:
            with contextlib.suppress(OSError):  # what is wrong with the socket the thread will see as well
                view = view[self._socket.send(view) :]
        if view:
            idle = not self._outbox
            self._outbox.append(view)
            self._outbox_bytes += len(view)
            if self._outbox_bytes > OUTBOX_BYTES and self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
            if idle:  # else the thread waits for room already: each time that it wakes up takes the interpreter from the model
                self._wake()

    def barrier(self, steps: dict[int, int], timeout_s: float, absent_s: float | None = None) -> None:
        """Wait until everything up to these steps, by lane, and every message so far is durable; no longer than `absent_s` where
        there is no engine. Raises EngineError."""
        with self._lock:
            barrier = self.begin_barrier(steps)
        deadline = time.monotonic() + timeout_s
        absent_since: float | None = None
        while not barrier.done.wait(max(0.0, min(0.1, deadline - time.monotonic()))):
            now = time.monotonic()
            absent_since = None if self.connected else absent_since or now
            absent = absent_since is not None and absent_s is not None and now - absent_since > absent_s
            if now < deadline and not absent:
                continue
            with self._lock:
                self._barriers.pop(barrier.message["id"], None)
            if absent:
                raise EngineError(f"flush: there has been no engine for {absent_s:g} s; what it had is in the store, what was not drained is lost "
                                  "unless it comes back while this session is attached", code="gone")  # fmt: skip
            state = "connected" if self.connected else "not connected"
            advice = f"the engine says: {self._trouble}" if self._trouble else "see its log, the disk, or wait longer"
            raise EngineError(f"flush: the engine did not report everything as durable within {timeout_s:g} s ({state}); {advice}", code="timeout")
        if barrier.error:
            raise EngineError(f"flush: {barrier.error}", code="io")

    def begin_barrier(self, steps: dict[int, int], then: Callable[[], None] | None = None) -> _Barrier:
        """Ask for a barrier, and do `then` (on the link's thread) once it is passed; called under the lock."""
        number = str(next(self._numbers))
        barrier = _Barrier({"type": "barrier", "id": number, "steps": {str(lane): step for lane, step in steps.items()}}, then)
        if self.failure is not None or self._closing:
            barrier.error = str(self.failure or "the session is closed")
            barrier.done.set()
            return barrier
        self._barriers[number] = barrier
        self.send(barrier.message)
        return barrier

    def leave(self, timeout_s: float) -> bool:
        """Say bye and wait for the engine's: it has then drained and sealed everything. False when it did not answer in time."""
        with self._lock:
            if self.failure is not None:
                return False
            self._leaving = {"type": "bye"}
            self.send(self._leaving)
        return self._left.wait(timeout_s) and self.failure is None

    # -------------------------------------------------------------- the thread
    def _wake(self) -> None:
        if self._wake_write >= 0:
            with contextlib.suppress(BlockingIOError):
                os.write(self._wake_write, b"\0")

    def _run(self) -> None:
        while True:
            try:
                why = self._converse()
            except EngineError as error:
                why = str(error)
            with self._lock:
                self._hang_up()
                if self._closing or self._left.is_set() or self.failure is not None:
                    break
                self._attached(False)
            self._event("warning", "detached", f"the engine went away ({why}); looking for it. What is captured meanwhile waits in the ring")
            if not self._reconnect():
                break
        with self._lock:
            self._attached(False)
            for barrier in self._barriers.values():
                barrier.error = barrier.error or str(self.failure or "the connection to the engine was closed")
                barrier.done.set()
            self._barriers.clear()
            self._left.set()
        self._stopped.set()

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._outbox.clear()
        self._outbox_bytes = 0

    def _converse(self) -> str:
        """Send and receive until the connection ends; returns why."""
        connection = self._socket
        if connection is None:
            return "not connected"
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        for message in self._early:
            self._receive(message)
        while True:
            with self._lock:
                if self._closing:
                    return "closed"
                poll.register(connection, select.POLLIN | (select.POLLOUT if self._outbox else 0))
            for fd, _ in poll.poll():
                if fd == self._wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_read, 4096)
                    continue
                try:
                    with self._lock:
                        self._drain_outbox(connection)
                    data = connection.recv(1 << 18)
                except BlockingIOError:
                    continue
                except OSError as error:
                    return str(error)
                if not data:
                    return "it hung up"
                for message in self._unframer.feed(data):
                    self._receive(message)
                if self._left.is_set():
                    return "bye"

    def _drain_outbox(self, connection: socket.socket) -> None:
        while self._outbox:
            view = self._outbox[0]
            try:
                sent = connection.send(view)
            except BlockingIOError:
                return
            self._outbox_bytes -= sent
            if sent == len(view):
                self._outbox.popleft()
            else:
                self._outbox[0] = view[sent:]

    def _receive(self, message: Message) -> None:
        kind = message["type"]
        if kind == "durable":
            with self._lock:
                barrier = self._barriers.pop(str(message.get("id")), None)
            if barrier is not None:
                barrier.error = str(message.get("error") or "")
                if not barrier.error:
                    self._trouble = ""
                if not barrier.error and barrier.then is not None:
                    barrier.then()
                barrier.done.set()
        elif kind == "event":
            if message.get("level") == "error" and message.get("code") == "store":
                self._trouble = str(message.get("message", ""))
            self._event(str(message.get("level", "info")), str(message.get("code", "")), str(message.get("message", "")))
        elif kind == "groups":
            with self._lock:
                self._groups(int(message["groups"]), list(message["sets"]))
        elif kind == "error":
            self._refused(EngineError(f"the engine ended the session: {message.get('message')}", code=str(message.get("code", ""))))
        elif kind == "bye":
            self._left.set()
        else:
            self._refused(EngineError(f"the engine sent {kind!r}, which protocol {PROTOCOL} does not have; update the one that is older", code="protocol"))

    def _refused(self, error: EngineError) -> None:
        with self._lock:
            if error.code in FATAL:
                self.failure = error
        self._event("error", error.code, str(error))
        raise error

    def _reconnect(self) -> bool:
        """Find an engine and tell it everything; False when closed, or refused for good."""
        pause, longest = BACKOFF_S
        while not self._closing:
            try:
                path = self._find()
                connection, welcome, unframer, early = dial(path, {**self._hello, "token": self._token(), "resume": True}, self._fds)
            except EngineError as error:
                if error.code in FATAL:
                    self.failure = error
                    self._event("error", error.code, str(error))
                    return False
            else:
                with self._lock:
                    if self._closing:
                        connection.close()
                        return False
                    self._socket, self.welcome, self._unframer, self._early = connection, welcome, unframer, early
                    self.send(*self._state(), *(barrier.message for barrier in self._barriers.values()))
                    if self._leaving is not None:
                        self.send(self._leaving)
                    self._attached(True)
                self.reconnections += 1
                self._event("info", "attached", "the engine is back")
                return True
            until = time.monotonic() + pause
            pause = min(2 * pause, longest)
            while not self._closing and (left := until - time.monotonic()) > 0:
                select.select([self._wake_read], [], [], left)
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
        return False
