#!/usr/bin/env python3
"""How what observing costs grows: with hooks (1 to 400), with bytes a step, with batch and requests.

    python bench/gpu_sweep.py [--rounds 5] [--save bench/results] [--plot bench/results/gpu_sweep.svg]

A graph of 400 matrix products, of which the first N are observed; two graphs of the same products, one with captures, take turns on the device's clock. "hooks": 1 to
400 of [32, 2560] in bf16; "width": 40 of them, of 64 to 16,384 columns; "rows": 40 of [1 to 1024, 2560], all of one request each, then all of one request.
The sink is bench/sink: all rows are drained, sliced, checksummed and counted in another process.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import result
import torch
from gpu_model import save, sink, timed

import dmi

POINTS, HIDDEN = 400, 2560
PLAN = [
    *({"axis": "hooks", "hooks": n, "rows": 32, "width": HIDDEN} for n in (1, 4, 16, 64, 128, 256, 400)),
    *({"axis": "width", "hooks": 40, "rows": 32, "width": n} for n in (64, 512, 2560, 8192, 16384)),
    *({"axis": "batch", "hooks": 40, "rows": n, "width": HIDDEN} for n in (1, 8, 64, 256, 1024)),
    *({"axis": "rows of one request", "hooks": 40, "rows": n, "width": HIDDEN, "requests": 1} for n in (64, 1024)),
]


class Chain(torch.nn.Module):
    """Products with a hook point behind each; every one's source is computed anew, so that none is in the cache for free."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.points = torch.nn.ModuleList(dmi.HookPoint(f"point{n:03}", rows=1) for n in range(POINTS))
        self.weight = torch.nn.Parameter(torch.randn(HIDDEN, width) / HIDDEN**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(x.shape[0], 1, device=x.device, dtype=x.dtype)
        for point in self.points:
            total = total + point(x @ self.weight)[:, :1]
        return total


def graph_of(model: Chain, x: torch.Tensor) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x)
    return graph


def measure(point: dict[str, Any], rounds: int) -> dict[str, Any]:
    rows, hooks = point["rows"], point["hooks"]
    model = Chain(point["width"]).to("cuda", torch.bfloat16).eval()
    x = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
    plain = graph_of(model, x)
    each = [rows] if point.get("requests") == 1 else [1] * rows
    with sink() as (address, reports):
        session = dmi.attach(model, [f"point{n:03}" for n in range(hooks)], engine=address, text="none", mode="complete")
        try:
            graph = graph_of(model, x)
            numbers: list[int] | None = None

            def observed() -> None:
                nonlocal numbers
                with session.step(rows=each, requests=numbers) as numbers:
                    graph.replay()

            base = timed(plain.replay, 5)
            steps = max(5, int(150 / base))
            timed(observed, 5)
            session.flush()
            before = session._ring.counters()
            ours, theirs = [], []
            for _ in range(rounds):
                theirs.append(timed(plain.replay, steps))
                ours.append(timed(observed, steps))
            session.flush()
            after = session._ring.counters()
        finally:
            session.detach()
    captured = after["captured_rows"] - before["captured_rows"]
    if captured != rounds * (steps + 1) * hooks * rows:
        raise SystemExit(f"bench/gpu_sweep: {captured} rows were captured of {rounds * (steps + 1) * hooks * rows}")
    bytes_ = (after["captured_bytes"] - before["captured_bytes"]) // (rounds * (steps + 1))
    return {**point, "observed_ms": statistics.median(ours), "unobserved_ms": statistics.median(theirs), "all_observed_ms": ours, "all_unobserved_ms": theirs, "bytes": bytes_, "engine": reports[0]}


def plot(raw: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    axes = ["hooks", "width", "batch"]
    figure, panels = plt.subplots(1, len(axes), figsize=(12, 3.4), layout="constrained")
    for panel, axis in zip(panels, axes, strict=True):
        some = [r for r in raw if r["axis"] == axis]
        x = [r["rows"] if axis == "batch" else r[axis] for r in some]
        panel.plot(x, [1e3 * (r["observed_ms"] - r["unobserved_ms"]) for r in some], marker="o")
        panel.set(xscale="log", xlabel={"hooks": "hooks", "width": "columns, 40 hooks", "batch": "rows, 40 hooks"}[axis], ylabel="added to a step, us")
        panel.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", metavar="FOLDER")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    raw: list[dict[str, Any]] = []
    with torch.no_grad():
        for point in PLAN:
            got = measure(point, arguments.rounds)
            raw.append(got)
            added = 1e3 * (got["observed_ms"] - got["unobserved_ms"])
            print(f"{got['axis']:20} {got['hooks']:3} hooks of [{got['rows']:4}, {got['width']:5}]: {got['unobserved_ms']:7.3f} -> {got['observed_ms']:7.3f} ms, {added:+8.1f} us, "
                  f"{got['bytes'] / 1e6:8.2f} MB a step", flush=True)  # fmt: skip
            if arguments.save:
                save(Path(arguments.save), "gpu_sweep", arguments.commit, [
                    result.row(f"{r['axis']}: {r['hooks']} hooks of [{r['rows']}, {r['width']}], {r['bytes']} bytes a step, sink checksum, 100 % captured(full)", r["observed_ms"], "ms", baseline=r["unobserved_ms"])
                    for r in raw
                ], raw)  # fmt: skip
    if arguments.plot:
        plot(raw, arguments.plot)


if __name__ == "__main__":
    main()
