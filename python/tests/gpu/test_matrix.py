"""Every site, captured in every way that a model runs on a GPU, is bit for bit what plain hooks clone in the same program."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch._dynamo.utils
import torch._inductor.config

from observed import fresh_seed, model_of, observed
from reference import Clones, check, expected

MODES = ["eager", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "graph"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", MODES)
def test_every_site(mode: str, implementation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh_seed()
    # Fused, what a half-precision operation gives goes on unrounded; what the oracle makes of cloned tensors (a norm's scale) begins with rounded ones.
    monkeypatch.setattr(torch._inductor.config, "emulate_precision_casts", True)
    torch._dynamo.utils.counters.clear()
    model = model_of("llama", implementation).to(dtype)
    ids = torch.randint(3, 128, (2, 11))
    rows = torch.ones(2, 11, dtype=torch.long, device="cpu")
    # Given to what is recorded, because making it is what a graph cannot record.
    given = {"attention_mask": torch.full((11, 11), torch.finfo(dtype).min, dtype=dtype).triu(1).expand(2, 1, 11, 11)}
    with observed(model, ["**"]) as session, Clones(model) as clones, torch.no_grad():
        call: Any = model if mode in ("eager", "graph") else torch.compile(model, fullgraph=True, mode=None if mode == "default" else mode)
        if mode == "graph":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side), session.instrumentation.step(rows):
                model(ids, **given, use_cache=False)
            torch.cuda.current_stream().wait_stream(side)
            session.drain()
            begun = len(session.reader.steps)
            clones.clear()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = model(ids, **given, use_cache=False).logits
        for step in range(4):  # warm-up, recording, replays
            ids.copy_(torch.randint(3, 128, ids.shape))
            if mode == "graph":
                with session.instrumentation.step(rows) as numbers:
                    graph.replay()
            else:
                clones.clear()
                torch.compiler.cudagraph_mark_step_begin()
                output = call(ids, use_cache=False).logits
                numbers = [2 * step, 2 * step + 1]
            session.drain()
            check(session, expected("llama", model, clones, output), numbers)
        if mode != "graph":
            session.check_books()
            begun = 0
        assert len(session.reader.steps) - begun == 4
    assert not torch._dynamo.utils.counters["graph_break"]
    if mode in ("reduce-overhead", "max-autotune"):
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_steps_take_turns_on_several_streams() -> None:
    """A model called on one stream after another: each step is its own, in order."""
    fresh_seed()
    model = model_of("llama")
    streams = [torch.cuda.Stream() for _ in range(3)]
    with observed(model, ["blocks.*.hook_resid_post", "logits"]) as session, torch.no_grad():
        outputs = []
        for step in range(12):
            stream = streams[step % 3]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs.append(model(torch.randint(3, 128, (2, 7)), use_cache=False).logits)
        torch.cuda.synchronize()
        session.check_books()
        assert [step.number for step in session.reader.steps] == sorted(step.number for step in session.reader.steps)
        for step, logits in enumerate(outputs):
            for row in range(2):
                assert torch.equal(session.tensor("unembed.hook_out", 2 * step + row), logits[row])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_session_for_each_device() -> None:
    fresh_seed()
    first, second = model_of("llama").to("cuda:0"), model_of("llama").to("cuda:1")
    with contextlib.ExitStack() as ends, torch.no_grad():
        from dmi import native

        rings = [native.Ring(mode="best-effort", device=f"cuda:{n}", payload_mib=16, staging_mib=8) for n in range(2)]
        from consumer import INNER, ROW, Consumer, batch_spans, captures, rows_of, same

        from dmi._abi import Space

        consumers = [Consumer(ring) for ring in rings]
        sites = [ring.add_site("x", layer=None, space=Space.TOKENS, roles=[ROW, ROW, INNER]) for ring in rings]
        for step in range(6):
            spans = batch_spans([(0, 5), (0, 5)])
            values = []
            for n, model in enumerate((first, second)):
                x = model.model.embed_tokens(torch.randint(3, 128, (2, 5), device=f"cuda:{n}"))
                assert rings[n].open_step(step, spans, width=(5, 0, 0))
                torch.ops.dmi.capture(rings[n].tensor, [x], [sites[n]])
                rings[n].close_step(step)
                values.append(x)
            for n in range(2):
                torch.cuda.synchronize(n)
                (record,) = captures(consumers[n].drain())
                assert same(rows_of(record, spans, Space.TOKENS, 5), values[n].reshape(10, -1).cpu())
        for ring in rings:
            ends.callback(ring.close)
