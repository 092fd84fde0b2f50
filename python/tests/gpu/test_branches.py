"""A CUDA graph of a whole forward, as vLLM records it, whose captures are on branches: each row is what a plain hook's clone has, though the model writes over whatever it may."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from consumer import Consumer, rows_of
from test_ring import captures, drained
from test_vllm_hooks import EVERYTHING, TOKENS_AT_MOST, WAYS, WORDS, Model, Observed

from dmi import _abi, native
from dmi.rows import SPANS
from dmi.sites import LOGITS, TOKENS
from dmi.vllm.hooks import Arrangement, Hooks
from dmi.vllm.sites import plan
from observed import fresh_seed

ROWS = 7


class Whole(Model):
    """As vLLM calls it: the backbone alone is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone: Callable[..., Any] = self.model.__call__

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.backbone(ids, positions)
        return hidden


class Recorded(Observed):
    def __init__(self, most: int, compiled: bool) -> None:
        torch.manual_seed(fresh_seed())
        self.model = Whole().cuda()
        self.plan = plan(self.model, EVERYTHING)
        self.ring = native.Ring(mode="complete", device="cuda", payload_mib=4, staging_mib=4)
        self.consumer = Consumer(self.ring)
        numbers = [self.ring.add_site(site.name, layer=site.layer, space=site.space, roles=site.roles) for site in self.plan.sites]
        self.arrangement = Arrangement(self.model, self.plan, TOKENS_AT_MOST, most=most)
        self.said: list[bool] = []
        self.hooks = Hooks(self.model, self.arrangement, self.ring.tensor, numbers, self._branch)
        if compiled:
            options = {"guard_filter_fn": lambda guards: [False for _ in guards]}
            self.model.backbone = torch.compile(self.model.model, fullgraph=True, dynamic=True, options=options)
        self.ids, self.positions = torch.zeros(ROWS, dtype=torch.long, device="cuda"), torch.arange(ROWS, device="cuda")
        self.graph = torch.cuda.CUDAGraph()

    def _branch(self, may: bool) -> None:
        self.said.append(may)
        self.ring.branch(may)

    @torch.no_grad()
    def record(self) -> None:
        warm = torch.cuda.Stream()
        with torch.cuda.stream(warm):
            for _ in range(3):
                self.model(self.ids, self.positions)
        torch.cuda.synchronize()
        assert not self.said
        with torch.cuda.graph(self.graph):
            self.hidden = self.model(self.ids, self.positions)
        assert self.said == [True, False]

    @torch.no_grad()
    def replay(self, step: int, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What was captured, by site."""
        self.ids.copy_(ids)
        spans = np.zeros(2, SPANS)
        spans["request"], spans["count"], spans["prompt"], spans["space"] = step, ROWS, ROWS, (TOKENS, LOGITS)
        assert self.ring.open_step(step, spans.tobytes(), width=(0, 0, 0), packed=True)
        self.graph.replay()
        self.model.logits_processor(self.model.lm_head, self.hidden)
        self.ring.close_step(step)
        return {self.plan.sites[r.raw.site].name: rows_of(r, [], TOKENS, 0) for r in captures(drained(self.consumer)) if r.kind == _abi.Kind.CAPTURE}


@WAYS
@pytest.mark.parametrize("groups", ["many", "one"])
def test_whatever_is_written_over(compiled: bool, groups: str) -> None:
    observed = Recorded((300 if groups == "many" else 1 << 20) * TOKENS_AT_MOST, compiled)
    assert (observed.arrangement.calls > 6) == (groups == "many")
    observed.record()
    for step in range(20):
        ids = torch.tensor([random.randrange(WORDS) for _ in range(ROWS)], device="cuda")
        got = observed.replay(step, ids)
        wanted = observed.expected(ids)
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(got[name].reshape(value.shape), value.cpu(), rtol=1e-4, atol=1e-5, msg=lambda message, name=name: f"{name}: {message}")
    observed.close()
