"""The capture op and the ring, against plain torch indexing, byte for byte; on the oldest and the newest torch."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import itertools
import mmap
import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from dmi import _abi, native
from dmi._abi import Outcome, Reason, Role, Space

pytestmark = pytest.mark.newest

ROW, INNER, KEY = Role.ROW, Role.INNER, Role.KEY
TOKENS, LOGITS, CACHE = Space.TOKENS, Space.LOGITS, Space.CACHE

DTYPES = {
    torch.bool: _abi.DType.BOOL, torch.uint8: _abi.DType.U8, torch.int8: _abi.DType.I8, torch.uint16: _abi.DType.U16,
    torch.int16: _abi.DType.I16, torch.uint32: _abi.DType.U32, torch.int32: _abi.DType.I32, torch.uint64: _abi.DType.U64,
    torch.int64: _abi.DType.I64, torch.float16: _abi.DType.F16, torch.bfloat16: _abi.DType.BF16, torch.float32: _abi.DType.F32,
    torch.float64: _abi.DType.F64, torch.float8_e4m3fn: _abi.DType.F8_E4M3, torch.float8_e5m2: _abi.DType.F8_E5M2,
    torch.float8_e4m3fnuz: _abi.DType.F8_E4M3FNUZ, torch.float8_e5m2fnuz: _abi.DType.F8_E5M2FNUZ,
    torch.float8_e8m0fnu: _abi.DType.F8_E8M0, torch.complex64: _abi.DType.C64, torch.complex128: _abi.DType.C128,
}  # fmt: skip


PATIENCE_S = 120
"""With what takes a moment, on a machine that has other work."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed = int(os.environ.get("DMI_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"DMI_TEST_SEED={seed}")
    random.seed(seed)
    torch.manual_seed(seed)


@dataclass
class Record:
    """A record, and the bytes of what it captured."""

    kind: int
    step: int
    raw: ctypes.Structure
    payload: bytes = b""


class Consumer:
    """The engine's side of a ring, and nothing but what abi/ring.h says of it."""

    def __init__(self, ring: native.Ring) -> None:
        self.map = mmap.mmap(ring.fds[0], 0)
        self.bell, self.pump = ring.fds[1], ring.fds[2]
        self.header = _abi.HeaderStruct.from_buffer(self.map)
        self.control = _abi.ControlStruct.from_buffer(self.map, self.header.control_offset)
        self.next = [0] * self.header.lanes
        self.posted = 0
        self.freed: dict[str, dict[int, int]] = {"payload_tail": {}, "spill_tail": {}}
        ring.set_attached(True)

    def drain(self) -> list[Record]:
        out = []
        for lane in range(self.header.lanes):
            while (record := self._take(lane)) is not None:
                out.append(record)
        return out

    def _take(self, lane: int) -> Record | None:
        slot = lane * self.header.record_capacity + self.next[lane] % self.header.record_capacity
        at = self.header.records_offset + slot * ctypes.sizeof(_abi.RecordStruct)
        raw = _abi.RecordStruct.from_buffer_copy(self.map, at)
        if raw.seq != self.next[lane] + 1:
            return None
        kinds = {_abi.Kind.OPEN: _abi.OpenStruct, _abi.Kind.CLOSE: _abi.CloseStruct, _abi.Kind.GAP: _abi.GapStruct}
        record = Record(raw.kind, raw.step, raw)
        if raw.kind == _abi.Kind.CAPTURE:
            if raw.outcome == Outcome.CAPTURED:
                record.payload = self._fetch(raw)
        else:
            record.raw = kinds[raw.kind].from_buffer_copy(self.map, at)
        if raw.kind == _abi.Kind.OPEN:
            self.control.lane[lane].table_tail.value = record.raw.table + record.raw.table_bytes
        self.next[lane] += 1
        self.control.lane[lane].record_tail.value = self.next[lane]
        return record

    def _fetch(self, raw: _abi.RecordStruct) -> bytes:
        if raw.place == _abi.Place.SPILL:
            at = self.header.spill_offset + raw.payload % self.header.spill_bytes
            data = self.map[at : at + raw.payload_bytes]
            self._free("spill_tail", raw)
            return data
        data = b""
        while len(data) < raw.payload_bytes:
            count = min(raw.payload_bytes - len(data), self.header.staging_bytes)
            at = self.header.commands_offset + self.posted % self.header.command_capacity * 32
            self.map[at : at + 32] = struct.pack("<QQQQ", raw.payload + len(data), count, 0, self.posted)
            self.posted += 1
            self.control.commands_head.value = self.posted
            bound = time.monotonic() + PATIENCE_S
            while self.control.commands_done.value != self.posted:
                assert time.monotonic() < bound, "the pump did not copy"
                if self.control.pump_waiting.value:  # again and again: it may have gone to sleep between our two words, as this test's stores have no fences
                    os.eventfd_write(self.pump, 1)
                time.sleep(0.0005)
            data += self.map[self.header.staging_offset : self.header.staging_offset + count]
        self._free("payload_tail", raw)
        return data

    def _free(self, tail: str, raw: _abi.RecordStruct) -> None:
        """Lanes' ranges tile the ring, and come in any order: the tail goes up to the first that is not done."""
        word, done = getattr(self.control, tail), self.freed[tail]
        if raw.payload_bytes:
            done[raw.payload] = -(-(raw.payload + raw.payload_bytes) // _abi.PAYLOAD_ALIGN) * _abi.PAYLOAD_ALIGN
        while word.value in done:
            word.value = done.pop(word.value)


def captures(records: list[Record], site: int | None = None) -> list[Record]:
    return [r for r in records if r.kind == _abi.Kind.CAPTURE and site in (None, r.raw.site)]


def rows_of(record: Record, spans: list[native.Span], space: int, width: int) -> torch.Tensor:
    """The record's rows in row-list order, its other dimensions behind them."""
    raw = record.raw
    dtype = next(t for t, number in DTYPES.items() if number == raw.dtype)
    size, stride = list(raw.size[: raw.ndim]), list(raw.stride[: raw.ndim])
    roles = list(raw.role[: raw.ndim])
    element = torch.empty(0, dtype=dtype).element_size()
    flat = torch.frombuffer(bytearray(record.payload) or bytearray(element), dtype=torch.uint8).view(dtype)
    whole = torch.as_strided(flat, size, stride) if 0 not in size else torch.empty(size, dtype=dtype)
    if raw.flags & _abi.RECORD_GATHERED:
        assert roles[0] == ROW and size[0] == raw.rows and ROW not in roles[1:]
        return whole
    places = [d for d, role in enumerate(roles) if role == ROW]
    picked = []
    for _, s, batch, first, count, *_ in spans:
        for index in range(first, first + count if s == space else first):
            where: list[object] = [slice(None)] * raw.ndim
            for d, i in zip(places, (batch, index) if len(places) == 2 else (batch * width + index,), strict=True):
                where[d] = i
            picked.append(whole[tuple(where)])
    return torch.stack(picked)[raw.row_first : raw.row_first + raw.rows]


def expected(
    x: torch.Tensor, roles: list[int], spans: list[native.Span], space: int, width: int, keys: int = 0
) -> torch.Tensor:
    """The same rows by plain indexing."""
    if KEY in roles and keys:
        x = x.narrow(roles.index(KEY), 0, min(keys, x.shape[roles.index(KEY)]))
    places = [d for d, role in enumerate(roles) if role == ROW]
    x = x.permute(*places, *(d for d in range(x.ndim) if d not in places))
    rows = []
    for _, s, batch, first, count, *_ in spans:
        if s == space:
            for index in range(first, first + count):
                rows.append(x[batch, index] if len(places) == 2 else x[batch * width + index])
    return torch.stack(rows) if rows else x.reshape(-1, *x.shape[len(places) :])[:0]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def random_tensor(size: list[int], dtype: torch.dtype) -> torch.Tensor:
    count = 1
    for n in size:
        count *= n
    if dtype == torch.bool:
        return torch.randint(0, 2, size).bool()
    element = torch.empty(0, dtype=dtype).element_size()
    return torch.randint(0, 256, (count * element,), dtype=torch.uint8).view(dtype).reshape(size)


@pytest.fixture
def ring() -> Iterator[native.Ring]:
    ring = native.Ring(mode="best-effort", payload_mib=4, staging_mib=1)
    yield ring
    ring.close()


def batch_spans(counts: list[tuple[int, int]], space: int = TOKENS) -> list[native.Span]:
    """A span per batch row: (first, count)."""
    return [(100 + b, space, b, first, count, 0, first, 0, 0) for b, (first, count) in enumerate(counts) if count]


def capture_one(
    ring: native.Ring,
    x: torch.Tensor,
    roles: list[int],
    spans: list[native.Span],
    *,
    space: int = TOKENS,
    width: int,
    keys: int = 0,
) -> tuple[list[Record], torch.Tensor]:
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=None, space=space, roles=roles)
    widths = tuple(width if s == space else 0 for s in range(3))
    assert ring.open_step(0, spans, width=widths, keys=keys)
    torch.ops.dmi.capture(ring.tensor, [x], [site])
    ring.close_step(0)
    records = captures(consumer.drain())
    return records, torch.cat([rows_of(r, spans, space, width) for r in records if r.raw.outcome == Outcome.CAPTURED])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(ring: native.Ring, dtype: torch.dtype) -> None:
    x = random_tensor([2, 5, 3], dtype)
    roles, spans = [ROW, ROW, INNER], batch_spans([(2, 3), (0, 5)])
    records, rows = capture_one(ring, x, roles, spans, width=5)
    assert [r.raw.dtype for r in records] == [DTYPES[dtype]]
    assert same(rows, expected(x, roles, spans, TOKENS, 5))


def random_strides(x: torch.Tensor) -> torch.Tensor:
    """The same values and shape in other memory: permuted, padded, sliced, expanded."""
    order = random.sample(range(x.ndim), x.ndim)
    inverse = [order.index(d) for d in range(x.ndim)]
    kind = random.choice(["permuted", "padded", "stepped", "expanded", "plain"])
    if kind == "permuted":
        return x.permute(order).contiguous().permute(inverse)
    if kind in ("padded", "stepped"):
        step = 2 if kind == "stepped" else 1
        out = torch.zeros([n * step + random.randrange(3) for n in x.permute(order).shape], dtype=x.dtype, device=x.device)
        out = out[tuple(slice(0, n * step, step) for n in x.permute(order).shape)].permute(inverse)
        out.copy_(x)
        return out
    if kind == "expanded":
        d = random.randrange(x.ndim)
        return x.narrow(d, 0, 1).expand(x.shape) if x.shape[d] else x
    return x


def test_layouts() -> None:
    """Random shapes, roles, memory layouts, row lists, keys: the rows are those that indexing gives."""
    ring = native.Ring(mode="best-effort", payload_mib=0.25, staging_mib=0.03, spill_mib=0, lanes=1)  # a record for each tensor
    consumer = Consumer(ring)
    whole = gathered = 0
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
        x = random_strides(torch.randn(size))
        site = ring.add_site(f"s{step}", layer=step, space=space, roles=roles)
        widths = tuple(width if s == space else 1 for s in range(3))
        assert ring.open_step(step, spans, width=widths, keys=keys, packed=packed)
        torch.ops.dmi.capture(ring.tensor, [x], [site])
        ring.close_step(step)
        (record,) = captures(consumer.drain())
        what = f"step {step}: {size} {x.stride()} {roles} {spans} keys {keys} packed {packed}"
        assert record.raw.outcome == Outcome.CAPTURED, what
        want = expected(x, roles, spans, space, 0 if packed else width, keys)
        assert record.raw.rows == len(want), what
        if len(want):
            assert same(rows_of(record, spans, space, 0 if packed else width), want), what
        if KEY in roles:
            assert record.raw.key_base == max(0, keys - size[roles.index(KEY)]), what
        whole += not record.raw.flags & _abi.RECORD_GATHERED
        gathered += bool(record.raw.flags & _abi.RECORD_GATHERED)
    assert whole > 4 and gathered > 100, (whole, gathered)  # both ways were tried
    ring.close()


def test_permuted_tensor_is_one_copy(ring: native.Ring) -> None:
    x = torch.randn(2, 6, 4, 8).permute(0, 2, 1, 3)  # [batch, tokens, heads, d] that lies as [batch, heads, tokens, d]
    roles, spans = [ROW, ROW, INNER, INNER], batch_spans([(0, 4), (0, 4)])
    (record,), rows = capture_one(ring, x, roles, spans, width=4)
    assert not record.raw.flags & _abi.RECORD_GATHERED
    assert tuple(record.raw.stride[:4]) == x.stride()
    assert same(rows, x.reshape(8, 6, 8))


@pytest.mark.parametrize("threads", [1, 3])
def test_large_copies_are_shared_among_torchs_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    ring = native.Ring(mode="best-effort", payload_mib=3, staging_mib=1)
    try:
        consumer = Consumer(ring)
        site = ring.add_site("x", layer=None, space=TOKENS, roles=[ROW, INNER])
        for step in range(8):  # over the end of the ring, too
            columns = 8191 + random.randrange(6)  # bytes that are no whole number of cache lines
            x = random_tensor([random.choice([63, 64, 65, 130]), columns], torch.uint8)
            spans = [(0, TOKENS, 0, 0, len(x), 0, 0, 0, 0)]
            assert ring.open_step(step, spans, width=(len(x), 0, 0))
            torch.ops.dmi.capture(ring.tensor, [x], [site])
            x_was = x.clone()
            x.zero_()
            ring.close_step(step)
            assert b"".join(record.payload for record in captures(consumer.drain())) == x_was.numpy().tobytes()
    finally:
        torch.set_num_threads(before)
        ring.close()


def test_pads_are_not_copied(ring: native.Ring) -> None:
    x = torch.randn(3, 50, 64)
    spans = batch_spans([(40, 10), (0, 50), (49, 1)])
    (record,), _ = capture_one(ring, x, [ROW, ROW, INNER], spans, width=50)
    assert record.raw.payload_bytes == 61 * 64 * 4


def test_static_cache_keys_are_cut(ring: native.Ring) -> None:
    x = torch.rand(2, 3, 4, 100)
    roles, spans = [ROW, INNER, ROW, KEY], batch_spans([(1, 3), (0, 4)])
    (record,), rows = capture_one(ring, x, roles, spans, width=4, keys=9)
    assert rows.shape == (7, 3, 9) and record.raw.payload_bytes == 7 * 3 * 9 * 4 and record.raw.key_base == 0
    assert same(rows, expected(x, roles, spans, TOKENS, 4, keys=9))


def test_sliding_window_says_where_its_keys_start(ring: native.Ring) -> None:
    x = torch.rand(1, 3, 4, 16)
    (record,), rows = capture_one(ring, x, [ROW, INNER, ROW, KEY], batch_spans([(0, 4)]), width=4, keys=40)
    assert record.raw.key_base == 24 and rows.shape == (4, 3, 16)


def test_cache_space_takes_the_steps_slots(ring: native.Ring) -> None:
    cache = torch.randn(2, 3, 64, 8)  # [batch, heads, slots, d]
    roles = [ROW, INNER, ROW, INNER]
    spans = batch_spans([(10, 3), (12, 1)], CACHE)
    _, rows = capture_one(ring, cache, roles, spans, space=CACHE, width=0)
    assert same(rows, torch.cat([cache[0, :, 10:13].permute(1, 0, 2), cache[1, :, 12:13].permute(1, 0, 2)]))


def test_empty(ring: native.Ring) -> None:
    """A space without rows, a dimension of none: the site has fired, nothing is copied."""
    consumer = Consumer(ring)
    logits = ring.add_site("logits", layer=None, space=LOGITS, roles=[ROW, ROW, INNER])
    hollow = ring.add_site("hollow", layer=None, space=TOKENS, roles=[ROW, ROW, INNER])
    assert ring.open_step(0, batch_spans([(0, 4)]), width=(4, 0, 0))
    torch.ops.dmi.capture(ring.tensor, [torch.empty(1, 0, 32), torch.empty(1, 4, 0)], [logits, hollow])
    ring.close_step(0)
    assert [(r.raw.site, r.raw.outcome, r.raw.rows, r.raw.payload_bytes) for r in captures(consumer.drain())] == [
        (logits, Outcome.CAPTURED, 0, 0),
        (hollow, Outcome.CAPTURED, 4, 0),
    ]


@pytest.mark.parametrize(
    ("roles", "x"),
    [
        ([ROW, ROW, INNER], torch.zeros(2, 4)),  # dimensions
        ([ROW, ROW, INNER], torch.zeros(2, 5, 3)),  # the length of the step's rows
        ([ROW, ROW, INNER], torch.zeros(1, 4, 3)),  # batch rows
        ([ROW, INNER], torch.zeros(7, 3)),  # flattened rows
        ([ROW, INNER], torch.zeros(4, 3)),
        ([], torch.zeros(())),  # no dimension at all
        ([], torch.zeros(1, 1, 1, 1, 1, 1, 1)),  # too many
        ([ROW, ROW, INNER], torch.zeros(2, 4, 3, dtype=torch.complex32)),  # a dtype that nobody stores
        ([ROW, ROW, INNER], torch.zeros(2, 4, 3).to_sparse()),
    ],
)
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_what_does_not_fit_is_booked(ring: native.Ring, roles: list[int], x: torch.Tensor) -> None:
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=0, space=TOKENS, roles=roles)
    assert ring.open_step(0, batch_spans([(0, 4), (1, 3)]), width=(4, 0, 0))
    torch.ops.dmi.capture(ring.tensor, [x], [site])
    ring.close_step(0)
    (record,) = captures(consumer.drain())
    assert (record.raw.outcome, record.raw.reason, record.raw.rows) == (Outcome.DROPPED, Reason.MISMATCH, 7)
    assert ring.counters()["rows"]["mismatch"] == 7


def test_lazy_conjugate_is_what_it_stands_for(ring: native.Ring) -> None:
    x = torch.randn(1, 4, 3, dtype=torch.complex64).conj()
    assert x.is_conj()
    _, rows = capture_one(ring, x, [ROW, ROW, INNER], batch_spans([(0, 4)]), width=4)
    assert same(rows, x.resolve_conj()[0])


def test_changed_in_place_right_after(ring: native.Ring) -> None:
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=0, space=TOKENS, roles=[ROW, ROW, INNER])
    x = torch.randn(4, 64, 128)
    before = x.clone()
    spans = batch_spans([(0, 64)] * 4)
    assert ring.open_step(0, spans, width=(64, 0, 0))
    torch.ops.dmi.capture(ring.tensor, [x], [site])
    x.fill_(7)
    ring.close_step(0)
    (record,) = captures(consumer.drain())
    assert same(rows_of(record, spans, TOKENS, 64), before.flatten(0, 1))


def test_modules_with_gradients_and_inference_mode(ring: native.Ring) -> None:
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=0, space=TOKENS, roles=[ROW, ROW, INNER])
    layer = torch.nn.Linear(4, 4)
    x = torch.randn(1, 3, 4)
    for step, mode in enumerate((torch.enable_grad, torch.no_grad, torch.inference_mode)):
        with mode():
            assert ring.open_step(step, batch_spans([(0, 3)]), width=(3, 0, 0))
            y = layer(x)
            torch.ops.dmi.capture(ring.tensor, [y], [site])
            ring.close_step(step)
        (record,) = captures(consumer.drain())
        assert same(rows_of(record, batch_spans([(0, 3)]), TOKENS, 3), y.detach()[0])
        if y.requires_grad:
            y.sum().backward()
            assert torch.equal(layer.bias.grad, torch.full((4,), 3.0))


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


# ------------------------------------------------------------------ torch.compile


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_without_a_break(ring: native.Ring) -> None:
    """Captures are neither dropped nor moved, and see a tensor as it is at their place, in-place changes before and after included."""
    consumer = Consumer(ring)
    sites = [ring.add_site(f"s{i}", layer=i, space=TOKENS, roles=[ROW, ROW, INNER]) for i in range(4)]
    handle = ring.tensor

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x) * 2
        torch.ops.dmi.capture(handle, [y], [sites[0]])
        y.add_(1)
        torch.ops.dmi.capture(handle, [y, y.transpose(1, 2).contiguous().transpose(1, 2)], [sites[1], sites[2]])
        y.mul_(3)
        torch.ops.dmi.capture(handle, [x], [sites[3]])
        return y.sum(-1)

    compiled = torch.compile(forward, fullgraph=True)
    spans = batch_spans([(0, 6), (0, 6)])
    for step in range(3):
        x = torch.randn(2, 6, 16)
        assert ring.open_step(step, spans, width=(6, 0, 0))
        out = compiled(x)
        ring.close_step(step)
        y = torch.relu(x) * 2
        torch.testing.assert_close(out, ((y + 1) * 3).sum(-1))
        records = captures(consumer.drain())
        assert [r.raw.site for r in records] == sites
        for record, want in zip(records, (y, y + 1, y + 1, x), strict=True):
            assert same(rows_of(record, spans, TOKENS, 6), want.flatten(0, 1))


@pytest.mark.usefixtures("fresh_compiler")
def test_site_numbers_do_not_recompile(ring: native.Ring) -> None:
    """A layer compiled on its own, its site an int argument: two graphs at most, whatever the number of layers."""
    consumer = Consumer(ring)
    sites = [ring.add_site(f"s{i}", layer=i, space=TOKENS, roles=[ROW, ROW, INNER]) for i in range(24)]
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def layer(x: torch.Tensor, site: int) -> torch.Tensor:
        y = x + 1
        torch.ops.dmi.capture(ring.tensor, [y], [site])
        return y

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    spans = batch_spans([(0, 3)])
    assert ring.open_step(0, spans, width=(3, 0, 0))
    x = torch.zeros(1, 3, 2)
    for site in sites:
        x = compiled(x, site)
    ring.close_step(0)
    records = captures(consumer.drain())
    assert [r.raw.site for r in records] == sites
    assert [float(rows_of(r, spans, TOKENS, 3)[0, 0]) for r in records] == [float(i + 1) for i in range(24)]
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_compiler")
def test_symbolic_shapes(ring: native.Ring) -> None:
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=0, space=TOKENS, roles=[ROW, ROW, INNER])

    @torch.compile(fullgraph=True, dynamic=True)
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch.ops.dmi.capture(ring.tensor, [y], [site])
        return y + 1

    for step, length in enumerate((3, 5, 9, 17)):
        x = torch.randn(2, length, 8)
        spans = batch_spans([(1, length - 1), (0, length)])
        assert ring.open_step(step, spans, width=(length, 0, 0))
        forward(x)
        ring.close_step(step)
        (record,) = captures(consumer.drain())
        assert same(rows_of(record, spans, TOKENS, length), expected(x * 2, [ROW, ROW, INNER], spans, TOKENS, length))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_outlives_its_ring() -> None:
    ring = native.Ring(mode="best-effort", payload_mib=1, staging_mib=1)
    handle = ring.tensor

    @torch.compile(fullgraph=True)
    def forward(x: torch.Tensor) -> torch.Tensor:
        torch.ops.dmi.capture(handle, [x], [0])
        return x + 1

    x = torch.zeros(3)
    forward(x)
    assert ring.counters()["outside"] == 1
    ring.close()
    assert torch.equal(forward(x), x + 1)
