"""From a hook to a query answer, through the engine: what a cache returns equals what an independent reader of a second
ring saw of the same forwards, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dmi
from observed import FAMILIES, Observed, fresh_seed, model_of, observed

pytestmark = pytest.mark.newest


def compare(session: Any, reader: Observed) -> int:
    """Every row of every request of both; returns how many tensors were compared."""
    compared = 0
    for request, number in zip(session.requests, reader.requests.visible, strict=True):
        cache = session.cache(request=request)
        tokens = reader.requests.tokens[number]
        assert tokens is None or cache.tokens.tolist() == tokens
        for name in reader.names:
            want = reader.tensor(name, number)
            got = cache.get(name, partial=True) if name == "unembed.hook_out" else cache[name]
            assert got.dtype == want.dtype and got.shape == want.shape, f"{name}: {got.shape}, not {want.shape}"
            assert torch.equal(got, want.cpu()), f"{name} of {request}"
            compared += 1
    return compared


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_and_generations(family: str, tmp_path: Path) -> None:
    fresh_seed()
    model = model_of(family)
    model.generation_config.eos_token_id = list(range(3, 12))
    ids = torch.randint(12, 128, (2, 7))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    names = [
        "blocks.*.hook_*",
        "blocks.1.attn.*",
        "blocks.**.mlp.*",
        "ln_final.hook_scale",
        "tokens",
        "unembed.hook_out",
    ]
    ways: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}]
    with observed(model, names) as reader, dmi.attach(model, hooks=names, store=tmp_path / "store") as session:
        with torch.no_grad():
            model(ids, attention_mask=mask, use_cache=False)
            for way in ways:
                model.generate(ids, attention_mask=mask, max_new_tokens=6, **way)
        session.flush()
        assert compare(session, reader) == len(reader.names) * 2 * (1 + len(ways))


def test_a_batch_as_one_tensor_and_hugging_faces_outputs(tmp_path: Path) -> None:
    fresh_seed()
    model = model_of("qwen3")
    ids = torch.randint(3, 128, (3, 9))
    with dmi.attach(model, hooks=["**"], store=tmp_path / "store") as session:
        with torch.no_grad():
            output = model(ids, output_hidden_states=True, output_attentions=True)
        cache = session.cache()
        states: list[Tensor] = [
            cache["blocks.0.hook_resid_pre"],
            cache["blocks.0.hook_resid_post"],
            cache["ln_final.hook_out"],
        ]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(states, output.hidden_states, strict=True))
        for layer in range(2):
            assert torch.equal(cache[f"blocks.{layer}.attn.hook_pattern"], output.attentions[layer])
        assert torch.equal(cache["logits"], output.logits)
        assert torch.equal(cache["tokens"], ids)
