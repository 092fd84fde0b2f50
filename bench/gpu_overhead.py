#!/usr/bin/env python3
"""What observing costs a model on a GPU: decode steps of a Qwen3-4B-shaped model, observed and unobserved in turns.

    python bench/gpu_overhead.py [residual:graph:1,8,32 residual:eager:1,32 all:graph:1 all:graph:256:stats:8 ...] [--rounds 7] [--save bench/results]

Random weights, bf16, Hugging Face's own model with a static cache. "graph": the forward in a CUDA graph captured by hand and replayed in
session.step(); "eager": the model called. Sites: "residual" is every block's output, the final norm and the logits (38); "all" is twelve
tensors a layer beside the last two (434), none of which DMI has to compute. The sink is bench/sink (built to bin/bench-sink): every row drained, sliced by request, checksummed, counted and
discarded by an engine in its own process. Two models over the same weights, one of them observed, take turns, on the device's clock; each
graph is recorded six times (at batch 1 twenty times), with its buffers at other places each time: where they lie decides up to 4 % of a small step's time. Medians of the rounds are reported, and the
share of rows that were captured. LEVEL, behind the batches, is what is captured of every row (full), and N behind it of how many requests one is
observed (1). Disk as the sink (--sink disk) is the real engine, which stores what it is given on DIR. "host" is what the model's thread does for a step outside the forward. The baseline of a goal is a
device-to-device copy of the same bytes, measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import result
import torch
from gpu_model import Decode, model, record, save, sink, timed, twin

import dmi

LAYER = ["hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q",
         "attn.hook_rot_k", "attn.hook_z", "mlp.hook_pre", "mlp.hook_post"]  # fmt: skip
SITES = {
    "residual": ["blocks.*.hook_resid_post", "ln_final.hook_out", "unembed.hook_out"],
    "all": [*(f"blocks.*.{site}" for site in LAYER), "ln_final.hook_out", "unembed.hook_out"],
}
BATCHES = "1,8,32,64,128,256"
PLAN = [f"{which}:{way}:{BATCHES}" for which in ("residual", "all") for way in ("graph", "eager")]
RECORDINGS = 6
AT_BATCH_1 = 20
"""Recordings of a step so small that where a graph's buffers lie would decide more than is to be measured."""


def copy_ms(bytes_: int) -> float:
    """A device-to-device copy of so many bytes, rotating over buffers so that nothing stays in the cache."""
    buffers = [torch.empty(max(bytes_, 1), dtype=torch.uint8, device="cuda") for _ in range(max(2, min(8, (1 << 29) // max(bytes_, 1))))]
    target = torch.empty_like(buffers[0])
    state = {"i": 0}

    def once() -> None:
        target.copy_(buffers[state["i"] % len(buffers)])
        state["i"] += 1

    timed(once, 20)
    return statistics.median(timed(once, 100) for _ in range(5))


def full_bytes(made: Any, batch: int, which: str) -> int:
    """Bytes of all rows of a step."""
    hooked = twin(made)
    decode = Decode(hooked, batch)
    with sink() as (address, _):
        session = dmi.attach(hooked, SITES[which], engine=address, text="none")
        try:
            with session.step(rows=torch.ones(batch, 1, dtype=torch.int64)):
                decode()
            session.flush()
            return int(session._ring.counters()["captured_bytes"])
        finally:
            session.detach()


def measure(made: Any, batch: int, way: str, which: str, rounds: int, mode: str, level: str = "full", share: int = 1, store: Path | None = None) -> dict[str, Any]:
    whole = full_bytes(made, batch, which) if (level, share) != ("full", 1) else None
    hooked = twin(made)
    mine, plain = Decode(hooked, batch), Decode(made, batch)
    mine(), plain()
    # Where a graph's buffers came to lie decides up to 3 % of its time, so several recordings of each take turns.
    places = random.Random(batch)
    recorded = [record(plain, scatter=places)[0] for _ in range(AT_BATCH_1 if batch == 1 else RECORDINGS)] if way == "graph" else []
    unobserved: list[Callable[[], Any]] = [graph.replay for graph in recorded] or [plain]
    timed(unobserved[0], 3)
    base = timed(unobserved[0], 5)
    # Called, the model is as fast as the host, which others disturb: many short turns then, rather than few long ones.
    steps, rounds = (max(3, int(300 / base) // len(unobserved)), rounds) if way == "graph" else (1, 5 * rounds)
    ours, theirs, host, outside = [], [], [], []
    ones = torch.ones(batch, 1, dtype=torch.int64)
    reports: list[dict[str, Any]] = [{"cpu_s": float("nan")}]
    with contextlib.ExitStack() as ends:
        if store is None:
            address, reports = ends.enter_context(sink(level, share))
            session = dmi.attach(hooked, SITES[which], engine=address, mode=mode, text="none")
        else:
            folder = ends.enter_context(tempfile.TemporaryDirectory(dir=store))
            session = dmi.attach(hooked, SITES[which], store=Path(folder) / "s", mode=mode, text="none")
        try:
            within = functools.partial(session.step, rows=ones)
            forwards: list[Callable[[], Any]] = [graph.replay for graph in [record(mine, within, scatter=places)[0] for _ in recorded]] or [mine]
            numbers: list[int] | None = None

            def observed(forward: Callable[[], Any]) -> None:
                nonlocal numbers
                start = time.perf_counter_ns()
                with session.step(rows=ones, requests=numbers) as numbers:
                    inside = time.perf_counter_ns()
                    forward()
                    done = time.perf_counter_ns()
                host.append(time.perf_counter_ns() - start - (done - inside))

            for forward in forwards:
                timed(functools.partial(observed, forward), 3)
            session.flush()
            host.clear()
            before = session._ring.counters()
            for _ in range(rounds):
                theirs.append(statistics.mean(timed(forward, steps) for forward in unobserved))
                ours.append(statistics.mean(timed(functools.partial(observed, forward), steps) for forward in forwards))
            session.flush()
            torch.cuda.synchronize()
            after = session._ring.counters()
            if way == "graph":  # the same graphs outside a step capture nothing: what is left is where their buffers lie
                outside = [statistics.mean(timed(forward, steps) for forward in forwards) for _ in range(rounds)]
            device_bytes = session._ring.device_bytes
        finally:
            session.detach()
    done = rounds * (steps + 1) * len(forwards)
    captured = after["captured_rows"] - before["captured_rows"]
    outcomes = {reason: rows - before["rows"][reason] for reason, rows in after["rows"].items()}
    lost = sum(rows for reason, rows in outcomes.items() if reason != "policy")
    bytes_ = (after["captured_bytes"] - before["captured_bytes"]) // done
    copying = copy_ms(whole or bytes_)
    observed_ms, plain_ms = statistics.median(ours), statistics.median(theirs)

    def spread(times: list[float]) -> float:
        """Of the middle half."""
        low, _, high = statistics.quantiles(times, n=4)
        return (high - low) / plain_ms

    return {
        "way": way, "sites": len(session.sites), "which": which, "batch": batch, "mode": mode, "level": level, "share": share, "sink": "checksum" if store is None else "disk", "full_bytes": whole or bytes_, "steps": done, "unobserved_ms": plain_ms, "observed_ms": observed_ms,
        "idle_ms": statistics.median(outside or [float("nan")]), "overhead": observed_ms / plain_ms - 1, "spread": spread(ours), "spread_unobserved": spread(theirs), "rounds": {"observed_ms": ours, "unobserved_ms": theirs, "outside_a_step_ms": outside},
        "bytes": bytes_, "copy_ms": copying, "captured": captured / max(1, captured + lost), "lost": {reason: rows for reason, rows in outcomes.items() if rows and reason != "policy"},
        "host_us": statistics.median(host) / 1e3, "wait_ms": (after["wait_ns"] - before["wait_ns"]) / 1e6, "device_mib": device_bytes / (1 << 20),
        "engine": reports[0],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", nargs="*", default=PLAN, metavar="SITES:WAY:BATCHES")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--mode", default="complete")
    parser.add_argument("--sink", choices=["checksum", "disk"], default="checksum")
    parser.add_argument("--store", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR", help="where --sink disk stores")
    parser.add_argument("--save", metavar="FOLDER")
    parser.add_argument("--name", default="gpu_overhead", help="of the results")
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    made = model(arguments.layers)
    rows: list[dict[str, Any]] = []
    for what in arguments.plan:
        which, way, batches, level, share = [*what.split(":"), "full", "1"][:5] if what.count(":") != 3 else [*what.split(":"), "1"]
        for batch in map(int, batches.split(",")):
            got = measure(made, batch, way, which, arguments.rounds, arguments.mode, level, int(share), arguments.store if arguments.sink == "disk" else None)
            rows.append(got)
            floor = {"graph": 0.005, "eager": 0.01}[way] if which == "residual" else 0.02
            # A copy reads and writes: half of it is what reading the bytes once takes.
            moved = 1.2 * got["copy_ms"] if level == "full" else 1.5 * got["copy_ms"] / 2
            got["allowed"] = 0.01 if int(share) > 1 else max(floor, moved / got["unobserved_ms"])
            print(
                f"{which:8} {way:5} {level}/{share} batch {batch:3}: {got['unobserved_ms']:7.3f} -> {got['observed_ms']:7.3f} ms  {100 * got['overhead']:+6.2f} % "
                f"(outside a step {got['idle_ms']:.3f}; allowed {100 * got['allowed']:.2f}; spread {100 * got['spread']:.2f}/{100 * got['spread_unobserved']:.2f})  {got['bytes'] / 1e6:7.2f} MB, {100 * got['bytes'] / got['full_bytes']:.2f} % of all  "
                f"captured {100 * got['captured']:.2f} % {got['lost']}  host {got['host_us']:.0f} us  wait {got['wait_ms']:.0f} ms  engine {got['engine']['cpu_s']:.1f} s",
                flush=True,
            )  # fmt: skip
            if arguments.save:
                save(Path(arguments.save), arguments.name, arguments.commit, [
                    result.row(f"{r['sites']} sites, {r['way']}, batch {r['batch']}: step, sink {r['sink']}, {100 * r['captured']:.2f} % captured({r['level']}), of one in {r['share']} requests", r["observed_ms"], "ms",
                               baseline=r["unobserved_ms"], goal=f"<= {1 + r['allowed']:.4f}", met=r["overhead"] <= r["allowed"] and r["captured"] == 1.0)
                    for r in rows
                ], rows)  # fmt: skip


if __name__ == "__main__":
    main()
