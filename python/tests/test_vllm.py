"""vLLM's own engine, observed: every captured row is its request's, at its position, as plain Hugging Face computes it alone."""

from __future__ import annotations

import ast
import importlib.util
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import dmi
from observed import fresh_seed

if importlib.util.find_spec("vllm") is None:  # engines are processes of their own: importing it takes half a minute, and is not needed here
    pytest.skip("vLLM is not in this environment: `make test-vllm` has one", allow_module_level=True)

from attribution import balanced, compare

from served import Alone, job_of, load, model_on_disk, serve, serve_all

COUNT = int(os.environ.get("DMI_TEST_VLLM_REQUESTS", "120"))
FULL = pytest.mark.skipif(not os.environ.get("DMI_TEST_FULL"), reason="a minute or more for each engine; `make soak` runs it")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_on_disk(tmp_path_factory.mktemp("qwen3"))


def test_rows_are_their_requests(qwen3: Path, tmp_path: Path) -> None:
    """Prompts in chunks, shared prefixes, a cache of keys so small that requests are preempted, aborts: eagerly. The answers are those of an engine that
    nobody observes."""
    requests = load(random.Random(fresh_seed()), COUNT, every=0.2, aborts=0.1, prefixes=3)
    settings = {"hooks": ["**"], "store": str(tmp_path / "store"), "mode": "complete"}
    tight: dict[str, Any] = {"enable_prefix_caching": True, "num_gpu_blocks_override": 12, "block_size": 32}
    result, plain = serve_all(tmp_path / "engines", [job_of(qwen3, requests, dmi=settings, **tight), job_of(qwen3, requests, **tight)])
    assert result["status"]["observed"] and result["flushed"]
    assert "captures 66 sites" in result["log"]
    assert result["preempted"] > 0 and max(result["cached"].values()) > 0, "the load shows nothing"
    found = compare(tmp_path / "store", Alone(qwen3), requests, result)
    balanced(tmp_path / "store")
    print(f"{found}, {result['steps']} steps, {result['preempted']} preemptions")
    finished = {request["id"] for request in requests if request.get("abort") is None}
    assert {key: plain["tokens"][key] for key in finished} == {key: result["tokens"][key] for key in finished}


def test_the_second_runner_is_as_it_is_taken_to_be() -> None:
    """It runs on a GPU alone. By its source: what is wrapped, what a batch says, and that requests of its own making come in nothing but the warm-up."""
    found = importlib.util.find_spec("vllm")
    assert found is not None and found.submodule_search_locations
    vllm = Path(found.submodule_search_locations[0])

    def parsed(name: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
        tree = ast.parse((vllm / "v1/worker" / name).read_text())
        return {node.name: node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}

    runner = parsed("gpu/model_runner.py")["GPUModelRunner"]
    methods = {node.name: [argument.arg for argument in node.args.args] for node in runner.body if isinstance(node, ast.FunctionDef)}
    assert {"load_model", "sample_tokens", "prepare_inputs", "sample", "initialize_kv_cache"} <= set(methods) and "_model_forward" not in methods
    assert methods["execute_model"][:2] == ["self", "scheduler_output"] and "dummy_run" in methods["execute_model"]
    assert "return self.model" in ast.unparse(next(node for node in runner.body if isinstance(node, ast.FunctionDef) and node.name == "get_model"))
    fields = {ast.unparse(node.target) for node in parsed("gpu/input_batch.py")["InputBatch"].body if isinstance(node, ast.AnnAssign)}
    assert {"req_ids", "num_scheduled_tokens", "num_computed_tokens_np", "num_draft_tokens_per_req"} <= fields
    calls = [node.name for node in parsed("gpu_worker.py")["Worker"].body if isinstance(node, ast.FunctionDef) and "warmup_kernels(" in ast.unparse(node)]
    assert calls == ["compile_or_warm_up_model"]


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=FULL)], ids=["eager", "compiled"])
def test_what_is_written_over(tmp_path: Path, eager: bool) -> None:
    """Norms that give their results in the memory of what they were given, and rotary embeddings that turn queries and keys where they are: of Llama, whose queries and
    keys nothing else touches. All sites of a forward are two calls: a group, and logits."""
    model = model_on_disk(tmp_path / "llama", "llama")
    requests = load(random.Random(fresh_seed()), 12, every=0.5)
    settings = {"hooks": ["**"], "store": str(tmp_path / "store"), "mode": "complete"}
    result = serve(tmp_path / "observed", model, requests, dmi=settings, in_place=True, enforce_eager=eager)
    assert result["status"]["observed"] and result["flushed"], result["status"]
    assert result["calls"]["dmi_tests::fused_add_rms_norm"] == 6, "norms are not in place: nothing is tested"
    found = compare(tmp_path / "store", Alone(model), requests, result, whole=len(requests))
    balanced(tmp_path / "store")
    print(f"{found}, {result['calls']}")
    assert (result["calls"]["dmi::capture"], result["calls"]["dmi::copy"]) == (2, 2 + 3)  # embedding and first residual; queries to values


def test_other_families(tmp_path: Path) -> None:
    """Other trees of modules: norms behind attention and MLP and sliding windows, learned positions and one tensor between blocks."""
    seed = fresh_seed()
    jobs, models = [], {}
    for number, family in enumerate(("llama", "gemma3", "gpt2")):
        models[family] = model_on_disk(tmp_path / family, family)
        settings = {"hooks": ["**"], "store": str(tmp_path / "stores" / family), "mode": "complete"}
        jobs.append(job_of(models[family], load(random.Random(seed + number), 12, every=0.5), dmi=settings))
    for (family, model), job, result in zip(models.items(), jobs, serve_all(tmp_path / "engines", jobs), strict=True):
        assert result["status"]["observed"] and result["flushed"], (family, result["status"])
        store = tmp_path / "stores" / family
        found = compare(store, Alone(model), job["requests"], result, whole=len(job["requests"]))
        balanced(store)
        print(family, found)
        assert found.rows > 0


@FULL
def test_guesses_that_are_rejected(qwen3: Path, tmp_path: Path) -> None:
    """Tokens that vLLM guesses from what was there before are captured where the model agrees, and booked rejected(speculation) where not. The logprobs of
    a prompt, which are computed with the same modules, are no rows."""
    requests = load(random.Random(fresh_seed()), 40, longest=50, most=16, every=0.4, aborts=0.1, prefixes=3, words=8)
    for request in requests[::5]:
        request["logprobs"] = 1
    guessing: dict[str, Any] = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    settings = {"hooks": ["**"], "store": str(tmp_path / "store"), "mode": "complete"}
    result = serve(tmp_path / "observed", qwen3, requests, dmi=settings, speculative_config=guessing, enable_prefix_caching=True, num_gpu_blocks_override=14,
                   block_size=32)  # fmt: skip
    assert result["status"]["observed"] and result["flushed"], result["status"]
    assert 0 < result["accepted"] < result["drafted"], "the load shows nothing"
    found = compare(tmp_path / "store", Alone(qwen3), requests, result)
    rejected = balanced(tmp_path / "store")["outcomes"]["rejected"]["speculation"]
    print(f"{found}, {result['drafted']} guesses, {result['accepted']} accepted")
    # Those behind a request's last token are rejected too, and of aborted ones nobody says.
    assert result["drafted"] - result["accepted"] <= found.rejected + found.aborted * 3
    assert 0 < found.rejected <= result["drafted"] and rejected >= found.rejected


@FULL
def test_two_ranks(qwen3: Path, tmp_path: Path) -> None:
    """Sites that every rank has whole come from the first; of the others each has a part, and they are refused by name."""
    requests = load(random.Random(fresh_seed()), 12, every=0.5)
    settings = {"hooks": ["**"], "store": str(tmp_path / "store"), "mode": "complete"}
    result = serve(tmp_path / "observed", qwen3, requests, dmi=settings, tensor_parallel_size=2, environ={"VLLM_CPU_OMP_THREADS_BIND": "0|1"})
    assert result["status"]["observed"], result["status"]
    assert [other["reason"] for other in result["others"]] == ["the first tensor-parallel rank captures what all have"]
    skipped = " ".join(str(refusal) for refusal in result["status"]["skipped"])
    for name in ("attn.hook_q", "attn.hook_rot_k", "attn.hook_z", "mlp.hook_pre", "mlp.hook_post"):
        assert f"blocks.1.{name}" in skipped
    found = compare(tmp_path / "store", Alone(qwen3), requests, result, whole=len(requests), refused=skipped)
    print(found)


@FULL
def test_hooks_and_the_compile_cache(qwen3: Path, tmp_path: Path) -> None:
    """Compiled, with vLLM's cache of what it compiled: hooks change from start to start, and each time these are the ones that capture. Among them are points
    that only a module path names: an output, an input, an element of a tuple, which the next norm takes over the memory of. Where captures go is no part of the cache."""
    alone = Alone(qwen3)
    loaded = []
    points = {"model.layers.1.self_attn:out": "blocks.1.hook_attn_out", "model.layers.1.mlp:in": "blocks.1.ln2.hook_out", "model.layers.1:out.1": "blocks.1.hook_resid_mid"}
    declared = ["hook_embed", "blocks.*.hook_resid_post", *points, "logits"]
    runs: list[list[str]] = [[], ["hook_embed", "blocks.*.hook_resid_post", "logits"], declared, declared]
    for turn, hooks in enumerate(runs):
        requests = load(random.Random(fresh_seed() + turn), 8)
        store = tmp_path / f"store{turn}"
        settings = {"hooks": hooks, "store": str(store), "mode": "complete"} if hooks else None
        result = serve(tmp_path / str(turn), qwen3, requests, dmi=settings, cache=True, enforce_eager=False)
        loaded.append(result["loaded"])
        if not hooks:
            continue
        assert result["status"]["observed"] and result["flushed"], result["status"]
        compare(store, alone, requests, result, whole=0)
        for request in requests if hooks is declared else ():
            cache = dmi.open(store).cache(request=request["id"])
            expected = alone.run(cache.tokens.tolist())
            for point, name in points.items():
                assert cache.positions_of(point).tolist() == cache.positions_of("hook_embed").tolist()
                torch.testing.assert_close(cache.get(point), expected[name][: len(cache.positions_of(point))], rtol=1e-3, atol=1e-3)
    assert loaded[1] == loaded[2] == 0, "what was compiled for other hooks was used again"
    assert loaded[3] > 0, "the cache is of no use: nothing was tested"
