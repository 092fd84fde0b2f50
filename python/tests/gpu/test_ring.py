"""The capture op on CUDA tensors, against plain torch indexing, byte for byte: dtypes, strides, graphs, streams, wrap and
shortage."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch
from consumer import (
    CACHE,
    DTYPES,
    INNER,
    KEY,
    LOGITS,
    ROW,
    TOKENS,
    Consumer,
    Record,
    batch_spans,
    expected,
    random_strides,
    random_tensor,
    rows_of,
    same,
)
from test_native import captures as with_corners

from dmi import _abi, native
from dmi._abi import Outcome, Reason

pytestmark = pytest.mark.usefixtures("seeded")


def on_gpu(**options: object) -> native.Ring:
    given: dict[str, object] = {"mode": "best-effort", "payload_mib": 4, "staging_mib": 1, "lanes": 1, **options}
    return native.Ring(device="cuda", **given)  # type: ignore[arg-type]


def capture(ring: native.Ring, tensors: list[torch.Tensor], sites: list[int]) -> None:
    torch.ops.dmi.capture(ring.tensor, tensors, sites)


def captures(records: list[Record]) -> list[Record]:
    """Without those that tell of the end of the spill region, which a group left."""
    return [r for r in with_corners(records) if r.raw.rows or r.raw.payload_bytes == r.raw.tensor_bytes]


def drained(consumer: Consumer) -> list[Record]:
    torch.cuda.synchronize()
    return consumer.drain()


class Drain:
    """A consumer of its own thread, for rings that are smaller than what goes through them."""

    def __init__(self, ring: native.Ring, pause_s: float = 0) -> None:
        self.consumer = Consumer(ring)
        self.records: list[Record] = []
        self._pause_s, self._stop = pause_s, False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop:
            self.records += self.consumer.drain()
            time.sleep(self._pause_s or 0.0002)

    def end(self) -> list[Record]:
        torch.cuda.synchronize()
        time.sleep(0.01)
        self._stop = True
        self._thread.join()
        self.records += self.consumer.drain()
        return self.records


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    ring = on_gpu()
    consumer = Consumer(ring)
    x = random_tensor([2, 5, 3], dtype).cuda()
    roles, spans = [ROW, ROW, INNER], batch_spans([(2, 3), (0, 5)])
    site = ring.add_site("x", layer=None, space=TOKENS, roles=roles)
    assert ring.open_step(0, spans, width=(5, 0, 0))
    capture(ring, [x], [site])
    ring.close_step(0)
    (record,) = captures(drained(consumer))
    assert record.raw.dtype == DTYPES[dtype] and record.raw.outcome == Outcome.CAPTURED
    assert same(rows_of(record, spans, TOKENS, 5), expected(x.cpu(), roles, spans, TOKENS, 5))
    ring.close()


def test_layouts() -> None:
    """Random shapes, roles, memory layouts, row lists, keys: the rows are those that indexing gives."""
    ring = on_gpu(payload_mib=0.25, staging_mib=0.03)
    consumer = Consumer(ring)
    for step in range(400):
        packed = random.random() < 0.3
        batch, width = (1, random.randrange(1, 20)) if packed else (random.randrange(1, 4), random.randrange(1, 9))
        two = random.random() < 0.6
        others = [INNER] * random.randrange(0, 4) + [KEY] * (random.random() < 0.4)
        roles = [ROW, *others]
        if two:
            roles.insert(random.randrange(1, len(roles) + 1), ROW)
        size = []
        for d, role in enumerate(roles):
            if role != ROW:
                size.append(random.randrange(1, 6))
            elif two:
                size.append(batch if d == 0 else width)
            else:
                size.append(batch * width)
        counts = []
        for _ in range(batch):
            first = random.choice([0, random.randrange(width)])
            counts.append((first, random.choice([width - first, random.randrange(width - first + 1)])))
        space = random.choice([TOKENS, LOGITS, CACHE])
        spans = batch_spans(counts, space)
        if packed:
            spans = [(7, space, 0, i, 1, i, 0, 0, 0) for i in range(width) if random.random() < 0.8]
        random.shuffle(spans)
        other = (space + 1) % 3
        spans.insert(random.randrange(len(spans) + 1), (9, other, 0, 0, 1, 0, 0, 0, 0))
        keys = random.choice([0, random.randrange(1, 8)])
        x = random_strides(torch.randn(size, device="cuda"))
        site = ring.add_site(f"s{step}", layer=step, space=space, roles=roles)
        widths = tuple(width if s == space else 1 for s in range(3))
        assert ring.open_step(step, spans, width=widths, keys=keys, packed=packed)
        capture(ring, [x], [site])
        ring.close_step(step)
        (record,) = captures(drained(consumer))
        what = f"step {step}: {size} {x.stride()} {roles} {spans} keys {keys} packed {packed}"
        assert record.raw.outcome == Outcome.CAPTURED, what
        want = expected(x.cpu(), roles, spans, space, 0 if packed else width, keys)
        assert record.raw.rows == len(want), what
        if len(want):
            assert same(rows_of(record, spans, space, 0 if packed else width), want), what
        if KEY in roles:
            assert record.raw.key_base == max(0, keys - size[roles.index(KEY)]), what
    ring.close()


def test_groups_of_many_sizes() -> None:
    """More tensors than a launch takes, large ones among small ones; the ring wraps again and again."""
    ring = on_gpu(payload_mib=16, staging_mib=4)
    consumer = Consumer(ring)
    sites = [ring.add_site(f"s{i}", layer=i, space=TOKENS, roles=[ROW, INNER]) for i in range(70)]
    rows = 96
    spans = [(1, TOKENS, 0, 0, rows, 0, 0, 0, 0)]
    for step in range(30):
        group = [torch.randn(rows, random.choice([1, 3, 64, 2560, 9728]), device="cuda").to(random.choice([torch.bfloat16, torch.float32]))
                 for _ in range(random.randrange(1, 71))]  # fmt: skip
        while sum(x.nbytes for x in group) > 15 << 20:
            group.pop()
        assert ring.open_step(step, spans, width=(rows, 0, 0), packed=True)
        capture(ring, group, sites[: len(group)])
        ring.close_step(step)
        records = captures(drained(consumer))
        assert [r.raw.site for r in records] == sites[: len(group)]
        for record, x in zip(records, group, strict=True):
            assert record.raw.outcome == Outcome.CAPTURED and same(rows_of(record, spans, TOKENS, rows), x.cpu())
    ring.close()


def test_changed_right_after_its_hook() -> None:
    ring = on_gpu(payload_mib=64, staging_mib=16)
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=None, space=TOKENS, roles=[ROW, INNER])
    x = torch.randn(512, 4096, device="cuda")
    spans = [(1, TOKENS, 0, 0, 512, 0, 0, 0, 0)]
    before = x.cpu()
    assert ring.open_step(0, spans, width=(512, 0, 0))
    capture(ring, [x], [site])
    x.fill_(float("nan"))
    ring.close_step(0)
    (record,) = captures(drained(consumer))
    assert same(rows_of(record, spans, TOKENS, 512), before)
    ring.close()


def test_nothing_outside_a_step() -> None:
    ring = on_gpu()
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=None, space=TOKENS, roles=[ROW, INNER])
    x = torch.randn(4, 8, device="cuda")
    capture(ring, [x], [site])
    assert drained(consumer) == []
    assert ring.counters()["outside"] == 1
    ring.close()
    capture(ring, [x], [site])  # closed: does nothing
    torch.cuda.synchronize()


def test_hand_captured_graph() -> None:
    """Captured once, outside any step; replayed in many, with other rows each time, and outside one again."""
    ring = on_gpu()
    consumer = Consumer(ring)
    sites = [ring.add_site(f"s{i}", layer=i, space=TOKENS, roles=[ROW, ROW, INNER]) for i in range(3)]
    source = torch.randn(4, 6, 32, device="cuda")

    def work() -> list[torch.Tensor]:
        outs = [source * (i + 1) for i in range(3)]
        capture(ring, outs, sites)
        return outs

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = work()
    assert drained(consumer) == []
    graph.replay()
    assert drained(consumer) == []
    for step in range(20):
        source.normal_()
        spans = batch_spans([(random.randrange(6), 1) if random.random() < 0.5 else (0, random.randrange(1, 7)) for _ in range(4)])
        assert ring.open_step(step, spans, width=(6, 0, 0))
        graph.replay()
        ring.close_step(step)
        records = captures(drained(consumer))
        assert [r.raw.site for r in records] == sites and {r.raw.step for r in records} == {step}
        for record, x in zip(records, outs, strict=True):
            assert same(rows_of(record, spans, TOKENS, 6), expected(x.cpu(), [ROW, ROW, INNER], spans, TOKENS, 6))
    graph.replay()
    assert drained(consumer) == []
    ring.close()
    graph.replay()  # the ring is gone: nothing happens
    torch.cuda.synchronize()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_compiled(mode: str) -> None:
    ring = on_gpu()
    consumer = Consumer(ring)
    sites = [ring.add_site(f"s{i}", layer=i, space=TOKENS, roles=[ROW, INNER]) for i in range(4)]
    weight = torch.randn(64, 64, device="cuda")

    def model(x: torch.Tensor) -> torch.Tensor:
        kept = []
        for _ in range(4):
            x = torch.tanh(x @ weight)
            kept.append(x)
        capture(ring, kept, sites)
        return x.sum()

    compiled = torch.compile(model, fullgraph=True, mode=None if mode == "default" else mode)
    spans = [(1, TOKENS, 0, 0, 16, 0, 0, 0, 0)]
    with torch.no_grad():
        for step in range(6):
            x = torch.randn(16, 64, device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            assert ring.open_step(step, spans, width=(16, 0, 0))
            got = compiled(x).item()
            ring.close_step(step)
            records = captures(drained(consumer))
            assert [r.raw.site for r in records] == sites
            rows = [rows_of(r, spans, TOKENS, 16) for r in records]
            assert torch.allclose(rows[-1].sum(), torch.tensor(got), rtol=1e-4, atol=1e-3)
            want = x
            for row in rows:
                want = torch.tanh(want @ weight)
                assert torch.allclose(row, want.cpu(), rtol=1e-3, atol=1e-3)
    if mode == "reduce-overhead":
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    ring.close()


def test_best_effort_books_what_found_no_room() -> None:
    """Nobody drains: whole tensors, then whole rows, then nothing; every row is in exactly one record."""
    ring = on_gpu(payload_mib=0.25, staging_mib=0.25)
    consumer = Consumer(ring)
    sites = [ring.add_site(f"s{i}", layer=i, space=TOKENS, roles=[ROW, INNER]) for i in range(5)]
    tensors = [torch.randn(100, 300, device="cuda") for _ in sites]  # 117 KiB each
    spans = [(1, TOKENS, 0, 0, 100, 0, 0, 0, 0)]
    assert ring.open_step(0, spans, width=(100, 0, 0))
    capture(ring, tensors, sites)
    ring.close_step(0)
    torch.cuda.synchronize()
    records = captures(consumer.drain())
    done = {site: 0 for site in sites}
    for record in records:
        assert record.raw.row_first == done[record.raw.site]
        if record.raw.outcome == Outcome.CAPTURED:
            assert same(rows_of(record, spans, TOKENS, 100), tensors[record.raw.site][record.raw.row_first :][: record.raw.rows].cpu())
        else:
            assert (record.raw.outcome, record.raw.reason) == (Outcome.DROPPED, Reason.RING_FULL)
        done[record.raw.site] += record.raw.rows
    assert set(done.values()) == {100}
    counters = ring.counters()
    assert counters["captured_rows"] >= 2 * 100
    assert counters["captured_rows"] + counters["rows"]["ring_full"] == 500 and counters["waits"] == 0
    ring.close()


@pytest.mark.parametrize("pause", [0.0, 0.002], ids=["eager-engine", "lazy-engine"])
def test_complete_mode_streams_what_is_larger_than_the_ring(pause: float) -> None:
    ring = on_gpu(mode="complete", payload_mib=1, staging_mib=0.5, spill_mib=0.5, wait_bound_s=20)
    drain = Drain(ring, pause)
    sites = [ring.add_site(f"s{i}", layer=i, space=TOKENS, roles=[ROW, INNER]) for i in range(6)]
    rows = 700
    spans = [(1, TOKENS, 0, 0, rows, 0, 0, 0, 0)]
    everything = []
    for step in range(3):
        tensors = [torch.randn(rows, random.choice([7, 500, 3000]), device="cuda") for _ in sites]
        everything.append(tensors)  # not to the host yet: a copy to pageable memory would keep the pump out of CUDA meanwhile
        assert ring.open_step(step, spans, width=(rows, 0, 0))
        capture(ring, tensors, sites)
        ring.close_step(step)
    records = drain.end()
    parts: dict[tuple[int, int], list[torch.Tensor]] = {}
    for record in captures(records):
        assert record.raw.outcome == Outcome.CAPTURED
        if record.raw.rows:
            piece = rows_of(record, spans, TOKENS, rows)
            at = parts.setdefault((record.raw.step, record.raw.site), [])
            assert sum(map(len, at)) == record.raw.row_first
            at.append(piece)
    for step, tensors in enumerate(everything):
        for site, x in zip(sites, tensors, strict=True):
            assert same(torch.cat(parts[step, site]), x.cpu()), (step, site)
    counters = ring.counters()
    assert counters["captured_rows"] == 3 * 6 * rows and not any(counters["rows"].values())
    ring.close()


def test_complete_mode_gives_up_at_its_bound() -> None:
    ring = on_gpu(mode="complete", payload_mib=0.25, staging_mib=0.25, spill_mib=0.25, wait_bound_s=0.2)
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=None, space=TOKENS, roles=[ROW, INNER])
    x = torch.randn(1000, 300, device="cuda")
    spans = [(1, TOKENS, 0, 0, 1000, 0, 0, 0, 0)]
    assert ring.open_step(0, spans, width=(1000, 0, 0))
    capture(ring, [x], [site])
    began = time.monotonic()
    ring.close_step(0)
    torch.cuda.synchronize()
    assert 0.15 < time.monotonic() - began < 5
    records = captures(consumer.drain())
    assert records[-1].raw.reason == Reason.TIMEOUT
    assert sum(r.raw.rows for r in records) == 1000
    with pytest.raises(native.CaptureError, match="no room"):
        assert ring.open_step(1, spans, width=(1000, 0, 0))
        ring.close_step(1)
    torch.cuda.synchronize()
    ring.close()


def test_steps_follow_each_other_on_any_streams() -> None:
    ring = on_gpu(payload_mib=32, staging_mib=4)
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=None, space=TOKENS, roles=[ROW, INNER])
    streams = [torch.cuda.Stream() for _ in range(3)]
    spans = [(1, TOKENS, 0, 0, 64, 0, 0, 0, 0)]
    want = []
    for step in range(60):
        with torch.cuda.stream(random.choice(streams)):
            x = torch.randn(64, 256, device="cuda")
            torch.cuda._sleep(random.randrange(100_000))
            assert ring.open_step(step, spans, width=(64, 0, 0))
            capture(ring, [x], [site])
            ring.close_step(step)
            want.append(x)
    records = drained(consumer)
    assert [r.step for r in records if r.kind == _abi.Kind.OPEN] == list(range(60))
    for record, x in zip(captures(records), want, strict=True):
        assert same(rows_of(record, spans, TOKENS, 64), x.cpu())
    ring.close()


def test_branches_of_a_step() -> None:
    """Captures on two streams between one open and one close, joined before the close."""
    ring = on_gpu(payload_mib=32, staging_mib=4)
    consumer = Consumer(ring)
    sites = [ring.add_site(f"s{i}", layer=i, space=TOKENS, roles=[ROW, INNER]) for i in range(40)]
    spans = [(1, TOKENS, 0, 0, 64, 0, 0, 0, 0)]
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    for step in range(30):
        tensors = [torch.randn(64, 1 + random.randrange(600), device="cuda") for _ in sites]
        assert ring.open_step(step, spans, width=(64, 0, 0))
        side.wait_stream(main)
        for i, (x, site) in enumerate(zip(tensors, sites, strict=True)):
            with torch.cuda.stream(side if i % 2 else main):
                capture(ring, [x], [site])
        main.wait_stream(side)
        ring.close_step(step)
        records = captures(drained(consumer))
        assert sorted(r.raw.site for r in records) == sites
        for record in records:
            assert same(rows_of(record, spans, TOKENS, 64), tensors[record.raw.site].cpu())
    ring.close()


def test_allocator_does_not_notice() -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()
    ring = on_gpu(payload_mib=64)
    assert ring.device_bytes > 64 << 20
    after = torch.cuda.memory_stats()
    assert {k: v for k, v in before.items() if "bytes" in k} == {k: v for k, v in after.items() if "bytes" in k}
    ring.close()


def test_a_tensor_elsewhere_is_booked() -> None:
    ring = on_gpu()
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=None, space=TOKENS, roles=[ROW, INNER])
    assert ring.open_step(0, [(1, TOKENS, 0, 0, 4, 0, 0, 0, 0)], width=(4, 0, 0))
    capture(ring, [torch.randn(4, 8, device="cpu")], [site])
    ring.close_step(0)
    (record,) = captures(drained(consumer))
    assert (record.raw.outcome, record.raw.reason, record.raw.rows) == (Outcome.DROPPED, Reason.MISMATCH, 4)
    ring.close()


def test_no_step_in_a_recording() -> None:
    ring = on_gpu()
    ring.add_site("x", layer=None, space=TOKENS, roles=[ROW, INNER])
    graph = torch.cuda.CUDAGraph()
    x = torch.zeros(4, device="cuda")
    with torch.cuda.graph(graph):
        x += 1
        with pytest.raises(ValueError, match="records a CUDA graph"):
            ring.open_step(0, [(1, TOKENS, 0, 0, 4, 0, 0, 0, 0)], width=(4, 0, 0))
    ring.close()




def test_a_copy_of_the_rings_tensor_is_refused() -> None:
    """A ring on a device is known by where its tensor lies; a copy, as some compilers' backends make, must not be silence. What was compiled for a ring that is closed goes on."""
    ring = on_gpu()
    site = ring.add_site("x", layer=None, space=TOKENS, roles=[ROW, INNER])
    x = torch.zeros(4, 8, device="cuda")
    with pytest.raises(RuntimeError, match="is a copy of a ring's tensor"):
        torch.ops.dmi.capture(ring.tensor.clone(), [x], [site])
    token = ring.tensor
    ring.close()
    torch.ops.dmi.capture(token, [x], [site])
