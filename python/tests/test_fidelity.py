"""Every site of docs/sites.md, in every family: captured bytes equal what plain forward hooks of our own see (reference.py), and what Hugging Face returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from observed import FAMILIES, fresh_seed, model_of, observed
from reference import HEADS, Clones, check, expected

pytestmark = pytest.mark.newest

B, T, LAYERS = 2, 11, 4


def deep(family: str) -> dict[str, Any]:
    """Changes that give a model LAYERS layers, so that there are some in the middle."""
    if family == "gpt2":
        return {"n_layer": LAYERS}
    kinds = {"gemma3": {"layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}, "qwen3_moe": {"mlp_only_layers": [2]}}
    return {"num_hidden_layers": LAYERS, **kinds.get(family, {})}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "qwen2"])
def test_every_site(family: str, dtype: torch.dtype) -> None:
    fresh_seed()
    model = model_of(family).to(dtype)
    ids = torch.randint(3, 128, (B, T))
    with torch.no_grad():
        plain = model(ids).logits
        with observed(model, ["**"]) as session, Clones(model) as clones:
            output = model(ids).logits
            session.check_books()
            check(session, expected(family, model, clones, output), [0, 1])
    assert torch.equal(output, plain), "observing changed what the model computes"


@pytest.mark.parametrize("pads", ["none", "left", "right"])
@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "qwen2"])
def test_every_layer_is_what_hugging_face_returns(family: str, pads: str) -> None:
    """output_hidden_states, output_attentions, output_router_logits and logits, bit for bit."""
    fresh_seed()
    model = model_of(family, **deep(family))
    ids = torch.randint(3, 128, (B, T))
    there = [slice(0, T), {"none": slice(0, T), "left": slice(3, T), "right": slice(0, T - 3)}[pads]]  # of the batch's rows
    mask = None
    if pads != "none":
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(there):
            mask[row, tokens] = 1
    routed = {"output_router_logits": True} if family in ("mixtral", "qwen3_moe") else {}
    with torch.no_grad():
        theirs = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True, **routed)
    router = list(theirs.router_logits) if routed else []
    assert len(theirs.hidden_states) == LAYERS + 1 and len(theirs.attentions) == LAYERS
    with observed(model, ["**"]) as session, torch.no_grad():
        assert torch.equal(model(ids, attention_mask=mask).logits, theirs.logits)
        session.check_books()
        own = {"ln_final.hook_out": theirs.hidden_states[LAYERS], "logits" if "logits" in session.names else "unembed.hook_out": theirs.logits}
        for n in range(LAYERS):
            # hidden_states[n] goes into block n; what comes out of the last block they have only after the final norm.
            own[f"blocks.{n}.hook_resid_pre"] = theirs.hidden_states[n]
            if n < LAYERS - 1:
                own[f"blocks.{n}.hook_resid_post"] = theirs.hidden_states[n + 1]
            own[f"blocks.{n}.attn.hook_pattern"] = theirs.attentions[n]
            if routed and f"blocks.{n}.mlp.gate.hook_out" in session.names:
                logits = router.pop(0).view(B, T, -1)
                own[f"blocks.{n}.mlp.gate.hook_out"] = logits
                own[f"blocks.{n}.mlp.hook_expert_indices"] = logits.topk(2).indices
        assert not router
        for name, batch in own.items():
            for request, tokens in enumerate(there):
                want = batch[request]
                want = want[:, tokens, tokens] if name.endswith("hook_pattern") else want[tokens]
                assert torch.equal(session.tensor(name, request), want), name


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt2"])
def test_scores_are_scaled_capped_and_masked(family: str) -> None:
    fresh_seed()
    model = model_of(family)
    config = model.config
    ids = torch.randint(3, 128, (B, T))
    with observed(model, ["blocks.*.attn.hook_rot_*", "blocks.*.attn.hook_attn_scores"]) as session:
        with torch.no_grad():
            model(ids)
        for layer in range(2):
            name = f"blocks.{layer}.attn"
            q, k = session.tensor(f"{name}.hook_rot_q", 1).double(), session.tensor(f"{name}.hook_rot_k", 1).double()
            k = k.repeat_interleave(HEADS // k.shape[1], dim=1)
            scale = (getattr(config, "query_pre_attn_scalar", None) or q.shape[-1]) ** -0.5
            scores = torch.einsum("qhd,khd->hqk", q, k) * scale
            cap = getattr(config, "attn_logit_softcapping", None)
            if cap:
                scores = (scores / cap).tanh() * cap
            position = torch.arange(T)
            seen = position[None, :] <= position[:, None]
            if (getattr(config, "layer_types", None) or [""] * 2)[layer] == "sliding_attention":
                seen &= position[None, :] > position[:, None] - config.sliding_window
            got = session.tensor(f"{name}.hook_attn_scores", 1).double()
            assert torch.allclose(got[:, seen], scores[:, seen], atol=1e-4)
            assert (got[:, ~seen] < -1e30).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_observed_attention_is_the_same_function(implementation: str) -> None:
    fresh_seed()
    model = model_of("qwen3", implementation)
    ids = torch.randint(3, 128, (B, T))
    before = [layer.self_attn.config for layer in model.model.layers]
    with torch.no_grad():
        plain = model(ids).logits
    with observed(model, ["blocks.*.attn.hook_rot_*"]) as session:
        with torch.no_grad():
            assert torch.equal(model(ids).logits, plain)
        session.check_books()
        assert model.config is before[0]
    assert all(layer.self_attn.config is config for layer, config in zip(model.model.layers, before, strict=True))


def test_a_batch_larger_than_the_group_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    from dmi import hook

    fresh_seed()
    model = model_of("llama")
    ids = torch.randint(3, 128, (B, T))
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    monkeypatch.setattr(hook.Collector.__init__, "__defaults__", (1000,))
    with observed(model, ["**"]) as session:
        with torch.no_grad():
            model(ids)
        session.check_books()
        assert torch.equal(session.tensor("blocks.0.hook_resid_post", 1), output.hidden_states[1][1])
        assert session.ring.counters()["op_calls"] > 20


def test_training_mode_captures_at_once() -> None:
    """Mixtral's router jitter rewrites the MLP's input in place: it must have been captured before."""
    fresh_seed()
    model = model_of("mixtral", router_jitter_noise=0.5).train()
    ids = torch.randint(3, 128, (B, T))
    seen: list[Tensor] = []
    handle = model.model.layers[0].post_attention_layernorm.register_forward_hook(
        lambda m, a, o: seen.append(o.detach().clone())
    )
    with observed(model, ["**"]) as session:
        model(ids).logits.sum().backward()
        session.check_books()
        assert torch.equal(session.tensor("blocks.0.ln2.hook_out", 1), seen[0][1])
    handle.remove()
    assert model.model.layers[0].mlp.gate.weight.grad is not None
