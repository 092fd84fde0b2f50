"""Levels below full, from the policy to what is read back: values within their bounds, figures as torch computes them, every row on the books at its level."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import dmi
from dmi.engine import binary
from sessions import alive, balanced, engine_pid, llama, plainly, prompts, until

HOOKS = ["blocks.*.hook_resid_post", "blocks.*.hook_resid_pre", "blocks.*.attn.hook_pattern", "tokens"]
POLICY = """
default: off
rules:
- {name: tokens, hooks: tokens, level: full}
- {name: patterns, hooks: attn.hook_pattern, layers: 0, level: stats}
- {name: keys, hooks: attn.hook_pattern, layers: 1, level: int8}
- {name: figures, hooks: resid_pre, layers: 1, level: stats}
- {name: bytes, hooks: resid_pre, layers: 0, level: int8}
- {name: ends, hooks: resid_post, layers: 1, tokens: ["prompt[-1]", "generated"], level: full}
- {name: rest, hooks: resid_post, layers: 1, level: fp8}
- {name: every, hooks: resid_post, layers: 0, phase: prefill, level: sampled/4}
- {name: generated, hooks: resid_post, layers: 0, level: stats}
"""
pytestmark = pytest.mark.newest


def figures(row: torch.Tensor) -> dict[str, float]:
    x = row.double().flatten()
    kept = x[x.isfinite()]
    return {"mean": kept.mean().item(), "rms": kept.square().mean().sqrt().item(), "min": kept.min().item(), "max": kept.max().item(),
            "absmax": kept.abs().max().item(), "l2": kept.norm().item(), "nonfinite": float(len(x) - len(kept)), "count": float(len(x))}  # fmt: skip


def quantised(got: torch.Tensor, want: torch.Tensor, level: str) -> None:
    """Within half a step of the row's scale; of fp8, 1/16 of a value and half its least code."""
    want = want.float()
    scale = want.abs().amax(dim=-1, keepdim=True) / (126 if level == "int8" else 416)
    bound = scale * 0.5001 if level == "int8" else want.abs() * 0.06251 + scale / 1023
    assert ((got - want).abs() <= bound).all()


@pytest.mark.parametrize("mode", ["best-effort", "complete"])
def test_levels_from_policy_to_reader(tmp_path: Path, mode: str) -> None:
    model = llama()
    with dmi.attach(model, HOOKS, store=tmp_path / "s", mode=mode) as session, torch.no_grad():
        session.policy.set(POLICY)
        with plainly(model.model.layers[0]) as first, plainly(model.model.layers[1]) as second:
            out = model(prompts(1, 9), use_cache=True)
            for _ in range(3):
                out = model(prompts(1, 1), past_key_values=out.past_key_values)
        post0, post1 = torch.cat(first, dim=1)[0], torch.cat(second, dim=1)[0]
        session.flush()
        cache = session.cache(request=session.requests[-1])
        engine = engine_pid(tmp_path / "s")

        # layer 1: full where a window says so, fp8 elsewhere
        with pytest.raises(dmi.IncompleteError, match=r"captured\(fp8\) 8.*for level any to get quantised ones as well"):
            cache["resid_post", 1]
        assert cache.levels_of("blocks.1.hook_resid_post") == ["fp8"] * 8 + ["full"] * 4
        read = cache.get("blocks.1.hook_resid_post", level="any")
        assert read.dtype == torch.float32 and torch.equal(read[8:], post1[8:].float())
        quantised(read[:8], post1[:8], "fp8")
        assert torch.equal(cache.get("blocks.1.hook_resid_post", tokens=slice(8, 12)), post1[8:])

        # layer 0: every fourth of the prompt, figures of what was generated
        with pytest.raises(dmi.IncompleteError, match="for statistics to get the figures"):
            cache["resid_post", 0]
        assert torch.equal(cache.get("blocks.0.hook_resid_post", partial=True), post0[[0, 4, 8]])
        lines = {line["position"]: line for line in cache.stats("blocks.0.hook_resid_post")}
        assert sorted(lines) == [0, 4, 8, 9, 10, 11]
        for position, line in lines.items():
            assert line["level"] == ("full" if position < 9 else "stats")
            for name, value in figures(post0[position]).items():
                assert line[name] == pytest.approx(value, rel=2e-7, abs=1e-7), (position, name)

        # resid_pre of layer 1 is resid_post of layer 0; of layer 0, int8 of what went in
        assert cache.levels_of("blocks.0.hook_resid_pre") == ["int8"] * 12
        ids = cache["tokens"].flatten()
        quantised(cache.get("blocks.0.hook_resid_pre", level="any"), torch.nn.functional.embedding(ids, model.model.embed_tokens.weight.cpu()), "int8")
        for line in cache.stats("blocks.1.hook_resid_pre"):
            for name, value in figures(post0[line["position"]]).items():
                assert line[name] == pytest.approx(value, rel=2e-7, abs=1e-7)

        # attention: figures of a query's own keys alone; codes back to weights that sum to one
        for line in cache.stats("blocks.0.attn.hook_pattern"):
            heads = model.config.num_attention_heads
            assert line["count"] == heads * (line["position"] + 1) and line["level"] == "stats"
            assert line["mean"] * line["count"] == pytest.approx(heads, rel=1e-3)
        pattern = cache.get("blocks.1.attn.hook_pattern", level="any")
        assert pattern.shape == (model.config.num_attention_heads, 12, 12)
        assert (pattern.triu(1) == 0).all() and (pattern.sum(-1) - 1).abs().max() < 12 / 252

        outcomes = dmi.open(tmp_path / "s").coverage(session=session.id)["outcomes"]
        assert outcomes["captured"] == {"full": 12 + 4 + 3, "stats": 12 + 12 + 3, "int8": 12 + 12, "fp8": 8}
        assert outcomes["skipped"] == {"policy": 6}
    until(lambda: not alive(engine))
    store = dmi.open(tmp_path / "s")
    assert balanced(store.coverage(session=session.id))
    assert torch.equal(store.cache(request=session.requests[-1]).get("blocks.1.hook_resid_post", level="any"), read)
    subprocess.run([binary(), "verify", "--store", tmp_path / "s"], check=True, capture_output=True)
    levels: dict[str, str] = {}
    for path in (tmp_path / "s" / "segments").glob("*.safetensors"):
        with safe_open(path, "pt") as segment:
            metadata = segment.metadata()
            levels |= {name: what["level"] for name, what in json.loads(metadata.get("dmi.levels", "{}")).items()}
            assert all(segment.get_slice(name).get_dtype() == "U8" for name in json.loads(metadata.get("dmi.levels", "{}")))
    assert set(levels.values()) == {"fp8", "int8"}


TOP = """
default: off
rules:
- {hooks: resid_post, layers: 1, phase: decode, level: stats+3}
- {hooks: resid_post, layers: 1, requests: {tags: [wide]}, level: stats+64}
- {hooks: resid_post, layers: 1, level: stats}
- {hooks: resid_post, layers: 0, level: full}
- {hooks: attn.hook_pattern, layers: 0, level: stats+7}
- {hooks: attn.hook_pattern, layers: 1, phase: prefill, level: stats+2}
- {hooks: logits, level: stats+5}
"""


def test_greatest_elements_are_those_of_torch_topk(tmp_path: Path) -> None:
    """At level stats+K, against torch.topk of the model's own tensors in float64: where rules of one site differ, each row has its own K."""
    model = llama()
    hooks = ["blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern", "logits"]
    with dmi.attach(model, hooks, store=tmp_path / "s", tags=["wide"]) as session, torch.no_grad():
        session.policy.set(TOP)
        with plainly(model.model.layers[0]) as first, plainly(model.model.layers[1]) as second, plainly(model.lm_head) as logits:
            out = model(prompts(1, 9), use_cache=True)
            for _ in range(3):
                out = model(prompts(1, 1), past_key_values=out.past_key_values)
        session.flush()
        cache = session.cache(request=session.requests[-1])

        def same(name: str, rows: torch.Tensor, k: int, positions: list[int]) -> None:
            found = {line["position"]: line for line in cache.topk(name, k=k, tokens=slice(positions[0], positions[-1] + 1))}
            assert sorted(found) == positions
            for position in positions:
                row, elements = rows[position].double().flatten(), found[position]["elements"]
                want = torch.topk(row, min(k, len(row)))
                assert [e["value"] for e in elements] == want.values.float().tolist(), (name, position)
                assert [row[e["index"]].item() for e in elements] == want.values.tolist()
                for a, b in zip(elements, elements[1:], strict=False):  # of equal ones, that of the lower index comes first
                    assert (a["value"], -a["index"]) > (b["value"], -b["index"])

        post0, post1, ends = torch.cat(first, dim=1)[0], torch.cat(second, dim=1)[0], torch.cat(logits, dim=1)[0]
        same("blocks.1.hook_resid_post", post1, 64, list(range(9)))
        same("blocks.1.hook_resid_post", post1, 3, list(range(9, 12)))
        same("blocks.1.hook_resid_post", post1, 2, list(range(12)))  # fewer than came
        same("blocks.0.hook_resid_post", post0, 6, list(range(12)))  # of full rows, by the engine
        same("logits", ends, 5, list(range(12)))
        with pytest.raises(ValueError, match="the 4 greatest elements .* of position 9 statistics came with 3"):
            cache.topk("blocks.1.hook_resid_post", k=4)
        # attention: of a query's own keys, one head after the other
        for line in cache.topk("blocks.0.attn.hook_pattern", k=7):
            keys = line["position"] + 1
            assert len(line["elements"]) == min(7, keys * model.config.num_attention_heads) and all(e["index"] < keys * model.config.num_attention_heads for e in line["elements"])
            assert line["elements"][0]["value"] == max(s["max"] for s in cache.stats("blocks.0.attn.hook_pattern") if s["position"] == line["position"])
        lines = {line["position"]: line for line in cache.stats("blocks.1.hook_resid_post")}
        for position, line in lines.items():
            for name, value in figures(post1[position]).items():
                assert line[name] == pytest.approx(value, rel=2e-7, abs=1e-7), (position, name)
        top = cache.topk("blocks.1.hook_resid_post", k=2)
        request = session.requests[-1]
    shown = subprocess.run([binary(), "topk", "--store", tmp_path / "s", "-r", request, "-s", "blocks.1.hook_resid_post", "-k", "2", "--json"], check=True, capture_output=True)
    assert json.loads(shown.stdout) == top  # from the segments, when the session is over


def test_what_is_not_finite_stays_so(tmp_path: Path) -> None:
    model = llama()
    with dmi.attach(model, ["blocks.*.hook_resid_post"], store=tmp_path / "s") as session, torch.no_grad():
        session.policy.set("rules:\n- {hooks: resid_post, layers: 0, level: int8}\n- {hooks: resid_post, layers: 1, level: stats}\n")
        weight = model.model.layers[0].mlp.down_proj.weight
        weight[3] = float("nan")
        weight[5] = float("inf")
        with plainly(model.model.layers[0]) as first, plainly(model.model.layers[1]) as second:
            model(prompts(1, 4), use_cache=False)
        session.flush()
        read = session.cache(request=session.requests[-1]).get("blocks.0.hook_resid_post", level="any")
        want = first[0][0].float()
        assert torch.equal(read.isnan(), want.isnan()) and torch.equal(read[want.isinf()], want[want.isinf()])
        assert want.isnan().any()
        lines = session.cache(request=session.requests[-1]).stats("blocks.1.hook_resid_post")
        assert [line["nonfinite"] for line in lines] == (~second[0][0].isfinite()).sum(-1).tolist()
