"""What a model notices of its engine's disk: a real one that is full, files that may not grow, a store that may not be written to."""

from __future__ import annotations

import contextlib
import http.client
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import dmi
from dmi import engine as engines
from dmi import native
from sessions import balanced, llama, naps, plainly, prompts, quiet, rows_of, stop, until

RESIDUAL = "blocks.*.hook_resid_post"
SETTINGS = ["store.buffer_mib=1", "store.flush_age_ms=50", "store.sync_age_ms=100"]


class Engine:
    """An engine whose sockets lie apart from its store."""

    def __init__(self, folder: Path, store: Path, *wrapped: str) -> None:
        self.store, self.socket, self.http = store, folder / "engine.sock", folder / "http.sock"
        settings = [word for s in SETTINGS for word in ("--set", s)]
        command = [*wrapped, engines.binary(), "serve", "--store", str(store), "--socket", str(self.socket), "--http-socket", str(self.http), *settings]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        if "engine_id" not in self.process.stdout.readline():
            raise AssertionError(self.process.communicate()[1])

    def ask(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("localhost", timeout=120)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.http))
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(300) == 0, self.process.communicate()[1]


@contextlib.contextmanager
def running(folder: Path, store: Path, *wrapped: str) -> Iterator[Engine]:
    engine = Engine(folder, store, *wrapped)
    try:
        yield engine
    finally:
        engine.process.kill()
        engine.process.communicate(timeout=300)


class Fault:
    """A disk that refuses writes from `begin` on, until the command that `ending` is has run: in another process, where this one is kept waiting."""

    says: str

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def begin(self) -> None:
        raise NotImplementedError

    def ending(self) -> list[str]:
        raise NotImplementedError


class Full(Fault):
    """A file system of a few MiB, in a mount namespace of the engine's, filled by somebody else."""

    says = "the disk is full; free space"

    def begin(self) -> None:
        self.ballast = Path(f"/proc/{self.engine.process.pid}/root/{self.engine.store.parent}/ballast")
        with self.ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass

    def ending(self) -> list[str]:
        return ["rm", "-f", str(self.ballast)]


class Limited(Fault):
    """Files of the engine's may not grow: what can be had without any permission."""

    says = "raise the limit"

    def begin(self) -> None:
        self.before = resource.prlimit(self.engine.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    def ending(self) -> list[str]:
        return ["prlimit", f"--pid={self.engine.process.pid}", "--fsize=unlimited:unlimited"]


def namespace(mount: str) -> list[str]:
    """What runs a command in a mount namespace of its own, after a mount."""
    for unshare in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        wrapped = [*unshare, "--propagation", "private", "sh", "-ec", f'{mount}; exec "$@"', "sh"]
        allowed = subprocess.run([*wrapped, "true"], capture_output=True, text=True)
        if allowed.returncode == 0:
            return wrapped
    pytest.skip(f"nothing can be mounted here, not even in a user namespace: {allowed.stderr.strip()}")


@pytest.fixture(params=[Full, Limited], ids=["full", "limited"])
def fault(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fault]:
    wrapped: list[str] = []
    disk = tmp_path / "disk"
    disk.mkdir()
    if request.param is Full:
        wrapped = namespace(f"mount -t tmpfs -o size=96m none {disk}")
    with running(tmp_path, disk / "s", *wrapped) as engine:
        yield request.param(engine)


def test_best_effort_does_not_notice(fault: Fault) -> None:
    model, engine = llama(), fault.engine
    with quiet(), plainly(model.model.layers[1]) as seen, torch.no_grad():
        with dmi.attach(model, RESIDUAL, engine=str(engine.socket), mode="best-effort", ring_mib=0.25, staging_mib=0.25) as session:
            model(prompts(4, 32), use_cache=False)
            session.flush()
            fault.begin()
            for _ in range(60):
                model(prompts(4, 32), use_cache=False)
            until(lambda: engine.ask("/readyz")[0] == 503)
            for _ in range(60):
                model(prompts(4, 32), use_cache=False)
            status, text = engine.ask("/readyz")
            assert status == 503 and fault.says in text
            assert "dmi_store_failing 1\n" in engine.ask("/metrics")[1]
            with pytest.raises(dmi.EngineError, match=fault.says):
                session.flush(timeout_s=5)
            subprocess.run(fault.ending(), check=True)
            until(lambda: engine.ask("/readyz")[0] == 200)
            session.flush()  # there is room again
            model(prompts(4, 32), use_cache=False)
            session.flush()
            ring, books = session.status()["ring"], session.coverage()
            assert (ring["waits"], ring["wait_ns"]) == (0, 0), "the model waited"
            assert balanced(books) and books["rows"] == 122 * 4 * 32 * 2
            first, last = session.requests[0], session.requests[-1]
            assert torch.equal(session.cache(request=first)["resid_post", 1], seen[0][0]), "what was durable before"
            assert torch.equal(session.cache(request=last)["resid_post", 1], seen[-1][3]), "what came after"
    engine.end()
    assert rows_of(books, "captured") + rows_of(books, "dropped") + rows_of(books, "lost") == books["rows"]


def mend_once_waited_for(fault: Fault, thread: int) -> None:
    """Ends a fault a second after a thread has begun to wait, which it does in many short naps."""
    before, pause = naps(thread), 0.1
    time.sleep(pause)
    while (now := naps(thread)) < before + 10:
        before = now
        time.sleep(pause)
    time.sleep(1)
    subprocess.run(fault.ending(), check=True)


def test_complete_waits_and_loses_nothing(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(native.ring_options.__kwdefaults__, "spill_mib", 0.25)
    model, engine = llama(), fault.engine
    with quiet(), plainly(model.model.layers[1]) as seen, torch.no_grad():
        with dmi.attach(model, RESIDUAL, engine=str(engine.socket), ring_mib=0.25, staging_mib=0.25) as session:
            model(prompts(4, 32), use_cache=False)
            session.flush()
            fault.begin()
            mending = threading.Thread(target=mend_once_waited_for, args=(fault, threading.get_native_id()))
            mending.start()
            while mending.is_alive() and len(seen) < 3000:
                model(prompts(4, 32), use_cache=False)
            mending.join()
            session.flush()
            ring, books = session.status()["ring"], session.coverage()
            assert ring["waits"] > 0, "or the test shows nothing: there was always room"
            assert rows_of(books, "captured") == books["rows"] == len(seen) * 4 * 32 * 2
            for forward in {0, len(seen) // 2, len(seen) - 1}:
                for row in range(4):
                    assert torch.equal(session.cache(request=session.requests[4 * forward + row])["resid_post", 1], seen[forward][row])
    engine.end()


def test_complete_gives_up_at_its_bound(fault: Fault) -> None:
    model, engine = llama(), fault.engine
    with quiet(), torch.no_grad():
        session = dmi.attach(model, RESIDUAL, engine=str(engine.socket), ring_mib=0.25, staging_mib=0.25, wait_bound_s=0.5)
        model(prompts(4, 32), use_cache=False)
        session.flush()
        fault.begin()
        begun = time.monotonic()
        with pytest.raises(dmi.CaptureError, match="wait"):
            while time.monotonic() - begun < 300:
                model(prompts(4, 64), use_cache=False)
        longest = time.monotonic() - begun
        print(f"it raised after {longest:.1f} s, of which it had waited {session.status()['ring']['wait_ns'] / 1e9:.1f} s")
        subprocess.run(fault.ending(), check=True)
        until(lambda: engine.ask("/readyz")[0] == 200)
        session.flush()
        books = session.coverage()
        with contextlib.suppress(dmi.CaptureError):
            session.detach()
    assert balanced(books) and rows_of(books, "captured") < books["rows"]
    engine.end()


def test_a_store_on_a_read_only_file_system(tmp_path: Path) -> None:
    """An engine refuses it, and says why; readers need no permission."""
    model, store = llama(), tmp_path / "s"
    with plainly(model.model.layers[1]) as seen, dmi.attach(model, RESIDUAL, store=store) as session, torch.no_grad():
        model(prompts(1, 7), use_cache=False)
    stop(store)
    frozen = namespace(f'mount --bind {store} {store}; mount -o remount,ro,bind {store}')
    refused = subprocess.run([*frozen, engines.binary(), "serve", "--store", str(store)], capture_output=True, text=True, timeout=600)
    assert refused.returncode != 0 and "mount the file system for writing" in refused.stderr, refused.stderr
    rows = tmp_path / "rows.npy"
    read = [engines.binary(), "get", "--store", str(store), "--request", session.requests[0], "--site", "blocks.1.hook_resid_post", "--out", str(rows)]
    subprocess.run([*frozen, *read], check=True, timeout=600)
    assert np.array_equal(np.load(rows), seen[0][0].numpy())
