"""A model that runs for the page's tests: attached to STORE, it does what it is told, a line of JSON each.

    generate N      a request of N new tokens
    forward N       a single forward of N tokens
    repeat N        a forward of N random tokens, twice over, in a run of its own
    fewer           a forward of 5 tokens of which the residual stream alone is captured, in a session of its own
    mixture         a forward of 20 tokens through a mixture of experts, in a session of its own
    drops           rows that are dropped: forwards in best-effort mode through a ring that is too small, in a session of their own
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import dmi

VOCABULARY = 128
HOOKS = ["tokens", "blocks.*.hook_resid_post", "blocks.*.hook_mlp_out", "blocks.*.attn.hook_pattern", "logits"]


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return "".join(f" w{i}" for i in ids)


def model() -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, attention_bias=True,
                         max_position_embeddings=512, attn_implementation="eager", pad_token_id=0, bos_token_id=1, eos_token_id=None)  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in llama.model.layers:  # patterns that differ from head to head and from token to token
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
        looks_back(llama.model.layers[1].self_attn)
    return llama


def looks_back(attention: torch.nn.Module) -> None:
    """Makes head 0 a previous-token head: whatever the token, its query is its key turned by one position."""
    half = 8
    angles = 10000.0 ** -(torch.arange(half) / half)
    for projection, first, second in ((attention.q_proj, angles.cos(), -angles.sin()), (attention.k_proj, torch.ones(half), torch.zeros(half))):
        projection.weight[: 2 * half] = 0
        projection.bias[: 2 * half] = 10 * torch.cat([first, second])


def mixture(store: Path) -> str:
    """A request of which it is known which experts the router chose."""
    torch.manual_seed(5)
    config = MixtralConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
                           max_position_embeddings=64, attn_implementation="eager", pad_token_id=0, bos_token_id=1, eos_token_id=None)  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    with dmi.attach(model, hooks=["blocks.*.hook_resid_post", "blocks.*.mlp.hook_expert_indices"], store=store, text="text", tokenizer=Tokenizer()) as session, torch.no_grad():
        model(torch.randint(2, VOCABULARY, (1, 20)))
        session.flush()
        return session.requests[-1]


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def drops(store: Path) -> str:
    """A request of which the ring had no room for all rows."""
    llama = model()
    with dmi.attach(llama, hooks=HOOKS, store=store, mode="best-effort", ring_mib=1, staging_mib=1, text="text", tokenizer=Tokenizer()) as session, torch.no_grad():
        for _ in range(12):
            llama(torch.randint(2, VOCABULARY, (1, 500)))
        session.flush()
        for request in session.requests:
            if not session.cache(request=request).coverage()["complete"]:
                return request
    return ""


def main() -> None:
    store = Path(sys.argv[1])
    torch.manual_seed(11)
    llama = model()
    with dmi.attach(llama, hooks=HOOKS, store=store, text="text", tokenizer=Tokenizer(), lens=True) as session, torch.no_grad():
        say(ready=True, session=session.id)
        for line in sys.stdin:
            command, _, count = line.strip().partition(" ")
            n = int(count or 0)
            at = time.time_ns()
            if command == "generate":
                llama.generate(torch.randint(2, VOCABULARY, (1, 9)), max_new_tokens=n, do_sample=False)
            elif command == "forward":
                llama(torch.randint(2, VOCABULARY, (1, n)))
            elif command == "repeat":
                with session.record(labels={"what": "repeated"}):
                    llama(torch.randint(2, VOCABULARY, (1, n)).repeat(1, 2))
            elif command == "fewer":
                less = model()
                with dmi.attach(less, hooks=["blocks.*.hook_resid_post"], store=store, text="text", tokenizer=Tokenizer()) as other:
                    less(torch.randint(2, VOCABULARY, (1, 5)))
                    other.flush()
                    say(request=other.requests[-1], at=at)
                continue
            elif command == "mixture":
                say(request=mixture(store), at=at)
                continue
            elif command == "drops":
                say(request=drops(store), at=at)
                continue
            else:
                raise SystemExit(f"unknown command {line!r}")
            done = time.time_ns()
            session.flush()
            say(request=session.requests[-1], at=at, done=done)
    say(ended=True)


if __name__ == "__main__":
    main()
