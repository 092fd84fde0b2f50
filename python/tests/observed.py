"""What adapter tests share: tiny random models of each family, and a session in miniature around a real ring."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dmi import instrument, native
from ringreader import RingReader

os.environ.setdefault("HF_HUB_OFFLINE", "1")

DEVICE = torch.device(os.environ.get("DMI_TEST_DEVICE", "cpu"))
"""Where models run. `make gpu-test` runs the same tests with "cuda"; they then also hold us to a default device that is not the CPU."""
if DEVICE.type != "cpu":
    torch.set_default_device(DEVICE)


def fresh_seed() -> int:
    """A new seed each run, printed; DMI_TEST_SEED repeats one."""
    seed = int(os.environ.get("DMI_TEST_SEED", 0)) or random.SystemRandom().randrange(1, 1 << 31)
    print(f"seed {seed} (repeat with DMI_TEST_SEED={seed})")
    torch.manual_seed(seed)
    return seed


def configuration(family: str, implementation: str = "eager", **changes: Any) -> Any:
    import transformers as t

    plain: dict[str, Any] = dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=128,
        max_position_embeddings=128,
        attn_implementation=implementation,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    grouped = plain | {"num_key_value_heads": 2}
    make: dict[str, tuple[Any, dict[str, Any]]] = {
        "llama": (t.LlamaConfig, grouped),
        "mistral": (t.MistralConfig, grouped),
        "qwen2": (t.Qwen2Config, grouped),
        "qwen3": (t.Qwen3Config, grouped | {"head_dim": 24}),
        "gpt2": (
            t.GPT2Config,
            dict(
                n_embd=64,
                n_layer=2,
                n_head=4,
                vocab_size=128,
                n_positions=128,
                attn_implementation=implementation,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
            ),
        ),
        "gemma2": (t.Gemma2Config, grouped | {"head_dim": 24, "sliding_window": 8, "query_pre_attn_scalar": 24}),
        "gemma3": (
            t.Gemma3TextConfig,
            grouped
            | {
                "head_dim": 24,
                "sliding_window": 8,
                "query_pre_attn_scalar": 24,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
        "mixtral": (t.MixtralConfig, grouped | {"num_local_experts": 4}),
        "qwen3_moe": (
            t.Qwen3MoeConfig,
            grouped
            | {
                "head_dim": 24,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "mlp_only_layers": [1],
            },
        ),
        "gpt_neox": (t.GPTNeoXConfig, plain),
        "olmo2": (t.Olmo2Config, grouped),
        "phi3": (t.Phi3Config, grouped),
    }
    kind, arguments = make[family]
    return kind(**(arguments | changes))


FAMILIES = ("llama", "qwen3", "gpt2", "gemma2", "gemma3", "mixtral", "qwen3_moe", "gpt_neox", "olmo2", "phi3")


def model_of(family: str, implementation: str = "eager", **changes: Any) -> Any:
    import transformers as t

    torch.set_num_threads(1)
    model = t.AutoModelForCausalLM.from_config(configuration(family, implementation, **changes)).eval()
    for name, parameter in model.named_parameters():  # norms begin as ones: make them tell
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if "bias" in name else 0.7, std=0.2)
    model.generation_config.eos_token_id = None
    return model


class Ledger:
    """session.Requests in miniature: remembers what it was told."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int] | None] = {}
        self.paths: dict[int, list[tuple[int, int, int]]] = {}
        self.hidden: set[int] = set()
        self.names: dict[int, str] = {}
        self.labels: dict[int, dict[str, str]] = {}
        self.ended: dict[int, str] = {}
        self.latest: list[int] = []
        self._steps = 0

    def begin(self, count: int, *, tokens: Any = None, hidden: bool = False, names: Any = (), labels: Any = (), tags: Any = ()) -> list[int]:
        numbers = list(range(len(self.tokens), len(self.tokens) + count))
        for i, number in enumerate(numbers):
            self.tokens[number] = None if tokens is None else tokens[i]
            if hidden:
                self.hidden.add(number)
            self.names[number] = names[i] if names else ""
            self.labels[number] = labels[i] if labels else {}
        return numbers

    def update(self, request: int, *, tokens: Any = None, path: Any = None) -> None:
        assert request not in self.ended, f"request {request} had ended"
        if tokens is not None:
            self.tokens[request] = tokens
        if path is not None:
            self.paths[request] = path

    def end(self, request: int, reason: str = "finished", step: int | None = None) -> None:
        assert request not in self.ended, f"request {request} ended twice"
        self.ended[request] = reason

    def batch(self, requests: list[int]) -> None:
        self.latest = requests

    def next_step(self) -> int:
        self._steps += 1
        return self._steps

    @property
    def visible(self) -> list[int]:
        return [number for number in self.tokens if number not in self.hidden]


class Observed:
    """A model with hooks on a real ring, read by RingReader."""

    def __init__(self, model: Any, patterns: Sequence[str], **options: Any) -> None:
        self.plan = instrument.plan(model, patterns, **options)
        self.ring = native.Ring(mode="best-effort", device=DEVICE, payload_mib=64, staging_mib=8)
        self.reader = RingReader(self.ring)
        ids = [
            self.ring.add_site(
                s.name, layer=s.layer, space=s.space, roles=s.roles, row_axis=s.row_axis, fill=s.fill, flags=s.flags
            )
            for s in self.plan.sites
        ]
        self.requests = Ledger()
        self.instrumentation = instrument.install(model, self.plan, self.ring, ids, self.requests)

    @property
    def names(self) -> list[str]:
        return [site.name for site in self.plan.sites]

    def tensor(self, name: str, request: int) -> torch.Tensor:
        """Rows of a request, through the path of a beam search's returned sequence."""
        self.drain()
        if request not in self.requests.paths:
            return self.reader.tensor(name, request).to(DEVICE)
        rows: dict[int, torch.Tensor] = {}
        for slot, first, count in self.requests.paths[request]:
            for position in range(first, first + count):
                if position in self.reader.rows[name][slot]:
                    rows[position] = self.reader.rows[name][slot][position]
        self.reader.rows[name][request] = rows
        return self.reader.tensor(name, request).to(DEVICE)

    def drain(self) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        self.reader.drain()

    def check_books(self) -> None:
        """Every site settled every row of every step, none outside one."""
        self.drain()
        for step in self.reader.steps:
            assert step.closed
            for number in range(step.sites):
                site = self.reader.site(number)
                owed = len(step.rows(site.space))
                if step.fired.get(number, 0) == 0 and (site.flags & 1 or owed == 0):
                    continue
                assert step.fired.get(number, 0) == owed, (step.number, self.reader.name(number), step.outcomes)
        assert self.instrumentation.outside() == 0


@contextlib.contextmanager
def observed(model: Any, patterns: Sequence[str], **options: Any) -> Iterator[Observed]:
    session = Observed(model, patterns, **options)
    try:
        yield session
    finally:
        session.instrumentation.remove()
        assert set(session.requests.tokens) == set(session.requests.ended), "requests left open"
        session.ring.close()
