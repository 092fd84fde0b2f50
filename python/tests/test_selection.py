"""Rows chosen by request, tag, sample, phase and position, and requests that a trigger promotes, in real sessions."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import dmi
from dmi.groups import Groups
from sessions import alive, balanced, engine_pid, llama, plainly, prompts, until

RESIDUAL = "blocks.*.hook_resid_post"
pytestmark = pytest.mark.newest


def splitmix(seed: int, number: int) -> int:
    """As published; what docs/format/policy.md says the sample is taken by."""
    mask = 2**64 - 1
    x = (number + (seed + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
    return x ^ x >> 31


def captured(session: dmi.Session, request: str, site: str) -> set[int]:
    """Positions of a request that were captured at a site. All others were skipped by the policy."""
    positions = set()
    for r in session.cache(request=request).coverage(site)["ranges"]:
        at = range(r["first"], r["first"] + r["count"] * r.get("stride", 1), r.get("stride", 1))
        if r["outcome"] == "captured":
            positions |= set(at)
        else:
            assert (r["outcome"], r["reason"]) == ("skipped", "policy"), r
    return positions


@pytest.mark.parametrize(("rule", "want"), [
    ("tokens: 'prompt[-1]'", lambda p, n: p == 6),
    ("tokens: ['generated[:3]', 'prompt[0]']", lambda p, n: p == 0 or 7 <= p < 10),
    ("tokens: 'all[::4]'", lambda p, n: p % 4 == 0),
    ("phase: decode", lambda p, n: p >= 7),
    ("phase: prefill\n  tokens: 'prompt[2:-1]'", lambda p, n: 2 <= p < 6),
    ("requests: {sample: 0.5, seed: 3}", lambda p, n: splitmix(3, n) < 2**63),
    ("requests: {ids: '*.1'}", lambda p, n: n == 1),
    ("requests: {tags: [wanted]}", lambda p, n: True),
    ("requests: {tags: [wanted, unwanted]}", lambda p, n: False),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_rows_are_those_of_the_rule(rule: str, want: Any, tmp_path: Path) -> None:
    model = llama()
    with plainly(model.model.layers[1]) as seen, dmi.attach(model, RESIDUAL, store=tmp_path / "s", tags=["wanted"]) as session:
        session.policy.set(f"default: off\nrules:\n- level: full\n  hooks: blocks.1.hook_resid_post\n  {rule}\n")
        session.flush()  # the producer was told of the rule's ids and tags
        model.generate(prompts(6, 7), max_new_tokens=8, do_sample=False, pad_token_id=0)
        session.flush()
        values, moved = torch.cat(seen, dim=1), 0
        for number, request in enumerate(session.requests):
            rows = {p for p in range(values.shape[1]) if want(p, number)}
            assert captured(session, request, "blocks.1.hook_resid_post") == rows
            assert captured(session, request, "blocks.0.hook_resid_post") == set()
            for p in sorted(rows):
                one = session.cache(request=request).get("blocks.1.hook_resid_post", tokens=slice(p, p + 1))
                assert torch.equal(one[0], values[number, p])
            if rows and len(rows) < values.shape[1]:
                with pytest.raises(dmi.IncompleteError, match="skipped"):
                    session.cache(request=request)["resid_post", 1]
            moved += len(rows)
            told = {p for p in range(values.shape[1]) if session.policy.explain(request, "blocks.1.hook_resid_post", position=p)[0]["captured"]}
            assert told == rows  # explain says what happened
        ring = session.status()["ring"]  # what the rule does not want never came into the ring
        assert ring["captured_rows"] == moved and ring["captured_bytes"] == moved * values[0, 0].nbytes
        assert balanced(session.coverage())


def test_requests_of_rules_are_told_apart_in_the_ring_whoever_changes_what(tmp_path: Path) -> None:
    """Requests begin under one document and go on under the next; their own tags and those of their runs count alike."""
    model, site = llama(), "blocks.1.hook_resid_post"
    with dmi.attach(model, site, store=tmp_path / "s", tags=["all"]) as session:

        def moved(document: str) -> int:
            session.policy.set("default: off\nrules:\n" + document)
            session.flush()
            before = session.status()["ring"]["captured_rows"]
            with session.record(tags=["blue"]):
                model.generate(prompts(2, 5), max_new_tokens=4, do_sample=False, pad_token_id=0)
            with session.record(tags=["red", "blue"]):
                model.generate(prompts(3, 5), max_new_tokens=4, do_sample=False, pad_token_id=0)
            session.flush()
            return int(session.status()["ring"]["captured_rows"]) - before

        rows = 5 + 4 - 1
        assert moved("- {level: full, requests: {tags: [blue]}}") == 5 * rows
        assert moved("- {level: off, requests: {tags: [blue, red]}}\n- {level: full, requests: {tags: blue}}") == 2 * rows
        assert moved("- {level: full, requests: {ids: '*.?', tags: red}, tokens: 'generated'}") == 3 * 3
        assert moved("- {level: full, requests: {ids: ['*.1', '*[0]*']}}") == 2 * rows
        assert moved("- {level: full, requests: {tags: [all]}}") == 0, "those of the session are not those of a run beside it"
        sets = "".join(f"- {{name: r{i}, level: full, requests: {{tags: [t{i}]}}}}\n" for i in range(65))
        assert moved(sets) == 5 * rows, "more groups than a producer can tell apart: it gives what any of them may need"
        assert balanced(session.coverage())


def test_an_engine_that_comes_back_names_its_groups_again(tmp_path: Path) -> None:
    """Requests that began before it went, and those that begin after it is back."""
    model, site = llama(), "blocks.1.hook_resid_post"
    with dmi.attach(model, site, store=tmp_path / "s", mode="best-effort") as session, torch.no_grad():
        session.policy.set("default: off\nrules:\n- {level: full, requests: {ids: '*.1'}}\n")
        session.flush()
        out = model(prompts(3, 4), use_cache=True)
        session.flush()  # what is not durable goes with the engine
        pid = engine_pid(tmp_path / "s")
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid) and session.status()["reconnections"] == 1 and session.status()["connected"])
        session.flush()
        model(prompts(3, 1), use_cache=True, past_key_values=out.past_key_values)
        with session.record():
            model(prompts(2, 4), use_cache=False)
        session.flush()
        assert session.status()["ring"]["captured_rows"] == 4 + 1 + 4
        for request in session.requests:
            positions = range(5 if session.requests.index(request) < 3 else 4)
            assert captured(session, request, site) == (set(positions) if request.endswith(".1") else set())
        assert balanced(session.coverage())


def test_ids_and_tags_mean_what_they_mean_to_the_engine() -> None:
    """tensor.MatchText: `*` stands for any bytes, `?` for one, brackets for themselves."""
    groups = Groups(1, [{"ids": ["*.1", "a?c[x]*"], "tags": []}, {"ids": [], "tags": ["t"]}, {"ids": ["é?"], "tags": ["t", "u"]}])
    for request, tags, members in (("r.1", [], 1), ("r.12", [], 0), ("abc[x]z", ["t"], 3), ("abcx", [], 0), ("x", ["t", "u"], 2), ("éz", ["t"], 2), ("éz", ["u", "t"], 6), ("éé", ["t", "u"], 2)):
        assert groups.of(request, tags) == members, request


def test_a_trigger_promotes_one_request_of_many(tmp_path: Path) -> None:
    model, plant = llama(), {}

    def planted(_: Any, __: Any, out: Any) -> Any:
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        if plant:
            hidden[plant["row"], -1] = 1e4
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = model.model.layers[1].register_forward_hook(planted)
    with dmi.attach(model, RESIDUAL, store=tmp_path / "s") as session, torch.no_grad():
        session.policy.set({
            "default": "off",
            "rules": [{"hooks": "blocks.1.hook_resid_post", "level": "full"}],
            "triggers": [{"name": "spike", "hooks": "resid_post", "when": {"statistic": "l2", "above": 1e4}, "promote": "blocks.0.**"}],
        })  # fmt: skip
        out = model(prompts(16, 4), use_cache=True)
        numbers = list(session.requests)
        plant["row"] = 11
        out = model(prompts(16, 1), use_cache=True, past_key_values=out.past_key_values)
        plant.clear()
        until(lambda: "promoted" in session.policy.get()["revision"])
        promoted = session.policy.get()["revision"]["promoted"]
        assert [(p["request"], p["number"], p["trigger"]) for p in promoted] == [(numbers[11], 11, "spike")]
        for _ in range(3):
            out = model(prompts(16, 1), use_cache=True, past_key_values=out.past_key_values)
        session.flush()
        assert session.status()["ring"]["captured_rows"] == 16 * 8 + 3  # of the others nothing more came into the ring
        for number, request in enumerate(numbers):
            assert captured(session, request, "blocks.0.hook_resid_post") == (set(range(5, 8)) if number == 11 else set())
            assert captured(session, request, "blocks.1.hook_resid_post") == set(range(8))
        assert [v["why"] for v in session.policy.explain(numbers[11], "blocks.0.**")] == ["a trigger has promoted the request"]
        assert balanced(session.coverage())
        del out  # and with it the cache: the requests have ended
        model(prompts(1, 3), use_cache=False)
        until(lambda: "promoted" not in session.policy.get()["revision"])
    handle.remove()
