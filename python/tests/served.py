"""What vLLM tests share: tiny models on disk, random loads, and the same requests run alone through plain Hugging Face."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dmi

CACHE = Path(__file__).parents[2] / ".cache" / "vllm"
"""What vLLM finds out of its models at the first start, which takes it half a minute."""

PACKAGES = str(Path(dmi.__file__).parents[1])
VOCABULARY = 512
ALL = slice(None)


def free_port() -> int:
    """A port for a server that is yet to start: none of those that the kernel gives to whoever asks for any meanwhile."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    choose = random.SystemRandom()
    while True:
        port = choose.randrange(5000, 65000)
        if not first <= port <= last:
            with contextlib.suppress(OSError), socket.socket() as free:
                free.bind(("127.0.0.1", port))
                return port


def model_on_disk(folder: Path, family: str = "qwen3", seed: int = 1) -> Path:
    """A tiny random model, whose weights are large enough that two tokens are never alike."""
    import transformers

    torch.manual_seed(seed)
    special: dict[str, Any] = dict(tie_word_embeddings=False, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    grouped = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                   head_dim=32, max_position_embeddings=1024, **special)  # fmt: skip
    configuration: Any = {
        "qwen3": lambda: transformers.Qwen3Config(**grouped),
        "llama": lambda: transformers.LlamaConfig(**grouped),
        "gemma3": lambda: transformers.Gemma3TextConfig(**grouped, sliding_window=16, query_pre_attn_scalar=32,
                                                        layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=2, n_positions=1024, **special),
    }[family]()  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(configuration)
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


def job_of(model: Path, requests: list[dict[str, Any]], *, dmi: dict[str, Any] | None = None, cache: bool = False, in_place: bool = False,
           **engine: Any) -> dict[str, Any]:  # fmt: skip
    """An engine, and what it is asked."""
    arguments = {"model": str(model), "dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 64 << 20,
                 "enforce_eager": True, "enable_prefix_caching": False, **engine}  # fmt: skip
    if dmi is not None:
        arguments["additional_config"] = {"dmi": dmi}
    return {"engine": arguments, "requests": requests, "cache": cache, "in_place": in_place}


def serve(folder: Path, model: Path, requests: list[dict[str, Any]], *, environ: dict[str, str] | None = None, timeout_s: float = 1800, **job: Any) -> dict[str, Any]:
    """Run requests through a vLLM of its own. The log is `result["log"]`."""
    (result,) = serve_all(folder, [job_of(model, requests, **job)], environ=environ, timeout_s=timeout_s)
    return result


def serve_all(folder: Path, jobs: list[dict[str, Any]], *, environ: dict[str, str] | None = None, timeout_s: float = 1800) -> list[dict[str, Any]]:
    """Engines one after the other, in one process; the log is that of all."""
    folder.mkdir(parents=True, exist_ok=True)
    job, result, log = folder / "job.json", folder / "result.json", folder / "log"
    cache = any(each["cache"] for each in jobs)
    job.write_text(json.dumps(jobs))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (PACKAGES, os.environ.get("PYTHONPATH")))), "HF_HUB_OFFLINE": "1", "DMI_TEXT": "ids", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                   "VLLM_CACHE_ROOT": str(folder.parent / "vllm-cache" if cache else CACHE), **(environ or {})}
    with open(log, "w") as out:
        code = subprocess.run([sys.executable, str(Path(__file__).with_name("vllm_engine.py")), str(job), str(result)], env=environment, stdout=out,
                              stderr=subprocess.STDOUT, timeout=timeout_s, cwd=folder).returncode  # fmt: skip
    text = log.read_text(errors="replace")
    assert code == 0, text[-6000:]
    return [{**each, "log": text} for each in json.loads(result.read_text())]


class Alone:
    """Requests run one by one through Hugging Face, every site that is compared by a hook that knows nothing of DMI."""

    def __init__(self, folder: Path, dtype: str = "float32", device: str = "cpu") -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="eager").eval().to(device)
        self.layers = self.model.config.num_hidden_layers
        self._places = list(self._of_model())

    def run(self, tokens: list[int]) -> dict[str, Tensor]:
        """Sites of a sequence, [position, ...]."""
        (found,) = self.run_all([tokens])
        return found

    def run_all(self, sequences: Sequence[list[int]], only: Container[str] | None = None, together: int = 64) -> list[dict[str, Tensor]]:
        """Of each, some of length alike in one call, padded behind: attention is causal, so that no row sees anything but its own sequence up to itself."""
        found: list[dict[str, Tensor]] = [{} for _ in sequences]
        by_length = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        for start in range(0, len(by_length), together):
            some = by_length[start : start + together]
            longest = len(sequences[some[-1]])
            seen = self._run(torch.tensor([sequences[index] + [0] * (longest - len(sequences[index])) for index in some]), only)
            for name, value in seen.items():
                for row, index in enumerate(some):
                    found[index][name] = value[row, : len(sequences[index])]
        return found

    @torch.no_grad()
    def _run(self, tokens: Tensor, only: Container[str] | None) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def keep(name: str, columns: slice) -> Any:
            def hook(module: Any, args: Any, output: Any = None) -> None:
                value = args[0] if output is None else output[0] if isinstance(output, tuple) else output
                seen[name] = value[..., columns].clone()

            return hook

        handles = []
        for name, module, side, columns in self._places:
            if only is None or name in only:
                place = module.register_forward_pre_hook if side == "in" else module.register_forward_hook
                handles.append(place(keep(name, columns)))
        try:
            self.model(tokens.to(self.model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return {name: value.cpu().expand(len(tokens), *value.shape[1:]) for name, value in seen.items()}

    def _of_model(self) -> Iterator[tuple[str, Any, str, slice]]:
        """Sites, and where they are: a module, its input or output, columns of it."""
        gpt2 = self.model.config.model_type == "gpt2"
        body = self.model.transformer if gpt2 else self.model.model
        for layer, block in enumerate(body.h if gpt2 else body.layers):
            yield f"blocks.{layer}.hook_resid_pre", block, "in", ALL
            yield f"blocks.{layer}.hook_resid_post", block, "out", ALL
            for name, *place in self._of_gpt2(block) if gpt2 else self._of_llama(block):
                yield f"blocks.{layer}.{name}", *place
        if gpt2:
            yield "hook_pos_embed", body.wpe, "out", ALL
        yield "hook_embed", body.wte if gpt2 else body.embed_tokens, "out", ALL
        yield "ln_final.hook_out", body.ln_f if gpt2 else body.norm, "out", ALL
        yield "logits", self.model.lm_head, "out", ALL

    def _of_llama(self, block: Any) -> Iterator[tuple[str, Any, str, slice]]:
        """And of those like it; Gemma has norms behind attention and MLP as well."""
        gemma = hasattr(block, "pre_feedforward_layernorm")
        ln2 = block.pre_feedforward_layernorm if gemma else block.post_attention_layernorm
        yield "hook_resid_mid", ln2, "in", ALL
        yield "ln1.hook_out", block.input_layernorm, "out", ALL
        yield "ln2.hook_out", ln2, "out", ALL
        yield "hook_attn_out", block.post_attention_layernorm if gemma else block.self_attn, "out", ALL
        yield "hook_mlp_out", block.post_feedforward_layernorm if gemma else block.mlp, "out", ALL
        if gemma:
            yield "attn.hook_out", block.self_attn, "out", ALL
            yield "mlp.hook_out", block.mlp, "out", ALL
        for part in "qkv":
            yield f"attn.hook_{part}", getattr(block.self_attn, f"{part}_proj"), "out", ALL
        yield "attn.hook_z", block.self_attn.o_proj, "in", ALL
        yield "mlp.hook_pre", block.mlp.gate_proj, "out", ALL
        yield "mlp.hook_pre_linear", block.mlp.up_proj, "out", ALL
        yield "mlp.hook_post", block.mlp.down_proj, "in", ALL

    def _of_gpt2(self, block: Any) -> Iterator[tuple[str, Any, str, slice]]:
        yield "hook_resid_mid", block.ln_2, "in", ALL
        yield "ln1.hook_out", block.ln_1, "out", ALL
        yield "ln2.hook_out", block.ln_2, "out", ALL
        yield "hook_attn_out", block.attn, "out", ALL
        yield "hook_mlp_out", block.mlp, "out", ALL
        width = self.model.config.n_embd
        for index, part in enumerate("qkv"):
            yield f"attn.hook_{part}", block.attn.c_attn, "out", slice(index * width, (index + 1) * width)
        yield "attn.hook_z", block.attn.c_proj, "in", ALL
        yield "mlp.hook_pre", block.mlp.c_fc, "out", ALL
        yield "mlp.hook_post", block.mlp.c_proj, "in", ALL
