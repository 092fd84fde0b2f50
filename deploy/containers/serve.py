"""A serving process in small: answers prompts, a line each on standard input, while an engine in another container watches.

MODEL names the model, DMI_SOCKET the engine's socket. Best-effort: whatever becomes of the engine, answers keep coming.
"""

from __future__ import annotations

import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dmi


def main() -> None:
    name = os.environ["MODEL"]
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    socket = os.environ.get("DMI_SOCKET", "/run/dmi/engine.sock")
    with dmi.attach(model, "blocks.*.hook_resid_post", engine=socket, mode="best-effort", text="none"), torch.no_grad():
        print("ready", flush=True)
        for line in sys.stdin:
            inputs = tokenizer(line.rstrip("\n"), return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
            print(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]), flush=True)


if __name__ == "__main__":
    main()
