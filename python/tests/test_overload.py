"""A real model in best-effort mode whose disk is slow, or whose engine is stopped: rules are lowered with a reason, come back by themselves, and
every row is on the books under the revision that decided."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dmi
from sessions import alive, balanced, engine_pid, llama, prompts, quiet, rows_of, until

ROOT = Path(__file__).parents[2]
RULES = """
rules:
- {name: cheap, hooks: blocks.0.hook_resid_post, level: full, priority: 5}
- {name: stream, hooks: "blocks.*.hook_resid_post", level: full}
- {name: attention, hooks: "blocks.*.attn.*", level: full, priority: -5}
"""


@pytest.fixture
def slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An engine built to have the disk that a file says: bytes a second, 0 for all it can."""
    if shutil.which("go") is None:
        pytest.skip("no Go: the engine with a slow disk has to be built")
    binary = ROOT / "bin" / "dmi-slowdisk"
    subprocess.run(["go", "build", "-trimpath", "-tags", "slowdisk", "-o", str(binary), "./cmd/dmi"], cwd=ROOT, check=True, env={**os.environ, "CGO_ENABLED": "0"})
    monkeypatch.setenv("DMI_BIN", str(binary))
    monkeypatch.setenv("DMI_STORE_BUFFER_MIB", "1")
    monkeypatch.setenv("DMI_STORE_FLUSH_AGE_MS", "50")
    speed = tmp_path / "s.disk_bytes_per_s"
    speed.write_text("0")
    yield speed


@contextlib.contextmanager
def serving(model: Any, pace_s: float = 0.02) -> Iterator[None]:
    """The model runs in its own thread, one short request after another: no faster than this pace, which a machine with other work holds as well."""
    done, failure = threading.Event(), []

    def run() -> None:
        try:
            due = time.monotonic()
            with torch.no_grad():
                while not done.wait(max(0, due - time.monotonic())):
                    due = max(due, time.monotonic()) + pace_s
                    model(prompts(2, 24), use_cache=False)
        except Exception as error:  # told below
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert not failure, failure


def lowered(session: dmi.Session) -> dict[str, str]:
    return dict(session.policy.get()["revision"]["lowered"])


def in_order(revisions: list[dict[str, Any]]) -> None:
    """No rule is touched before all of a lower priority are at the end of their ladders; every step says why."""
    order = ["default", "attention", "stream", "cheap"]
    for r in revisions:
        down = r["lowered"]
        for below, above in zip(order[1:], order[2:], strict=False):  # nothing is hooked that the default decides about
            assert above not in down or down.get(below) == "off", r
        if "goes from" in r["why"]:
            assert any(word in r["why"] for word in ("full:", "no room", "room for", "nothing presses", "budget", "% full")), r["why"]


def test_a_slow_disk_lowers_rules_and_a_fast_one_restores_them(slow_disk: Path, tmp_path: Path) -> None:
    model = llama()
    hooks = ["blocks.*.hook_resid_post", "blocks.*.attn.hook_z", "blocks.*.attn.hook_q"]
    with quiet(), dmi.attach(model, hooks, store=tmp_path / "s", mode="best-effort", ring_mib=1, staging_mib=1) as session:
        session.policy.set(RULES)
        with serving(model):
            until(lambda: session.policy.get()["rules"][1]["bytes_per_s"] or 0)
            demand = sum(r["bytes_per_s"] or 0 for r in session.policy.get()["rules"])
            assert demand > 0 and lowered(session) == {}
            slow_disk.write_text(str(demand / 10))
            until(lambda: lowered(session).get("attention") == "off")
            until(lambda: "stream" in lowered(session))
            slow_disk.write_text("0")
            until(lambda: lowered(session) == {})
        session.flush()
        engine = engine_pid(tmp_path / "s")
        number = session.id
    until(lambda: not alive(engine))
    with dmi.open(tmp_path / "s") as store:
        books, revisions = store.coverage(session=number), store.policy.revisions()
        assert balanced(books)
        assert rows_of(books, "captured") + rows_of(books, "skipped") + rows_of(books, "dropped") == books["rows"]
        assert books["outcomes"]["skipped"].keys() == {"policy"}
        assert any("attention goes from full to " in r["why"] for r in revisions)
        assert any(re.search("attention goes from [^ ]* to full:", r["why"]) for r in revisions)
        in_order(revisions)


def test_a_stopped_engine_lowers_rules_and_restores_them(tmp_path: Path) -> None:
    model = llama()
    with quiet(), dmi.attach(model, "blocks.*.hook_resid_post", store=tmp_path / "s", mode="best-effort", ring_mib=0.5, staging_mib=0.5) as session:
        session.policy.set("rules:\n- {name: stream, hooks: hook_resid_post, level: full}\n")
        pid = engine_pid(tmp_path / "s")
        with serving(model):
            until(lambda: session.policy.get()["rules"][0]["bytes_per_s"] or 0)  # the governor has seen it run
            before = session.status()["ring"]["waits"]
            os.kill(pid, signal.SIGSTOP)
            try:
                until(lambda: session.status()["ring"]["rows"]["ring_full"] > 0)
            finally:
                os.kill(pid, signal.SIGCONT)
            until(lambda: any("had no room" in r["why"] or "% full" in r["why"] for r in session.policy.revisions()))
            until(lambda: lowered(session) == {})
            assert session.status()["ring"]["waits"] == before
        session.flush()
        books = session.coverage()
        number = session.policy.get()["revision"]["revision"]
    assert balanced(books)
    assert rows_of(books, "dropped") > 0
    assert number >= 3  # set, down, up


def test_a_budget_for_copies_is_held_by_levels_that_the_producer_gives(tmp_path: Path) -> None:
    """Rules step down a rung that still captures something, and no more than the budget leaves the ring."""
    model = llama()
    with quiet(), dmi.attach(model, "blocks.*.hook_resid_post", store=tmp_path / "s", mode="best-effort") as session:
        rules = 'rules:\n- {name: stream, hooks: hook_resid_post, phase: prefill, level: full, degrade: [int8, sampled/16, stats, "off"]}\n'
        session.policy.set(rules)

        def copied() -> int:
            (attached,) = [a for a in session._answering().get("/status")["attached"] if a["session"] == session.id]
            return int(attached["copied_bytes"]) + int(attached["spilled_bytes"])

        with serving(model, pace_s=0.1):
            until(lambda: session.policy.get()["rules"][0]["bytes_per_s"] or 0)
            budget = 2 * 2 * 24 * 64 * 4 / 0.1 / 6  # of what the sites' rows take: less than int8 does, more than every sixteenth row or statistics
            session.policy.set(f"budgets: {{copied_bytes_per_s: {budget:.0f}}}\n{rules}")
            until(lambda: lowered(session).get("stream") in ("sampled/16", "stats"))
            session.flush()  # what was under way is through
            before, begun = copied(), time.monotonic()
            time.sleep(3)
            until(lambda: copied() > before)  # a disk that is busy may have held everything up
            rate = (copied() - before) / (time.monotonic() - begun)
            assert 0 < rate <= budget, (rate, budget, lowered(session))
        session.flush()
        assert balanced(session.coverage())
