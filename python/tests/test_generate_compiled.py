"""`generate` on a model that was compiled: caches, ways of choosing tokens, left padding, and whether hooks, compilation or a first run came first.

A run of the tests takes each cache and way with one order of the three, and each order twice; with DMI_TEST_FULL=1 all of them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from test_generate import alone, check, prompts

from observed import fresh_seed, model_of, observed

pytestmark = pytest.mark.newest

SITES = ["blocks.*.hook_resid_post", "blocks.**.hook_rot_k", "blocks.**.hook_pattern", "tokens", "unembed.hook_out"]
CHOICES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 2, "do_sample": False},
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


EVERY = list(itertools.product(CHOICES, ("dynamic", "static"), ("hooks", "compiled", "run")))
SHARE = EVERY if os.environ.get("DMI_TEST_FULL") else [EVERY[3 * i + order] for i, order in enumerate((2, 1, 1, 0, 0, 2))]


@pytest.mark.parametrize(("choice", "cache", "first"), SHARE)
def test_generate(choice: str, cache: str, first: str) -> None:
    fresh_seed()
    model = model_of("llama", num_hidden_layers=1)
    ids, mask = prompts()
    options = {**CHOICES[choice], "cache_implementation": cache, "max_new_tokens": 4, "disable_compile": True}  # by us, and not once more by generate

    def compile_it() -> None:
        model.forward = torch.compile(model.forward, backend="eager", dynamic=True)

    if first != "hooks":
        compile_it()
    with torch.no_grad():
        if first == "run":
            model.generate(ids, attention_mask=mask, **options)
        with observed(model, SITES) as session:
            if first == "hooks":
                compile_it()
            output = model.generate(ids, attention_mask=mask, **options)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
            session.check_books()
            requests = session.requests.visible
            assert len(requests) == len(output)
            del model.forward
            for i, request in enumerate(requests):
                row = i * len(ids) // len(output)
                tokens = [*ids[row][mask[row] == 1].tolist(), *output[i, 7:].tolist()]
                assert session.requests.tokens[request] == tokens
                check(session, request, alone(model, tokens[:-1], SITES))
