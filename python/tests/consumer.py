"""The engine's side of a ring by itself: what tests of the capture op read with, and the rows that plain torch indexing gives."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import struct
import time
from dataclasses import dataclass

import torch

from dmi import _abi, native
from dmi._abi import Outcome, Role, Space

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


def random_strides(x: torch.Tensor) -> torch.Tensor:
    """The same values and shape in other memory: permuted, padded, sliced, expanded."""
    order = random.sample(range(x.ndim), x.ndim)
    inverse = [order.index(d) for d in range(x.ndim)]
    kind = random.choice(["permuted", "padded", "stepped", "expanded", "plain"])
    if kind == "permuted":
        return x.permute(order).contiguous().permute(inverse)
    if kind in ("padded", "stepped"):
        step = 2 if kind == "stepped" else 1
        out = torch.zeros(
            [n * step + random.randrange(3) for n in x.permute(order).shape], dtype=x.dtype, device=x.device
        )
        out = out[tuple(slice(0, n * step, step) for n in x.permute(order).shape)].permute(inverse)
        out.copy_(x)
        return out
    if kind == "expanded":
        d = random.randrange(x.ndim)
        return x.narrow(d, 0, 1).expand(x.shape) if x.shape[d] else x
    return x


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
