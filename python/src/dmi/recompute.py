"""Attention scores and patterns made on reading, from the queries and keys that were captured after rotation.

Paged and fused kernels never form them, so that there is nothing to capture (vLLM, sdpa, flash attention); `hook_rot_q` and `hook_rot_k`
have all that they are made of. What the model does on top, which its configuration says, is told when it is attached to."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor

from dmi.cache import Cache
from dmi.hook import HookError


def recompute_attention(cache: Cache, layer: int, *, scores: bool = False) -> Tensor:
    """The attention pattern of a layer, float32 [n_heads, query, key], of a cache of one request that has its `attn.hook_rot_q` and
    `attn.hook_rot_k`, or of a model that rotates none (GPT-2) its `attn.hook_q` and `attn.hook_k`; `scores`: what its softmax is of, masked with minus
    infinity. Queries are the rows of hook_rot_q, keys those of positions 0 on.

    softmax(mask(cap(scale · q kᵀ))): scale, soft cap and sliding window are those of the model's configuration; key heads serve groups of
    query heads. It is computed in float32 of what was captured. Against the model's own eager attention: within 1e-5 in float32; in
    bfloat16, where the model rounds the scores themselves, within 0.03.

    Raises HookError for a model whose attention is not known to be that, NotCapturedError and IncompleteError as reading does: keys
    that came out of a prefix cache, or that the policy left out, are missing, and no pattern is made without them.
    """
    if cache._batch or len(cache.requests) != 1:
        raise HookError("recompute_attention: give the cache of one request: cache(request=...)")
    facts = _facts(cache)
    name = f"blocks.{layer}.attn"
    names = [f"{name}.hook_{'rot_' if facts.get('rotary', True) else ''}{part}" for part in "qk"]
    q, k = (cache[site].float() for site in names)
    queries, keys = (torch.as_tensor(cache.positions_of(site)) for site in names)
    if not torch.equal(keys, torch.arange(len(keys))):
        raise HookError(f"recompute_attention: {names[1]} has not the positions from 0 on: a query looks at all before it")
    if len(queries) and len(keys) <= int(queries.max()):
        raise HookError(f"recompute_attention: {name} has {len(keys)} keys and a query at position {int(queries.max())}: a query looks at all before it")
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    out: Tensor = torch.einsum("qhd,khd->hqk", q, k) * facts["scale"]
    if facts["soft_cap"] is not None:
        out = facts["soft_cap"] * torch.tanh(out / facts["soft_cap"])
    behind = queries[:, None] - keys[None, :]
    window = facts["windows"][layer]
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    out.masked_fill_(hidden, float("-inf"))
    return out if scores else out.softmax(-1)


def _facts(cache: Cache) -> dict[str, Any]:
    request = cache._client.get("/requests/" + quote(cache.requests[0], safe=""))
    model: dict[str, Any] = next((info["model"] for info in cache._client.list("/sessions") if info["id"] == request["session"]), {})
    facts = model.get("attention")
    if not isinstance(facts, dict):
        raise HookError(f"recompute_attention: how {model.get('class', 'the model')} makes scores of queries and keys is not known")
    return facts


KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "mixtral", "qwen3_moe", "gpt_neox", "gpt2")
"""Families whose attention is what `recompute_attention` computes: no bias by distance, no sinks, nothing that differs by head."""


def attention_of(config: Any) -> dict[str, Any] | None:
    """`scale`, `soft_cap` (or None), `windows` (of each layer, or None) and `rotary` of a Hugging Face configuration; None where they are not known."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "model_type", None) not in KNOWN or getattr(config, "scale_attn_by_inverse_layer_idx", False) or not getattr(config, "scale_attn_weights", True):
        return None
    layers = int(config.num_hidden_layers)
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scalar = getattr(config, "query_pre_attn_scalar", None) or d_head
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    windows = [window if kind == "sliding_attention" else None for kind in kinds]
    return {"scale": float(scalar) ** -0.5, "soft_cap": getattr(config, "attn_logit_softcapping", None), "windows": windows, "rotary": config.model_type != "gpt2"}
