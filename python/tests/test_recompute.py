"""Attention patterns made on reading are those that Hugging Face's own eager attention returns: grouped heads, sliding windows, soft caps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dmi
from dmi.recompute import attention_of
from observed import configuration, fresh_seed, model_of

LENGTH = 21  # more than twice the window

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "qwen3": {}, "mistral": {"sliding_window": 8}, "gemma2": {}, "gemma3": {},
    "phi3": {}, "gpt_neox": {}, "olmo2": {}, "gpt2": {},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_against_eager_attention(dtype: torch.dtype, tmp_path: Path) -> None:
    fresh_seed()
    for family, changes in FAMILIES.items():
        model = model_of(family, **changes).to(dtype)
        ids = torch.randint(3, 128, (1, LENGTH))
        with torch.no_grad():
            want = model(ids, output_attentions=True, use_cache=False).attentions
            rotated = "" if family == "gpt2" else "rot_"
            with dmi.attach(model, [f"blocks.*.attn.hook_{rotated}q", f"blocks.*.attn.hook_{rotated}k"], store=tmp_path / "captures") as session:
                model(ids, use_cache=False)
                cache = session.cache(session.requests[0])
                for layer, attention in enumerate(want):
                    got = dmi.recompute_attention(cache, layer)
                    assert got.dtype == torch.float32 and got.shape == attention[0].shape, family
                    worst = (got - attention[0].float()).abs().max().item()
                    assert worst < (1e-5 if dtype == torch.float32 else 0.03), f"{family} layer {layer}: {worst:.2e}"
                    scores = dmi.recompute_attention(cache, layer, scores=True)
                    assert torch.equal(scores.softmax(-1), got) and torch.equal(scores == float("-inf"), got == 0), family
        windows = attention_of(model.config)["windows"]  # type: ignore[index]
        assert any(windows) == (family in ("qwen2", "mistral", "gemma2", "gemma3")), "the model has not what it is to show"


def test_what_cannot_be_recomputed_is_refused(tmp_path: Path) -> None:
    fresh_seed()
    by_layer = {"scale_attn_by_inverse_layer_idx": True}
    assert attention_of(configuration("gpt2", **by_layer)) is None and attention_of(configuration("gpt2", scale_attn_weights=False)) is None
    model = model_of("llama")
    hooks = ["blocks.*.attn.hook_rot_q", "blocks.*.attn.hook_rot_k"]
    with torch.no_grad(), dmi.attach(model, hooks, store=tmp_path / "captures") as session:
        session.policy.set('rules: [{hooks: hook_rot_k, tokens: "all[1:]", level: full}, {hooks: hook_rot_k, level: off}]')
        model(torch.randint(3, 128, (1, LENGTH)), use_cache=False)
        with pytest.raises(dmi.IncompleteError):  # a key is missing
            dmi.recompute_attention(session.cache(session.requests[0]), 0)
        session.policy.set("default: full")
        model(torch.randint(3, 128, (2, LENGTH)), use_cache=False)
        with pytest.raises(dmi.HookError, match="one request"):
            dmi.recompute_attention(session.cache(), 0)
    with torch.no_grad(), dmi.attach(model_of("gpt2", **by_layer), ["blocks.*.attn.hook_q", "blocks.*.attn.hook_k"], store=tmp_path / "captures") as session:
        session._model(torch.randint(3, 128, (1, 5)), use_cache=False)
        with pytest.raises(dmi.HookError, match="not known"):
            dmi.recompute_attention(session.cache(session.requests[0]), 0)
