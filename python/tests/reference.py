"""What every site of docs/sites.md should hold, by plain forward hooks that know Hugging Face's modules and not dmi's mappings.

`Clones` records the inputs and outputs of all modules, what rotary embeddings give and what softmax is given; the table says
what each site is in those terms. All of it is traced by torch.compile, into the very program that is observed: two programs
may round differently."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from observed import Observed

D, HEADS = 64, 4
Seen = dict[str, Tensor]


class Clones:
    """Clones of every module's first input and outputs, by `path:in`, `path:out`, `path:out1`, ..., and of what norms make of their input, `path:scale`
    and `path:normalized`; of what rotary embeddings give and what softmax is given in attention, in the order of the layers. Of one forward: `clear` before
    the next."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: Seen = {}
        self.rotated: list[tuple[Tensor, Tensor]] = []
        self.scores: list[Tensor] = []
        self._handles: list[Any] = []
        for path, module in model.named_modules():
            if path == "":  # whose hooks are no part of a compiled program
                continue
            self._handles.append(module.register_forward_pre_hook(self._input(path), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._output(path)))
        self._file: Any = sys.modules[type(model).__module__]
        self._rotary = getattr(self._file, "apply_rotary_pos_emb", None)
        self._softmax = nn.functional.softmax

    def __enter__(self) -> Clones:
        if self._rotary is not None:
            self._file.apply_rotary_pos_emb = self._rotate
        nn.functional.softmax = self._weigh  # type: ignore[assignment]
        return self

    def __exit__(self, *raised: object) -> None:
        if self._rotary is not None:
            self._file.apply_rotary_pos_emb = self._rotary
        nn.functional.softmax = self._softmax
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        self.seen.clear()
        self.rotated.clear()
        self.scores.clear()

    def _input(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            value = args[0] if args else kwargs.get("hidden_states", kwargs.get("input_ids"))
            if isinstance(value, Tensor):
                self.seen[f"{path}:in"] = value.detach().clone()
                if hasattr(module, "variance_epsilon") or hasattr(module, "eps"):
                    self.seen[f"{path}:scale"], self.seen[f"{path}:normalized"] = statistics(value.detach(), module)

        return hook

    def _output(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            items = output if isinstance(output, tuple) else (output,)
            for i, item in enumerate(items):
                if isinstance(item, Tensor):
                    self.seen[f"{path}:out{i or ''}"] = item.detach().clone()

        return hook

    def _rotate(self, *args: Any, **kwargs: Any) -> Any:
        q, k = self._rotary(*args, **kwargs)
        self.rotated.append((q.transpose(1, 2).detach().clone(), k.transpose(1, 2).detach().clone()))
        return q, k

    def _weigh(self, x: Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
        if x.ndim == 4:  # routers have two dimensions
            self.scores.append(x.detach().clone())
        # Not the function that this stands in for: where a default device is set, that calls itself by its name once more.
        return x.softmax(dim, dtype=dtype)


def statistics(x: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(scale, normalised input) in float32, by the definitions."""
    x = x.float()
    if isinstance(norm, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    variance = (x * x).mean(-1, keepdim=True)
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
    return (variance + epsilon).sqrt(), x * (variance + epsilon).rsqrt()


LLAMA = {
    "hook_resid_pre": "{b}:in",
    "hook_resid_post": "{b}:out",
    "hook_resid_mid": "{b}.post_attention_layernorm:in",
    "ln1.hook_out": "{b}.input_layernorm:out",
    "ln2.hook_out": "{b}.post_attention_layernorm:out",
    "ln1": "{b}.input_layernorm",
    "ln2": "{b}.post_attention_layernorm",
    "attn.hook_q": "{b}.self_attn.q_proj:out",
    "attn.hook_k": "{b}.self_attn.k_proj:out",
    "attn.hook_v": "{b}.self_attn.v_proj:out",
    "attn.hook_z": "{b}.self_attn.o_proj:in",
    "attn.hook_pattern": "{b}.self_attn:out1",
    "hook_attn_out": "{b}.self_attn:out",
    "hook_mlp_out": "{b}.mlp:out",
    "mlp.hook_pre": "{b}.mlp.gate_proj:out",
    "mlp.hook_pre_linear": "{b}.mlp.up_proj:out",
    "mlp.hook_post": "{b}.mlp.down_proj:in",
    "embed": "model.embed_tokens",
    "block": "model.layers.{n}",
    "final": "model.norm",
}
MOE = {
    "mlp.hook_pre": None,
    "mlp.hook_pre_linear": None,
    "mlp.hook_post": None,
    "mlp.gate.hook_out": "{b}.mlp.gate:out",
    "mlp.hook_expert_indices": "{b}.mlp.gate:out2",
}
GEMMA = LLAMA | {
    "hook_resid_mid": "{b}.pre_feedforward_layernorm:in",
    "ln2.hook_out": "{b}.pre_feedforward_layernorm:out",
    "ln2": "{b}.pre_feedforward_layernorm",
    "ln1_post": "{b}.post_attention_layernorm",
    "ln2_post": "{b}.post_feedforward_layernorm",
    "attn.hook_out": "{b}.self_attn:out",
    "mlp.hook_out": "{b}.mlp:out",
    "hook_attn_out": "{b}.post_attention_layernorm:out",
    "hook_mlp_out": "{b}.post_feedforward_layernorm:out",
}
WHERE: dict[str, dict[str, str | None]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "mixtral": LLAMA | MOE,
    "qwen3_moe": LLAMA | MOE,
    "olmo2": GEMMA
    | {"hook_resid_mid": "{b}.mlp:in", "ln1": None, "ln2": None, "ln1.hook_out": None, "ln2.hook_out": None},
    "phi3": LLAMA
    | {
        "attn.hook_q": "{b}.self_attn.qkv_proj:out[0:64]",
        "attn.hook_k": "{b}.self_attn.qkv_proj:out[64:96]",
        "attn.hook_v": "{b}.self_attn.qkv_proj:out[96:128]",
        "mlp.hook_pre": "{b}.mlp.gate_up_proj:out[0:96]",
        "mlp.hook_pre_linear": "{b}.mlp.gate_up_proj:out[96:192]",
        "attn.hook_out": "{b}.self_attn:out",
        "mlp.hook_out": "{b}.mlp:out",
        "hook_attn_out": "{b}.resid_attn_dropout:out",
        "hook_mlp_out": "{b}.resid_mlp_dropout:out",
    },
    "gpt2": {
        "hook_resid_pre": "{b}:in",
        "hook_resid_post": "{b}:out",
        "hook_resid_mid": "{b}.ln_2:in",
        "ln1.hook_out": "{b}.ln_1:out",
        "ln2.hook_out": "{b}.ln_2:out",
        "ln1": "{b}.ln_1",
        "ln2": "{b}.ln_2",
        "attn.hook_q": "{b}.attn.c_attn:out[0:64]",
        "attn.hook_k": "{b}.attn.c_attn:out[64:128]",
        "attn.hook_v": "{b}.attn.c_attn:out[128:192]",
        "attn.hook_z": "{b}.attn.c_proj:in",
        "attn.hook_pattern": "{b}.attn:out1",
        "hook_attn_out": "{b}.attn:out",
        "hook_mlp_out": "{b}.mlp:out",
        "mlp.hook_pre": "{b}.mlp.c_fc:out",
        "mlp.hook_pre_linear": None,
        "mlp.hook_post": "{b}.mlp.c_proj:in",
        "embed": "transformer.wte",
        "block": "transformer.h.{n}",
        "final": "transformer.ln_f",
    },
    "gpt_neox": {
        "hook_resid_pre": "{b}:in",
        "hook_resid_post": "{b}:out",
        "hook_resid_mid": None,
        "ln1.hook_out": "{b}.input_layernorm:out",
        "ln2.hook_out": "{b}.post_attention_layernorm:out",
        "ln1": "{b}.input_layernorm",
        "ln2": "{b}.post_attention_layernorm",
        "attn.hook_q": "{b}.attention.query_key_value:out{0}",
        "attn.hook_k": "{b}.attention.query_key_value:out{1}",
        "attn.hook_v": "{b}.attention.query_key_value:out{2}",
        "attn.hook_z": "{b}.attention.dense:in",
        "attn.hook_pattern": "{b}.attention:out1",
        "attn.hook_out": "{b}.attention:out",
        "mlp.hook_out": "{b}.mlp:out",
        "hook_attn_out": "{b}.post_attention_dropout:out",
        "hook_mlp_out": "{b}.post_mlp_dropout:out",
        "mlp.hook_pre": "{b}.mlp.dense_h_to_4h:out",
        "mlp.hook_pre_linear": None,
        "mlp.hook_post": "{b}.mlp.dense_4h_to_h:in",
        "embed": "gpt_neox.embed_in",
        "block": "gpt_neox.layers.{n}",
        "final": "gpt_neox.final_layer_norm",
    },
}


def look_up(seen: Seen, where: str) -> Tensor:
    """`path:out`, with [a:b] of the last dimension, or {i} for the i-th third of every head."""
    key, _, part = where.partition("[")
    if part:
        start, stop = part.rstrip("]").split(":")
        return seen[key][..., int(start) : int(stop)]
    if where.endswith("}"):
        key, index = where[:-3], int(where[-2])
        return seen[key].unflatten(-1, (HEADS, 3, D // HEADS))[..., index, :]
    return seen[where]


def expected(family: str, model: Any, clones: Clones, logits: Tensor) -> Seen:
    """Every site that this family should have, [batch, ...], of the forward that was cloned and gave these logits."""
    where, seen, out = WHERE[family], clones.seen, {}
    config = model.config.get_text_config()
    d_head = getattr(config, "head_dim", None) or D // HEADS

    def norm(name: str, path: str) -> None:
        for hook in ("scale", "normalized", "out"):
            out[f"{name}.hook_{hook}"] = seen[f"{path}:{hook}"]

    embed = str(where["embed"])
    out["tokens"], out["hook_embed"] = seen[f"{embed}:in"], seen[f"{embed}:out"]
    batch, tokens = out["tokens"].shape
    if family == "gpt2":
        out["hook_pos_embed"] = seen["transformer.wpe:out"].expand(batch, -1, -1)
    to_come = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    for n in range(config.num_hidden_layers):
        block = str(where["block"]).format(n=n)
        table = dict(where)
        if n in (getattr(config, "mlp_only_layers", None) or ()):
            table |= {k: LLAMA.get(k) for k in MOE}
        for site, place in table.items():
            if place is None or site in ("embed", "block", "final", "ln1", "ln2", "ln1_post", "ln2_post"):
                continue
            if site == "attn.hook_pattern" and not clones.scores:  # fused attention never materialises it, nor the scores
                continue
            value = look_up(seen, place.replace("{b}", block))
            if site in ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z") and value.ndim == 3:
                value = value.unflatten(-1, (-1, d_head))
            if site.startswith("mlp.gate") or "expert" in site:
                value = value.unflatten(0, (batch, tokens))
            out[f"blocks.{n}.{site}"] = value
        for site in ("ln1", "ln2", "ln1_post", "ln2_post"):
            if table.get(site) is not None:
                norm(f"blocks.{n}.{site}", str(table[site]).replace("{b}", block))
        # The output of a norm after attention or MLP goes by the name of what is added.
        out.pop(f"blocks.{n}.ln1_post.hook_out", None)
        out.pop(f"blocks.{n}.ln2_post.hook_out", None)
        if clones.rotated:
            out[f"blocks.{n}.attn.hook_rot_q"], out[f"blocks.{n}.attn.hook_rot_k"] = clones.rotated[n]
        if clones.scores:
            out[f"blocks.{n}.attn.hook_attn_scores"] = clones.scores[n].masked_fill(to_come, float("-inf"))
    norm("ln_final", str(where["final"]))
    out["unembed.hook_out"] = seen["lm_head:out"]
    if getattr(config, "final_logit_softcapping", None):
        out["logits"] = logits
    return out


def check(session: Observed, oracle: Seen, requests: list[int]) -> None:
    """The session captured the sites of the oracle and no other, bit for bit."""
    assert set(session.names) == set(oracle)
    for name, batch in oracle.items():
        for row, request in enumerate(requests):
            got, want = session.tensor(name, request), batch[row]
            assert (got.dtype, got.shape) == (want.dtype, want.shape), name
            assert torch.equal(got, want), f"{name}: differs by {(got.double() - want.double()).abs().nan_to_num().max()}"
