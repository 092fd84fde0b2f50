"""The parts of the vLLM plugin that need no vLLM: what it was asked for, and the row tables of its steps."""

from __future__ import annotations

import ctypes
import logging
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dmi import HookError, native
from dmi._abi import SPAN_CACHED, SPAN_DRAFT, SPAN_NO_ROWS, SPAN_REJECTED
from dmi.instrument import Plan
from dmi.requests import Requests, new_run
from dmi.rows import DECODE, PREFILL, SPANS
from dmi.sites import LOGITS, TOKENS
from dmi.vllm import plugin, runners
from dmi.vllm.batches import Batch, Batches
from dmi.vllm.hooks import Arrangement
from dmi.vllm.observer import Observer, usual_ring_mib
from dmi.vllm.settings import asked_for
from observed import fresh_seed


def test_nothing_asked_for() -> None:
    assert asked_for({}, {}) is None
    assert asked_for({"other": 1}, {"DMI_STORE": "captures"}) is None
    assert asked_for({"dmi": {"hooks": ["logits"], "store": "s"}}, {"DMI_DISABLE": "1"}) is None


def test_a_ring_holds_two_of_the_largest_steps_within_a_share_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    plan: Any = SimpleNamespace(sites=[*[SimpleNamespace(bytes_per_token=5120, space=TOKENS)] * 37, SimpleNamespace(bytes_per_token=1 << 18, space=LOGITS),
                                      SimpleNamespace(bytes_per_token=None, space=TOKENS)])  # fmt: skip
    memory = SimpleNamespace(total_memory=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    cuda = torch.device("cuda", 0)
    for memory.total_memory, tokens, mib in ((80 << 30, 256, native.USUAL_MIB), (80 << 30, 1024, 2 * (185 + 64)), (80 << 30, 8192, 640), (16 << 30, 8192, native.USUAL_MIB)):
        assert usual_ring_mib(plan, tokens, 256, cuda) == mib
    assert usual_ring_mib(plan, 8192, 256, torch.device("cpu")) == native.USUAL_MIB


def test_environment_and_configuration() -> None:
    environ = {"DMI_HOOKS": "blocks.*.hook_resid_post, logits", "DMI_STORE": "/a", "DMI_MODE": "complete", "DMI_RING_MIB": "64"}
    settings = asked_for({}, environ)
    assert settings is not None
    assert (settings.hooks, settings.store, settings.mode, settings.ring_mib) == (("blocks.*.hook_resid_post", "logits"), "/a", "complete", 64.0)
    settings = asked_for({"dmi": {"hooks": ["logits"], "engine": "/run/dmi.sock"}}, environ)  # it goes before the environment
    assert settings is not None
    assert (settings.hooks, settings.store, settings.engine, settings.mode) == (("logits",), "", "/run/dmi.sock", "complete")
    assert asked_for({}, {"DMI_HOOKS": '["a b", "c"]', "DMI_STORE": "s"}).hooks == ("a b", "c")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("logits", "give an object"),
        ({"hook": ["logits"]}, "'hook', which is nothing; there are hooks, store"),
        ({"store": "s"}, "give names"),
        ({"hooks": [], "store": "s"}, "give names"),
        ({"hooks": ["logits"]}, "say where captures go"),
        ({"hooks": ["logits"], "store": "s", "engine": "e"}, "once"),
        ({"hooks": ["logits"], "store": "s", "mode": "fast"}, "'fast'"),
        ({"hooks": ["logits"], "store": "s", "text": "text"}, "no tokenizer"),
        ({"hooks": ["logits"], "store": "s", "ring_mib": "big"}, "no number"),
    ],
)
def test_what_cannot_be_meant(given: Any, message: str) -> None:
    with pytest.raises(HookError, match=message):
        asked_for({"dmi": given}, {})


def test_digest_tells_sets_and_orders_apart() -> None:
    settings = asked_for({"dmi": {"hooks": ["a"], "store": "s"}}, {})
    assert settings is not None
    digests = {settings.digest(sites) for sites in ([], ["a"], ["b"], ["a", "b"], ["b", "a"], ["a,b"])}
    assert len(digests) == 6


def test_without_a_known_worker_vllm_goes_on(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm.v1.worker.worker_base", SimpleNamespace())
    with caplog.at_level(logging.WARNING, "vllm.dmi"):
        plugin.register()
    assert "nothing is captured" in caplog.text


class Scheduler:
    """vLLM's, as far as workers see it: prompts in chunks, prefixes from the cache, guesses, preemptions; and what of it each row is, one by one."""

    def __init__(self, choose: random.Random, count: int) -> None:
        self.choose = choose
        self.requests = Requests(new_run(None, ()), "ids")
        self.batches = Batches(self.requests, 200)
        self.prompts = {f"r{i}-{choose.randrange(16**8):08x}": [choose.randrange(100) for _ in range(choose.randrange(1, 30))] for i in range(count)}
        self.ends = {key: len(prompt) + choose.randrange(1, 40) for key, prompt in self.prompts.items()}
        self.tokens = {key: list(prompt) for key, prompt in self.prompts.items()}
        self.done = dict.fromkeys(self.prompts, 0)
        self.numbers: dict[str, int] = {}
        self.rows: dict[tuple[int, int, int], str] = {}
        """By request, position and attempt: what a row was booked as, of drafts once that was said."""
        self.ids: list[str] = []
        self.at_once = 0
        """Steps whose spans libdmi made."""
        self.drafts: list[tuple[int, int, int]] = []

    def step(self, guessing: bool) -> None:
        choose = self.choose
        guessing = guessing and choose.random() < 0.5
        open_ = [key for key in sorted(self.prompts) if len(self.tokens[key]) < self.ends[key]]
        ids = self.ids if set(self.ids) <= set(open_) and self.ids and choose.random() < 0.8 else choose.sample(open_, 4)
        self.ids = ids
        counts, drafts, cached = [], [], {}
        for key in ids:
            if key not in self.numbers:
                self.batches.begin([SimpleNamespace(req_id=key, prompt_token_ids=self.prompts[key], sampling_params=SimpleNamespace(max_tokens=self.ends[key] - len(self.prompts[key])))])
                if choose.random() < 0.3 and len(self.prompts[key]) > 1:
                    cached[key] = self.done[key] = choose.randrange(1, len(self.prompts[key]))
            elif choose.random() < 0.03:  # preempted; a part may be in the prefix cache
                self.done[key] = choose.randrange(self.done[key] + 1)
            left = len(self.tokens[key]) - self.done[key]
            rows = choose.randrange(1, left + 1)
            drafts.append(choose.randrange(4) if guessing and rows == left and self.done[key] + left >= len(self.prompts[key]) else 0)
            counts.append(rows + drafts[-1])
        places = [self.done[key] for key in ids]
        table = self.table(Batch(ids, counts, places, drafts if guessing else ()))
        self.judge(table)
        self.check(table, ids, counts, places, drafts, cached)
        asked, sampled = self.batches.asked, []
        for key, at, count, guesses in zip(ids, places, counts, drafts, strict=True):
            known = at + count - guesses
            agreed = choose.randrange(guesses + 1)
            new = [choose.randrange(100) for _ in range(agreed + 1)] if known == len(self.tokens[key]) else []
            sampled.append(new)
            kept = new[: self.ends[key] - len(self.tokens[key])]
            self.tokens[key] += kept
            self.done[key] = known + max(0, len(kept) - 1)
        self.batches.sampled(asked, ids, sampled)
        self.batches.learn()

    def table(self, batch: Batch) -> Any:
        """What the ring comes to know."""
        at = self.batches.spans(batch)
        if at is None:
            return np.frombuffer(self.batches.table(batch), SPANS)
        self.at_once += 1
        return np.frombuffer(ctypes.string_at(at.address, at.number * SPANS.itemsize), SPANS)

    def judge(self, table: Any) -> None:
        wrong = {(int(span["request"]), int(span["position"]) + i, int(span["attempt"])) for span in table[table["flags"] == SPAN_REJECTED] for i in range(span["count"])}
        assert wrong <= set(self.drafts), "a verdict on rows of which none is due"
        for row in self.drafts:
            self.rows[row] = "rejected" if row in wrong else "captured"
        self.drafts = []

    def check(self, table: Any, ids: list[str], counts: list[int], places: list[int], drafts: list[int], cached: dict[str, int]) -> None:
        prefixes = table[table["flags"] == SPAN_CACHED]
        table = table[(table["flags"] & SPAN_NO_ROWS) == 0]
        spans = {space: [(span, i) for span in table[table["space"] == space] for i in range(span["count"])] for space in (TOKENS, LOGITS)}
        row = {TOKENS: 0, LOGITS: 0}
        for key, count, at, guesses in zip(ids, counts, places, drafts, strict=True):
            for place in range(count):
                for space in (TOKENS, LOGITS):
                    if space == LOGITS and place < count - guesses - 1:
                        continue
                    span, i = spans[space][row[space]]
                    self.numbers.setdefault(key, int(span["request"]))
                    assert (span["request"], span["position"] + i, span["first"] + i) == (self.numbers[key], at + place, row[space])
                    assert bool(span["flags"] & SPAN_DRAFT) == (place >= count - guesses)
                    assert span["phase"] == (DECODE if count - guesses == 1 and at >= len(self.prompts[key]) else PREFILL)
                    assert span["prompt"] == len(self.prompts[key])
                    row[space] += 1
                    this = (self.numbers[key], at + place, int(span["attempt"]))
                    if space == TOKENS:
                        assert this not in self.rows and this not in self.drafts, f"{this} again, in the same attempt"
                        earlier = [attempt for number, position, attempt in self.rows if (number, position) == this[:2]]
                        assert all(attempt < this[2] for attempt in earlier), f"{this} comes after {earlier}"
                        if place >= count - guesses:
                            self.drafts.append(this)
                        else:
                            self.rows[this] = "captured"
        assert [row[TOKENS], row[LOGITS]] == [len(spans[TOKENS]), len(spans[LOGITS])]
        assert {(int(span["request"]), int(span["count"])) for span in prefixes} == {(self.numbers[key], count) for key, count in cached.items()}


@pytest.mark.parametrize("guessing", [False, True])
def test_row_tables(guessing: bool) -> None:
    """Random schedules against a table written row by row. In the end, every position of a request has been captured, but for its last token's."""
    scheduler = Scheduler(random.Random(fresh_seed()), 40)
    told: list[Any] = []
    scheduler.requests.send = lambda *messages: told.extend(messages)
    while sum(len(scheduler.tokens[key]) < end for key, end in scheduler.ends.items()) >= 4:
        scheduler.step(guessing)
    scheduler.judge(np.frombuffer(scheduler.batches.verdict(), SPANS))
    assert guessing == ("rejected" in scheduler.rows.values())
    assert guessing or scheduler.at_once > 0, "libdmi made no spans: nothing of that is tested"
    assert len(set(scheduler.numbers.values())) == len(scheduler.numbers)
    assert set(scheduler.requests) == {key.rpartition("-")[0] for key in scheduler.numbers}
    for key, number in scheduler.numbers.items():
        latest = {position: fate for (owner, position, _), fate in sorted(scheduler.rows.items()) if owner == number}
        captured = {position for position, fate in latest.items() if fate == "captured"}
        if len(scheduler.tokens[key]) == scheduler.ends[key]:
            assert max(captured) == len(scheduler.tokens[key]) - 2, "rows behind the last token are nobody's"
            assert captured == set(range(min(captured), len(scheduler.tokens[key]) - 1))
    scheduler.batches.finish(scheduler.numbers)
    scheduler.batches.tell_finished(0)
    tokens = {request["request"]: request["tokens"] for message in told if message["type"] == "requests" for request in message["requests"] if "tokens" in request}
    assert {key: tokens[number] for key, number in scheduler.numbers.items()} == {key: scheduler.tokens[key] for key in scheduler.numbers}


def test_steps_whose_spans_libdmi_makes() -> None:
    """Of those who go on where their last rows ended, in prompts too; not where one guesses, has come back, or comes with a part in the prefix cache. There may come to be more of them than there was room for."""
    batches = Batches(Requests(new_run(None, ()), "none"))
    new = [SimpleNamespace(req_id=key, prompt_token_ids=[1, 2, 3], sampling_params=SimpleNamespace(max_tokens=9)) for key in "abc"]
    batches.begin(new)

    def at_once(ids: str, counts: list[int], positions: list[int], drafts: tuple[int, ...] = ()) -> bool:
        batch = Batch(list(ids), counts, positions, drafts)
        if batches.spans(batch) is not None:
            return True
        batches.table(batch)
        return False

    assert at_once("ab", [3, 1], [0, 0]) and at_once("ab", [1, 1], [3, 1]) and at_once("ba", [2, 1], [2, 4])
    assert [found and found[1:] for found in batches.asked.of(["a", "b"])] == [(4, 0), (3, 0)]
    assert [found and found[1:] for found in batches.asked.of(["b", "x", "a"])] == [(3, 0), None, (4, 0)]
    assert not at_once("ba", [1, 1], [2, 5])  # computed once more
    assert batches._sequences["b"].attempt == 1 and batches._sequences["a"].attempt == 0
    assert at_once("ba", [1, 1], [3, 6])
    assert not at_once("bc", [1, 1], [4, 2]) and at_once("bc", [1, 1], [5, 3])
    batches.finish("b")
    batches.begin(SimpleNamespace(req_id=f"more{n}", prompt_token_ids=[1], sampling_params=SimpleNamespace(max_tokens=9)) for n in range(600))
    everybody = [*"ac", *(f"more{n}" for n in range(600))]
    assert batches.spans(Batch(everybody, [1] * 602, [7, 4, *[0] * 600])) is not None
    assert batches._sequences["a"].attempt == 0 and batches._sequences["more599"].number == 602
    assert at_once("ac", [1, 1], [8, 5])
    batches.finish(["a"])
    batches.begin(new[:1])
    assert at_once("ac", [1, 1], [0, 6]) and [found and found[0].number for found in batches.asked.of(["a", "c"])] == [603, 2], "another one of the same name"
    assert not at_once("ac", [1, 2], [1, 7], (0, 1)) and not at_once("ac", [1, 1], [2, 9]), "once there were guesses, their fates are to be told"


def test_tokens_are_told() -> None:
    requests = Requests(new_run(None, ()), "ids")
    told: list[Any] = []
    requests.send = lambda *messages: told.extend(messages)
    batches = Batches(requests)
    batches.begin([SimpleNamespace(req_id="a-01234567", prompt_token_ids=[1, 2, 3], sampling_params=SimpleNamespace(max_tokens=9, stop_token_ids=[7]))])
    for count, position, new in ((2, 0, []), (1, 2, [5]), (1, 3, [7]), (1, 4, [8])):  # the last was under way when it ended
        batches.table(Batch(["a-01234567"], [count], [position]))
        batches.sampled(batches.asked, ["a-01234567"], [new])
    assert not batches.learn()
    batches.finish(["a-01234567"])
    batches.tell_finished(4)
    last = [request for message in told if message["type"] == "requests" for request in message["requests"]][-1]
    assert last["tokens"] == [1, 2, 3, 5, 7]


class FirstRunner:
    """vLLM's first model runner, as far as it calls itself and is called."""

    def __init__(self) -> None:
        self.input_batch = SimpleNamespace(req_ids=["a", "b"], num_computed_tokens_cpu=np.array([4, 0, 9]))
        self.fails = False

    def load_model(self) -> None: ...

    def execute_model(self, output: Any) -> None:
        if output.total_num_scheduled_tokens:
            self._model_forward()

    def _model_forward(self) -> None:
        if self.fails:
            raise RuntimeError("out of memory")

    def sample_tokens(self, grammar: Any) -> Any:
        return SimpleNamespace(req_ids=["a", "b"], sampled_token_ids=[[5, 6], []])


class SecondRunner:
    """And the second."""

    is_pooling_model = False

    def load_model(self) -> None: ...

    def execute_model(self, output: Any, dummy_run: bool = False) -> None:
        if output.total_num_scheduled_tokens and not dummy_run:
            self.prepare_inputs(output)

    def prepare_inputs(self, output: Any) -> Any:
        return SimpleNamespace(req_ids=["a", "b"], num_scheduled_tokens=np.array([3, 2]), num_computed_tokens_np=np.array([4, 0]), num_draft_tokens_per_req=np.array([2, 0]))

    def sample(self) -> None: ...

    def sample_tokens(self, grammar: Any) -> Any:
        self.sample()
        values = SimpleNamespace(req_ids=["a", "b"], sampled_token_ids=[[5, 6], []])
        return SimpleNamespace(get_output=lambda: values)


@pytest.mark.parametrize("kind", [FirstRunner, SecondRunner])
def test_where_runners_call(kind: Any) -> None:
    """A step opens with its batch before the model runs, is launched when it has, and closes when its logits are there; what was sampled comes once; dummy runs are nothing."""
    calls: list[Any] = []
    asked = {"a": None}

    def tell(what: str, *args: Any, **kwargs: Any) -> Any:
        calls.append((what, *[argument() if callable(argument) else argument for argument in args], *kwargs.values()))
        return asked if what == "asked" else None

    runner = kind()
    assert runners.known(runner) and runners.second(runner) == (kind is SecondRunner)
    runners.wrap(runner, lambda: calls.append("loaded"), tell)
    runner.load_model()
    output = SimpleNamespace(num_scheduled_tokens={"b": 2, "a": 3}, scheduled_spec_decode_tokens={"a": [7, 8]}, total_num_scheduled_tokens=5)
    runner.execute_model(output)
    result = runner.sample_tokens(None)
    for _ in range(2):
        getattr(result, "get_output", lambda: None)()
    batch = calls[2][1]
    assert [list(values) for values in (batch.ids, batch.counts, batch.positions, batch.drafts)] == [["a", "b"], [3, 2], [4, 0], [2, 0]]
    expected = ["loaded", ("scheduled", output), ("open", batch), ("launched",), ("close", False), ("asked",), ("sampled", asked, ["a", "b"], [[5, 6], []])]
    assert calls == expected
    calls.clear()
    if kind is SecondRunner:
        runner.execute_model(output, dummy_run=True)
        assert calls == []
    else:
        runner.fails = True
        with pytest.raises(RuntimeError, match="out of memory"):
            runner.execute_model(output)
        assert [call[0] for call in calls] == ["scheduled", "open", "close"] and calls[-1] == ("close", True)
    assert not runners.known(SimpleNamespace(load_model=None))


@pytest.mark.parametrize("later", [True, False], ids=["the forward is launched", "the forward is waited for"])
@pytest.mark.parametrize("end", ["launched", "aborted"])
def test_when_the_engine_is_told_of_requests(later: bool, end: str) -> None:
    """All together: on a GPU behind the forward's launch, else before it, and where a forward fails all the same; who is over behind it."""
    ring = native.Ring(mode="best-effort")
    ring.add_site("site", layer=None, space=0, roles=(1, 2))
    requests = Requests(new_run(None, ()))
    sent: list[list[str]] = []
    requests.send = lambda *messages: sent.append([message["type"] for message in messages])
    model: Any = SimpleNamespace(config=None)
    observer = Observer(SimpleNamespace(max_model_len=None), model, Arrangement(model, Plan(()), 1), ring, [], requests)
    observer._later = later

    def step(arrivals: list[str], over: set[str], ids: list[str]) -> None:
        new = [SimpleNamespace(req_id=key, prompt_token_ids=[1, 2], sampling_params=SimpleNamespace(max_tokens=None)) for key in arrivals]
        observer.scheduled(SimpleNamespace(finished_req_ids=over, scheduled_new_reqs=new, total_num_scheduled_tokens=2 * len(ids)))
        if ids:
            observer.open(Batch(ids, [2] * len(ids), [0] * len(ids)))
        before.append(list(sent))
        if end == "launched":
            observer.launched()
            observer.close(aborted=False)
        elif ids:
            observer.close(aborted=True)

    before: list[list[list[str]]] = []
    step(["a-01234567", "b-01234567"], set(), ["a-01234567", "b-01234567"])
    assert before[0] == ([] if later else [["requests"]]) and sent == [["requests"]]
    step(["c-01234567"], {"a-01234567", "b-01234567"}, ["c-01234567"])
    told = [["requests", "request_end", "request_end"]] if later else [["requests"], ["request_end", "request_end"]]
    assert before[1] == [["requests"]] + ([] if later else told[:1]) and sent[1:] == told
    step([], {"c-01234567"}, [])  # no step opens
    assert before[2][-1] == ["request_end"] and sent == before[2]
    ring.close()
