"""An engine in one page of Python: drains a ring as docs and abi/ring.h say, with nothing of the Go engine's code.

Tests of what is captured read it through this, so that they stand on their own feet.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from dataclasses import dataclass, field

import torch

from dmi import _abi, native

DTYPES = {
    _abi.DType.BOOL: torch.bool,
    _abi.DType.U8: torch.uint8,
    _abi.DType.I8: torch.int8,
    _abi.DType.I16: torch.int16,
    _abi.DType.I32: torch.int32,
    _abi.DType.I64: torch.int64,
    _abi.DType.F16: torch.float16,
    _abi.DType.BF16: torch.bfloat16,
    _abi.DType.F32: torch.float32,
    _abi.DType.F64: torch.float64,
}


@dataclass(frozen=True)
class RowKey:
    request: int
    position: int
    batch: int
    first: int
    key_first: int
    attempt: int


@dataclass
class Step:
    number: int
    spans: list[_abi.SpanStruct]
    width: tuple[int, int, int]
    keys: int
    sites: int
    aborted: bool = False
    closed: bool = False
    fired: dict[int, int] = field(default_factory=dict)
    """Rows settled, by site."""
    outcomes: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """Rows by (site, outcome, reason)."""

    def rows(self, space: int) -> list[RowKey]:
        return [
            RowKey(s.request, s.position + i, s.batch, s.first + i, s.key_first, s.attempt)
            for s in self.spans
            if s.space == space
            for i in range(s.count)
        ]


class RingReader:
    """`drain()` empties the ring. `rows[site][request][position]` is then the row, newest attempt; `steps` what
    happened."""

    def __init__(self, ring: native.Ring) -> None:
        self._map = mmap.mmap(ring.fds[0], 0)
        self._pump = ring.fds[2]
        self._head = self._view(_abi.HeaderStruct, 0)
        self._control = self._view(_abi.ControlStruct, self._head.control_offset)
        self._cursor = [0] * self._head.lanes
        self._open: list[Step | None] = [None] * self._head.lanes
        self._posted = 0
        self._parts: dict[int, bytearray] = {}
        self.steps: list[Step] = []
        self.rows: dict[str, dict[int, dict[int, torch.Tensor]]] = {}
        self._attempts: dict[tuple[str, int, int], int] = {}
        ring.set_attached(True)

    def _view(self, kind: type[ctypes.Structure], offset: int):  # type: ignore[no-untyped-def]
        return kind.from_buffer(self._map, offset)

    def site(self, number: int):  # type: ignore[no-untyped-def]
        return self._view(_abi.SiteStruct, self._head.sites_offset + number * ctypes.sizeof(_abi.SiteStruct))

    def name(self, number: int) -> str:
        site = self.site(number)
        return bytes(site.name[: site.name_bytes]).decode()

    def drain(self) -> None:
        size = ctypes.sizeof(_abi.RecordStruct)
        for lane in range(self._head.lanes):
            while True:
                index = self._cursor[lane]
                slot = lane * self._head.record_capacity + index % self._head.record_capacity
                offset = self._head.records_offset + slot * size
                record = self._view(_abi.RecordStruct, offset)
                if record.seq != index + 1:
                    break
                if record.kind == _abi.Kind.OPEN:
                    self._on_open(lane, self._view(_abi.OpenStruct, offset))
                elif record.kind == _abi.Kind.CAPTURE:
                    self._on_capture(lane, record)
                elif record.kind == _abi.Kind.CLOSE:
                    self._on_close(lane, self._view(_abi.CloseStruct, offset))
                self._cursor[lane] += 1
                self._control.lane[lane].record_tail.value = self._cursor[lane]

    def _on_open(self, lane: int, record: _abi.OpenStruct) -> None:
        assert not record.gated, f"step {record.step} was gated off"
        at = self._head.tables_offset + lane * self._head.table_bytes + record.table % self._head.table_bytes
        table = self._view(_abi.TableStruct, at)
        assert table.magic == _abi.TABLE_MAGIC and table.step == record.step
        size = ctypes.sizeof(_abi.SpanStruct)
        spans = [
            _abi.SpanStruct.from_buffer_copy(self._map, at + ctypes.sizeof(_abi.TableStruct) + i * size)
            for i in range(table.spans)
        ]
        step = Step(record.step, spans, tuple(table.width), table.keys, record.sites)
        for space in range(_abi.SPACES):
            assert record.rows[space] == len(step.rows(space))
        self._control.lane[lane].table_tail.value = record.table + record.table_bytes
        self._open[lane] = step
        self.steps.append(step)

    def _on_close(self, lane: int, record: _abi.CloseStruct) -> None:
        step = self._open[lane]
        assert step is not None and step.number == record.step
        step.closed, step.aborted = True, bool(record.aborted)
        self._open[lane] = None

    def _on_capture(self, lane: int, record: _abi.RecordStruct) -> None:
        step = self._open[lane]
        assert step is not None and step.number == record.step
        step.fired[record.site] = step.fired.get(record.site, 0) + record.rows
        key = (record.site, record.outcome, record.reason)
        step.outcomes[key] = step.outcomes.get(key, 0) + record.rows
        if record.outcome != _abi.Outcome.CAPTURED:
            return
        data = self._fetch(record)
        if record.part_offset or record.payload_bytes != record.tensor_bytes:
            whole = self._parts.setdefault(record.site, bytearray(record.tensor_bytes))
            whole[record.part_offset : record.part_offset + record.payload_bytes] = data
            if record.part_offset + record.payload_bytes != record.tensor_bytes:
                return
            data = bytes(self._parts.pop(record.site))
        self._slice(step, record, data)

    def _fetch(self, record: _abi.RecordStruct) -> bytes:
        """The payload, where it lies or through the pump."""
        end = -(-(record.payload + record.payload_bytes) // _abi.PAYLOAD_ALIGN) * _abi.PAYLOAD_ALIGN
        if record.place == _abi.Place.SPILL:
            at = self._head.spill_offset + record.payload % self._head.spill_bytes
            data = self._map[at : at + record.payload_bytes]
            self._control.spill_tail.value = max(self._control.spill_tail.value, end)
            return data
        out = bytearray()
        while len(out) < record.payload_bytes:
            count = min(record.payload_bytes - len(out), self._head.staging_bytes)
            at = self._posted % self._head.command_capacity * ctypes.sizeof(_abi.CommandStruct)
            command = self._view(_abi.CommandStruct, self._head.commands_offset + at)
            command.payload, command.bytes = record.payload + len(out), count
            command.staging, command.id = 0, self._posted
            self._posted += 1
            self._control.commands_head.value = self._posted
            os.eventfd_write(self._pump, 1)
            bound = time.monotonic() + 120
            while self._control.commands_done.value < self._posted:
                assert time.monotonic() < bound, "the pump did not copy within two minutes"
                time.sleep(0)
            out += self._map[self._head.staging_offset : self._head.staging_offset + count]
        self._control.payload_tail.value = max(self._control.payload_tail.value, end)
        return bytes(out)

    def _slice(self, step: Step, record: _abi.RecordStruct, data: bytes) -> None:
        site = self.site(record.site)
        name = self.name(record.site)
        dtype = DTYPES[_abi.DType(record.dtype)]
        size, stride = tuple(record.size[: record.ndim]), tuple(record.stride[: record.ndim])
        roles = list(record.role[: record.ndim])
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype, device="cpu")
        tensor = torch.as_strided(flat, size, stride) if flat.numel() else flat.reshape(size)
        rows = step.rows(site.space)[record.row_first : record.row_first + record.rows]
        places = [d for d, role in enumerate(roles) if role == _abi.Role.ROW]
        for i, row in enumerate(rows):
            if record.flags & _abi.RECORD_GATHERED:
                index: tuple[int, ...] = (i,)
            elif len(places) == 2:
                index = (row.batch, row.first)
            else:
                index = (row.batch * step.width[site.space] + row.first,)
            value = tensor
            for d, where in reversed(list(zip(places, index, strict=True))):
                value = value.select(d, where)
            if _abi.Role.KEY in roles:
                begin = row.key_first - record.key_base
                missing = max(0, -begin)
                keys = value[..., max(begin, 0) : begin + row.position + 1]
                blank = float("-inf") if site.fill else 0
                value = torch.nn.functional.pad(keys, (missing, 0), value=blank)
            key = (name, row.request, row.position)
            if row.attempt >= self._attempts.get(key, -1):
                self._attempts[key] = row.attempt
                self.rows.setdefault(name, {}).setdefault(row.request, {})[row.position] = value.clone()

    def tensor(self, name: str, request: int) -> torch.Tensor:
        """All rows of a request, as a reader is given them: rows on the site's row axis, keys padded with its fill."""
        rows = self.rows[name][request]
        assert sorted(rows) == list(range(min(rows), min(rows) + len(rows))), f"{name}: holes in {sorted(rows)}"
        number = next(n for n in range(self._control.sites_count.value) if self.name(n) == name)
        site = self.site(number)
        values = [rows[p] for p in sorted(rows)]
        if _abi.Role.KEY in list(site.role):
            longest = max(v.shape[-1] for v in values)
            blank = float("-inf") if site.fill else 0
            values = [torch.nn.functional.pad(v, (0, longest - v.shape[-1]), value=blank) for v in values]
        return torch.stack(values, dim=site.row_axis)
