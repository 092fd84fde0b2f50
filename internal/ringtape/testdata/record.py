"""Records tapes beside this file, and what they hold: NAME.rows.safetensors is written from what plain forward hooks saw. None of DMI's code has a part in it, but
for the requests' ids and, where rows were dropped, the producer's own counters.

    PYTHONPATH=python/src .venv/bin/python internal/ringtape/testdata/record.py      in the root of the repository, after `make setup`

It has a tensor for each site of each request, `REQUEST/SITE`, a row for each position that the model computed; metadata `requests` (ids in order),
`tokens` (of each, where they are known), `positions` (of each tensor), `books` (rows by outcome and reason).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import dmi

HERE = Path(__file__).parent
BINARY = Path("bin/dmi").absolute()


class Truth:
    """What plain hooks saw, by request and site: rows by position."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, str], dict[int, Tensor]] = {}
        self.tokens: list[list[int]] = []
        self.books: dict[str, int] = {}

    def saw(self, request: int, site: str, position: int, row: Tensor) -> None:
        self.rows.setdefault((request, site), {})[position] = row.detach().clone()

    def save(self, name: str, session: dmi.Session) -> None:
        tensors, positions = {}, {}
        for (request, site), rows in self.rows.items():
            order = sorted(rows)
            shape = [max(sizes) for sizes in zip(*(rows[p].shape for p in order), strict=True)]  # rows of attention grow: zeros behind
            whole = torch.zeros(len(order), *shape, dtype=rows[order[0]].dtype)
            for place, position in enumerate(order):
                row = rows[position]
                whole[(place, *(slice(0, size) for size in row.shape))] = row
            tensors[f"{request}/{site}"], positions[f"{request}/{site}"] = whole, order
        facts = {"requests": list(session.requests), "tokens": self.tokens, "positions": positions, "books": self.books}
        file = HERE / f"{name}.rows.safetensors"
        save_file(tensors, file, {key: json.dumps(value) for key, value in facts.items()})
        file.chmod(0o644)


@contextlib.contextmanager
def recording(name: str, model: nn.Module, hooks: list[str], **options: Any) -> Iterator[tuple[dmi.Session, int]]:
    """A session whose tape becomes NAME.tape, and the process of its engine."""
    with tempfile.TemporaryDirectory() as folder:
        store, tapes = Path(folder, "store"), Path(folder, "tapes")
        with subprocess.Popen([BINARY, "serve", "--store", store, "--set", f"control.record_dir={tapes}"]) as engine:
            try:
                socket = store / "engine.sock"
                while not socket.exists():
                    assert engine.poll() is None, "the engine ended"
                    time.sleep(0.02)
                with dmi.attach(model, hooks, engine=str(socket), **options) as session:
                    yield session, engine.pid
            finally:
                engine.send_signal(signal.SIGTERM)
        (tape,) = tapes.glob("*.tape")
        shutil.copyfile(tape, HERE / f"{name}.tape")
        (HERE / f"{name}.tape").chmod(0o644)


def padded_and_growing() -> None:
    """Two prompts of different lengths, padded on the left, and four tokens more: keys grow, logits of prompts are not computed but for the last."""
    import transformers

    torch.manual_seed(1)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=24, attn_implementation="eager", bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id = None
    truth, pads, new = Truth(), [3, 0], 4
    ids = torch.randint(3, 24, (2, 7))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    hooks = ["tokens", "hook_pos_embed", "blocks.*.attn.hook_pattern", "blocks.*.hook_resid_post", "logits"]
    computed = 0  # columns of the batch before this forward

    def rows(site: str, batch: Tensor, last: int | None = None) -> None:
        columns = batch.shape[1]
        for request, pad in enumerate(pads):
            for column in range(columns):
                at = computed + (column if last is None else last - 1)
                if at >= pad:
                    truth.saw(request, site, at - pad, batch[request, column])

    def pattern(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for request, pad in enumerate(pads):
                for query in range(output[1].shape[2]):
                    if computed + query >= pad:
                        truth.saw(request, f"blocks.{layer}.attn.hook_pattern", computed + query - pad, output[1][request, :, query, pad : computed + query + 1])

        return hook

    backbone = model.transformer
    with recording("padded_and_growing", model, hooks) as (session, _), torch.no_grad():
        width = 0

        def embedded(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal width
            width = args[0].shape[1]
            rows("tokens", args[0])

        def ended(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal computed
            rows("unembed.hook_out", output, last=width)
            computed += width

        handles = [
            backbone.wte.register_forward_hook(embedded),
            backbone.wpe.register_forward_hook(lambda module, args, output: rows("hook_pos_embed", output.expand(2, -1, -1))),
            *(block.attn.register_forward_hook(pattern(layer)) for layer, block in enumerate(backbone.h)),
            *(block.register_forward_hook(lambda module, args, output, layer=layer: rows(f"blocks.{layer}.hook_resid_post", output)) for layer, block in enumerate(backbone.h)),
            model.lm_head.register_forward_hook(ended),
        ]
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        for handle in handles:
            handle.remove()
    truth.tokens = [out[request, pad:].tolist() for request, pad in enumerate(pads)]
    prompt = [7 - pad for pad in pads]
    truth.books = {"captured ": sum(len(rows) for rows in truth.rows.values()), "not_computed engine": sum(length - 1 for length in prompt)}
    truth.save("padded_and_growing", session)


class Packed(nn.Module):
    """Rows of several requests one after another, as serving engines compute them."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, wide), nn.Linear(wide, width)
        self.inner, self.outer = dmi.HookPoint("inner", rows=1), dmi.HookPoint("outer", rows=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x + self.down(self.inner(torch.relu(self.up(x)))))


def packed_chunks() -> None:
    """Chunks of prompts and decoded tokens of three requests in one row dimension, in bfloat16; requests come, go on and pause."""
    torch.manual_seed(2)
    model = Packed(8, 12).to(torch.bfloat16)
    truth, at = Truth(), [0, 0, 0]
    steps = [([0, 1, 2], [5, 3, 0]), ([0, 1, 2], [4, 1, 2]), ([2, 0], [6, 1]), ([1, 2], [1, 1]), ([2, 0, 1], [1, 1, 1])]
    numbers = None
    with recording("packed_chunks", model, ["inner", "outer"]) as (session, _), torch.no_grad():
        for who, counts in steps:
            with session.step(counts, requests=None if numbers is None else [numbers[request] for request in who]) as given:
                numbers = numbers or given
                compute(model, truth, who, counts, at)
    truth.books = {"captured ": sum(len(rows) for rows in truth.rows.values())}
    truth.save("packed_chunks", session)


def compute(model: Packed, truth: Truth, who: list[int], counts: list[int], at: list[int]) -> None:
    """A forward of the rows of some requests, seen by plain hooks."""
    seen: dict[str, Tensor] = {}
    handles = [getattr(model, site).register_forward_hook(lambda module, args, output, site=site: seen.__setitem__(site, output.clone())) for site in ("inner", "outer")]
    model(torch.randn(sum(counts), model.up.in_features, dtype=model.up.weight.dtype))
    for handle in handles:
        handle.remove()
    for site, rows in seen.items():
        row = 0
        for request, count in zip(who, counts, strict=True):
            for i in range(count):
                truth.saw(request, site, at[request] + i, rows[row + i])
            row += count
    for request, count in zip(who, counts, strict=True):
        at[request] += count


def wraps_and_drops() -> None:
    """A ring of 16 KiB that is filled many times over, and whose engine stands still for some steps of it."""
    torch.manual_seed(3)
    model = Packed(16, 64)
    truth, at = Truth(), [0]
    with recording("wraps_and_drops", model, ["inner", "outer"], mode="best-effort", ring_mib=1 / 64, staging_mib=1 / 4) as (session, engine), torch.no_grad():
        session.policy.set({"rules": [{"hooks": "**", "level": "full", "degrade": []}]})  # nothing is to be lowered meanwhile
        requests = None
        for step in range(16):
            if step == 6:
                os.kill(engine, signal.SIGSTOP)
            elif step == 12:
                os.kill(engine, signal.SIGCONT)
            with session.step([13], requests=requests) as requests:
                compute(model, truth, [0], [13], at)
            if not 6 <= step < 12:
                session.flush()
        counters = session.status()["ring"]
    dropped = {f"dropped {reason}": rows for reason, rows in counters["rows"].items() if rows}
    truth.books = {"captured ": counters["captured_rows"], **dropped}
    truth.save("wraps_and_drops", session)


if __name__ == "__main__":
    warnings.simplefilter("ignore", dmi.CaptureWarning)
    padded_and_growing()
    packed_chunks()
    wraps_and_drops()
    for file in sorted(HERE.glob("*.tape")):
        print(file.name, file.stat().st_size)
