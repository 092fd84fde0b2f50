"""Continuous batching: every captured row belongs to the request, layer and position that it is booked for, and to no other.

The oracle is plain Hugging Face: each request run by itself, seen by hooks that know nothing of DMI. Weights and prompts are random, so that
a row of another request, or of another position, is visibly another row."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    ContinuousMixin,
)
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import RequestState

import dmi
from dmi.batching import LABEL
from dmi.hook import HookError
from observed import Observed, fresh_seed, model_of, observed

pytestmark = pytest.mark.newest

REQUESTS = int(os.environ.get("DMI_BATCHING_REQUESTS", "16"))
"""Of each load."""
SITES = ["tokens", "blocks.*.hook_resid_post", "blocks.**.hook_rot_k", "logits"]
WRAPPED = [(ContinuousBatchProcessor, name) for name in ("_generation_step", "prepare_next_batch", "update_batch", "fail_all_requests", "reset")]
WRAPPED += [(ModelRunner, "run_one_warmup"), (ContinuousBatchingManager, "add_request"), (ContinuousMixin, "generate_batch"),
            (ContinuousBatchingLogitsProcessorList, "check_kwargs"), (RequestState, "to_generation_output")]  # fmt: skip
MODELS = [("llama", "sdpa"), ("qwen3", "eager"), ("gpt2", "sdpa"), ("mixtral", "eager")]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The library's loop writes what ends it to the log; a request's result says it too."""
    logger = logging.getLogger("ContinuousBatchingLogger")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


def sites_of(family: str, implementation: str) -> list[str]:
    out = [site for site in SITES if not (family == "gpt2" and "rot" in site)]
    return [*out, "blocks.**.hook_pattern"] if implementation == "eager" else out


PATIENCE_S = 300
"""With what takes a moment, on a machine that has other work."""


def prompts(choose: random.Random, count: int, longest: int = 40) -> dict[str, list[int]]:
    """Some begin alike, or are wholly alike."""
    made: list[list[int]] = []
    for _ in range(count):
        beginning = choose.choice(made)[: choose.randrange(1, longest)] if made and choose.random() < 0.4 else []
        rest = [choose.randrange(3, 128) for _ in range(choose.randrange(0 if beginning else 1, longest - len(beginning) + 1))]
        made.append(beginning + rest)
    return {f"r{index}": prompt for index, prompt in enumerate(made)}


def serve(model: Any, asked: dict[str, list[int]], choose: random.Random, config: dict[str, Any], *, copies: int = 1, cancels: float = 0.0) -> dict[str, Any]:
    """Requests that arrive while others run, some cancelled; what became of those that were not."""
    generation = GenerationConfig(max_new_tokens=10, eos_token_id=-1, do_sample=True, num_return_sequences=copies)
    done: dict[str, Any] = {}
    cancelled = {key for key in asked if choose.random() < cancels}
    waited_for = {name for key in asked if key not in cancelled for name in (key, *(f"{key}__child#{i}" for i in range(copies - 1)))}
    with model.continuous_batching_context_manager(generation, continuous_batching_config=ContinuousBatchingConfig(**config)) as manager:
        to_come = list(asked)
        while to_come or waited_for - set(done):
            for _ in range(choose.randrange(1, 5)):
                if to_come:
                    key = to_come.pop(0)
                    manager.add_request(asked[key], request_id=key, max_new_tokens=choose.randrange(1, 16))
            if cancelled and choose.random() < 0.5:
                going = [key for key in asked if key in cancelled and key not in to_come]
                if going:
                    manager.cancel_request(choose.choice(going))
            result = manager.get_result(timeout=0.02 if to_come else PATIENCE_S)
            if result is None:
                assert to_come, f"no result for {waited_for - set(done)}; the loop ended with {manager.background_thread_status.fatal_error}"
                continue
            assert result.error is None, result.error
            if result.is_finished():
                done[result.request_id] = result
        for key in cancelled:
            manager.cancel_request(key)
    return done


@torch.no_grad()
def alone(model: Any, tokens: list[int], names: list[str]) -> dict[str, Tensor]:
    """Rows of a sequence run by itself, [position, ...]."""
    seen: dict[str, Tensor] = {}
    body = getattr(model, "model", None) or model.transformer
    blocks = body.layers if hasattr(body, "layers") else body.h
    handles = [
        block.register_forward_hook(lambda m, a, out, i=i: seen.update({f"blocks.{i}.hook_resid_post": (out if isinstance(out, Tensor) else out[0])[0]}))
        for i, block in enumerate(blocks)
    ]
    output = model(torch.tensor([tokens]), use_cache=True, output_attentions=any("pattern" in name for name in names))
    for handle in handles:
        handle.remove()
    seen["tokens"], seen["unembed.hook_out"] = torch.tensor(tokens), output.logits[0]
    for i, layer in enumerate(output.past_key_values.layers):
        seen[f"blocks.{i}.attn.hook_rot_k"] = layer.keys[0].transpose(0, 1)
    for i, weights in enumerate(output.attentions or ()):
        seen[f"blocks.{i}.attn.hook_pattern"] = weights[0].transpose(0, 1)
    return {name: seen[name] for name in names}


def rows_of(session: Observed) -> dict[int, dict[str, dict[int, Tensor]]]:
    """By request, site and position."""
    session.drain()
    return {request: {name: dict(session.reader.rows.get(name, {}).get(request, {})) for name in session.names} for request in session.requests.visible}


def near(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and torch.allclose(got.float(), want.float(), atol=3e-4, rtol=1e-3)


def check(model: Any, rows: dict[int, dict[str, dict[int, Tensor]]], tokens: dict[int, list[int]], names: list[str]) -> int:
    """Each row equals the request's own, and is further from every other request's that has seen other tokens, where those of the two requests alone can be told
    apart: what follows the same few tokens again and again comes to be alike. Returns how many rows there were."""
    own = {request: alone(model, tokens[request], names) for request in rows if tokens[request]}
    compared = alike = apart = 0
    last = names[[i for i, name in enumerate(names) if "resid_post" in name][-1]]
    for request, sites in rows.items():
        for name, found in sites.items():
            for position, row in found.items():
                want = own[request][name][position]
                want = want[..., : row.shape[-1]] if "pattern" in name else want
                assert near(row, want), f"request {request}, {name}, position {position}: {row.flatten()[:4]} is not {want.flatten()[:4]}"
                compared += 1
        for other in rows:
            for position, row in sites[last].items():
                if position < len(tokens[other]) and tokens[other][: position + 1] != tokens[request][: position + 1]:
                    mine, theirs = own[request][last][position], own[other][last][position]
                    if near(mine, theirs):
                        alike += 1
                        continue
                    apart += 1
                    assert (row - mine).norm() < (row - theirs).norm(), f"position {position} of request {request} is that of {other}"
    print(f"{alike} of {alike + apart} rows like another request")
    assert alike <= (alike + apart) // 10, f"{alike} of {alike + apart} rows are like another request's: they would not show a mix-up"
    return compared


LOADS: dict[str, dict[str, Any]] = {
    "room": {"config": {"block_size": 8, "num_blocks": 128, "max_batch_tokens": 48}},
    "tight": {"config": {"block_size": 4, "num_blocks": 30, "max_batch_tokens": 24}, "cancels": 0.2},
    "offloaded": {"config": {"block_size": 4, "num_blocks": 30, "max_batch_tokens": 24, "cpu_offload_space": 0.0005}, "cancels": 0.1},
    "unshared": {"config": {"block_size": 8, "num_blocks": 64, "max_batch_tokens": 16, "allow_block_sharing": False, "scheduler_type": "prefill_first"}, "cancels": 0.2},
    "forked": {"config": {"block_size": 4, "num_blocks": 48, "max_batch_tokens": 32}, "copies": 3},
    "padded": {"config": {"block_size": 8, "num_blocks": 64, "max_batch_tokens": 32, "q_padding_interval_size": 8, "kv_padding_interval_size": 64,
                          "varlen_compile_config": CompileConfig(backend="eager", fullgraph=False, mode=None)}},
}  # fmt: skip


EVERY = [(family, implementation, load) for load in LOADS for family, implementation in MODELS]
SHARE = EVERY if os.environ.get("DMI_TEST_FULL") else EVERY[random.Random(os.environ.get("DMI_TEST_SEED")).randrange(len(MODELS)) :: len(MODELS)]  # each load


@pytest.mark.parametrize(("family", "implementation", "load"), SHARE)
def test_every_row_is_its_requests(family: str, implementation: str, load: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():  # pinned memory needs a device; what is kept in it does not
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **rest: empty(*size, **rest))
    choose = random.Random(fresh_seed())
    model = model_of(family, implementation)
    asked = prompts(choose, REQUESTS)
    with observed(model, sites_of(family, implementation)) as session:
        done = serve(model, asked, choose, **LOADS[load])
        session.check_books()
        rows = rows_of(session)
        names = session.names
        ledger = session.requests
        steps = session.reader.steps
    assert check(model, rows, {request: ledger.tokens[request] or [] for request in rows}, names) > 0
    numbers = {label[LABEL]: number for number, label in ledger.labels.items()}
    assert len(numbers) == len(ledger.labels), "a request was taken for two"
    for key, output in done.items():
        number = numbers[key]
        told = ledger.tokens[number]
        assert told == output.prompt_ids + output.generated_tokens and output.prompt_ids == asked[key.partition("__")[0]]
        assert ledger.ended[number] == "finished"
        captured = sorted(rows[number]["tokens"])  # the last token comes out, and never goes in
        assert captured and captured == list(range(captured[0], len(told) - 1))
        predicted = sorted(rows[number]["unembed.hook_out"])
        assert predicted[-len(output.generated_tokens) :] == list(range(len(told) - 1 - len(output.generated_tokens), len(told) - 1))
    assert all(reason in ("finished", "aborted") for reason in ledger.ended.values())
    twice = [(key.request, key.position, key.attempt) for step in steps for key in step.rows(0)]
    print(f"{load}: {len(asked)} requests, {len(steps)} steps, {len(twice)} rows, {sum(1 for _, _, attempt in twice if attempt)} of them again")
    assert len(twice) == len(set(twice)), "a row of one attempt was computed twice"


def test_a_store_finds_them_by_the_ids_of_hugging_face(tmp_path: Path) -> None:
    """`attach` and then `generate_batch`, twice: its ids repeat, ours do not."""
    choose = random.Random(fresh_seed())
    model = model_of("llama", "sdpa")
    config = ContinuousBatchingConfig(block_size=8, num_blocks=64, max_batch_tokens=16, allow_block_sharing=False)
    asked = list(prompts(choose, 5).values())
    plain = {name: vars(owner)[name] for owner, name in WRAPPED}
    with dmi.attach(model, hooks=["blocks.*.hook_resid_post", "logits"], store=tmp_path / "store") as session:
        outputs = [model.generate_batch(asked, GenerationConfig(max_new_tokens=5, eos_token_id=-1), config) for _ in range(2)]
        assert len(session.requests) == len(set(session.requests)) == 10
        books = session.coverage()
    assert plain == {name: vars(owner)[name] for owner, name in WRAPPED}, "detaching left something behind"
    assert books["complete"] and set(books["outcomes"]) == {"captured", "not_computed"}
    assert books["outcomes"]["not_computed"] == {"engine": 2 * sum(len(prompt) - 1 for prompt in asked)}, "logits of prompts, but for their last tokens"
    store = dmi.open(tmp_path / "store")
    layers = model.config.num_hidden_layers
    for key in outputs[0]:
        found = store.requests(labels={LABEL: key})
        assert len(found) == 2 and {request["reason"] for request in found} == {"finished"}
        for request, output in zip(sorted(found, key=lambda request: request["begun_unix_ns"]), outputs, strict=True):
            told = output[key].prompt_ids + output[key].generated_tokens
            want = alone(model, told[:-1], [f"blocks.{layers - 1}.hook_resid_post", "unembed.hook_out"])
            cache = store.cache(request=request["id"])
            assert near(cache["resid_post", layers - 1], want[f"blocks.{layers - 1}.hook_resid_post"])


def test_clients_ids_are_ours_where_they_can_be() -> None:
    choose = random.Random(fresh_seed())
    model = model_of("llama", "sdpa")
    config = {"block_size": 8, "num_blocks": 64, "max_batch_tokens": 16}
    with observed(model, ["tokens"]) as session:
        for _ in range(2):
            serve(model, {"chat-7": [5, 6, 7]}, choose, config)
        assert list(session.requests.names.values()) == ["chat-7", ""]
        assert {label[LABEL] for label in session.requests.labels.values()} == {"chat-7"}
        assert set(session.requests.ended.values()) == {"finished"}


def test_patterns_are_refused_where_pages_form_none() -> None:
    """A model that was loaded eager and is then told to run on another kernel; and one with sliding windows."""
    model = model_of("llama", "eager")
    with observed(model, ["blocks.0.attn.hook_pattern"]):
        model.set_attn_implementation("paged|sdpa")
        with pytest.raises(HookError, match="paged.eager"):
            model.init_continuous_batching(GenerationConfig(max_new_tokens=3, eos_token_id=-1))
        model.set_attn_implementation("eager")
        done = serve(model, {"a": [3, 4, 5]}, random.Random(1), {"block_size": 8, "num_blocks": 16, "max_batch_tokens": 16})
        assert done["a"].generated_tokens
    with observed(model_of("gemma3", "eager"), ["blocks.0.attn.hook_pattern"]) as session, pytest.raises(HookError, match="sliding windows"):
        session.instrumentation._model.init_continuous_batching(GenerationConfig(max_new_tokens=3, eos_token_id=-1))


def test_requests_say_what_is_captured_of_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In `add_request`, by a prompt of `generate_batch` or for all of its prompts, and in `generate`: what is kept was wished, and is right; the answers are
    those of requests that say nothing."""
    fresh_seed()
    model = model_of("llama", "sdpa")
    config = ContinuousBatchingConfig(block_size=8, num_blocks=64, max_batch_tokens=16, allow_block_sharing=False)
    generation = GenerationConfig(max_new_tokens=5, eos_token_id=-1)
    prompt = torch.randint(3, 128, (9,)).tolist()
    last = f"blocks.{model.config.num_hidden_layers - 1}.hook_resid_post"
    choices: dict[str, dict[str, Any]] = {
        "all": {"dmi_reference": 1},
        "off": {"dmi_capture": "off", "dmi_reference": 1},
        "sites": {"dmi_sites": ["logits", last], "dmi_positions": ["prompt[-1]", "generated[:2]"], "dmi_tags": "trial eu"},
        "wrong": {"dmi_layers": 3, "dmi_reference": 1},
    }
    everything, ends = list(range(13)), [8, 9, 10]
    kept = {"all": (everything, everything), "off": ([], []), "sites": (ends, []), "wrong": ([], [])}  # of the last block, of the first

    def positions(request: str, site: str) -> list[int]:
        books = store.cache(request=request).coverage(site)["outcomes"]
        return store.cache(request=request).positions_of(site).tolist() if "captured" in books else []

    with dmi.attach(model, hooks=["blocks.*.hook_resid_post", "logits"], store=tmp_path / "store") as session:
        with model.continuous_batching_context_manager(generation, continuous_batching_config=config) as manager, caplog.at_level(logging.WARNING):
            for key, options in choices.items():
                manager.add_request(prompt, request_id=key, **options)
            done: dict[str, Any] = {}
            while len(done) < len(choices):
                result = manager.get_result(timeout=PATIENCE_S)
                assert result is not None and result.error is None, result
                done[result.request_id] = result
        assert "request wrong: nothing of it is captured: 'dmi_layers' is no option" in caplog.text
        batch = model.generate_batch([dmi.Prompt(prompt, dmi_positions="prompt[0]"), prompt, dmi.Prompt(prompt, dmi_sites=last)], generation, config, dmi_tags="batch")
        ids = torch.tensor([prompt])
        plain = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(plain, model.generate(ids, max_new_tokens=5, do_sample=False, dmi_positions="generated[0]", dmi_tags="plain"))
        with pytest.raises(HookError, match="session.requests"):
            model.generate(ids, max_new_tokens=5, dmi_reference=1)
        beams = model.generate(ids, max_new_tokens=5, num_beams=2, dmi_positions=["prompt[0]", "generated[0]"], dmi_tags="beams")
        with pytest.raises(TypeError, match="dmi_site=...\\) is no option"):
            dmi.Prompt(prompt, dmi_site="logits")
        session.flush()
        store = dmi.open(tmp_path / "store")
        assert {tuple(output.generated_tokens) for output in (*done.values(), *batch.values())} == {tuple(plain[0, 9:].tolist())}
        want = alone(model, plain[0, :-1].tolist(), [last])[last]
        for key, (of_last, of_first) in kept.items():
            assert positions(key, last) == of_last and positions(key, "blocks.0.hook_resid_post") == of_first, key
            if of_last:
                assert near(store.cache(request=key).get(last, partial=True), want[of_last])
        assert done["all"].dmi == {"observed": True, "request": "all", "session": session.id, "store": session.store, LABEL: "all"}
        assert done["off"].dmi == {"observed": False, "reason": "the request asked for nothing to be captured"}
        assert "no option" in done["wrong"].dmi["reason"] and not hasattr(done["sites"], "dmi")
        assert [info["id"] for info in store.requests(tag="trial")] == ["sites"]
        tagged = {info["labels"][LABEL]: info["id"] for info in store.requests(tag="batch")}
        first, second, third = (tagged[key] for key in batch)
        assert (positions(first, last), positions(second, last), positions(third, last)) == ([0], everything, everything)
        assert positions(third, "blocks.0.hook_resid_post") == [] and positions(second, "blocks.0.hook_resid_post") == everything
        (by_generate,) = store.requests(tag="plain")
        assert positions(by_generate["id"], last) == [9]
        (of_beams,) = store.requests(tag="beams")
        assert positions(of_beams["id"], last) == [0, 9]
        assert near(store.cache(request=of_beams["id"]).get(last, partial=True), alone(model, beams[0, :-1].tolist(), [last])[last][[0, 9]])


def test_options_outlive_the_session() -> None:
    """Requests that wait when a session ends go on without it: the library would fail them for arguments that it does not know."""
    model = model_of("llama", "sdpa")
    manager = model.init_continuous_batching(GenerationConfig(max_new_tokens=3, eos_token_id=-1), ContinuousBatchingConfig(block_size=8, num_blocks=64, max_batch_tokens=16))
    with observed(model, ["tokens"]):
        manager.add_request([5, 6, 7], request_id="late", dmi_positions="prompt[-1]")
    manager.start()
    result = manager.get_result(timeout=PATIENCE_S)
    manager.stop(block=True)
    manager.destroy()
    assert result is not None and result.error is None and len(result.generated_tokens) == 3
