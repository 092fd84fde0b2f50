"""Attention models whose heads are of known kinds, because their weights were set so by hand."""

from __future__ import annotations

import random
from typing import Any

import torch

SHARPNESS = 4000.0


def heads_by_hand(seed: int, vocabulary: int = 40, positions: int = 40) -> tuple[Any, list[list[str]]]:
    """A GPT-2 of two layers of three heads, and the kind of each: previous-token, duplicate-token, first-token-sink in the first layer, in random order;
    induction, one that attends evenly, and one of the first layer's kinds in the second.

    The residual stream is [one-hot token, one-hot position, one-hot token before], so that every row has the same mean and norm and LayerNorm only rescales.
    A head has room for a vocabulary and for positions, so that it can compare either.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    choose = random.Random(seed)
    size = max(vocabulary, positions)
    d_head = 2 * size
    d_model = 3 * d_head
    config = GPT2Config(n_embd=d_model, n_layer=2, n_head=3, n_positions=positions, vocab_size=vocabulary, attn_implementation="eager",
                        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    token, position, before = 0, size, 2 * size  # where each one-hot begins
    kinds: list[list[str]] = []
    with torch.no_grad():
        stream = model.transformer
        stream.wte.weight[torch.arange(vocabulary), token + torch.arange(vocabulary)] = 1
        stream.wpe.weight[torch.arange(positions), position + torch.arange(positions)] = 1
        first = ["previous-token", "duplicate-token", "first-token-sink"]
        choose.shuffle(first)
        second = ["induction", "other", choose.choice(first)]
        choose.shuffle(second)
        for layer, here in enumerate((first, second)):
            block = stream.h[layer]
            block.ln_1.weight.fill_(1)
            block.ln_2.weight.fill_(1)
            attention = block.attn
            for head, kind in enumerate(here):
                q, k, v = head * d_head, d_model + head * d_head, 2 * d_model + head * d_head
                weight = attention.c_attn.weight  # [in, out]
                t, p = torch.arange(vocabulary), torch.arange(positions)
                if kind == "previous-token":
                    weight[position + p[1:], q + p[:-1]] = SHARPNESS
                    weight[position + p, k + p] = 1
                    if layer == 0:  # what induction compares with
                        weight[token + t, v + t] = 1
                        attention.c_proj.weight[head * d_head + t, before + t] = 1
                elif kind == "duplicate-token":  # the same token, and not the same position
                    weight[token + t, q + t] = SHARPNESS
                    weight[token + t, k + t] = 1
                    weight[position + p, q + size + p] = -SHARPNESS
                    weight[position + p, k + size + p] = 1
                elif kind == "first-token-sink":
                    attention.c_attn.bias[q] = SHARPNESS
                    weight[position, k] = 1
                elif kind == "induction":
                    weight[token + t, q + t] = SHARPNESS
                    weight[before + t, k + t] = 1
            kinds.append(here)
    return model, kinds
