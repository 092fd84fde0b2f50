"""What the measurements on a GPU share: a model of Qwen3-4B's shape, its decode step, its graph, the engine that discards, the clock."""

from __future__ import annotations

import contextlib
import copy
import json
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import result
import torch

ROOT = Path(__file__).resolve().parent.parent
CONTEXT, PROMPT = 160, 128


def model(layers: int, attention: str = "sdpa") -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=4096, tie_word_embeddings=True, attn_implementation=attention,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        made = Qwen3ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return made


class Decode:
    """One decode step at a fixed position of a static cache, again and again."""

    def __init__(self, made: Any, batch: int, *, logits: bool = True) -> None:
        from transformers import StaticCache

        self.model = made if logits else made.model
        self.cache = StaticCache(config=made.config, max_cache_len=CONTEXT)
        config = made.config
        self.cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, torch.bfloat16, torch.device("cuda"))
        # A layer counts what was written to it; here every step writes the same slot, so the counts go back each time, in one launch.
        self.lengths = torch.full((config.num_hidden_layers,), PROMPT, device="cuda")
        for layer, length in zip(self.cache.layers, self.lengths, strict=True):
            layer.cumulative_length = length
        self.ids = torch.randint(0, made.config.vocab_size, (batch, 1), device="cuda")
        self.position = torch.full((batch, 1), PROMPT, device="cuda")
        # Attention sees every slot of the cache, as decoding at its end would: a mask of our own keeps the work the same.
        self.mask = torch.zeros(batch, 1, 1, CONTEXT, device="cuda", dtype=torch.bfloat16)
        self.mask[..., PROMPT + 1 :] = float("-inf")

    @torch.inference_mode()
    def __call__(self, **ask: bool) -> Any:
        self.lengths.fill_(PROMPT)
        return self.model(input_ids=self.ids, position_ids=self.position, past_key_values=self.cache, attention_mask=self.mask, use_cache=True, **ask)


def record(
    decode: Decode, within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext, scatter: random.Random | None = None, **ask: bool
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The step as a graph, and the output that its replays write. The calls before the recording are made `within` what is given. `scatter`: allocate some
    memory first, in the graph's own pool, so that its buffers lie elsewhere each time: where they lie decides up to 3 % of a small step's time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            with within():
                decode(**ask)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pads = [torch.empty(512 * scatter.randrange(1, 256), dtype=torch.uint8, device="cuda") for _ in range(scatter.randrange(64))] if scatter else []
        out = decode(**ask)
        del pads
    return graph, out


def timed(step: Callable[[], None], steps: int) -> float:
    """Milliseconds a step, on the device's clock. A step runs ahead of it, so that what the host does for one is done while the device
    works on another, as in any loop."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    step()
    begin.record()
    for _ in range(steps):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / steps


@contextlib.contextmanager
def sink(level: str = "full", share: int = 1) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """The control socket of an engine that has rows at a level captured, of one in `share` requests; its report, once it has ended."""
    reports: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        engine = subprocess.Popen([ROOT / "bin" / "bench-sink", "-level", level, "-share", str(share), f"{folder}/s"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert engine.stderr is not None and engine.stdout is not None
        if "ready" not in engine.stderr.readline():
            raise SystemExit("bench/gpu_overhead: bin/bench-sink did not start; build it with `make gpu-bench`'s set-up")
        try:
            yield f"{folder}/s/engine.sock", reports
        finally:
            engine.terminate()
            out, err = engine.communicate(timeout=60)
            lines = [line for line in err.splitlines() if not line.startswith("info")]
            if lines:
                print("\n".join(lines[:5]), file=sys.stderr)
            reports.append(json.loads(out))


def twin(made: Any) -> Any:
    """The same model over the same weights, to hook one and leave the other alone."""
    return copy.deepcopy(made, {id(t): t for t in [*made.parameters(), *made.buffers()]})


def save(folder: Path, name: str, commit: str, rows: list[dict[str, Any]], raw: Any) -> None:
    gpu = torch.cuda.get_device_name().replace(" ", "-")
    result.write(name, rows, folder=folder, commit=commit, machine=f"{gpu}, {platform.machine()}, torch {torch.__version__}", short=gpu.split("-")[1], raw=raw)
