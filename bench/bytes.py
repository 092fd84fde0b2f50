#!/usr/bin/env python3
"""What leaves the ring, in bytes: statistics of every site of a layer as wide as Qwen3-4B's, against the rows in full; and of late selection, against what its rules ask for.

    python bench/bytes.py [--device cuda] [--save [FOLDER]]

Two layers, as all are alike, and a batch of decode steps and prompts. Bytes are those that the engine's copy commands move, and those that come by the spill region: what crosses PCIe, where there is
one. `--save` writes bench/results/, or FOLDER; `--commit` says of what, where this is no checkout.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import result
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import dmi

LAYER = ["hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_z",
         "mlp.hook_pre", "mlp.hook_post"]  # fmt: skip
HOOKS = [*(f"blocks.*.{site}" for site in LAYER), "ln_final.hook_out", "unembed.hook_out"]
FIGURES = 32  # bytes of a row at level stats
REQUESTS = 64


def copied(session: dmi.Session) -> int:
    session.flush()
    (attached,) = [a for a in session._answering().get("/status")["attached"] if a["session"] == session.id]
    return int(attached["copied_bytes"]) + int(attached["spilled_bytes"])


def run(model: Any, requests: int, prompt: int, new: int) -> None:
    with torch.no_grad():
        ids = torch.randint(1, 1000, (requests, prompt), device=model.device)
        out = model(ids, use_cache=True)
        for _ in range(new):
            out = model(ids[:, :1], use_cache=True, past_key_values=out.past_key_values)


def statistics(store: Path, model: Any, rows: list[dict[str, Any]]) -> None:
    moved: dict[str, int] = {}
    with dmi.attach(model, HOOKS, store=store, mode="complete") as session:
        for policy in ("default: full\n", "default: stats\n", "default: stats+4\n", "default: off\nrules:\n- {tokens: 'all[::8]', level: stats}\n"):
            session.policy.set(policy)
            before = copied(session)
            run(model, 4, 16, 8)
            moved[policy] = copied(session) - before
    full = moved.pop("default: full\n")
    print(f"{'every site in full':72} {full / 1e6:10.3f} MB")
    for policy, metric, goal in zip(moved, ("statistics of every site", "statistics and 4 greatest elements of every site", "statistics of every 8th row of every site"), (0.02, None, 0.02), strict=True):
        ratio = moved[policy] / full
        say(rows, metric + ", of what all rows in full move", moved[policy] / 1e6, "MB", full / 1e6, ratio, "" if goal is None else f"<= {goal:.0%} of full", None if goal is None else ratio <= goal)


def late(store: Path, model: Any, rows: list[dict[str, Any]]) -> None:
    """One request in 64 has what the last layer's condition is about; its rows of both layers come in full, the others as statistics."""
    def grow(_module: Any, _args: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        hidden[REQUESTS // 3] *= 50
        return out

    handle = model.model.layers[1].register_forward_hook(grow)
    with dmi.attach(model, ["blocks.*.hook_resid_post", "blocks.*.hook_mlp_out"], store=store, mode="best-effort", ring_mib=128) as session:
        session.policy.set("""
default: stats
triggers:
- {name: large, hooks: blocks.1.hook_resid_post, when: {statistic: l2, above: 500}, keep: [hook_resid_post, hook_mlp_out], cooldown: 0s}
""")
        before = copied(session)
        run(model, REQUESTS, 16, 4)
        moved = copied(session) - before
        captured = session.coverage()["outcomes"]["captured"]
        status = session.status()["ring"]
    handle.remove()
    width = model.config.hidden_size * model.dtype.itemsize
    tokens = REQUESTS * (16 + 4)
    asked = captured["full"] * width + captured["stats"] * FIGURES
    full = 4 * tokens * width
    print(f"{captured} of {4 * tokens} rows; offered {status['offered_bytes'] / 1e6:.1f} MB")
    expected = 4 * 20  # one request's rows of four sites
    say(rows, "rows in full of the request that the rule asks for, late selection", captured["full"], "rows", expected, captured["full"] / expected, "all of it, and no other", captured["full"] == expected)
    say(rows, "late selection, of what its rules ask for", moved / 1e6, "MB", asked / 1e6, moved / asked, "<= 1.05 of what is asked for", moved <= 1.05 * asked)
    say(rows, "late selection, of all rows in full", moved / 1e6, "MB", full / 1e6, moved / full, "", None)


def say(rows: list[dict[str, Any]], metric: str, value: float, unit: str, baseline: float, ratio: float, goal: str, met: bool | None) -> None:
    rows.append(result.row(metric, value, unit, baseline=baseline, ratio=ratio, goal=goal, met=met))
    print(f"{metric:72} {value:10.3f} {unit} of {baseline:.3f}: {ratio:.2%}{'' if met is None else '  ' + goal + (': yes' if met else ': NO')}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--save", nargs="?", type=Path, const=result.FOLDER, metavar="FOLDER")
    parser.add_argument("--commit", default="")
    given = parser.parse_args()
    torch.manual_seed(0)
    config = Qwen3Config(hidden_size=2560, intermediate_size=9728, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=1024)
    model = Qwen3ForCausalLM(config).to(given.device, torch.bfloat16).eval()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="dmi-bytes-") as folder:
        statistics(Path(folder) / "statistics", model, rows)
        late(Path(folder) / "late", model, rows)
    if given.save and given.device == "cpu":
        print(f"written to {result.write('bytes', rows, folder=given.save, torch=torch.__version__)}")
    elif given.save:
        from gpu_model import save

        save(given.save, "gpu_bytes", given.commit, rows, None)


if __name__ == "__main__":
    main()
