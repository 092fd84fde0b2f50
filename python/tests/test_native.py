"""What the capture op captures, against plain torch indexing, byte for byte; on the oldest and the newest torch."""

from __future__ import annotations

import random

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
    batch_spans,
    capture_one,
    captures,
    expected,
    random_strides,
    random_tensor,
    rows_of,
    same,
)

from dmi import _abi, native
from dmi._abi import Outcome, Reason

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("seeded")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(ring: native.Ring, dtype: torch.dtype) -> None:
    x = random_tensor([2, 5, 3], dtype)
    roles, spans = [ROW, ROW, INNER], batch_spans([(2, 3), (0, 5)])
    records, rows = capture_one(ring, x, roles, spans, width=5)
    assert [r.raw.dtype for r in records] == [DTYPES[dtype]]
    assert same(rows, expected(x, roles, spans, TOKENS, 5))


def test_layouts() -> None:
    """Random shapes, roles, memory layouts, row lists, keys: the rows are those that indexing gives."""
    ring = native.Ring(
        mode="best-effort", payload_mib=0.25, staging_mib=0.03, spill_mib=0, lanes=1
    )  # a record for each tensor
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


def test_bits_of_another_dtype(ring: native.Ring) -> None:
    """A tensor of integers whose site says what its bits are; of other sizes it is a mismatch. What is held behind those that have sites is not captured."""
    consumer = Consumer(ring)
    site = ring.add_site("x", layer=None, space=TOKENS, roles=[ROW, INNER])
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    spans: list[native.Span] = [(0, TOKENS, 0, 0, 3, 0, 0, 0, 0)]
    assert ring.open_step(0, spans, width=(3, 0, 0))
    torch.ops.dmi.capture(ring.tensor, [x.view(torch.int16), x + 1], [site + native.AS[torch.bfloat16]], 1, True)
    ring.close_step(0)
    (record,) = captures(consumer.drain())
    assert record.raw.dtype == _abi.DType.BF16 and same(rows_of(record, spans, TOKENS, 3), x)
    assert ring.open_step(1, spans, width=(3, 0, 0))
    torch.ops.dmi.capture(ring.tensor, [x.view(torch.int16)], [site + native.AS[torch.float32]])
    ring.close_step(1)
    (record,) = captures(consumer.drain())
    assert (record.raw.outcome, record.raw.reason) == (Outcome.DROPPED, _abi.Reason.MISMATCH)


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
