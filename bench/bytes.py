#!/usr/bin/env python3
"""What leaves the ring, in bytes: statistics of every site of Qwen3-4B's shape, against the rows in full; and of late selection, against what its rules ask for.

    python bench/bytes.py [--device cuda] [--save [FOLDER]]

All 434 sites on a GPU, two layers of that width on the CPU; prompts and decode steps of a batch. Bytes are those that the engine's copy commands move, and those that come by the spill region: what crosses PCIe, where there is
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


def statistics(store: Path, model: Any, rows: list[dict[str, Any]]) -> float:
    """Returns the bytes that a token has in full at all sites."""
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
    return full / (4 * (16 + 8))


def late(store: Path, model: Any, token: float, rows: list[dict[str, Any]]) -> None:
    """One request in 64 has what the last layer's condition is about; its rows of the last two layers come in full, all others of every site as statistics. `token`: bytes of one in full."""
    def grow(_module: Any, _args: Any, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        hidden[REQUESTS // 3] *= 50
        return out

    last = model.config.num_hidden_layers - 1
    kept = [f"blocks.{layer}.{site}" for layer in (last - 1, last) for site in ("hook_resid_post", "hook_mlp_out")]
    handle = model.model.layers[last].register_forward_hook(grow)
    with dmi.attach(model, HOOKS, store=store, mode="best-effort", ring_mib=128) as session:
        session.policy.off()
        norm = bound(model)
        session.policy.on()
        session.policy.set(f"""
default: stats
triggers:
- {{name: large, hooks: {kept[2]}, when: {{statistic: l2, above: {norm}}}, keep: [{", ".join(kept)}], cooldown: 0s}}
""")
        before = copied(session)
        run(model, REQUESTS, 16, 4)
        moved = copied(session) - before
        session.flush()
        captured: dict[str, int] = {}
        for request in session.requests[-REQUESTS:]:
            for level, n in session.cache(request=request).coverage()["outcomes"]["captured"].items():
                captured[level] = captured.get(level, 0) + n
        status = session.status()["ring"]
    handle.remove()
    width = model.config.hidden_size * model.dtype.itemsize
    full = REQUESTS * (16 + 4) * token
    asked = captured["full"] * width + captured["stats"] * FIGURES
    print(f"{captured} rows; offered {status['offered_bytes'] / 1e6:.1f} MB")
    expected = len(kept) * (16 + 4)  # one request's rows
    say(rows, "rows in full of the request that the rule asks for, late selection", captured["full"], "rows", expected, captured["full"] / expected, "all of it, and no other", captured["full"] == expected)
    say(rows, "late selection, of what its rules ask for", moved / 1e6, "MB", asked / 1e6, moved / asked, "<= 1.05 of what is asked for", moved <= 1.05 * asked)
    say(rows, "late selection, of all rows in full", moved / 1e6, "MB", full / 1e6, moved / full, "", None)


def bound(model: Any) -> float:
    """A norm that the last layer's rows have when they are 50 times what they were, and not before."""
    norms: list[torch.Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(lambda _, __, out: norms.append((out[0] if isinstance(out, tuple) else out).detach().double().norm(dim=-1)))
    run(model, REQUESTS, 16, 4)
    handle.remove()
    grown = torch.cat([n[REQUESTS // 3].flatten() for n in norms]).min()
    usual = torch.cat([torch.cat([n[: REQUESTS // 3], n[REQUESTS // 3 + 1 :]]).flatten() for n in norms]).max()
    assert grown > 2 * usual, (grown, usual)
    return float((grown + usual) / 2)


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
    if given.device == "cuda":
        from gpu_model import model as whole

        model = whole(36)
    else:
        config = Qwen3Config(hidden_size=2560, intermediate_size=9728, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=1024)
        model = Qwen3ForCausalLM(config).to(torch.bfloat16).eval()
    print(f"{model.config.num_hidden_layers} layers", flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="dmi-bytes-") as folder:
        token = statistics(Path(folder) / "statistics", model, rows)
        late(Path(folder) / "late", model, token, rows)
    if given.save and given.device == "cpu":
        print(f"written to {result.write('bytes', rows, folder=given.save, torch=torch.__version__)}")
    elif given.save:
        from gpu_model import save

        save(given.save, "gpu_bytes", given.commit, rows, None)


if __name__ == "__main__":
    main()
