"""The ring and its steps: room and shortage, waiting and waking, threads, memory, misuse; on the oldest and the newest torch."""

from __future__ import annotations

import fcntl
import gc
import itertools
import os
import random
import threading
import time

import pytest
import torch
from consumer import (
    INNER,
    LOGITS,
    PATIENCE_S,
    ROW,
    TOKENS,
    Consumer,
    Record,
    batch_spans,
    captures,
    expected,
    random_tensor,
    rows_of,
    same,
)

from dmi import _abi, native
from dmi._abi import Outcome, Reason

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("seeded")]


@pytest.mark.parametrize("mode", ["complete", "best-effort"])
def test_little_is_put_where_the_engine_reads_it(mode: str) -> None:
    """It needs no copy command, in a region that is filled to its end and from its start again."""
    ring = native.Ring(mode=mode, payload_mib=1, staging_mib=1, spill_mib=1 / 64, wait_bound_s=PATIENCE_S)
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=None, space=TOKENS, roles=[ROW, INNER])
    try:
        for step in range(40):
            x = random_tensor([random.randrange(1, 4), 999], torch.float32)
            spans = [(0, TOKENS, 0, 0, len(x), 0, 0, 0, 0)]
            assert ring.open_step(step, spans, width=(len(x), 0, 0))
            torch.ops.dmi.capture(ring.tensor, [x], [site])
            ring.close_step(step)
            records = captures(consumer.drain())
            assert {r.raw.place for r in records} == {_abi.Place.SPILL}
            assert b"".join(r.payload for r in records) == x.numpy().tobytes()
        counters = ring.counters()
        assert counters["spilled_bytes"] == counters["captured_bytes"] > 1 << 16 and counters["waits"] == 0
    finally:
        ring.close()


def test_larger_than_the_ring() -> None:
    ring = native.Ring(mode="complete", payload_mib=0.25, staging_mib=0.06, spill_mib=0.13, wait_bound_s=PATIENCE_S)
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=0, space=TOKENS, roles=[ROW, ROW, INNER])
    wide = ring.add_site("wide", layer=0, space=TOKENS, roles=[ROW, ROW, INNER, INNER])
    x = torch.randn(2, 300, 999).transpose(0, 1).contiguous().transpose(0, 1)  # 2.4 MB
    spans = batch_spans([(7, 293), (0, 300)])
    records: list[Record] = []
    done = threading.Event()

    def drain() -> None:
        while not done.is_set():
            records.extend(consumer.drain())
            time.sleep(0.001)
        records.extend(consumer.drain())

    thread = threading.Thread(target=drain)
    thread.start()
    assert ring.open_step(0, spans, width=(300, 0, 0))
    torch.ops.dmi.capture(ring.tensor, [x], [site])
    ring.close_step(0)
    one = [(3, TOKENS, 0, 0, 2, 0, 0, 0, 0)]
    huge = torch.randn(1, 2, 29, 3449).transpose(2, 3)  # rows of 400 kB, no two elements of one in place
    assert ring.open_step(1, one, width=(2, 0, 0))
    torch.ops.dmi.capture(ring.tensor, [huge], [wide])
    ring.close_step(1)
    done.set()
    thread.join()
    pieces = captures(records, site)
    assert len(pieces) > 1
    assert same(
        torch.cat([rows_of(r, spans, TOKENS, 300) for r in pieces]), expected(x, [ROW, ROW, INNER], spans, TOKENS, 300)
    )
    parts = captures(records, wide)
    assert len(parts) > 2 and sum(r.raw.rows for r in parts) == 2
    offset = 0
    for part in parts:
        assert part.raw.part_offset == offset % 400_084 and part.raw.tensor_bytes == 400_084 and part.raw.size[0] == 1
        offset += part.raw.payload_bytes
    assert b"".join(r.payload for r in parts) == huge.contiguous().numpy().tobytes()
    counters = ring.counters()
    assert counters["spilled_bytes"] > 0 and counters["waits"] > 0
    assert counters["captured_rows"] == 593 + 2
    ring.close()


def test_ring_full_gated_and_gap() -> None:
    """Best-effort without an engine: whole rows as long as they fit, then nothing, and all of it is told afterwards."""
    ring = native.Ring(mode="best-effort", payload_mib=1 / 64, staging_mib=1 / 64, record_capacity=64, lanes=1)
    site = ring.add_site("x", layer=0, space=TOKENS, roles=[ROW, ROW, INNER])
    x = torch.randn(1, 6, 1000)
    spans = batch_spans([(0, 6)])
    opened = []
    for step in range(60):
        opened.append(ring.open_step(step, spans, width=(6, 0, 0)))
        torch.ops.dmi.capture(ring.tensor, [x], [site])
        ring.close_step(step)
    counters = ring.counters()
    assert counters["waits"] == 0 and counters["gap_steps"] > 0
    consumer = Consumer(ring)
    records = consumer.drain()
    first, second = captures([r for r in records if r.step == 0])
    assert (first.raw.row_first, first.raw.rows, first.raw.outcome) == (0, 4, Outcome.CAPTURED)
    assert (second.raw.row_first, second.raw.rows, second.raw.reason) == (4, 2, Reason.RING_FULL)
    assert same(rows_of(first, spans, TOKENS, 6), x[0, :4])
    opens = [r.raw for r in records if r.kind == _abi.Kind.OPEN]
    assert [not o.gated for o in opens] == opened[: len(opens)] and any(o.gated for o in opens)
    assert all(o.table_bytes > 0 for o in opens if o.gated)  # whose rows they were is known all the same
    assert len([r for r in records if r.kind == _abi.Kind.CLOSE]) == len(opens)
    assert ring.open_step(60, spans, width=(6, 0, 0))
    ring.close_step(60)
    gap, *_ = consumer.drain()
    assert gap.kind == _abi.Kind.GAP
    assert (gap.raw.step, gap.raw.last_step, gap.raw.steps, gap.raw.rows) == (
        len(opens),
        59,
        60 - len(opens),
        6 * (60 - len(opens)),
    )
    counters = ring.counters()
    assert counters["gap_steps"] == 0
    assert counters["captured_rows"] + sum(counters["rows"].values()) == 60 * 6
    ring.close()


def test_complete_mode_gives_up_at_its_bound() -> None:
    ring = native.Ring(mode="complete", payload_mib=1 / 64, staging_mib=1 / 64, spill_mib=1 / 64, wait_bound_s=0.2)
    site = ring.add_site("x", layer=0, space=TOKENS, roles=[ROW, ROW, INNER])
    spans = batch_spans([(0, 20)])
    assert ring.open_step(0, spans, width=(20, 0, 0))
    start = time.monotonic()
    torch.ops.dmi.capture(ring.tensor, [torch.randn(1, 20, 1000)], [site])
    assert 0.2 <= time.monotonic() - start < PATIENCE_S
    with pytest.raises(native.CaptureError, match=r"step 0.*200 ms.*dropped\(timeout\)"):
        ring.close_step(0)
    assert ring.counters()["rows"]["timeout"] == 20 - ring.counters()["captured_rows"] == 12
    assert ring.counters()["waits"] == 1
    ring.close()


def test_the_engine_is_woken(ring: native.Ring) -> None:
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=0, space=TOKENS, roles=[ROW, ROW, INNER])
    os.eventfd_read(consumer.bell)  # what set_attached rang

    def rung() -> bool:
        try:
            return os.eventfd_read(consumer.bell) > 0
        except BlockingIOError:
            return False

    def step(number: int) -> None:
        assert ring.open_step(number, batch_spans([(0, 2)]), width=(2, 0, 0))
        torch.ops.dmi.capture(ring.tensor, [torch.zeros(1, 2, 3)], [site])
        ring.close_step(number)

    step(0)
    assert not rung()
    consumer.control.engine_waiting.value = 1
    step(1)
    assert rung()
    ring.set_attached(False)
    step(2)
    assert not rung()


def test_idle_pump_costs_nothing(ring: native.Ring) -> None:
    consumer = Consumer(ring)
    (task,) = [t for t in os.listdir("/proc/self/task") if open(f"/proc/self/task/{t}/comm").read() == "dmi-pump\n"]

    def fields() -> list[str]:
        return open(f"/proc/self/task/{task}/stat").read().rsplit(")")[1].split()

    def ticks() -> int:
        return int(fields()[11]) + int(fields()[12])

    bound = time.monotonic() + PATIENCE_S
    while not consumer.control.pump_waiting.value or fields()[0] != "S":
        assert time.monotonic() < bound, "the pump does not go to sleep"
        time.sleep(0.01)
    before = ticks()
    time.sleep(0.3)
    assert ticks() == before


def test_outside_a_step_nothing_happens(ring: native.Ring) -> None:
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=0, space=TOKENS, roles=[ROW, ROW, INNER])
    x = torch.zeros(1, 2, 3)
    torch.ops.dmi.capture(ring.tensor, [x, x], [site, site])
    assert consumer.drain() == []
    assert ring.counters()["outside"] == 2
    assert ring.open_step(0, batch_spans([(0, 2)]), width=(2, 0, 0))
    late = ring.add_site("late", layer=0, space=TOKENS, roles=[ROW, ROW, INNER])  # the open step does not know it
    torch.ops.dmi.capture(ring.tensor, [x, x], [site, late])
    ring.close_step(0)
    assert [r.raw.site for r in captures(consumer.drain())] == [site]
    assert ring.counters()["outside"] == 3
    torch.ops.dmi.capture(torch.tensor([0]), [x], [site])
    torch.ops.dmi.capture(torch.tensor([123456789]), [x], [site])


def test_misuse_is_told() -> None:
    with pytest.raises(ValueError, match="mode 'fast'.*'best-effort', 'complete'"):
        native.Ring(mode="fast")
    with pytest.raises(ValueError, match="99 lanes; give 1 to 8"):
        native.Ring(mode="complete", lanes=99)
    with pytest.raises(ValueError, match="payload is 0 bytes"):
        native.Ring(mode="complete", payload_mib=0)
    ring = native.Ring(mode="best-effort", payload_mib=1, staging_mib=1, record_capacity=32, site_capacity=16)
    with pytest.raises(ValueError, match="needs one or two ROW dimensions, has 0"):
        ring.add_site("x", layer=None, space=TOKENS, roles=[INNER])
    with pytest.raises(ValueError, match="no row space 3"):
        ring.add_site("x", layer=None, space=3, roles=[ROW])
    with pytest.raises(ValueError, match="give 1 to 192"):
        ring.add_site("", layer=None, space=0)
    for i in range(6):
        ring.add_site(f"s{i}", layer=None, space=0)
    with pytest.raises(ValueError, match="would not fit a record_capacity of 32"):
        ring.add_site("one more", layer=None, space=0)
    with pytest.raises(ValueError, match="span 0: rows 3 to 5 exceed the width, 4"):
        ring.open_step(0, [(0, 0, 0, 3, 2, 0, 0, 0, 0)], width=(4, 0, 0))
    with pytest.raises(ValueError, match="span 0: cached or rejected rows in row space 1"):
        ring.open_step(0, [(0, LOGITS, 0, 0, 2, 0, 0, 0, 0, _abi.SPAN_CACHED)], width=(0, 0, 0), packed=True)
    with pytest.raises(ValueError, match="no whole number of spans"):
        ring.open_step(0, b"123", width=(4, 0, 0))
    with pytest.raises(RuntimeError, match="2 tensors, but 1 sites"):
        torch.ops.dmi.capture(ring.tensor, [torch.zeros(1)] * 2, [0])
    with pytest.raises(RuntimeError, match="2 tensors, but 2 sites and 1 that are held"):
        torch.ops.dmi.capture(ring.tensor, [torch.zeros(1)] * 2, [0, 0], 1)
    with pytest.raises(RuntimeError, match="the ring's own tensor"):
        torch.ops.dmi.capture(torch.zeros(1), [torch.zeros(1)], [0])
    ring.close()
    ring.close()
    assert ring.closed
    assert not ring.open_step(1, b"", width=(0, 0, 0))
    ring.close_step(1)
    torch.ops.dmi.capture(ring.tensor, [torch.zeros(1)], [0])
    with pytest.raises(native.NativeError, match="closed"):
        ring.counters()


def test_missing_library(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(native, "LIBRARY", native.LIBRARY.with_name("absent.so"))
    monkeypatch.setattr(native, "_library", None)
    with pytest.raises(native.NativeError, match=r"absent.so does not exist; build it with `python cuda/build.py`"):
        native.Ring(mode="complete")


def test_memory_is_sealed_and_freed() -> None:
    ring = native.Ring(mode="best-effort", payload_mib=1, staging_mib=1)
    seals = fcntl.fcntl(ring.fds[0], fcntl.F_GET_SEALS)
    assert seals == fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    for size in (0, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(ring.fds[0], size)
    fds = ring.fds
    for fd in fds:
        os.fstat(fd)
    del ring
    gc.collect()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_threads_have_lanes_of_their_own() -> None:
    ring = native.Ring(mode="complete", payload_mib=0.5, staging_mib=0.25, lanes=3, wait_bound_s=PATIENCE_S)
    consumer = Consumer(ring)
    sites = [ring.add_site(f"s{i}", layer=i, space=TOKENS, roles=[ROW, ROW, INNER]) for i in range(4)]
    spans = batch_spans([(0, 8)])
    number = itertools.count()
    tensors: dict[tuple[int, int], torch.Tensor] = {}
    failures: list[BaseException] = []

    def forward() -> None:
        try:
            for _ in range(40):
                step = next(number)
                assert ring.open_step(step, spans, width=(8, 0, 0))
                for site in sites:
                    x = torch.randn(1, 8, 50)
                    tensors[step, site] = x.clone()
                    torch.ops.dmi.capture(ring.tensor, [x], [site])
                    x.zero_()
                ring.close_step(step)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=forward) for _ in range(3)]
    for thread in threads:
        thread.start()
    records: list[Record] = []
    while any(thread.is_alive() for thread in threads):
        records += consumer.drain()
        time.sleep(0.001)
    records += consumer.drain()
    assert not failures, failures
    got = {(r.step, r.raw.site): rows_of(r, spans, TOKENS, 8) for r in captures(records)}
    assert got.keys() == tensors.keys()
    assert all(same(rows, tensors[key][0]) for key, rows in got.items())
    ring.finish()
    assert consumer.control.state.value == _abi.State.CLOSED
    ring.close()


def test_a_forked_child_captures_nothing(ring: native.Ring) -> None:
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=0, space=TOKENS, roles=[ROW, ROW, INNER])
    spans = batch_spans([(0, 2)])
    x = torch.randn(1, 2, 3)
    assert ring.open_step(0, spans, width=(2, 0, 0))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.ops.dmi.capture(ring.tensor, [x], [site])
            ring.close_step(0)
            opened = ring.open_step(1, spans, width=(2, 0, 0))
            ring.close()
            status = 2 if opened else 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    torch.ops.dmi.capture(ring.tensor, [x], [site])
    ring.close_step(0)
    assert [r.kind for r in consumer.drain()] == [_abi.Kind.OPEN, _abi.Kind.CAPTURE, _abi.Kind.CLOSE]
    assert consumer.control.state.value == _abi.State.RUNNING


def test_the_gil_is_not_held_while_waiting() -> None:
    ring = native.Ring(mode="complete", payload_mib=1 / 64, staging_mib=1 / 64, spill_mib=0, wait_bound_s=PATIENCE_S)
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=0, space=TOKENS, roles=[ROW, ROW, INNER])
    spans = batch_spans([(0, 50)])
    x = torch.randn(1, 50, 500)  # six rings full; only this thread drains

    def forward() -> None:
        ring.open_step(0, spans, width=(50, 0, 0))
        torch.ops.dmi.capture(ring.tensor, [x], [site])
        ring.close_step(0)

    thread = threading.Thread(target=forward)
    thread.start()
    records: list[Record] = []
    while thread.is_alive():
        records += consumer.drain()
    thread.join()
    records += consumer.drain()
    assert same(torch.cat([rows_of(r, spans, TOKENS, 50) for r in captures(records)]), x[0])
    ring.close()


def test_memory_of_torch_is_not_taken(ring: native.Ring) -> None:
    site = ring.add_site("x", layer=0, space=TOKENS, roles=[ROW, ROW, INNER])
    x = torch.randn(1, 64, 1024)
    assert ring.open_step(0, batch_spans([(0, 64)]), width=(64, 0, 0))
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.ops.dmi.capture(ring.tensor, [x], [site])
    ring.close_step(0)
    assert ring.counters()["captured_rows"] == 64
    assert sum(abs(event.self_cpu_memory_usage) for event in profile.key_averages()) == 0
