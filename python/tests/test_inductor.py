"""Under torch.compile with Inductor, every site of every family is bit for bit what plain forward hooks clone in the same compiled program.

Two programs may round differently (Inductor keeps what it fuses in float32), so the oracle's clones are part of the program that is observed. A run of the tests
takes three of the families, in one dtype each; with DMI_TEST_FULL=1, as in `make soak`, all of them."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
import torch._dynamo.utils

from observed import FAMILIES, fresh_seed, model_of, observed
from reference import Clones, check, expected

pytestmark = pytest.mark.newest

EVERY = [(family, dtype) for family in FAMILIES for dtype in ("float32", "bfloat16")]
CHANCE = random.Random(os.environ.get("DMI_TEST_SEED"))
SHARE = EVERY if os.environ.get("DMI_TEST_FULL") else [(family, CHANCE.choice(("float32", "bfloat16"))) for family in CHANCE.sample(FAMILIES, 3)]


def shallow(family: str) -> dict[str, Any]:
    """Changes that give a model one layer: the compiler takes its time."""
    if family == "gpt2":
        return {"n_layer": 1}
    return {"num_hidden_layers": 1, **({"layer_types": ["sliding_attention"]} if family == "gemma3" else {})}


@pytest.mark.parametrize(("family", "dtype"), SHARE)
def test_every_site(family: str, dtype: str) -> None:
    fresh_seed()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = model_of(family, **shallow(family)).to(getattr(torch, dtype))
    ids = torch.randint(3, 128, (2, 11))
    with observed(model, ["**"]) as session, Clones(model) as clones, torch.no_grad():
        output = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
        session.check_books()
        oracle = expected(family, model, clones, output)
        check(session, oracle, [0, 1])
        if "logits" not in oracle:
            assert torch.equal(oracle["unembed.hook_out"], output)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + ("logits" in oracle)  # whose hook is the root's
    torch._dynamo.reset()
