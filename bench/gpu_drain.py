#!/usr/bin/env python3
"""How fast captures leave the GPU: a graph that captures far more than anything could drain, against the copy engine alone.

    python bench/gpu_drain.py [--rings 256,1024] [--steps 400] [--save bench/results]

A graph captures 32 tensors of 4 MiB a step, between matrix products, in complete mode: the model is then as fast as what it captures is
drained. Staging on the host is as by default, 256 MiB, whatever the ring on the device. The sink is bench/sink in its own process: every byte crosses PCIe, is sliced by request, checksummed and counted. The clock stops when
all of it has been. The copy engine alone: device to page-locked memory, 256 MiB at a time, in the same run.

And what the drain does to who else copies: a model whose logits of 256 requests (155 MB) are captured at the end of each step then copies 1 KiB to the host, as a server does with the tokens that it sampled.
Microseconds from the step's end to that copy's, on the device's clock, against the same model unobserved, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import result
import torch
from gpu_model import save, sink, timed

import dmi

TENSORS, ROWS, WIDTH = 32, 1024, 2048  # bf16: 4 MiB each


class Wide(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.points = torch.nn.ModuleList(dmi.HookPoint(f"wide{n}", rows=1) for n in range(TENSORS))
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for point in self.points:
            x = point(x @ self.weight)
        return x


def copy_engine() -> float:
    """GB/s."""
    source = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    timed(lambda: target.copy_(source, non_blocking=True), 5)
    return (256 << 20) / 1e6 / statistics.median(timed(lambda: target.copy_(source, non_blocking=True), 10) for _ in range(5))


def drained(ring_mib: int, steps: int, requests: int) -> dict[str, Any]:
    model = Wide().to("cuda", torch.bfloat16).eval()
    x = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16)
    rows = [ROWS // requests] * requests
    numbers: list[int] | None = None
    with sink() as (address, reports), torch.no_grad():
        session = dmi.attach(model, "wide*", engine=address, text="none", ring_mib=ring_mib, staging_mib=256)
        try:
            model(x)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(x)

            def step() -> None:
                nonlocal numbers
                with session.step(rows=rows, requests=numbers) as numbers:
                    graph.replay()

            for _ in range(4):
                step()
            session.flush()
            before = session._ring.counters()
            start = time.perf_counter()
            for _ in range(steps):
                step()
            session.flush()
            seconds = time.perf_counter() - start
            after = session._ring.counters()
        finally:
            session.detach()
    bytes_ = after["captured_bytes"] - before["captured_bytes"]
    if bytes_ != steps * TENSORS * ROWS * WIDTH * 2:
        raise SystemExit(f"bench/gpu_drain: {bytes_} bytes were captured of {steps * TENSORS * ROWS * WIDTH * 2}")
    return {"ring_mib": ring_mib, "requests": requests, "bytes": bytes_, "seconds": seconds, "gb_s": bytes_ / 1e9 / seconds,
            "spilled": after["spilled_bytes"] - before["spilled_bytes"], "engine": reports[0], "engine_s_per_gb": reports[0]["cpu_s"] / (reports[0]["bytes"] / 1e9)}  # fmt: skip


class Serving(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits = dmi.HookPoint("logits", rows=1)
        self.weights = torch.nn.ParameterList(torch.randn(4096, 4096) / 64 for _ in range(40))
        self.unembed = torch.nn.Parameter(torch.randn(4096, 151936) / 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = x @ weight
        return self.logits((x @ self.unembed).float()).amax(dim=-1)


def beside(steps: int) -> dict[str, list[float]]:
    """Microseconds that a small copy takes, behind steps that are observed and behind those that are not."""
    observed, plain = (Serving().to("cuda", torch.bfloat16).eval() for _ in range(2))
    x = torch.randn(256, 4096, device="cuda", dtype=torch.bfloat16)
    host = torch.empty(256, pin_memory=True)
    took: dict[str, list[float]] = {"plain": [], "observed": []}
    with sink() as (address, _), torch.no_grad(), dmi.attach(observed, "logits", engine=address, text="none", mode="best-effort") as session:
        graphs = {}
        for name, model in (("plain", plain), ("observed", observed)):
            model(x)
            torch.cuda.synchronize()
            graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[name]):
                out = model(x)
        numbers: list[int] | None = None
        for step in range(2 * steps + 20):
            name = ("plain", "observed")[step // 10 % 2]  # ten of each: what the last one left behind is gone by then
            ends, copied = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if name == "observed":
                with session.step(rows=[1] * 256, requests=numbers) as numbers:
                    graphs[name].replay()
            else:
                graphs[name].replay()
            ends.record()
            host.copy_(out, non_blocking=True)
            copied.record()
            copied.synchronize()
            if step >= 20:
                took[name].append(1e3 * ends.elapsed_time(copied))
    return {name: sorted(values) for name, values in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rings", default="256,1024")
    parser.add_argument("--requests", default="1,256")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save", metavar="FOLDER")
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    alone = copy_engine()
    print(f"copy engine alone: {alone:.1f} GB/s", flush=True)
    raw, rows = [], []
    for ring_mib in map(int, arguments.rings.split(",")):
        for requests in map(int, arguments.requests.split(",")):
            got = drained(ring_mib, arguments.steps, requests)
            raw.append(got)
            goal = 0.95 if ring_mib >= 1024 else 0.9
            print(f"ring {ring_mib:5} MiB, {requests:3} requests: {got['gb_s']:6.2f} GB/s, {got['gb_s'] / alone:.2f} of it; engine {got['engine_s_per_gb']:.2f} CPU s/GB; "
                  f"{got['spilled'] / 1e6:.0f} MB spilled", flush=True)  # fmt: skip
            rows.append(result.row(f"drained with a ring of {ring_mib} MiB, {requests} requests a step, sink checksum, 100 % captured(full)", got["gb_s"], "GB/s",
                                   baseline=alone, goal=f">= {goal}", met=got["gb_s"] >= goal * alone))  # fmt: skip
            rows.append(result.row(f"engine's CPU, ring of {ring_mib} MiB, {requests} requests a step", got["engine_s_per_gb"], "s/GB"))
    waits = beside(arguments.steps)
    raw.append({f"small copy, {name}, us": values for name, values in waits.items()})
    for share, name in ((0.5, "median"), (0.99, "p99")):
        observed, plain = (values[int(share * (len(values) - 1))] for values in (waits["observed"], waits["plain"]))
        print(f"a small copy of the model's own, {name}: {observed:.0f} us, unobserved {plain:.0f}", flush=True)
        rows.append(result.row(f"a copy of 1 KiB behind a step whose 155 MB of logits are drained, {name}", observed, "us", baseline=plain))
    if arguments.save:
        save(Path(arguments.save), "gpu_drain", arguments.commit, rows, raw)


if __name__ == "__main__":
    main()
