"""`vllm serve` of a model on disk, in processes of its own, and an engine beside it that can be stopped and killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from dmi import engine as engines
from served import free_port

SRC = Path(__file__).parents[1] / "src"
START_S = 900
"""vLLM takes 80 s of two cores to start; a machine may have other work."""


class Daemon:
    """`dmi serve`, again and again over one store."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.socket = store / "engine.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen([engines.binary(), "serve", "--store", str(self.store)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert self._process.stdout is not None and b"engine_id" in self._process.stdout.readline()

    def signal(self, which: signal.Signals) -> None:
        """KILL and TERM end it."""
        assert self._process is not None
        self._process.send_signal(which)
        if which in (signal.SIGKILL, signal.SIGTERM):
            self._process.wait(timeout=300)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)


@contextlib.contextmanager
def daemon(store: Path) -> Iterator[Daemon]:
    engine = Daemon(store)
    try:
        yield engine
    finally:
        engine.close()


@contextlib.contextmanager
def serving(folder: Path, model: Path, *arguments: str, environ: dict[str, str], name: str = "model") -> Iterator[tuple[str, Path]]:
    """The server's address, and its log. Ends with SIGTERM, as an operator would."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    log = folder / "log"
    command = [sys.executable, "-m", "dmi.vllm.serve", str(model), "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(SRC), "HF_HUB_OFFLINE": "1", "VLLM_CACHE_ROOT": str(folder / "vllm-cache"), "VLLM_NO_USAGE_STATS": "1", **environ}
    with open(log, "wb") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert server.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-6000:]
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}", log
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # its workers too, where it failed
        server.wait()
