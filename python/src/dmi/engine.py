"""Finding the engine of a store, or starting it.

A store has at most one engine. It announces itself in STORE/engine.json while it lives; whoever finds none starts one, under a
lock, so that two sessions that begin at once share it. It outlives the process that started it, and ends by itself after its last session.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import json
import os
import select
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmi.errors import EngineError
from dmi.terminal import progress

READY_TIMEOUT_S = 120.0
"""How long a new engine may take to open its store (it settles what an earlier one left behind)."""
TAKE_OVER_TIMEOUT_S = 40.0
"""How long we wait for an engine that is stopping to let go of its store; its own bound is 30 s."""
START_PATIENCE_S = 10.0
"""How long a question that only the owner can answer waits for one that has the store and does not answer yet."""
SOCKET_PATH_BYTES = 100
"""Unix socket paths hold 107 bytes; what is longer goes to a short folder."""
LOG_BYTES = 4 << 20
"""STORE/engine.log is begun anew when it is larger than this."""


@dataclass(frozen=True)
class Engine:
    """A live engine. `control` is "" where it only reads."""

    id: str
    store: str
    control: str
    http_unix: str
    http: str = ""
    pid: int = 0
    child: subprocess.Popen[bytes] | None = None
    """Ours alone: it ends when its standard input closes."""

    def stop(self, timeout_s: float = 35.0) -> None:
        """End a child of ours: it drains, seals and commits. Idempotent; no-op for engines that are not ours alone."""
        if self.child is None or self.child.stdin is None:
            return
        with contextlib.suppress(OSError):
            self.child.stdin.close()
        try:
            self.child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()


APART = "import os, sys; os.fork() or os.execv(sys.argv[1], sys.argv[1:])"
"""Has a program be nobody's child: servers that end kill what descends from their processes (vLLM does), and this engine has captures to write then."""


def binary() -> str:
    """The engine's binary: of this package, $DMI_BIN, a checkout's bin/dmi, or the PATH. Raises EngineError."""
    given = os.environ.get("DMI_BIN")
    if given:
        if os.access(given, os.X_OK) and os.path.isfile(given):
            return given
        raise EngineError(f"find the engine: DMI_BIN={given} is no program; unset it, or build one with `go build -o bin/dmi ./cmd/dmi`")
    here = Path(__file__).resolve()
    for candidate in (here.parent / "bin" / "dmi", *(here.parents[3] / "bin" / "dmi" for _ in (0,) if len(here.parents) > 3)):
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return str(candidate)
    found = shutil.which("dmi")
    if found is None:
        raise EngineError("find the engine: no dmi program in this package, in bin/ of a checkout, or on PATH; build it with "
                          "`make setup` (or `go build -o bin/dmi ./cmd/dmi`), install a wheel, or set DMI_BIN")  # fmt: skip
    return found


def command() -> None:
    """The `dmi` command of an installed package: becomes the engine's binary."""
    packaged = Path(__file__).resolve().parent / "bin" / "dmi"
    program = os.environ.get("DMI_BIN") or str(packaged)
    try:
        os.execv(program, ["dmi", *sys.argv[1:]])
    except OSError as error:
        sys.exit(f"dmi: run {program}: {error.strerror}; install a wheel that was built for this system, or set DMI_BIN to a dmi program")


def reachable(path: str) -> bool:
    """Whether somebody listens on a Unix socket."""
    if not path:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2)
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def live(store: Path) -> Engine | None:
    """The engine that owns a store, if it lives. A stale announcement is nobody's, and one that came with a copy of a live store another's."""
    try:
        said = json.loads((store / "engine.json").read_text())
        engine = _engine(said)
        if not os.path.samefile(store, engine.store):
            return None
    except (OSError, ValueError, TypeError):
        return None
    return engine if reachable(engine.http_unix) else None


def _engine(said: dict[str, Any], child: subprocess.Popen[bytes] | None = None) -> Engine:
    return Engine(
        str(said.get("engine_id", "")), str(said.get("store", "")), str(said.get("control", "")), str(said.get("http_unix", "")),
        str(said.get("http", "")), int(said.get("pid", 0)), child,
    )  # fmt: skip


def join_or_start(store: str | os.PathLike[str]) -> Engine:
    """The engine of a store, started if there is none. Raises EngineError with what the engine said."""
    folder = Path(store).absolute()
    found = live(folder)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise EngineError(f"make the store {folder}: {error}; give another folder as store=", code="store") from error
    deadline = time.monotonic() + TAKE_OVER_TIMEOUT_S
    with _starting(folder):
        while True:
            found = live(folder)  # another process may have started one while we waited for the lock
            if found is not None:
                return found
            try:
                return _start(folder, ["--exit-when-idle"], detached=True)
            except EngineError:
                # An engine that is stopping holds the store for a moment, and one may have been started by hand.
                if not _held(folder) or time.monotonic() > deadline:
                    raise
            time.sleep(0.05)


def start_own(store: str | os.PathLike[str], *, read_only: bool = False) -> Engine:
    """An engine of our own, which ends when we do. Raises EngineError."""
    folder = Path(store).absolute()
    if read_only:
        try:
            there = stat.S_ISDIR(folder.stat().st_mode)
        except PermissionError as error:
            raise EngineError(f"open the store {folder}: {error.strerror}; run as the user who owns it", code="store") from error
        except OSError:
            there = False
        if not there:
            raise EngineError(f"open the store {folder}: no such folder; give the one that a session was attached with as store=", code="store")
    return _start(folder, ["--read-only"] if read_only else [], detached=False)


def to_read(store: str | os.PathLike[str]) -> Engine:
    """Whoever answers for a store: its live engine, else a reader of our own. Raises EngineError."""
    folder = Path(store).absolute()
    return live(folder) or start_own(folder, read_only=True)


@contextlib.contextmanager
def _starting(folder: Path) -> Iterator[None]:
    """One starter at a time."""
    try:
        lock = os.open(folder / "engine.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EngineError(f"start an engine for {folder}: {error}; is the folder yours to write to?", code="store") from error
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S + TAKE_OVER_TIMEOUT_S
        with progress(f"waiting for another process to start the engine of {folder}"):
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise EngineError(f"start an engine for {folder}: another process has been starting one for too long; see {folder}/engine.log") from None
                    time.sleep(0.02)
        yield
    finally:
        os.close(lock)


def await_owner(store: Path) -> None:
    """Return when the engine that has a store answers, or nobody has it; after START_PATIENCE_S at the latest."""
    deadline = time.monotonic() + START_PATIENCE_S
    if live(store) is not None or not _held(store):
        return
    with progress(f"waiting for whoever has {store} to answer, {START_PATIENCE_S:.0f} s at most"):
        while live(store) is None and _held(store) and time.monotonic() < deadline:
            time.sleep(0.02)


def _held(folder: Path) -> bool:
    """Whether an engine has the store open: its lock file is locked."""
    try:
        file = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _sockets(folder: Path, read_only: bool) -> list[str]:
    """Flags for sockets elsewhere, where the store's own would have paths too long for the system."""
    if read_only or len(os.fsencode(folder / "engine.sock")) <= SOCKET_PATH_BYTES:
        return []
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"dmi-{os.getuid()}"
    short = base / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    try:
        for part in (base, short):
            part.mkdir(exist_ok=True, mode=0o700)
            status = part.lstat()
            if status.st_uid != os.getuid() or status.st_mode & 0o077:
                raise PermissionError(f"{part} is not ours alone")
    except OSError as error:
        raise EngineError(f"start an engine for {folder}: its path is too long for a Unix socket, and {short} cannot be used instead: {error}; "
                          "give a shorter store=, or engine= of a running one") from error  # fmt: skip
    return ["--socket", str(short / "engine.sock"), "--http-socket", str(short / "http.sock")]


def _start(folder: Path, flags: list[str], *, detached: bool) -> Engine:
    program = binary()
    read_only = "--read-only" in flags
    command = [program, "serve", "--store", str(folder), *flags, *_sockets(folder, read_only)]
    if not detached:
        command.append("--exit-with-stdin")
    ready_read, ready_write = os.pipe()
    command += ["--ready-fd", str(ready_write)]
    if detached:
        command = [sys.executable, "-I", "-S", "-c", APART, *command]
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, ready_read)
        try:
            log = stack.enter_context(_log(folder, read_only))
            start = log.tell()
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL if detached else subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log,
                pass_fds=(ready_write,), start_new_session=True,  # a Ctrl-C at our terminal is not for it
            )  # fmt: skip
        except OSError as error:
            raise EngineError(f"start an engine for {folder}: {error}") from error
        finally:
            os.close(ready_write)
        try:
            with progress(f"starting the engine of {folder}"):
                said = ready_line(ready_read)
            if said is None:
                raise EngineError(f"start an engine for {folder}: {last_words(log, start)}", code="store")
        except BaseException as error:
            child.kill()
            child.wait()
            if child.stdin is not None:
                child.stdin.close()
            if isinstance(error, TimeoutError):
                raise EngineError(f"start an engine for {folder}: {error}; try again, it may only be slow. Its log ends with\n  {last_words(log, start)}", code="store") from None
            raise
    if detached:
        child.wait()
        return _engine(said)
    engine = _engine(said, child)
    atexit.register(engine.stop)
    return engine


def _log(folder: Path, read_only: bool) -> Any:
    """Where an engine writes its log. One that only reads may not write into the store."""
    if read_only:
        return tempfile.TemporaryFile()
    file = open(folder / "engine.log", "ab+")  # the caller's stack closes it
    os.chmod(file.name, 0o600)
    if file.tell() > LOG_BYTES:
        file.truncate(0)
    return file


def ready_line(pipe: int) -> dict[str, Any] | None:
    """The line that an engine writes when it is ready, or None when it ended. Raises TimeoutError when it takes longer than READY_TIMEOUT_S."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    text = b""
    while not text.endswith(b"\n"):
        readable, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            raise TimeoutError(f"it was not ready within {READY_TIMEOUT_S:g} s")
        data = os.read(pipe, 65536)
        if not data:
            return None
        text += data
    said = json.loads(text)
    return said if isinstance(said, dict) else None


def last_words(log: Any, start: int) -> str:
    """Why an engine ended: what it said last. Its end of the pipe closes when it ends, so all of it is there."""
    log.seek(start)
    lines = log.read().decode(errors="replace").strip().splitlines()
    own = [line.removeprefix("dmi: ") for line in lines if line.startswith("dmi: ")]
    return "\n  ".join(own or lines[-8:]) or "it ended and said nothing; was it killed?"
