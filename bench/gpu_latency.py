#!/usr/bin/env python3
"""How long a decoded token's tensor takes from the GPU to a subscriber, and what a step costs the model's thread.

    python bench/gpu_latency.py [--steps 400] [--batch 1,32,256] [--save bench/results]

A Qwen3-4B-shaped model decodes in a CUDA graph, 37 sites observed, by the real engine, which stores them: one as it is by default, which looks for more while somebody follows (control.busy_poll_s), and one that sleeps.
The model ends with its final norm: logits would come behind the last publication and before the end of the step, and take 0.2 ms. The subscriber is a process of its own (bench/live, built to bin/bench-live) that reads the engine's stream of tensors: of the last block's alone, and of all 37. The clock starts
when the host sees that the device has come to the end of the step, a few microseconds behind its last publication, and stops when the subscriber has read the last block's tensor. A pause
between steps keeps them apart. "host" is what the model's thread does for a step outside the forward, opening and closing it: in steps that follow each other, as a model decodes, and in those
with a pause, before which the core's caches have other things to hold. Of it, what libdmi's two calls take, each of which launches a kernel, beside the launch of a kernel that does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import result
import torch
from gpu_model import ROOT, Decode, model, record, save

import dmi
from dmi.engine import binary

LAYERS = 36
WARM = 50
ENGINES = {"": [], ", an engine that sleeps": ["--set", "control.busy_poll_s=0"]}


@contextlib.contextmanager
def engine(store: Path, settings: list[str]) -> Iterator[str]:
    """An engine of that configuration, which has the store; its HTTP socket."""
    process = subprocess.Popen([binary(), "serve", "--store", str(store), "--log-level", "warning", *settings], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["http_unix"]
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def subscriber(door: str, every: bool) -> Iterator[Iterator[int]]:
    """When each of the last block's tensors was read, by a subscriber of every site or of that one."""
    site = f"blocks.{LAYERS - 1}.hook_resid_post"
    process = subprocess.Popen([ROOT / "bin" / "bench-live", "-follow", door, "-site", site, *(["-every"] if every else [])], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            raise SystemExit("bench/gpu_latency: bin/bench-live did not start; `make gpu-programs` builds it")
        time.sleep(0.5)
        yield map(int, process.stdout)
    finally:
        process.terminate()
        process.wait()


class Calls:
    """How long libdmi's calls of a step take, and a bare launch beside them: nanoseconds."""

    def __init__(self, ring: Any) -> None:
        self.ring = ring
        self.took: dict[str, list[int]] = {"open": [], "close": [], "launch": []}
        self.originals = {name: getattr(ring, name) for name in ("open_next", "close_step")}

    def __enter__(self) -> Calls:
        for name, original in self.originals.items():
            setattr(self.ring, name, functools.partial(self.timed, name.partition("_")[0], original))
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.originals:
            delattr(self.ring, name)

    def timed(self, name: str, call: Callable[..., Any], *args: Any, **more: Any) -> Any:
        begin = time.perf_counter_ns()
        try:
            return call(*args, **more)
        finally:
            self.took[name].append(time.perf_counter_ns() - begin)

    def bare(self) -> None:
        self.timed("launch", torch.cuda._sleep, 0)


class Steps:
    """Steps of a graph, and how long the thread took for each outside its replay."""

    def __init__(self, session: dmi.Session, graph: torch.cuda.CUDAGraph, rows: torch.Tensor) -> None:
        self.session, self.graph, self.rows = session, graph, rows
        self.numbers: list[int] | None = None
        self.count = 0
        self.done = torch.cuda.Event()

    def __call__(self) -> int:
        if self.count % 20 == 0:  # the model stays where it is, and what DMI takes for positions must not leave its cache
            self.numbers = None
        self.count += 1
        begin = time.perf_counter_ns()
        with self.session.step(rows=self.rows, requests=self.numbers) as self.numbers:
            inside = time.perf_counter_ns()
            self.graph.replay()
            outside = time.perf_counter_ns()
        took = time.perf_counter_ns() - begin - (outside - inside)
        self.done.record()
        while not self.done.query():
            pass
        return took


def measure(made: Any, decode: Decode, batch: int, settings: list[str], steps: int) -> dict[str, list[int]]:
    """Nanoseconds a step: to the subscriber, and of the host with pauses and without."""
    rows = torch.ones(batch, 1, dtype=torch.int64)
    took: dict[str, list[int]] = {"took": [], "every": [], "host": [], "paused": []}
    with tempfile.TemporaryDirectory() as folder, engine(Path(folder) / "s", settings) as door:
        with dmi.attach(made, ["blocks.*.hook_resid_post", "ln_final.hook_out"], store=Path(folder) / "s", text="none") as session:
            graph, _ = record(decode, lambda: session.step(rows=rows))
            step = Steps(session, graph, rows)
            took["host"] = [step() for _ in range(WARM + steps)]
            with Calls(session._ring) as calls:
                for _ in range(WARM + steps):
                    step()
                    calls.bare()
            took.update(calls.took)
            session.flush()
            for name in ("took", "every"):
                with subscriber(door, every=name == "every") as arrivals:
                    for _ in range(WARM + steps):
                        took["paused"].append(step())
                        published = time.time_ns()
                        arrived = [next(arrivals) for _ in range(batch)][-1]
                        took[name].append(arrived - published)
                        time.sleep(0.002)
                session.flush()
    return {name: sorted(values[WARM:]) for name, values in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", default="1,32,256")
    parser.add_argument("--save", metavar="FOLDER")
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    made = model(LAYERS)
    out, raw = [], dict[str, Any]()
    for batch in map(int, arguments.batch.split(",")):
        decode = Decode(made, batch, logits=False)
        decode()
        for kind, settings in ENGINES.items():
            took = measure(made, decode, batch, settings, arguments.steps)
            (p50, p99), (all50, all99) = (
                (took[name][len(took[name]) // 2] / 1e3, took[name][len(took[name]) * 99 // 100] / 1e3) for name in ("took", "every")
            )
            host, paused, opening, closing, launch = (statistics.median(took[name]) / 1e3 for name in ("host", "paused", "open", "close", "launch"))
            print(f"batch {batch}{kind}: publication -> subscriber p50 {p50:.0f} us, p99 {p99:.0f} us, of every tensor {all50:.0f} and {all99:.0f} us; host {host:.1f} us a step for {LAYERS + 1} hooks, {paused:.1f} with pauses; open {opening:.1f}, close {closing:.1f}, a bare launch {launch:.1f}", flush=True)
            asked = batch == 1  # of one token; a larger batch has as many more to send
            out += [result.row(f"publication on the GPU -> subscriber, p50, batch {batch}{kind}", p50, "us", **({"goal": "<= 150", "met": p50 <= 150} if asked else {})),
                    result.row(f"publication on the GPU -> subscriber, p99, batch {batch}{kind}", p99, "us", **({"goal": "<= 1000", "met": p99 <= 1000} if asked else {})),
                    result.row(f"publication on the GPU -> subscriber of every tensor, p50, batch {batch}{kind}", all50, "us"),
                    result.row(f"publication on the GPU -> subscriber of every tensor, p99, batch {batch}{kind}", all99, "us"),
                    result.row(f"host work of a step, {LAYERS + 1} hooks, CUDA graph, batch {batch}{kind}", host, "us", goal="<= 10", met=host <= 10),
                    result.row(f"host work of a step, {LAYERS + 1} hooks, CUDA graph, batch {batch}{kind}, pauses between steps", paused, "us", goal="<= 10", met=paused <= 10),
                    result.row(f"of it, libdmi's opening, batch {batch}{kind}", opening, "us", baseline=launch),
                    result.row(f"of it, libdmi's closing, batch {batch}{kind}", closing, "us", baseline=launch)]  # fmt: skip
            raw[f"batch {batch}{kind}"] = {f"{name}_ns": values for name, values in took.items()}
    if arguments.save:
        save(Path(arguments.save), "gpu_latency", arguments.commit, out, raw)


if __name__ == "__main__":
    main()
