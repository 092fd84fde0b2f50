#!/usr/bin/env python3
"""How long a decoded token's tensor takes from the GPU to a subscriber, and what a step costs the model's thread.

    python bench/gpu_latency.py [--steps 400] [--batch 1] [--save bench/results]

A Qwen3-4B-shaped model decodes in a CUDA graph, 37 sites observed, by the real engine, which stores them. The subscriber is a process of its own (bench/live, built to
bin/bench-live) that reads the engine's stream of tensors. The clock starts when the host sees that the device has come to the end of the step, a few
microseconds behind its last publication, and stops when the subscriber has read the last block's tensor. A pause between steps keeps them apart. "host" is what the
model's thread does for a step outside the forward: opening and closing it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import result
import torch
from gpu_model import ROOT, Decode, model, record, save

import dmi

LAYERS = 36
WARM = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--save", metavar="FOLDER")
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    decode = Decode(model(LAYERS), arguments.batch)
    decode()
    rows = torch.ones(arguments.batch, 1, dtype=torch.int64)
    took, host = [], []
    with tempfile.TemporaryDirectory() as folder, dmi.attach(decode.model, ["blocks.*.hook_resid_post", "ln_final.hook_out"], store=Path(folder) / "s", text="none") as session:
        graph, _ = record(decode, lambda: session.step(rows=rows))
        session.flush()
        door = json.loads((Path(folder) / "s" / "engine.json").read_text())["http_unix"]
        site = f"blocks.{LAYERS - 1}.hook_resid_post"
        subscriber = subprocess.Popen([ROOT / "bin" / "bench-live", "-follow", door, "-site", site], stdout=subprocess.PIPE, text=True)
        assert subscriber.stdout is not None
        try:
            if subscriber.stdout.readline() != "ready\n":
                raise SystemExit("bench/gpu_latency: bin/bench-live did not start; `make gpu-bench` builds it")
            time.sleep(0.5)
            numbers = None
            done = torch.cuda.Event()
            for step in range(WARM + arguments.steps):
                if step % 20 == 0:  # the model stays where it is, and what DMI takes for positions must not leave its cache
                    numbers = None
                begin = time.perf_counter_ns()
                with session.step(rows=rows, requests=numbers) as numbers:
                    inside = time.perf_counter_ns()
                    graph.replay()
                    outside = time.perf_counter_ns()
                host.append(time.perf_counter_ns() - begin - (outside - inside))
                done.record()
                while not done.query():
                    pass
                published = time.time_ns()
                arrived = [int(subscriber.stdout.readline()) for _ in range(arguments.batch)][-1]
                took.append(arrived - published)
                time.sleep(0.002)
        finally:
            subscriber.terminate()
            subscriber.wait()
    took, host = sorted(took[WARM:]), sorted(host[WARM:])
    p50, p99, step_us = took[len(took) // 2] / 1e3, took[len(took) * 99 // 100] / 1e3, statistics.median(host) / 1e3
    print(f"batch {arguments.batch}: publication -> subscriber p50 {p50:.0f} us, p99 {p99:.0f} us; host {step_us:.1f} us a step for {LAYERS + 1} hooks", flush=True)
    out = [result.row(f"publication on the GPU -> subscriber, p50, batch {arguments.batch}", p50, "us", goal="<= 150", met=p50 <= 150),
           result.row(f"publication on the GPU -> subscriber, p99, batch {arguments.batch}", p99, "us", goal="<= 1000", met=p99 <= 1000),
           result.row(f"host work of a step, {LAYERS + 1} hooks, CUDA graph, batch {arguments.batch}", step_us, "us", goal="<= 10", met=step_us <= 10)]  # fmt: skip
    if arguments.save:
        save(Path(arguments.save), "gpu_latency", arguments.commit, out, {"took_ns": took, "host_ns": host})


if __name__ == "__main__":
    main()
