"""What vLLM tests share: tiny models on disk, random loads, and the same requests run alone through plain Hugging Face."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dmi

CACHE = Path(__file__).parents[2] / ".cache" / "vllm"
"""What vLLM finds out of its models at the first start, which takes it half a minute."""

PACKAGES = str(Path(dmi.__file__).parents[1])
VOCABULARY = 512


def model_on_disk(folder: Path, family: str = "qwen3", seed: int = 1) -> Path:
    """A tiny random model, whose weights are large enough that two tokens are never alike."""
    import transformers

    torch.manual_seed(seed)
    common = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                  head_dim=32, max_position_embeddings=1024, tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, pad_token_id=None)  # fmt: skip
    name = {"qwen3": "Qwen3", "llama": "Llama"}[family]
    model = getattr(transformers, name + "ForCausalLM")(getattr(transformers, name + "Config")(**common))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def tokenizer_on_disk(folder: Path, words: int) -> None:
    """A tokenizer whose words are w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0").save_pretrained(folder)


def load(choose: random.Random, count: int, *, longest: int = 60, most: int = 12, every: float = 0.5, aborts: float = 0.0, prefixes: int = 0,
         words: int | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """Requests of random lengths that arrive over time; some are aborted, some share one of `prefixes` beginnings. `words`: tokens that prompts are made of,
    which guesses from what was there before need to be few."""
    words = words or VOCABULARY
    shared = [[choose.randrange(words) for _ in range(choose.randrange(longest // 2, longest))] for _ in range(prefixes)]
    out, at = [], 0.0
    for index in range(count):
        prompt = [choose.randrange(words) for _ in range(choose.randrange(1, longest))]
        if shared and choose.random() < 0.7:
            prompt = choose.choice(shared) + prompt
        at += choose.expovariate(1 / every)
        request: dict[str, Any] = {"id": f"request-{index}", "prompt": prompt, "max_tokens": choose.randrange(1, most), "arrive": int(at)}
        if choose.random() < aborts:
            request["abort"] = int(at) + choose.randrange(1, 2 * most)
        out.append(request)
    return out


def serve(folder: Path, model: Path, requests: list[dict[str, Any]], *, dmi: dict[str, Any] | None = None, environ: dict[str, str] | None = None,
          cache: bool = False, timeout_s: float = 1800, **engine: Any) -> dict[str, Any]:  # fmt: skip
    """Run requests through a vLLM of its own. The log is `result["log"]`."""
    folder.mkdir(parents=True, exist_ok=True)
    job, result, log = folder / "job.json", folder / "result.json", folder / "log"
    arguments = {"model": str(model), "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 64 << 20,
                 "enforce_eager": True, "enable_prefix_caching": False, **engine}  # fmt: skip
    if dmi is not None:
        arguments["additional_config"] = {"dmi": dmi}
    job.write_text(json.dumps({"engine": arguments, "requests": requests, "cache": cache}))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (PACKAGES, os.environ.get("PYTHONPATH")))), "HF_HUB_OFFLINE": "1", "DMI_TEXT": "ids", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                   "VLLM_CACHE_ROOT": str(folder.parent / "vllm-cache" if cache else CACHE), **(environ or {})}
    with open(log, "w") as out:
        code = subprocess.run([sys.executable, str(Path(__file__).with_name("vllm_engine.py")), str(job), str(result)], env=environment, stdout=out,
                              stderr=subprocess.STDOUT, timeout=timeout_s, cwd=folder).returncode  # fmt: skip
    text = log.read_text(errors="replace")
    assert code == 0, text[-6000:]
    return {**json.loads(result.read_text()), "log": text}


class Alone:
    """Requests run one by one through Hugging Face, every site that is compared by a hook that knows nothing of DMI."""

    def __init__(self, folder: Path, dtype: str = "float32", device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager").eval().to(device)
        self.layers = self.model.config.num_hidden_layers

    @torch.no_grad()
    def run(self, tokens: list[int]) -> dict[str, Tensor]:
        """Sites of a sequence, [position, ...]."""
        seen: dict[str, Tensor] = {}

        def keep(name: str, which: int = 0) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                seen[name] = (output[which] if isinstance(output, tuple) else output)[0].clone()

            return hook

        def keep_input(name: str) -> Any:
            def hook(module: Any, args: Any) -> None:
                seen[name] = args[0][0].clone()

            return hook

        handles = []
        for layer, block in enumerate(self.model.model.layers):
            name = f"blocks.{layer}"
            handles += [
                block.register_forward_pre_hook(keep_input(f"{name}.hook_resid_pre")),
                block.register_forward_hook(keep(f"{name}.hook_resid_post")),
                block.post_attention_layernorm.register_forward_pre_hook(keep_input(f"{name}.hook_resid_mid")),
                block.input_layernorm.register_forward_hook(keep(f"{name}.ln1.hook_out")),
                block.post_attention_layernorm.register_forward_hook(keep(f"{name}.ln2.hook_out")),
                block.self_attn.register_forward_hook(keep(f"{name}.hook_attn_out")),
                block.self_attn.q_proj.register_forward_hook(keep(f"{name}.attn.hook_q")),
                block.self_attn.k_proj.register_forward_hook(keep(f"{name}.attn.hook_k")),
                block.self_attn.v_proj.register_forward_hook(keep(f"{name}.attn.hook_v")),
                block.self_attn.o_proj.register_forward_pre_hook(keep_input(f"{name}.attn.hook_z")),
                block.mlp.register_forward_hook(keep(f"{name}.hook_mlp_out")),
                block.mlp.gate_proj.register_forward_hook(keep(f"{name}.mlp.hook_pre")),
                block.mlp.up_proj.register_forward_hook(keep(f"{name}.mlp.hook_pre_linear")),
                block.mlp.down_proj.register_forward_pre_hook(keep_input(f"{name}.mlp.hook_post")),
            ]
        handles += [
            self.model.model.embed_tokens.register_forward_hook(keep("hook_embed")),
            self.model.model.norm.register_forward_hook(keep("ln_final.hook_out")),
            self.model.lm_head.register_forward_hook(keep("logits")),
        ]
        try:
            self.model(torch.tensor([tokens], device=self.model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return {name: value.cpu() for name, value in seen.items()}
