"""libdmi from Python: the capture op, and the ring that it writes.

The op is ``torch.ops.dmi.capture(ring.tensor, tensors, sites)``: it copies a group of tensors, each to its site, into the step that the
calling thread has open on that ring. A site plus ``AS[dtype]``: the tensor's bits are of that dtype, whatever its own. With
``held`` and ``beside``: the last ``held`` tensors have no site, and are there to live until this call; those of a call that is ``beside`` are to be held by the next. Outside an open step, on a closed ring, and in a forked child it does nothing. ``torch.ops.dmi.copy(ring.tensor,
tensor)`` is a clone that compilers leave where it is.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dmi import _abi

LIBRARY = Path(__file__).parent / "lib" / "libdmi.so"

MODES = {"best-effort": _abi.Mode.BEST_EFFORT, "complete": _abi.Mode.COMPLETE}

#: A row span as a tuple: request, space, batch, first, count, position, key_first, attempt, phase (see dmi_span in abi/ring.h).
Span = tuple[int, int, int, int, int, int, int, int, int]

_SPAN = struct.Struct("<QIIIIIIHBBI")
_NO_STEP = (1 << 64) - 1
_ERROR_INVALID, _ERROR_CLOSED, _ERROR_TIMEOUT = -1, -3, -4


class NativeError(RuntimeError):
    """libdmi is missing, or the operating system refused it something."""


class CaptureError(RuntimeError):
    """In complete mode, rows were not captured because the engine made no room within the bound. They are on the books."""


class _Options(ctypes.Structure):
    _fields_ = [
        ("mode", ctypes.c_uint32),
        ("lanes", ctypes.c_uint32),
        ("record_capacity", ctypes.c_uint32),
        ("command_capacity", ctypes.c_uint32),
        ("site_capacity", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("payload_bytes", ctypes.c_uint64),
        ("table_bytes", ctypes.c_uint64),
        ("staging_bytes", ctypes.c_uint64),
        ("spill_bytes", ctypes.c_uint64),
        ("wait_bound_ns", ctypes.c_uint64),
    ]


class _Series(ctypes.Structure):
    _fields_ = [
        ("ring", ctypes.c_int64),
        ("spans", ctypes.c_void_p),
        ("count", ctypes.c_uint32),
        ("width", ctypes.c_uint32 * _abi.SPACES),
        ("table_flags", ctypes.c_uint32),
    ]


class _Pack(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("sequences", "slots", "counts", "positions", "spans")]


class _Gauges(ctypes.Structure):
    _fields_ = [
        ("payload_used", ctypes.c_uint64),
        ("spill_used", ctypes.c_uint64),
        ("outside", ctypes.c_uint64),
        ("bad_commands", ctypes.c_uint64),
        ("gap_steps", ctypes.c_uint64),
        ("gap_rows", ctypes.c_uint64),
    ]


KEEPING = " keeping the GIL"

# Of any strides: else Inductor gives the op clones of what it would lay out otherwise, another one in each call, so that what one call is given the next does not hold.
_definitions = torch.library.Library("dmi", "FRAGMENT")
_definitions.define("capture(Tensor(a!) ring, Tensor[] tensors, SymInt[] sites, int held=0, bool beside=False) -> ()", tags=(torch.Tag.flexible_layout,))

_loading = threading.Lock()
_library: ctypes.CDLL | None = None


def load() -> ctypes.CDLL:
    """Load libdmi and register the op. Raises NativeError where it is not there or does not fit this torch."""
    global _library
    with _loading:
        if _library is None:
            _library = _load()
        return _library


def _load() -> ctypes.CDLL:
    if not LIBRARY.exists():
        raise NativeError(
            f"load libdmi: {LIBRARY} does not exist; build it with `python cuda/build.py` in a checkout, or install a dmi wheel"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise NativeError(
            f"load libdmi: {LIBRARY} does not load in torch {torch.__version__} (2.11 or later is needed): {error}"
        ) from error
    library = ctypes.CDLL(str(LIBRARY))  # releases the GIL for each call
    handle, u32, i32, u64 = ctypes.c_int64, ctypes.c_uint32, ctypes.c_int32, ctypes.c_uint64
    pointer = ctypes.POINTER
    for name, result, arguments in (
        ("dmi_last_error", ctypes.c_char_p, []),
        ("dmi_ring_create", handle, [pointer(_Options)]),
        ("dmi_ring_shared_bytes", ctypes.c_int64, [pointer(_Options)]),
        ("dmi_ring_fds", i32, [handle, pointer(i32)]),
        ("dmi_has_cuda", i32, []),
        ("dmi_ring_token", ctypes.c_void_p, [handle]),
        ("dmi_ring_device_bytes", handle, [handle]),
        ("dmi_ring_producer", i32, [handle, ctypes.c_char_p]),
        ("dmi_ring_add_site", handle, [handle, pointer(_abi.SiteStruct)]),
        ("dmi_ring_set_attached", i32, [handle, i32]),
        ("dmi_ring_set_groups", i32, [handle, u64, pointer(u64), pointer(u64), u32]),
        ("dmi_ring_counters", i32, [handle, pointer(_abi.CountersStruct), u32, pointer(_Gauges)]),
        ("dmi_ring_closed_steps", i32, [handle, pointer(u64), u32]),
        ("dmi_ring_settle", i32, [handle, u64]),
        ("dmi_ring_finish", i32, [handle, u64]),
        ("dmi_ring_close", i32, [handle]),
        ("dmi_ring_branch", i32, [handle, i32, ctypes.c_void_p]),
        ("dmi_step_open", i32, [handle, u64, ctypes.c_void_p, u32, pointer(u32), u32, u32, ctypes.c_void_p]),
        ("dmi_step_next", i32, [ctypes.c_void_p, u64, u32, ctypes.c_void_p]),
        ("dmi_step_close", i32, [handle, u64, i32, ctypes.c_void_p]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    keeping = ctypes.PyDLL(str(LIBRARY))  # keeps the GIL, which another thread would then have for milliseconds perhaps
    pack_rows = vars(library)["dmi_pack_rows"] = keeping.dmi_pack_rows
    pack_rows.restype, pack_rows.argtypes = i32, [ctypes.c_void_p, u32]
    for name in ("dmi_step_open", "dmi_step_close"):
        kept, function = getattr(keeping, name), getattr(library, name)
        kept.restype, kept.argtypes = function.restype, function.argtypes
        vars(library)[name + KEEPING] = kept

    @torch.library.register_fake("dmi::capture")
    def _capture(ring: torch.Tensor, tensors: Sequence[torch.Tensor], sites: Sequence[int], held: int = 0, beside: bool = False) -> None:
        return None

    @torch.library.register_fake("dmi::copy")
    def _copy(ring: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    return library


def _check(library: ctypes.CDLL, status: int) -> int:
    """Return a status that is none of an error's, else raise what it stands for."""
    if status >= 0:
        return status
    message = library.dmi_last_error().decode(errors="replace")
    if status == _ERROR_INVALID:
        raise ValueError(message)
    if status == _ERROR_TIMEOUT:
        raise CaptureError(message)
    raise NativeError(message)


def _close(library: ctypes.CDLL, handle: int, tensor: torch.Tensor) -> None:
    if tensor.device.type == "cpu":
        tensor.zero_()  # graphs that were compiled with it go on and capture nothing
    library.dmi_ring_close(handle)


def pack_spans(spans: Sequence[Span]) -> bytes:
    """Spans as dmi_span structs. Trailing attempt and phase may be left out of a tuple."""
    return b"".join(_SPAN.pack(*span, *(0,) * (11 - len(span))) for span in spans)


SEQUENCES = np.dtype([("request", "<u8"), ("prompt", "<u4"), ("next", "<u4"), ("attempt", "<u2"), ("flags", "u1"), ("reserved", "V5")])
"""dmi_sequence: what all spans of a request have that a serving engine runs, and the position of its next row."""


class SpansAt(NamedTuple):
    """`number` spans (dmi_span) at an address, in memory of somebody's, who keeps them until the step is open."""

    address: int
    number: int


class Pack:
    """Spans of steps of which requests' rows lie one behind another in one dimension, made by libdmi: a loop over hundreds of them takes Python longer than a small model's step may. The arrays
    are for the caller to fill, each [capacity]: `sequences` (SEQUENCES), and for a step, uint32, `slots` (whose rows, as places among the sequences), `counts` (their tokens) and `positions` (of the first).
    A step has no more requests than `capacity`. One thread at a time."""

    def __init__(self, capacity: int) -> None:
        self._library = load()
        self.sequences = np.zeros(capacity, SEQUENCES)
        self.slots, self.counts, self.positions = np.zeros((3, capacity), np.uint32)
        self._spans = np.zeros(2 * capacity * _SPAN.size, np.uint8)
        self._told = _Pack(*(array.ctypes.data for array in (self.sequences, self.slots, self.counts, self.positions, self._spans)))
        self._address, self._at = ctypes.addressof(self._told), self._spans.ctypes.data

    def spans(self, count: int) -> SpansAt | None:
        """Of a step of so many requests: the tokens of each, then the row of each whose logits are computed, its last. They stay until the next call; `next` moves on.
        None, and nothing is changed, where the rows of one do not begin at its `next`."""
        return SpansAt(self._at, 2 * count) if self._library.dmi_pack_rows(self._address, count) else None


class Series:
    """Steps that follow each other with one token a row. Made by `Ring.series`; each is opened by `Ring.open_next`."""

    def __init__(self, ring: int, spans: bytes, width: tuple[int, int, int], packed: bool) -> None:
        self._spans = (ctypes.c_uint64 * (len(spans) // 8)).from_buffer_copy(spans)
        self._told = _Series(ring, ctypes.addressof(self._spans), len(spans) // _SPAN.size, width, _abi.TABLE_PACKED if packed else 0)
        self.address = ctypes.addressof(self._told)
        """Of what libdmi reads and moves on."""


class _Token:
    """Device memory of libdmi's as torch takes it: nothing of torch's allocator is used, and nothing is copied."""

    def __init__(self, address: int) -> None:
        self.__cuda_array_interface__ = {"shape": (1,), "typestr": "<i8", "data": (address, False), "version": 3}


AS = {
    dtype: int(of) << 32
    for dtype, of in (
        (torch.float16, _abi.DType.F16), (torch.bfloat16, _abi.DType.BF16), (torch.float32, _abi.DType.F32), (torch.float64, _abi.DType.F64),
        (torch.float8_e4m3fn, _abi.DType.F8_E4M3), (torch.float8_e5m2, _abi.DType.F8_E5M2),
    )
}  # fmt: skip
"""What is added to a site for the op to read a tensor's bits as of another dtype."""

USUAL_MIB = 256
"""Of a ring's payload, and of its staging."""


def ring_options(
    *,
    mode: str,
    device: torch.device | str = "cpu",
    payload_mib: float = USUAL_MIB,
    staging_mib: float = USUAL_MIB,
    spill_mib: float = 64,
    table_mib: float = 4,
    lanes: int | None = None,
    record_capacity: int = 16384,
    site_capacity: int = 4096,
    command_capacity: int = 4096,
    wait_bound_s: float = 30,
) -> tuple[_Options, torch.device]:
    """What a `Ring` is made with, and where it is."""
    if mode not in MODES:
        raise ValueError(f"create ring: mode {mode!r}; give one of {', '.join(map(repr, MODES))}")
    where = torch.device(device)
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"create ring: device {where}; tensors are captured on the CPU and on CUDA devices")
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    if lanes is None:
        lanes = 4 if where.type == "cpu" else 1  # steps follow each other on a device
    mib = 1 << 20
    return _Options(
        mode=MODES[mode],
        lanes=lanes,
        record_capacity=record_capacity,
        command_capacity=command_capacity,
        site_capacity=site_capacity,
        device=where.index if where.type == "cuda" else -1,
        payload_bytes=int(payload_mib * mib),
        table_bytes=int(table_mib * mib),
        staging_bytes=int(staging_mib * mib),
        spill_bytes=int(spill_mib * mib),
        wait_bound_ns=int(wait_bound_s * 1e9),
    ), where


def shared_bytes(options: _Options) -> int:
    """What a ring of these options shares with its engine."""
    library = load()
    return _check(library, library.dmi_ring_shared_bytes(ctypes.byref(options)))


class Ring:
    """A ring of this process: shared memory for one engine, and the private payload beside it.

    `device`: where the tensors are that it captures, the CPU or one CUDA device; there the payload takes `payload_mib` of its memory.
    Sizes are in MiB and rounded up to pages. Steps belong to the thread that opened them, at most ``lanes`` at once (4; on a
    device 1, where steps follow each other whatever streams they are on). A ring is
    closed by close(), or when it is no longer referenced; at exit its thread is stopped.
    """

    def __init__(self, *, mode: str, keep_gil: bool = False, **given: Any) -> None:
        """`given`: as `ring_options` takes them. `keep_gil`: other threads of this process run Python all the time, so that giving the GIL up for the microseconds in which a step is
        opened or closed may cost milliseconds; and nothing that the device waits for is done in Python, since opening may have to wait until a full launch queue moves on. Complete mode,
        which may wait for the engine, gives it up all the same."""
        self._library = load()
        self.mode = mode
        kind = KEEPING if keep_gil and mode == "best-effort" else ""
        self._open, self._close = getattr(self._library, "dmi_step_open" + kind), getattr(self._library, "dmi_step_close" + kind)
        options, self.device = ring_options(mode=mode, **given)
        self.lanes = int(options.lanes)
        self._index = None if self.device.type == "cpu" else self.device.index
        self._handle = _check(self._library, self._library.dmi_ring_create(ctypes.byref(options)))
        with torch.inference_mode(False):
            #: The op's `ring` argument. Keep this very object: compiled code refers to it.
            if self.device.type == "cpu":
                self.tensor = torch.tensor([self._handle], dtype=torch.int64, device="cpu")
            else:
                self.tensor = torch.as_tensor(_Token(self._library.dmi_ring_token(self._handle)), device=self.device)
                # CUDA graphs of torch.compile take a mutated input only where it cannot move.
                torch._dynamo.mark_static_address(self.tensor)
        self._finalizer = weakref.finalize(self, _close, self._library, self._handle, self.tensor)
        self._finalizer.atexit = False  # so that what ends at exit may still use it; libdmi stops its thread by itself
        producer = ctypes.create_string_buffer(16)
        _check(self._library, self._library.dmi_ring_producer(self._handle, producer))
        #: The ring's random name, 16 bytes.
        self.producer: bytes = producer.raw
        fds = (ctypes.c_int32 * 3)()
        _check(self._library, self._library.dmi_ring_fds(self._handle, fds))
        #: Sealed memfd, eventfd that we write, eventfd that the engine writes. The ring owns them.
        self.fds: tuple[int, int, int] = (fds[0], fds[1], fds[2])

    def add_site(
        self,
        name: str,
        *,
        layer: int | None,
        space: int,
        roles: Sequence[int] = (),
        row_axis: int = 0,
        fill: int = 0,
        flags: int = 0,
    ) -> int:
        """Publish a site and return its number. No roles: a leading row axis and anything behind it. Any thread, any time;
        steps that are open do not know it yet."""
        encoded = name.encode()
        if not 0 < len(encoded) <= _abi.SITE_NAME_BYTES:
            raise ValueError(f"add site {name!r}: its name has {len(encoded)} bytes; give 1 to {_abi.SITE_NAME_BYTES}")
        if len(roles) > _abi.MAX_DIMS:
            raise ValueError(f"add site {name!r}: {len(roles)} dimensions; at most {_abi.MAX_DIMS}")
        site = _abi.SiteStruct(
            layer=_abi.NO_LAYER if layer is None else layer,
            space=space,
            ndim=len(roles),
            row_axis=row_axis,
            fill=fill,
            flags=flags,
            name_bytes=len(encoded),
        )
        site.role[: len(roles)] = list(roles)
        site.name[: len(encoded)] = list(encoded)
        return _check(self._library, self._library.dmi_ring_add_site(self._handle, ctypes.byref(site)))

    def open_step(
        self,
        step: int,
        spans: bytes | SpansAt | Sequence[Span],
        *,
        width: tuple[int, int, int],
        keys: int = 0,
        packed: bool = False,
    ) -> bool:
        """Open a step on the calling thread; one that it left open is closed as aborted. `width` is the length of a source's last
        row dimension by space, 0 where unknown; `keys` the key-value cache's slots in use after the step.

        False: nothing will be captured; the step is booked as dropped where the ring is open at all. Complete mode raises
        CaptureError instead, when the engine makes no room within the bound; then no step is open.
        """
        at: bytes | int
        if isinstance(spans, SpansAt):
            at, count = spans
        else:
            at = spans if isinstance(spans, bytes) else pack_spans(spans)
            count, rest = divmod(len(at), _SPAN.size)
            if rest:
                raise ValueError(f"open step {step}: {len(at)} bytes are no whole number of spans of {_SPAN.size}")
        flags = _abi.TABLE_PACKED if packed else 0
        status = self._open(
            self._handle, step, at, count, (ctypes.c_uint32 * _abi.SPACES)(*width), keys, flags, self._stream()
        )
        return status != _ERROR_CLOSED and _check(self._library, status) == 1

    def series(self, spans: bytes, *, width: tuple[int, int, int], packed: bool = False) -> Series:
        """Steps that follow one with these spans, a token later each."""
        return Series(self._handle, spans, width, packed)

    def open_next(self, series: Series, step: int, keys: int = 0) -> bool:
        """Open the next of a series: as `open_step`, but nothing is made anew of what is as it was. A step that does not open is one of them."""
        status = self._library.dmi_step_next(series.address, step, keys, self._stream())
        return status == 1 or (status != _ERROR_CLOSED and _check(self._library, status) == 1)

    def close_step(self, step: int, *, aborted: bool = False) -> None:
        """Close the step; no-op where the calling thread has it open no more. Raises CaptureError in complete mode when a capture of
        it gave up at the bound, unless `aborted`: then an exception is under way already."""
        status = self._close(self._handle, step, aborted, self._stream())
        if status < 0 and status != _ERROR_CLOSED:
            _check(self._library, status)

    def branch(self, may: bool) -> None:
        """Whether what the current stream records from here on may have branches, on which captures are that were said to be `beside`: where nothing but the recording of a whole forward ends
        before it is taken back. No-op on the CPU, and on a closed ring."""
        status = self._library.dmi_ring_branch(self._handle, may, self._stream())
        if status != _ERROR_CLOSED:
            _check(self._library, status)

    def _stream(self) -> int | None:
        """Where torch's work of this thread goes, on the ring's device."""
        # A tenth of what torch.cuda.current_stream(), which makes an object, costs.
        return None if self._index is None else int(torch._C._cuda_getCurrentRawStream(self._index))

    @property
    def device_bytes(self) -> int:
        """Device memory in use by the ring; 0 on the CPU."""
        return _check(self._library, self._library.dmi_ring_device_bytes(self._handle))

    def set_attached(self, attached: bool) -> None:
        """Say whether an engine has the ring. Without one nobody is woken, and waits end at their bound."""
        _check(self._library, self._library.dmi_ring_set_attached(self._handle, int(attached)))

    def set_groups(self, groups: int, members: Mapping[int, int | None]) -> None:
        """Say which of the groups that the engine named `groups` requests are in, a bit each, by the requests' numbers; None: the request has no rows any
        more. From the next step on. No-op on a closed ring."""
        placed = {request: of for request, of in members.items() if of is not None}
        over = [request for request, of in members.items() if of is None]
        for requests, of in ((list(placed), list(placed.values())), (over, None)):
            if requests:
                array = ctypes.c_uint64 * len(requests)
                status = self._library.dmi_ring_set_groups(self._handle, groups, array(*requests), None if of is None else array(*of), len(requests))
                if status != _ERROR_CLOSED:
                    _check(self._library, status)

    def counters(self) -> dict[str, Any]:
        """Sums over the lanes of what abi/ring.h's dmi_counters say, with `rows` by reason of what was not captured, and gauges of the
        ring. Exact once no step is open."""
        lanes = (_abi.CountersStruct * self.lanes)()
        gauges = _Gauges()
        count = _check(
            self._library, self._library.dmi_ring_counters(self._handle, lanes, self.lanes, ctypes.byref(gauges))
        )
        out: dict[str, Any] = {}
        for name, *_ in _abi.CountersStruct._fields_:
            if name not in ("other_rows", "spare"):
                out[name] = sum(getattr(lanes[i], name) for i in range(count))
        out["rows"] = {
            reason.name.lower(): sum(lanes[i].other_rows[reason] for i in range(count))
            for reason in _abi.Reason
            if reason != _abi.Reason.NONE
        }
        out["outside"] += gauges.outside
        for name, *_ in _Gauges._fields_:
            if name != "outside":
                out[name] = getattr(gauges, name)
        return out

    def closed_steps(self) -> dict[int, int]:
        """By lane, the last step that was closed on it: what a barrier names. Lanes that had none are left out."""
        steps = (ctypes.c_uint64 * self.lanes)()
        count = _check(self._library, self._library.dmi_ring_closed_steps(self._handle, steps, self.lanes))
        return {lane: steps[lane] for lane in range(count) if steps[lane] != _NO_STEP}

    def settle(self, bound_s: float) -> None:
        """Return when the steps that were closed by now are published: on a device, when it has come to their end. Raises CaptureError at
        the bound."""
        _check(self._library, self._library.dmi_ring_settle(self._handle, int(bound_s * 1e9)))

    def finish(self, bound_s: float = 1) -> None:
        """No step opens from here on; the ring says that it is closed. Before the control socket's `bye`: the engine can go on draining.
        Raises CaptureError when the record of steps that were dropped whole found no room within the bound."""
        _check(self._library, self._library.dmi_ring_finish(self._handle, int(bound_s * 1e9)))

    def close(self) -> None:
        """Free everything; what the engine has not copied by now is lost. Idempotent. After finish() and the engine's answer to `bye`
        nothing is. Waits for captures under way on other threads, ending their waits for the engine."""
        self._finalizer()

    @property
    def closed(self) -> bool:
        return not self._finalizer.alive
