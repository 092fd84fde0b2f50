"""A model that says what time it is: 20 sequences, a token each every 19 ms, which is 1,050 a second, whose embedding is the seconds since it was told to go.

    python bench/page/online.py STORE

For each line that it reads, `go N`, it generates N tokens a sequence and answers with a line of JSON: `began_unix_ms` (of second 0), `tokens_per_second`, `forwards_ms` (each).
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dmi

SEQUENCES = 20
TICK_S = 0.019
FIRST_S = 1.0  # four digits of a reading tell milliseconds, up to 10 s


def main() -> None:
    torch.manual_seed(1)
    torch.set_num_threads(1)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=None)
    model = LlamaForCausalLM(config).eval()
    epoch, next_tick, forwards = 0.0, 0.0, []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal next_tick
        next_tick = max(next_tick + TICK_S, time.time())
        time.sleep(max(0.0, next_tick - time.time()))
        model.model.embed_tokens.weight.data.fill_(time.time() - epoch)
        forwards.append(-time.perf_counter())

    def after(module: Any, args: Any, output: Any) -> None:
        forwards[-1] += time.perf_counter()

    model.register_forward_pre_hook(before, with_kwargs=True)
    with dmi.attach(model, hooks=["hook_embed", "blocks.*.hook_resid_post"], store=sys.argv[1], mode="best-effort") as session, torch.no_grad():
        model.register_forward_hook(after)
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            tokens = int(line.split()[1])
            forwards.clear()
            epoch = time.time() - FIRST_S
            next_tick = time.time()
            model.generate(torch.randint(2, 64, (SEQUENCES, 4)), max_new_tokens=tokens, do_sample=False)
            took = time.time() - epoch - FIRST_S
            books = session.coverage()["outcomes"]
            print(json.dumps({"began_unix_ms": epoch * 1000, "tokens_per_second": SEQUENCES * tokens / took, "forwards_ms": [1000 * f for f in forwards], "outcomes": books}), flush=True)


if __name__ == "__main__":
    main()
