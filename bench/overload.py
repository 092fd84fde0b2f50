#!/usr/bin/env python3
"""What an overloaded engine costs the model, and how long until everything is captured again after it.

    python bench/overload.py [--seconds N] [--device cuda] [--store DIR] [--save [FOLDER]]

Two copies of one model take turns, step by step (on a GPU eight by eight), one observed and one not, either first as often; the figure is the median of the
ratios of neighbouring turns, by the clock and by the thread's own processor time, which other programs disturb less. In best-effort mode: the disk takes a tenth of what comes (an engine built with `-tags slowdisk`), then all again; then the
engine is stopped for 10 s, and goes on. Afterwards the books are held against what was computed. In complete mode the disk is slow
for a while: nothing may be lost, and the wait is reported. On a GPU both models run in CUDA graphs. Needs Go, or what it makes of `make
gpu-bench`, bin/dmi-slowdisk. `--save` writes bench/results/, or FOLDER; `--commit` says of what, where
this is no checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import result
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dmi

ROOT = Path(__file__).resolve().parent.parent
HOOKS = ["blocks.*.hook_resid_post", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out"]
POLICY = """
rules:
- {name: residual, hooks: "blocks.*.hook_resid_post", level: full, priority: 5}
- {name: the rest, hooks: "blocks.**", level: full}
"""


BATCH = 8
"""On a GPU: of residuals and what is added to them 4.5 MB in a step of 8.4 ms, about what a disk takes."""


class Turn(NamedTuple):
    observed: float
    plain: float
    observed_cpu: float
    plain_cpu: float


class Bench:
    def __init__(self, store: Path, mode: str, device: str) -> None:
        torch.manual_seed(0)
        self.gpu = device != "cpu"
        self.speed = store.parent / f"{store.name}.disk_bytes_per_s"
        self.speed.write_text("0")
        self.tokens = self.turns = 0
        self.numbers: list[int] | None = None
        self.steps = 8 if self.gpu else 1  # of a turn: the host is ahead of a device, as in any loop; each replays another recording, as in gpu_overhead
        if self.gpu:
            # Decoding of a batch, as in gpu_overhead, by the shape of Qwen3-4B.
            from gpu_model import Decode, model, record, twin

            self.plain = model(36)
            self.model = twin(self.plain)
            mine, plain = Decode(self.model, BATCH), Decode(self.plain, BATCH)
            mine(), plain()
            self.rows, self.rows_a_step = torch.ones(BATCH, 1, dtype=torch.int64), BATCH
        else:
            # Layers as wide as those of the smallest models that people serve (0.5 billion parameters, 24 layers), of which there are 4.
            config = LlamaConfig(vocab_size=1024, hidden_size=896, intermediate_size=4864, num_hidden_layers=4, num_attention_heads=14, num_key_value_heads=2)
            self.plain = LlamaForCausalLM(config).eval()
            self.model = LlamaForCausalLM(config).eval()
            self.ids = torch.randint(1, 1024, (1, 64))
            self.rows_a_step = self.ids.numel()
        sizes = {} if self.gpu else {"ring_mib": 8, "staging_mib": 8}
        self.session = dmi.attach(self.model, HOOKS, store=store, mode=mode, wait_bound_s=120, **sizes)
        self.engine = int(json.loads((store / "engine.json").read_text())["pid"])
        if self.gpu:
            places = random.Random(BATCH)
            self.plainly = [record(plain, scatter=places)[0] for _ in range(self.steps)]
            self.observedly = [record(mine, self.step, scatter=places)[0] for _ in range(self.steps)]

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step opened by hand, and counted. Requests decode 16 tokens: then others come, before what DMI takes for positions leaves the cache."""
        if self.tokens % (16 * self.rows_a_step) == 0:
            self.numbers = None
        with self.session.step(rows=self.rows, requests=self.numbers) as self.numbers:
            yield
        self.tokens += self.rows_a_step

    def forward(self, observed: bool, number: int) -> None:
        if not self.gpu:
            (self.model if observed else self.plain)(self.ids, use_cache=False)
            self.tokens += self.rows_a_step if observed else 0
        elif observed:
            with self.step():
                self.observedly[number].replay()
        else:
            self.plainly[number].replay()

    def turn(self) -> Turn:
        """Seconds of a step observed, and of one that is not."""
        took: dict[bool, tuple[float, float]] = {}
        self.turns += 1
        for observed in (True, False) if self.turns % 2 else (False, True):
            begun, used = time.perf_counter(), time.thread_time()
            for number in range(self.steps):
                self.forward(observed, number)
            if self.gpu:
                torch.cuda.synchronize()
            took[observed] = (time.perf_counter() - begun) / self.steps, (time.thread_time() - used) / self.steps
        return Turn(took[True][0], took[False][0], took[True][1], took[False][1])

    def run(self, seconds: float) -> list[Turn]:
        end, turns = time.monotonic() + seconds, []
        while time.monotonic() < end:
            turns.append(self.turn())
        return turns

    def until_whole(self, bound_s: float = 60) -> float:
        """Seconds of running until every rule is at its own level, and a step captured whole."""
        begun = time.monotonic()
        whole = threading.Event()

        def watch() -> None:
            while time.monotonic() - begun < bound_s and not whole.is_set():
                if not self.session.policy.get()["revision"]["lowered"]:
                    whole.set()
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        while True:
            was, before = whole.is_set(), self.lost()
            self.turn()
            if was and self.lost() == before:
                break
            if time.monotonic() - begun > bound_s:
                raise SystemExit(f"overload: rules are still lowered {bound_s} s after relief: {self.session.policy.get()['revision']}")
        took = time.monotonic() - begun
        watcher.join()
        return took

    def lost(self) -> int:
        return sum(self.session.status()["ring"]["rows"].values())


def best_effort(store: Path, seconds: float, device: str, row: Callable[..., None]) -> None:
    b = Bench(store, "best-effort", device)
    bound = 1.01 if b.gpu else 1.03
    with b.session as session, torch.no_grad():
        session.policy.set(POLICY)
        b.run(2)  # warming up
        figures = {"nothing is wrong": b.run(seconds)}
        demand = sum(r["bytes_per_s"] or 0 for r in session.policy.get()["rules"])
        row("captured when nothing is wrong", demand / 1e6, "MB/s")
        b.speed.write_text(str(demand / 10))
        lost = b.lost()
        b.run(max(5, seconds / 3))  # until it is felt
        figures["disk at a tenth of the demand"] = b.run(seconds)
        lowered = session.policy.get()["revision"]["lowered"]
        row("rows reduced or dropped while the disk is slow", b.lost() - lost, "rows")
        row("rules lowered while the disk is slow", len(lowered), "rules")
        b.speed.write_text("0")
        row("from a fast disk to full fidelity", b.until_whole(), "s", goal="<= 2", met=lambda v: v <= 2)
        b.run(2)
        lost = b.lost()
        os.kill(b.engine, signal.SIGSTOP)
        try:
            figures["engine stopped for 10 s"] = b.run(10)
        finally:
            os.kill(b.engine, signal.SIGCONT)
        row("rows dropped while the engine is stopped", b.lost() - lost, "rows")
        row("from the engine going on to full fidelity", b.until_whole(), "s", goal="<= 2", met=lambda v: v <= 2)
        for name, turns in figures.items():
            ratio = statistics.median(t.observed / t.plain for t in turns)
            calm = name.startswith("nothing")
            row(f"step, {name}", 1e3 * statistics.median(t.observed for t in turns), "ms", baseline=1e3 * statistics.median(t.plain for t in turns), ratio=ratio,
                goal="" if calm else f"<= {bound} of unobserved", met=None if calm else lambda _, ratio=ratio: ratio <= bound)  # fmt: skip
            row(f"processor time of a step, {name}", 1e3 * statistics.median(t.observed_cpu for t in turns), "ms",
                baseline=1e3 * statistics.median(t.plain_cpu for t in turns), ratio=statistics.median(t.observed_cpu / t.plain_cpu for t in turns))  # fmt: skip
        row("times that the model waited", session.status()["ring"]["waits"], "waits", goal="0", met=lambda v: v == 0)
        session.flush()
        books = session.coverage()
        booked = sum(sum(reasons.values()) for reasons in books["outcomes"].values())
        row("rows computed and not on the books", b.tokens * len(session.sites) - booked, "rows", goal="0", met=lambda v: v == 0)


def complete(store: Path, seconds: float, device: str, row: Callable[..., None]) -> None:
    b = Bench(store, "complete", device)
    with b.session as session, torch.no_grad():
        b.run(2)
        begun = session.status()["ring"]["captured_bytes"]
        b.run(3)
        demand = (session.status()["ring"]["captured_bytes"] - begun) / 3
        b.speed.write_text(str(demand / 10))
        for _ in range(20):  # rings, staging and the engine's buffer take something in before the model has to wait
            if session.status()["ring"]["wait_ns"] > 0:
                break
            b.run(seconds)
        before = session.status()["ring"]["wait_ns"]
        turns = b.run(seconds)
        waited = (session.status()["ring"]["wait_ns"] - before) / 1e9
        longer = b.steps * sum(t.observed - t.plain for t in turns)
        observed, plain = statistics.mean(t.observed for t in turns), statistics.mean(t.plain for t in turns)
        row("step, complete mode, disk at a tenth of the demand, mean", 1e3 * observed, "ms", baseline=1e3 * plain, ratio=observed / plain)
        b.speed.write_text("0")
        session.flush()
        row("wait reported in complete mode, of what its steps took longer", waited, "s", baseline=longer, goal="> 0", met=lambda v: v > 0)
        row("wait reported in complete mode, all in all", session.status()["ring"]["wait_ns"] / 1e9, "s")
        captured = sum(session.coverage()["outcomes"]["captured"].values())
        row("rows lost in complete mode", b.tokens * len(session.sites) - captured, "rows", goal="0", met=lambda v: v == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30, help="of each measurement")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--store", type=Path, default=ROOT / "build", metavar="DIR", help="where the engine's disk is")
    parser.add_argument("--save", nargs="?", type=Path, const=result.FOLDER, metavar="FOLDER")
    parser.add_argument("--commit", default="")
    given = parser.parse_args()
    engine = ROOT / "bin" / "dmi-slowdisk"
    if shutil.which("go") is None and not engine.exists():
        raise SystemExit("overload: Go is needed, to build an engine whose disk can be slow")
    if shutil.which("go") is not None:
        subprocess.run(["go", "build", "-trimpath", "-tags", "slowdisk", "-o", str(engine), "./cmd/dmi"], cwd=ROOT, check=True, env={**os.environ, "CGO_ENABLED": "0"})
    os.environ.update(DMI_BIN=str(engine), DMI_STORE_BUFFER_MIB="16", DMI_STORE_FLUSH_AGE_MS="100")
    warnings.simplefilter("ignore", dmi.CaptureWarning)
    torch.set_num_threads(1)  # the engine has the other cores
    rows: list[dict[str, Any]] = []

    def row(metric: str, value: float, unit: str, *, baseline: float | None = None, ratio: float | None = None, goal: str = "",
            met: Callable[[float], bool] | None = None) -> None:  # fmt: skip
        fine = None if met is None else bool(met(value))
        rows.append(result.row(metric, value, unit, baseline=baseline, ratio=ratio, goal=goal, met=fine))
        against = "" if ratio is None else f"  of {baseline:.2f}: x{ratio:.4f}"
        print(f"{metric:58} {value:12.2f} {unit}{against}{'' if fine is None else '  ' + goal + (': yes' if fine else ': NO')}", flush=True)

    with tempfile.TemporaryDirectory(prefix="dmi-overload-", dir=given.store) as folder:
        best_effort(Path(folder) / "best", given.seconds, given.device, row)
        complete(Path(folder) / "complete", given.seconds, given.device, row)
    if given.save and given.device == "cpu":
        print(f"written to {result.write('overload', rows, folder=given.save, torch=torch.__version__)}")
    elif given.save:
        from gpu_model import save

        save(given.save, "gpu_overload", given.commit, rows, None)


if __name__ == "__main__":
    main()
