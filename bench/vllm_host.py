#!/usr/bin/env python3
"""What a step of vLLM's costs the thread that runs its model, besides what is captured: row tables, requests, tokens. Needs no vLLM and no GPU.

    python bench/vllm_host.py [--steps 600] [--save bench/results]

Of an observer as the plugin has it, on a ring of the CPU that somebody empties, told through a socket that another process reads: microseconds a step, the median, of requests that
all decode a token a step, with the text kept of them or not; of such steps where one request is over and another begins each time, and where all do. What is done ahead of the forward
is what a first token waits for, and is said apart. Then what opening and closing a step take on the average beside another thread that runs Python a third of the time, as vLLM's process
has them: where they keep Python's global lock, as the plugin has it, and where they give it up.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import result

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python" / "tests"))

from dmi import native  # noqa: E402
from dmi.control import frame  # noqa: E402
from dmi.instrument import Plan  # noqa: E402
from dmi.requests import Requests, new_run  # noqa: E402
from dmi.vllm.batches import Batch  # noqa: E402
from dmi.vllm.hooks import Arrangement  # noqa: E402
from dmi.vllm.observer import Observer  # noqa: E402
from ringreader import RingReader  # noqa: E402

PROMPT = 16
PARTS = ("scheduled", "open", "launched", "close", "sampled")
AHEAD = PARTS[:2]


def new_request(number: int) -> Any:
    return SimpleNamespace(req_id=f"chatcmpl-{number:016x}-{number:08x}", prompt_token_ids=list(range(PROMPT)), sampling_params=SimpleNamespace(max_tokens=None))


@contextlib.contextmanager
def reader() -> Iterator[Callable[..., None]]:
    """Sends messages to a process that reads them."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(["cat"], stdin=theirs, stdout=subprocess.DEVNULL)
    theirs.close()
    try:
        yield lambda *messages: ours.sendall(b"".join(map(frame, messages)))
    finally:
        ours.close()
        process.wait()


def measure(batch: int, steps: int, text: str, changing: int, send: Callable[..., None]) -> dict[str, float]:
    """`changing`: requests that are over after each step."""
    ring = native.Ring(mode="best-effort")
    ring.add_site("site", layer=None, space=0, roles=(1, 2))
    engine = RingReader(ring)
    model: Any = SimpleNamespace(config=None)
    requests = Requests(new_run(None, ()), text)
    requests.send = send
    observer = Observer(SimpleNamespace(max_model_len=None), model, Arrangement(model, Plan(()), 1), ring, [], requests)
    observer._later = True  # as on a GPU
    going, computed, begun = [new_request(i) for i in range(batch)], np.zeros(batch, "<i4"), batch
    arrivals, finished = list(going), set[str]()
    took: dict[str, list[float]] = {part: [] for part in PARTS}
    for step in range(steps):
        output = SimpleNamespace(finished_req_ids=finished, scheduled_new_reqs=arrivals, total_num_scheduled_tokens=batch)
        counts = {request.req_id: 1 if at else PROMPT for request, at in zip(going, computed.tolist(), strict=True)}
        ids, tokens = [request.req_id for request in going], [[7] for _ in going]
        for part in PARTS:
            args: tuple[Any, ...] = {"scheduled": (output,), "open": (Batch(ids, [counts[key] for key in ids], computed),), "launched": (), "close": (),
                                     "sampled": (observer.asked(), ids, tokens)}[part]  # fmt: skip
            kwargs, call = {"aborted": False} if part == "close" else {}, getattr(observer, part)
            before = time.perf_counter()
            call(*args, **kwargs)
            took[part].append(1e6 * (time.perf_counter() - before))
        computed += [counts[key] for key in ids]
        arrivals, finished = [], set()
        for at in (n % batch for n in range(changing * step, changing * (step + 1))):
            finished.add(going[at].req_id)
            going[at], computed[at], begun = new_request(begun), 0, begun + 1
            arrivals.append(going[at])
        if step % 8 == 0:
            engine.drain()
    ring.close()
    return {part: statistics.median(values[steps // 8 :]) for part, values in took.items()}


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Another thread that runs Python for half a millisecond, and waits for one."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(0.001):
            until = time.perf_counter() + 0.0005
            while time.perf_counter() < until:
                pass

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def beside(steps: int, keep_gil: bool) -> list[float]:
    """Microseconds that opening and closing take, of steps whose rest is Python too."""
    ring = native.Ring(mode="best-effort", keep_gil=keep_gil)
    ring.add_site("site", layer=None, space=0, roles=(1, 2))
    engine, took = RingReader(ring), []
    with busy():
        for step in range(steps):
            before = time.perf_counter()
            ring.open_step(step, b"", width=(0, 0, 0), packed=True)
            ring.close_step(step)
            after = time.perf_counter()
            took.append(1e6 * (after - before))
            while time.perf_counter() < after + 0.0006:
                pass
            if step % 8 == 0:
                engine.drain()
    ring.close()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--save", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    raw: dict[str, Any] = {}
    for name, text, changing in (("all decode", "none", 0), ("all decode, tokens are kept", "ids", 0), ("one ends and one begins", "none", 1), ("all end and as many begin", "none", -1)):
        for batch in (1, 32, 256):
            if changing < 0 and batch == 1:
                continue
            with reader() as send:
                raw[f"{name}, batch {batch}"] = parts = measure(batch, given.steps, text, batch if changing < 0 else changing, send)
            ahead = sum(parts[part] for part in AHEAD)
            rows += [result.row(f"{name}, batch {batch}", sum(parts.values()), "us a step"), result.row(f"{name}, batch {batch}: ahead of the forward", ahead, "us a step")]
            print(f"{name}, batch {batch}: {sum(parts.values()):.0f} us a step, {ahead:.0f} ahead of the forward: {', '.join(f'{part} {value:.0f}' for part, value in parts.items())}", flush=True)
    means: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(6):
        means[turn % 2 == 0].append(statistics.mean(beside(2 * given.steps, turn % 2 == 0)))
    kept, given_up = statistics.median(means[True]), statistics.median(means[False])
    lock = result.row("opening and closing beside a busy thread, the global lock kept, mean", kept, "us a step", baseline=given_up)
    print(f"opening and closing beside a busy thread: {kept:.0f} us a step on the average, {given_up:.0f} where the global lock is given up", flush=True)
    if given.save:
        print("written to", result.write("vllm_host", rows, folder=given.save, raw=raw))
        print("written to", result.write("vllm_host_lock", [lock], folder=given.save, raw={"kept": means[True], "given up": means[False]}))


if __name__ == "__main__":
    main()
