"""`vllm serve` with a worker process of its own, observed, and an OpenAI client: what a request says of itself, what a response says of its captures,
what the metrics say; and an engine that is stopped, killed and started again while requests come."""

from __future__ import annotations

import random
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import dmi
from observed import fresh_seed

pytest.importorskip("vllm", reason="vLLM is not in this environment: `make test-vllm` has one")

import openai

from served import VOCABULARY, Alone, model_on_disk, tokenizer_on_disk
from vllm_server import Daemon, daemon, serving

RESIDUAL = "blocks.2.hook_resid_post"


class Server(NamedTuple):
    address: str
    log: Path
    model: Path
    engine: Daemon

    def ask(self, prompt: list[int], key: str = "", **extra: Any) -> Any:
        client = openai.OpenAI(base_url=self.address + "/v1", api_key="none", max_retries=0, timeout=600)
        headers = {"X-Request-Id": key} if key else {}
        body = {"ignore_eos": True, **({"vllm_xargs": extra} if extra else {})}
        return client.completions.create(model="model", prompt=prompt, max_tokens=6, temperature=0, extra_headers=headers, extra_body=body)

    def flushed(self) -> Any:
        """The store, once the engine has everything of the requests that are over."""
        store = dmi.open(self.engine.store)
        store._fresh().post("/flush")
        return store


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    model = model_on_disk(folder / "model")
    tokenizer_on_disk(model, VOCABULARY)
    with daemon(folder / "captures") as engine:
        observe = {"DMI_HOOKS": "tokens blocks.*.hook_resid_post logits", "DMI_ENGINE": str(engine.socket), "DMI_TEXT": "ids", "DMI_RING_MIB": "32", "DMI_STAGING_MIB": "32"}
        arguments = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--kv-cache-memory-bytes", str(64 << 20),
                     "--enforce-eager", "--distributed-executor-backend", "mp"]  # fmt: skip
        with serving(folder / "vllm", model, *arguments, environ=observe) as (address, log):
            yield Server(address, log, model, engine)


def positions(store: Any, request: str, site: str) -> list[int]:
    try:
        return list(store.cache(request=request).positions_of(site).tolist())
    except (dmi.NotCapturedError, dmi.IncompleteError):
        return []


def test_requests_say_what_is_captured_of_them(server: Server) -> None:
    choose = random.Random(fresh_seed())
    prompt = [choose.randrange(VOCABULARY) for _ in range(9)]
    rows = len(prompt) + 5
    plain = server.ask(prompt, dmi_reference=1)
    off = server.ask(prompt, dmi_capture="off", dmi_reference=1)
    sites = server.ask(prompt, dmi_sites=["logits", "blocks.2.*"], dmi_positions=["prompt[-1]", "generated[:2]"], dmi_tags="trial eu")
    wrong = server.ask(prompt, dmi_layers="3")
    window = server.ask(prompt, dmi_positions="prompt[x]")
    named = server.ask(prompt, key="chat-7")
    store = server.flushed()
    texts = {answer.choices[0].text for answer in (plain, off, sites, wrong, window, named)}
    assert len(texts) == 1, "what is captured changes what is answered"

    told = plain.kv_transfer_params["dmi"]
    assert told["observed"] and told["request"] == plain.id and told["store"] == str(server.engine.store)
    assert [info["id"] for info in store.requests(session=told["session"], labels={"vllm_request": told["vllm_request"]})] == [plain.id]
    assert off.kv_transfer_params["dmi"] == {"observed": False, "reason": "the request asked for nothing to be captured"}
    assert getattr(sites, "kv_transfer_params", None) is None

    everything = list(range(rows))
    assert positions(store, plain.id, RESIDUAL) == positions(store, plain.id, "blocks.0.hook_resid_post") == everything
    assert positions(store, sites.id, RESIDUAL) == positions(store, sites.id, "logits") == [8, 9, 10]
    assert positions(store, sites.id, "blocks.0.hook_resid_post") == []
    assert [info["id"] for info in store.requests(tag="trial")] == [sites.id]
    for nothing in (off, wrong, window):
        assert all(not positions(store, nothing.id, site) for site in ("tokens", RESIDUAL, "logits"))
        assert set(store.cache(request=nothing.id).coverage()["outcomes"]) <= {"skipped", "not_computed"}
    (told,) = [info for info in store.requests(labels={"dmi.capture": "off"}) if info["id"] == wrong.id]
    assert "no option" in told["labels"]["dmi.error"]
    assert "'dmi_layers' is no option" in server.log.read_text(errors="replace") and "prompt[x]" in server.log.read_text(errors="replace")
    assert positions(store, named.id, RESIDUAL) == everything and named.id == "cmpl-chat-7"
    alone = Alone(server.model).run(store.cache(request=named.id).tokens.tolist())
    got = store.cache(request=named.id)[RESIDUAL]
    assert torch.allclose(got, alone[RESIDUAL][: len(got)], atol=2e-4 * alone[RESIDUAL].abs().max().item())


def test_engines_side_by_side(tmp_path: Path) -> None:
    """Data parallel: each engine is a session of its own, its requests say which, and the metrics tell of both, whichever API server is asked."""
    model = model_on_disk(tmp_path / "model")
    tokenizer_on_disk(model, VOCABULARY)
    with daemon(tmp_path / "captures") as engine:
        observe = {"DMI_HOOKS": RESIDUAL, "DMI_ENGINE": str(engine.socket), "DMI_RING_MIB": "32", "DMI_STAGING_MIB": "32"}
        arguments = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager", "--data-parallel-size", "2"]
        with serving(tmp_path / "vllm", model, *arguments, environ=observe) as (address, log):
            two = Server(address, log, model, engine)
            with ThreadPoolExecutor(6) as threads:
                answers = list(threads.map(lambda first: two.ask([first, 5, 6], dmi_reference=1), range(12)))
            store = two.flushed()
            references = [answer.kv_transfer_params["dmi"] for answer in answers]
            assert len({reference["session"] for reference in references}) == 2, "all went to one engine"
            for answer, told in zip(answers, references, strict=True):
                assert [info["id"] for info in store.requests(session=told["session"], labels={"vllm_request": told["vllm_request"]})] == [answer.id]
                assert positions(store, answer.id, RESIDUAL) == list(range(8))
            for _ in range(4):
                with urllib.request.urlopen(address + "/metrics", timeout=300) as answer:
                    text = answer.read().decode()
                assert all(f'dmi_vllm_observed{{reason="",worker="{worker}"}} 1.0' in text for worker in (0, 1))


def test_the_policy_is_the_upper_bound(server: Server) -> None:
    store = dmi.open(server.engine.store)
    store.policy.set("rules: [{hooks: logits, level: off}]")
    try:
        answer = server.ask([5, 6, 7], dmi_sites="logits, blocks.2.hook_resid_post")
        store = server.flushed()
        assert positions(store, answer.id, "logits") == [] and positions(store, answer.id, RESIDUAL) == list(range(8))
        (verdict,) = store.policy.explain(answer.id, "blocks.0.hook_resid_post")
        assert verdict["rule"] == "the request" and not verdict["captured"]
    finally:
        store.policy.set("default: full")


def test_metrics(server: Server) -> None:
    with urllib.request.urlopen(server.address + "/metrics", timeout=300) as answer:
        text = answer.read().decode()
    assert 'dmi_vllm_observed{reason="",worker="0"} 1.0' in text
    assert 'dmi_vllm_sites{worker="0"} 5.0' in text
    assert 'dmi_vllm_device_bytes{worker="0"} 6.7108864e+07' in text
    assert 'dmi_vllm_kv_blocks_cost{worker="0"} 0.0' in text, "the cache's size is the user's"


class Answer(NamedTuple):
    prompt: list[int]
    got: Any
    began: float
    ended: float


def test_engine_stopped_killed_and_started_again(server: Server) -> None:
    """No request fails; every row is on the books, and captured but for those that the killed engine had on its way: of requests that were under way when it
    was killed, or ended after the last flush before that; and those that did not fit the ring while there was no engine."""
    seed = fresh_seed()
    answers: list[Answer] = []
    failures: list[BaseException] = []
    over = threading.Event()

    def client(number: int) -> None:
        choose = random.Random(seed + number)
        while not over.is_set():
            prompt = [choose.randrange(VOCABULARY) for _ in range(choose.randrange(1, 40))]
            began = time.monotonic()
            try:
                answers.append(Answer(prompt, server.ask(prompt), began, time.monotonic()))
            except BaseException as error:
                failures.append(error)
                return

    def more(count: int) -> None:
        until = len(answers) + count
        deadline = time.monotonic() + 900
        while len(answers) < until and not failures:
            assert time.monotonic() < deadline, "requests do not come to their ends"
            time.sleep(0.02)

    def back() -> None:
        """The session is: what is asked is captured."""
        deadline = time.monotonic() + 600
        while not positions(server.flushed(), server.ask([3, 4, 5]).id, RESIDUAL):
            assert time.monotonic() < deadline, "the session does not come back"
            time.sleep(0.2)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    try:
        more(10)
        server.engine.signal(signal.SIGSTOP)
        more(20)
        server.engine.signal(signal.SIGCONT)
        more(10)
        flushing = time.monotonic()
        server.flushed()
        server.engine.signal(signal.SIGKILL)
        killed = time.monotonic()
        more(20)
        server.engine.start()
        more(10)
        back()
        returned = time.monotonic()
        more(10)
        server.engine.signal(signal.SIGTERM)
        ended = time.monotonic()
        more(10)
        server.engine.start()
        more(10)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not failures, failures
    back()
    store = server.flushed()
    lost = 0
    for prompt, got, began, done in answers:
        assert len(got.choices[0].text.split()) <= 6 and got.usage.completion_tokens == 6
        for site in ("blocks.0.hook_resid_post", RESIDUAL, "logits"):
            outcomes = store.cache(request=got.id).coverage(site)["outcomes"]
            assert sum(sum(reasons.values()) for reasons in outcomes.values()) == len(prompt) + 5, (got.id, site, outcomes)
            allowed = {"captured", "not_computed"}
            if began < killed and done > flushing:
                allowed.add("lost")
            if began < returned and done > killed or done > ended:  # there was no engine for a while
                allowed.add("dropped")
            assert set(outcomes) <= allowed and set(outcomes.get("lost", {})) <= {"engine_exit"}, (got.id, site, outcomes, began - killed, done - killed)
            lost += sum(outcomes.get("lost", {}).values())
    print(f"{len(answers)} requests, {lost} rows lost with the engine")
