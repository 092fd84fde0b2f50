#!/usr/bin/env python3
"""How fast captures leave the GPU: a graph that captures far more than anything could drain, against the copy engine alone.

    python bench/gpu_drain.py [--rings 256,1024] [--steps 400] [--save bench/results]

A graph captures 32 tensors of 4 MiB a step, between matrix products, in complete mode: the model is then as fast as what it captures is
drained. Staging on the host is as by default, 256 MiB, whatever the ring on the device. The sink is bench/sink in its own process: every byte crosses PCIe, is sliced by request, checksummed and counted. The clock stops when
all of it has been. The copy engine alone: device to page-locked memory, 256 MiB at a time, in the same run.
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
    if arguments.save:
        save(Path(arguments.save), "gpu_drain", arguments.commit, rows, raw)


if __name__ == "__main__":
    main()
