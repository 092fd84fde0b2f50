#!/usr/bin/env python3
"""Getting hidden states, attentions and scores out of a decoding model: unmonitored, through Hugging Face's own outputs, through DMI.

    python bench/gpu_seed.py [--batches 1,8,32,64,128,256] [--lengths 16,32,64,128,256,512] [--ways graph,eager] [--rounds 3] [--save bench/results]

A Qwen3-4B-shaped model with random weights in bf16, eager attention (the only one that has attentions to give), static cache. Throughput is
batch * decode steps over the time until all of it is there: of "offload", in page-locked memory of the process, copied from
output_hidden_states, output_attentions and logits of each step; of "naive", the same by `.cpu()`; of DMI, in the engine's sink: drained,
sliced by request, checksummed, counted, in another process. Batches at 16 steps, and the largest batch at other lengths. Rounds take
turns; medians. What the engine counted must be what the model produced, or the run fails.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import result
import torch
from gpu_model import CONTEXT, PROMPT, Decode, model, record, save, sink, twin

import dmi

SITES = ["hook_embed", "blocks.*.hook_resid_post", "ln_final.hook_out", "blocks.*.attn.hook_pattern", "unembed.hook_out"]
ASK = {"output_hidden_states": True, "output_attentions": True}


def wall(run: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def outputs(out: Any) -> list[torch.Tensor]:
    return [*out.hidden_states, *out.attentions, out.logits]


def measure(plain_model: Any, hooked: Any, batch: int, lengths: list[int], way: str, rounds: int) -> list[dict[str, Any]]:
    plain, mine = Decode(plain_model, batch), Decode(hooked, batch)
    plain(), mine()
    if way == "graph":
        bare, asking = record(plain)[0], record(plain, **ASK)
        forward: Callable[[], Any] = bare.replay

        def ask() -> Any:
            asking[0].replay()
            return asking[1]
    else:
        forward, ask = plain, lambda: plain(**ASK)
    # The same shapes at every step: what is offloaded at step n is copied over what was at step n - 1, as a consumer that keeps up would let it.
    pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in outputs(ask())]

    def unmonitored(steps: int) -> None:
        for _ in range(steps):
            forward()
        torch.cuda.synchronize()

    def offload(steps: int) -> None:
        for _ in range(steps):
            for to, value in zip(pinned, outputs(ask()), strict=True):
                to.copy_(value, non_blocking=True)
        torch.cuda.synchronize()

    def naive(steps: int) -> None:
        for _ in range(steps):
            for value in outputs(ask()):
                value.cpu()

    ones = torch.ones(batch, 1, dtype=torch.int64)
    numbers: list[int] | None = None
    made: dict[int, dict[str, list[float]]] = {length: {"unmonitored": [], "dmi": [], "offload": [], "naive": []} for length in lengths}
    with sink() as (address, reports):
        session = dmi.attach(hooked, SITES, engine=address, text="none")
        try:
            within = functools.partial(session.step, rows=ones, keys=CONTEXT)
            observed: Callable[[], Any] = record(mine, within)[0].replay if way == "graph" else mine

            def through(steps: int) -> None:
                nonlocal numbers
                for step in range(steps):
                    if step % PROMPT == 0:  # the model stays where it is, and what DMI takes for positions must not leave its cache
                        numbers = None
                    with session.step(rows=ones, requests=numbers, keys=CONTEXT) as numbers:
                        observed()
                session.flush()

            for warm in (unmonitored, through, offload, naive):
                warm(2)
            begun = session._ring.counters()
            ways = {"unmonitored": unmonitored, "dmi": through, "offload": offload, "naive": naive}
            for _ in range(rounds):
                for length in lengths:
                    for name, run in ways.items():
                        made[length][name].append(wall(lambda run=run, length=length: run(length)))  # type: ignore[misc]
            ended = session._ring.counters()
            sites = len(session.sites)
        finally:
            session.detach()
    want = rounds * sum(lengths) * batch * sites
    got = ended["captured_rows"] - begun["captured_rows"]
    if got != want or reports[0]["rows"] != ended["captured_rows"]:
        raise SystemExit(f"bench/gpu_seed: {want} rows were produced and {got} captured; of {ended['captured_rows']} in all, {reports[0]['rows']} came to the sink")
    bytes_ = (ended["captured_bytes"] - begun["captured_bytes"]) // (rounds * sum(lengths))
    rows = []
    for length in lengths:
        seconds = {name: statistics.median(times) for name, times in made[length].items()}
        row = {"way": way, "batch": batch, "length": length, "bytes_a_step": bytes_, "seconds": seconds, "all_seconds": made[length],
               "tokens_per_s": {name: batch * length / s for name, s in seconds.items()}, "captured": 1.0}  # fmt: skip
        rows.append(row)
        speed = row["tokens_per_s"]
        print(f"{way:5} batch {batch:3} length {length:3}: unmonitored {speed['unmonitored']:9.1f} tokens/s, DMI {speed['dmi'] / speed['unmonitored']:.3f} of it, "
              f"offload {speed['offload'] / speed['unmonitored']:.3f}, naive {speed['naive'] / speed['unmonitored']:.3f}; DMI over offload {speed['dmi'] / speed['offload']:.2f}x, "
              f"over naive {speed['dmi'] / speed['naive']:.2f}x; {bytes_ / 1e6:.1f} MB a step", flush=True)  # fmt: skip
    return rows


def plot(raw: list[dict[str, Any]], path: Path) -> None:
    """Throughput against the unmonitored model's, over batches at the first length and over lengths at the largest batch."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    batch, length = max(r["batch"] for r in raw), min(r["length"] for r in raw)
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for panel, axis, some in ((panels[0], "batch", [r for r in raw if r["length"] == length]), (panels[1], "length", [r for r in raw if r["batch"] == batch])):
        for way in sorted({r["way"] for r in some}):
            for name in ("dmi", "offload", "naive"):
                line = [(r[axis], r["tokens_per_s"][name] / r["tokens_per_s"]["unmonitored"]) for r in some if r["way"] == way]
                panel.plot(*zip(*line, strict=True), marker="o", label=f"{name}, {way}")
        panel.set(xscale="log", xlabel=f"batch, {length} steps" if axis == "batch" else f"steps, batch {batch}", ylabel="of the unmonitored throughput", ylim=(0, 1.05))
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path)


def keep(raw: list[dict[str, Any]], folder: Path, name: str, commit: str) -> None:
    rows = []
    for r in raw:
        what, speed = f"{r['way']}, batch {r['batch']}, {r['length']} steps", r["tokens_per_s"]
        rows.append(result.row(f"{what}: DMI, sink checksum, 100 % captured(full)", speed["dmi"], "tokens/s", baseline=speed["unmonitored"],
                               goal=">= 0.98", met=speed["dmi"] >= 0.98 * speed["unmonitored"]))  # fmt: skip
        for other in ("offload", "naive"):
            rows.append(result.row(f"{what}: {other}", speed[other], "tokens/s", baseline=speed["unmonitored"]))
    save(folder, name, commit, rows, raw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,8,32,64,128,256")
    parser.add_argument("--lengths", default="16,32,64,128,256,512")
    parser.add_argument("--ways", default="graph,eager")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--save", metavar="FOLDER")
    parser.add_argument("--name", default="gpu_seed", help="of the results")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    plain = model(arguments.layers, "eager")
    hooked = twin(plain)
    batches, lengths = [int(b) for b in arguments.batches.split(",")], [int(n) for n in arguments.lengths.split(",")]
    raw: list[dict[str, Any]] = []
    for way in arguments.ways.split(","):
        for batch in batches:
            raw += measure(plain, hooked, batch, lengths if batch == max(batches) else lengths[:1], way, arguments.rounds)
            if arguments.save:
                keep(raw, Path(arguments.save), arguments.name, arguments.commit)
    if arguments.plot:
        plot(raw, arguments.plot)


if __name__ == "__main__":
    main()
