"""What is captured changes while a model runs: at the next step, by site, and every row on the books under the revision that decided."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import dmi
from dmi.engine import join_or_start
from sessions import alive, balanced, engine_pid, llama, plainly, prompts, until

HOOKS = ["blocks.*.hook_resid_post", "blocks.*.hook_resid_pre", "logits"]
pytestmark = pytest.mark.newest


def ranges(session: dmi.Session, site: str) -> list[tuple[int, int, str, int]]:
    """(first, count, outcome, revision) of the latest request's rows at a site, neighbours merged."""
    session.flush()
    merged: list[tuple[int, int, str, int]] = []
    for r in session.cache(request=session.requests[-1]).coverage(site)["ranges"]:
        first, count, fate = r["first"], r["count"], (r["outcome"], r["policy"])
        if merged and merged[-1][2:] == fate and merged[-1][0] + merged[-1][1] == first:
            first, count = merged[-1][0], merged.pop()[1] + count
        merged.append((first, count, *fate))
    return merged


def test_policy_acts_at_the_next_step(tmp_path: Path) -> None:
    model = llama()
    with plainly(model.model.layers[1]) as seen, dmi.attach(model, HOOKS, store=tmp_path / "s") as session, torch.no_grad():
        assert session.policy.get()["revision"]["revision"] == 0
        ids = prompts(1, 4)
        out = model(ids, use_cache=True)
        session.policy.set("default: off\nrules:\n- {name: kept, hooks: hook_resid_post, layers: 1, level: full}\n")
        out = model(prompts(1, 1), past_key_values=out.past_key_values)
        out = model(prompts(1, 2), past_key_values=out.past_key_values)
        session.policy.off()
        out = model(prompts(1, 1), past_key_values=out.past_key_values)
        session.policy.on()
        out = model(prompts(1, 1), past_key_values=out.past_key_values)
        session.policy.set({"rules": [{"hooks": "logits", "level": "off"}]})
        model(prompts(1, 1), past_key_values=out.past_key_values)
        assert ranges(session, "blocks.1.hook_resid_post") == [(0, 4, "captured", 0), (4, 3, "captured", 1), (7, 1, "skipped", 2), (8, 1, "captured", 3), (9, 1, "captured", 4)]
        assert ranges(session, "blocks.0.hook_resid_pre") == [(0, 4, "captured", 0), (4, 3, "skipped", 1), (7, 1, "skipped", 2), (8, 1, "skipped", 3), (9, 1, "captured", 4)]
        cache = session.cache(request=session.requests[-1])
        with pytest.raises(dmi.IncompleteError, match="skipped"):
            cache["resid_post", 1]
        assert torch.equal(cache.get("blocks.1.hook_resid_post", tokens=slice(0, 7)), torch.cat(seen, dim=1)[0, :7])
        engine = engine_pid(tmp_path / "s")
    until(lambda: not alive(engine))
    store = dmi.open(tmp_path / "s")
    books = store.coverage(session=session.id)
    assert balanced(books)
    # 5 sites by 6 tokens at which something was off: 3 tokens x 4 sites, 1 x 5, 1 x 4, 1 x 1. Logits of a prompt's other tokens are not computed, not skipped.
    assert books["outcomes"]["skipped"] == {"policy": 3 * 4 + 5 + 4 + 1}
    assert [r["why"].split()[0] for r in store.policy.revisions()] == ["set", "brake", "brake", "set"]
    assert store.policy.get(revision=1)["revision"]["text"].startswith("default: off")
    with pytest.raises(dmi.EngineError, match="only reads"):
        store.policy.off()


def test_a_change_is_for_an_engine_that_is_starting(tmp_path: Path) -> None:
    """One that has the store and has not announced itself yet; who only reads the store would refuse."""
    engine = join_or_start(tmp_path)
    assert engine.store == str(tmp_path)
    announced = tmp_path / "engine.json"
    announced.rename(tmp_path / "late")
    late = threading.Timer(0.5, (tmp_path / "late").rename, [announced])
    late.start()
    with dmi.open(tmp_path) as store:  # without it
        assert store.policy.off()["revision"]["off"]
    late.join()


def test_refused_policies_change_nothing(tmp_path: Path) -> None:
    model = llama()
    windows = ", ".join(f"'all[{position}]'" for position in range(129))
    with dmi.attach(model, HOOKS, store=tmp_path / "s") as session, torch.no_grad():
        for document, said in {
            "rules: [{level: ful}]": "line 1, column 17.*there are full",
            "rules:\n- {hook: x, level: off}": "line 2, column 4.*did you mean hooks",
            f"budgets: {{copied_bytes_per_s: 1MB}}\nrules:\n- {{level: full, tokens: [{windows}], degrade: [sampled/8, off]}}": "sampled/8 does not hold copied_bytes_per_s",
        }.items():
            with pytest.raises(ValueError, match=said):
                session.policy.set(document)
        with pytest.raises(ValueError, match='as JSON:\nline 4:    "level": "ful"'):
            session.policy.set({"rules": [{"level": "ful"}]})
        assert session.policy.get()["revision"]["revision"] == 0
        model(prompts(1, 3), use_cache=False)
        assert session.cache()["resid_post", 1].shape == (1, 3, 64)


def test_explain_says_the_rule_and_its_price(tmp_path: Path) -> None:
    model = llama()
    with dmi.attach(model, HOOKS, store=tmp_path / "s") as session, torch.no_grad():
        model(prompts(1, 3), use_cache=False)
        session.flush()
        session.policy.set("rules:\n- name: no logits\n  hooks: logits\n  level: off\n")
        verdicts: dict[str, Any] = {v["site"]: v for v in session.policy.explain(session.requests[-1], position=1)}
        logits = next(v for name, v in verdicts.items() if "unembed" in name or name == "logits")
        assert (logits["rule"], logits["line"], logits["captured"], logits["bytes_per_s"]) == ("no logits", 2, False, 0)
        residual = verdicts["blocks.1.hook_resid_post"]
        assert (residual["rule"], residual["captured"]) == ("default", True)
        with pytest.raises(dmi.NotCapturedError):
            session.policy.explain("none")


def test_watch_tells_what_the_policy_does_as_it_does_it(tmp_path: Path) -> None:
    model, got = llama(), list[dict[str, Any]]()
    with dmi.attach(model, HOOKS, store=tmp_path / "s") as session, torch.no_grad():
        session.policy.set({"triggers": [{"name": "loud", "hooks": "resid_post", "cooldown": "1h", "when": {"statistic": "l2", "above": 0}}]})
        policy = session.policy
        watching = threading.Thread(target=lambda: got.extend(policy.watch()))  # what came before first
        late = list[dict[str, Any]]()
        store = dmi.open(tmp_path / "s")

        def follow() -> None:
            for event in store.policy.watch():
                late.append(event)

        following = threading.Thread(target=follow)
        watching.start()
        following.start()
        until(lambda: len(late) == 1)  # and then what comes
        model(prompts(1, 3), use_cache=False)
        until(lambda: len(late) == 2)
        session.policy.off()
        until(lambda: len(late) == 3)
    for thread in (watching, following):
        thread.join(60)  # with its engine the stream ends
        assert not thread.is_alive()
    assert [(e["code"], e["level"]) for e in late] == [("policy", "info"), ("trigger", "warning"), ("policy", "info")]
    assert late[1]["message"].startswith(f"loud: request {session.requests[0]}, position 0") and "brake put on" in late[2]["message"]
    assert [e["id"] for e in got] == [e["id"] for e in late] == sorted(e["id"] for e in late)
    with pytest.raises(dmi.NotCapturedError, match="nothing is captured here"):
        next(store.policy.watch())


def test_a_policy_outlives_its_engine_and_meets_the_next_model(tmp_path: Path) -> None:
    model = llama()
    with dmi.attach(model, HOOKS, store=tmp_path / "s") as session:
        session.policy.set("rules:\n- {hooks: logits, level: off}\n")
    with dmi.attach(model, HOOKS, store=tmp_path / "s") as session, torch.no_grad():
        assert session.policy.get()["revision"]["revision"] == 1
        model(prompts(1, 3), use_cache=False)
        assert all(r[2] == "skipped" and r[3] == 1 for r in ranges(session, "logits") if r[2] != "not_computed")
        assert ranges(session, "blocks.1.hook_resid_post") == [(0, 3, "captured", 1)]
