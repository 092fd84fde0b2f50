#!/usr/bin/env python3
"""What a capture costs the model's thread on the CPU: the op, eager, against x.clone() of the same tensors.

    python bench/hook_cost.py [--rounds N] [--save]

One tensor a call, and a group of 36 in one call against 36 clones; decode and prefill shapes of a 2560-wide model in bf16. Both are
measured in turns in one process, medians of the rounds are reported. Between the rounds, outside of what is timed, everything is
released as an engine would that throws it away: the ring never fills, and no engine competes for the cores. All of the ring was
written before. A clone goes to memory that the allocator gives again and again, and that is in the caches; a capture to the next place
of a ring, which is not: what that alone costs, torch's own copy to the next place of a buffer of the same size, is measured beside.
Last, what a decoding step costs besides: `with session.step(rows=...)` around nothing.
`--save` writes bench/results/.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import time
from collections.abc import Callable

import result
import torch

from dmi import _abi, native
from dmi.hook import Collector
from dmi.huggingface import Steps
from dmi.requests import Requests, new_run

LAYERS, WIDTH = 36, 2560
CALLS = 20  # a timing of single calls
RING_MIB = 512
GOAL = "<= 1 x clone"  # what a bare op that captures costs


class Kept:
    """Copies to the next place of a buffer as large as the ring."""

    def __init__(self) -> None:
        self._buffer = torch.zeros(RING_MIB << 19, dtype=torch.bfloat16)
        self._at = 0

    def __call__(self, x: torch.Tensor) -> None:
        if self._at + x.numel() > len(self._buffer):
            self._at = 0
        self._buffer[self._at : self._at + x.numel()].view(x.shape).copy_(x)
        self._at += x.numel()


class Discard:
    """Releases what a one-lane ring holds, unread."""

    def __init__(self, ring: native.Ring) -> None:
        self._ring = ring
        self._map = mmap.mmap(ring.fds[0], 0)
        header = _abi.HeaderStruct.from_buffer(self._map)
        self._control = _abi.ControlStruct.from_buffer(self._map, header.control_offset)
        ring.set_attached(True)

    def __call__(self) -> None:
        counters = self._ring.counters()
        lost = sum(counters["rows"].values())
        if lost:
            raise SystemExit(f"hook cost: {lost} rows were not captured, so the figures would be those of dropping")
        self._control.payload_tail.value += counters["payload_used"]
        self._control.lane[0].record_tail.value = counters["records"]


def median_us(
    work: Callable[[], None], rest: Callable[[], None], other: Callable[[], None], rounds: int
) -> tuple[float, float]:
    """Median microseconds of work and of other, in turns; rest() follows each work, untimed."""
    ours, theirs = [], []
    for turn in range(rounds + rounds // 10 + 1):
        start = time.perf_counter_ns()
        work()
        middle = time.perf_counter_ns()
        rest()
        begin = time.perf_counter_ns()
        other()
        end = time.perf_counter_ns()
        if turn > rounds // 10:  # after warming up
            ours.append(middle - start)
            theirs.append(end - begin)
    return statistics.median(ours) / 1e3, statistics.median(theirs) / 1e3


def measure(rounds: int) -> list[dict[str, object]]:
    ring = native.Ring(mode="best-effort", payload_mib=RING_MIB, staging_mib=1, lanes=1, table_mib=64)
    sites = [ring.add_site(f"blocks.{i}.hook_resid_post", layer=i, space=0, roles=[1, 1, 2]) for i in range(LAYERS)]
    discard = Discard(ring)
    op, handle = torch.ops.dmi.capture, ring.tensor
    rows: list[dict[str, object]] = []
    kept = Kept()

    def row(metric: str, ours: float, clone: float | None = None) -> None:
        ratio = None if clone is None else ours / clone
        goal = {} if clone is None else {"goal": GOAL, "met": ours <= clone}
        rows.append(result.row(metric, ours, "us", baseline=clone, **goal))
        against = "" if clone is None else f"   clone {clone:8.2f} us   x{ratio:.2f}"
        print(f"{metric:58} {ours:8.2f} us{against}", flush=True)

    step = 0
    large = [torch.zeros(1, 128, WIDTH).bfloat16() for _ in range(LAYERS)]
    for _ in range((RING_MIB << 20) // sum(x.nbytes for x in large) + 1):
        ring.open_step(step, native.pack_spans([(0, 0, 0, 0, 128, 0, 0, 0, 0)]), width=(128, 0, 0))
        op(handle, large, sites)
        ring.close_step(step)
        discard()
        step += 1
    for name, batch, tokens in (
        ("decode, batch 1", 1, 1),
        ("decode, batch 32", 32, 1),
        ("prefill, 128 tokens", 1, 128),
    ):
        tensors = [torch.randn(batch, tokens, WIDTH).bfloat16() for _ in range(LAYERS)]
        spans = native.pack_spans([(b, 0, b, 0, tokens, 0, 0, 0, 0) for b in range(batch)])
        one, site = [tensors[0]], [sites[0]]

        def opened(
            work: Callable[[], None], spans: bytes = spans, tokens: int = tokens
        ) -> tuple[Callable[[], None], Callable[[], None]]:
            """work() in an open step; closing and opening are outside of the timing."""

            def rest() -> None:
                nonlocal step
                ring.close_step(step)
                discard()
                step += 1
                ring.open_step(step, spans, width=(tokens, 0, 0))

            step_now = step
            ring.open_step(step_now, spans, width=(tokens, 0, 0))
            return work, rest

        def single(one: list[torch.Tensor] = one, site: list[int] = site) -> None:
            for _ in range(CALLS):
                op(handle, one, site)

        def clone(x: torch.Tensor = tensors[0]) -> None:
            for _ in range(CALLS):
                x.clone()

        def keep(x: torch.Tensor = tensors[0]) -> None:
            for _ in range(CALLS):
                kept(x)

        def group(tensors: list[torch.Tensor] = tensors) -> None:
            op(handle, tensors, sites)

        def clones(tensors: list[torch.Tensor] = tensors) -> None:
            for x in tensors:
                x.clone()

        size = f"{tensors[0].nbytes >> 10} KiB"
        ours, theirs = median_us(*opened(single), clone, rounds)
        row(f"one tensor of {size} ({name}), one call", ours / CALLS, theirs / CALLS)
        ours, theirs = median_us(*opened(group), clones, rounds)
        row(f"group of {LAYERS} tensors of {size} ({name}), one call", ours, theirs)
        copies, theirs = median_us(keep, lambda: None, clone, rounds)
        rows.append(result.row(f"one tensor of {size}, torch's copy to the next place of {RING_MIB} MiB", copies / CALLS, "us", baseline=theirs / CALLS))
        print(f"{rows[-1]['metric']:58} {copies / CALLS:8.2f} us   clone {theirs / CALLS:8.2f} us   x{copies / theirs:.2f}", flush=True)

    def boundary() -> None:
        nonlocal step
        ring.close_step(step)
        step += 1
        ring.open_step(step, spans, width=(128, 0, 0))

    ours, _ = median_us(boundary, discard, lambda: None, rounds)
    row(f"closing a step and opening the next, {LAYERS} sites", ours)
    ring.close_step(step)
    torch.ops.dmi.capture(handle, one, site)
    outside, _ = median_us(lambda: op(handle, one, site), lambda: None, lambda: None, rounds)
    row("one tensor, one call, outside a step (nothing captured)", outside)
    for batch in (1, 32, 256):
        steps = Steps(torch.nn.Identity(), ring, Requests(new_run({}, [])), Collector(handle), keyed=False)
        mask = torch.ones(batch, 1, dtype=torch.int64)
        numbers = None

        def by_hand(steps: Steps = steps, mask: torch.Tensor = mask) -> None:
            nonlocal numbers
            with steps.by_hand(mask, requests=numbers) as numbers:
                pass

        ours, _ = median_us(by_hand, discard, lambda: None, rounds)
        row(f"a decoding step by hand, around nothing, {LAYERS} sites, batch {batch}", ours)
    ring.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--save", action="store_true", help="write bench/results/hook_cost.MACHINE.DATE.json")
    arguments = parser.parse_args()
    rows = measure(arguments.rounds)
    if not arguments.save:
        return
    path = result.write("hook_cost", rows, torch=torch.__version__, note="released unread between rounds, untimed")
    print(f"{path.relative_to(result.ROOT)}: written")


if __name__ == "__main__":
    main()
