"""Requests of a model runner that choose what is captured of them, through ring and engine: every row that is kept was wished, and is right."""

from __future__ import annotations

import logging
import os
import random
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import dmi
from dmi.vllm.batches import Batch
from dmi.vllm.observer import observe
from dmi.vllm.settings import Settings
from observed import fresh_seed
from sessions import engine_pid, until

ROWS, WIDTH = 12, 8


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


class Runner:
    """A packed batch, a step at a time, as vLLM's runner has it."""

    def __init__(self) -> None:
        self.model = Model()
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=1), scheduler_config=SimpleNamespace(max_num_batched_tokens=ROWS, max_num_seqs=len(CHOICES)), additional_config={})
        self.requests: dict[str, Any] = {}
        self.max_model_len = ROWS + 1
        self.inputs: dict[str, torch.Tensor] = {}

    def get_model(self) -> nn.Module:
        return self.model

    def ask(self, name: str, prompt: int, **extra: Any) -> None:
        key = f"{name}-0a1b2c3d"
        parameters = SimpleNamespace(extra_args=extra or None, max_tokens=ROWS)
        self.requests[key] = SimpleNamespace(req_id=key, prompt_token_ids=list(range(prompt)), sampling_params=parameters)
        self.inputs[name] = torch.randn(ROWS, WIDTH)

    def run(self, observer: Any) -> None:
        """Prompts in one step, then a token each."""
        done = dict.fromkeys(self.requests, 0)
        while any(at < ROWS for at in done.values()):
            counts = {key: len(self.requests[key].prompt_token_ids) if at == 0 else 1 for key, at in done.items() if at < ROWS}
            news = [self.requests[key] for key in counts if done[key] == 0]
            observer.scheduled(SimpleNamespace(finished_req_ids=[], scheduled_new_reqs=news, total_num_scheduled_tokens=sum(counts.values())))
            observer.open(Batch(list(counts), list(counts.values()), [done[key] for key in counts]))
            rows = [self.inputs[key.rpartition("-")[0]][done[key] : done[key] + count] for key, count in counts.items()]
            self.model(torch.cat(rows))
            observer.close(aborted=False)
            for key, count in counts.items():
                done[key] += count


CHOICES: dict[str, tuple[int, dict[str, Any], list[int], list[int]]] = {
    # prompt, options, positions kept of first and of second
    "all": (3, {}, list(range(ROWS)), list(range(ROWS))),
    "none": (3, {"dmi_capture": "off"}, [], []),
    "site": (4, {"dmi_sites": "second"}, [], list(range(ROWS))),
    "ends": (5, {"dmi_positions": ["prompt[-1]", "generated[:2]"]}, [4, 5, 6], [4, 5, 6]),
    "both": (2, {"dmi_sites": ["fir*"], "dmi_positions": "all[::5]", "dmi_tags": "t"}, [0, 5, 10], []),
    "mistaken": (3, {"dmi_layers": 3}, [], []),
    "window": (3, {"dmi_positions": "prompt[x]"}, [], []),
}


def check(store: dmi.Store, runner: Runner, suffix: str) -> None:
    for name, (_, _, first, second) in CHOICES.items():
        cache = store.cache(request=name + suffix)
        x = runner.inputs[name + suffix]
        with torch.no_grad():
            want = {"first": runner.model.first(x), "second": runner.model(x)}
        for site, positions in (("first", first), ("second", second)):
            books = cache.coverage(site)["outcomes"]
            told = {"captured": {"full": len(positions)}, "skipped": {"policy": ROWS - len(positions)}}
            assert books == {key: value for key, value in told.items() if sum(value.values())}, (name, site, books)
            if positions:
                assert cache.positions_of(site).tolist() == positions
                torch.testing.assert_close(cache.get(site, partial=True), want[site][positions], rtol=1e-5, atol=1e-5, msg=f"{name} {site}")  # products of other shapes


def test_what_requests_choose(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also by an engine that was killed meanwhile, and knows them again; and whatever the operator's policy says, no more than it gives."""
    fresh_seed()
    runner = Runner()
    settings = Settings(("first", "second"), store=str(tmp_path / "captures"), mode="complete", ring_mib=4, staging_mib=4)
    with warnings.catch_warnings(record=True) as told, torch.no_grad(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("always")
        session, observer = observe(runner, settings)
        try:
            for name, (prompt, extra, _, _) in CHOICES.items():
                runner.ask(name, prompt, **extra)
            runner.run(observer)
            session.flush()
            store = dmi.open(tmp_path / "captures")
            check(store, runner, "")
            assert "no option" in caplog.text and any("prompt[x]" in str(warning.message) for warning in told)
            (tagged,) = store.requests(tag="t")
            assert tagged["id"] == "both" and tagged["labels"]["dmi.sites"] == "fir*"
            (verdict,) = store.policy.explain("site", "first")
            assert verdict["rule"] == "the request" and not verdict["captured"]

            os.kill(engine_pid(tmp_path / "captures"), signal.SIGKILL)
            runner.requests.clear()
            for name, (prompt, extra, _, _) in CHOICES.items():
                runner.ask(name + "-again", prompt, **extra)
            runner.run(observer)  # while there is no engine, or a new one
            until(lambda: session.status()["connected"])
            session.flush()
            check(store, runner, "-again")

            store.policy.set("rules: [{hooks: second, level: off}]")
            runner.requests.clear()
            runner.ask("bounded", 3, dmi_sites="first second")
            runner.run(observer)
            session.flush()
            bounded = store.cache(request="bounded")
            assert bounded.coverage("second")["outcomes"] == {"skipped": {"policy": ROWS}}
            assert bounded.positions_of("first").tolist() == list(range(ROWS))
        finally:
            session.detach()


def test_what_was_guessed(tmp_path: Path) -> None:
    """Guesses that the model agreed with are captured; the others, and those behind the last token, are rejected(speculation)."""
    choose = random.Random(fresh_seed())
    runner = Runner()
    runner.max_model_len = 64
    settings = Settings(("first", "second"), store=str(tmp_path / "captures"), mode="complete", ring_mib=4, staging_mib=4, text="ids")
    session, observer = observe(runner, settings)
    prompts = {f"{name}-0a1b2c3d": choose.randrange(1, 6) for name in ("a", "b", "c")}
    ends = {key: prompt + choose.randrange(8, 20) for key, prompt in prompts.items()}
    tokens = {key: list(range(prompt)) for key, prompt in prompts.items()}
    inputs = {key: torch.randn(ends[key] + 8, WIDTH) for key in prompts}
    done, rejected = dict.fromkeys(prompts, 0), dict.fromkeys(prompts, 0)
    over: list[str] = []
    with torch.no_grad():
        while prompts.keys() - set(over):
            going = [key for key in prompts if len(tokens[key]) < ends[key]]
            finished = [key for key in prompts if key not in going and key not in over]
            over += finished
            news = [SimpleNamespace(req_id=key, prompt_token_ids=tokens[key], sampling_params=SimpleNamespace(max_tokens=ends[key] - prompts[key])) for key in going if not done[key]]
            drafts = [choose.randrange(4) if done[key] else 0 for key in going]
            counts = [len(tokens[key]) - done[key] + guesses for key, guesses in zip(going, drafts, strict=True)]
            observer.scheduled(SimpleNamespace(finished_req_ids=finished, scheduled_new_reqs=news, total_num_scheduled_tokens=sum(counts)))
            if not going:
                break
            observer.open(Batch(going, counts, [done[key] for key in going], drafts))
            rows = []
            for key, count, guesses in zip(going, counts, drafts, strict=True):
                x = inputs[key][done[key] : done[key] + count].clone()
                agreed = choose.randrange(guesses + 1)
                kept = min(agreed + 1, ends[key] - len(tokens[key]))
                x[count - guesses + kept - 1 :] = torch.randn(guesses - kept + 1, WIDTH) if guesses >= kept else 0  # what was wrong looks otherwise
                rejected[key] += guesses - (kept - 1)
                rows.append((x, agreed, kept))
            runner.model(torch.cat([x for x, _, _ in rows]))
            observer.close(aborted=False)
            observer.sampled(observer.asked(), going, [[choose.randrange(9) for _ in range(agreed + 1)] for _, agreed, _ in rows])
            for key, (_, _, kept) in zip(going, rows, strict=True):
                done[key] = len(tokens[key]) + kept - 1
                tokens[key] = [*tokens[key], *[-1] * kept]
        session.flush()
        store = dmi.open(tmp_path / "captures")
        assert sum(rejected.values()) > 0
        for key in prompts:
            cache = store.cache(request=key.rpartition("-")[0])
            assert cache.tokens.tolist()[: prompts[key]] == tokens[key][: prompts[key]] and len(cache.tokens) == ends[key]
            for site, of in (("first", runner.model.first), ("second", runner.model)):
                positions = list(range(ends[key] - 1))
                assert cache.positions_of(site).tolist() == positions
                torch.testing.assert_close(cache.get(site, partial=True), of(inputs[key])[positions], rtol=1e-5, atol=1e-5, msg=f"{key} {site}")
                books = cache.coverage(site)
                assert books["outcomes"] == {"captured": {"full": len(positions)}, **({"rejected": {"speculation": rejected[key]}} if rejected[key] else {})}
                assert books["complete"]
        books = store.coverage()
        assert sum(rows for reasons in books["outcomes"].values() for rows in reasons.values()) == books["rows"]
    session.detach()
