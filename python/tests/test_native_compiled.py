"""The capture op in code that torch.compile made; on the oldest and the newest torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from consumer import (
    INNER,
    ROW,
    TOKENS,
    Consumer,
    batch_spans,
    captures,
    expected,
    rows_of,
    same,
)

from dmi import native

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("seeded")]


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
