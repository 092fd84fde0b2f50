"""How long the model's thread is held up, measured from outside with the operating system's own clock and counters, against what the producer says."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dmi
from dmi import native
from sessions import alive, balanced, engine_pid, kill, llama, naps, prompts, quiet, rows_of, until

RESIDUAL = "blocks.*.hook_resid_post"


class Outside:
    """Every call that the model's thread makes into the producer: how long it took, and whether the thread slept in it. A thread that waits
    gives the processor away of its own will, which the kernel counts; one that is only preempted does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds: list[float] = []
        self.slept: list[bool] = []
        monkeypatch.setattr(torch.ops.dmi.capture, "default", self.watched(torch.ops.dmi.capture.default))
        monkeypatch.setattr(native.Ring, "open_step", self.watched(native.Ring.open_step))
        monkeypatch.setattr(native.Ring, "open_next", self.watched(native.Ring.open_next))
        monkeypatch.setattr(native.Ring, "close_step", self.watched(native.Ring.close_step))

    def watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
            begun = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds.append(time.perf_counter() - begun)
                self.slept.append(resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw > switches)

        return timed

    def sleeping(self) -> float:
        """Seconds in calls in which the thread slept."""
        return sum(s for s, slept in zip(self.seconds, self.slept, strict=True) if slept)


def nothing(store: Path) -> None:
    pass


def stopped(store: Path) -> None:
    os.kill(engine_pid(store), signal.SIGSTOP)


def killed(store: Path) -> None:
    kill(engine_pid(store))


def told_to_stop(store: Path) -> None:
    pid = engine_pid(store)
    os.kill(pid, signal.SIGTERM)
    until(lambda: not alive(pid))


@pytest.mark.parametrize("fault", [nothing, stopped, killed, told_to_stop], ids=lambda f: f.__name__)
def test_best_effort_never_waits(fault: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = llama(), tmp_path / "s"
    with quiet(), dmi.attach(model, RESIDUAL, store=store, mode="best-effort", ring_mib=0.25, staging_mib=0.25) as session, torch.no_grad():
        pid = engine_pid(store)
        model(prompts(4, 32), use_cache=False)
        fault(store)
        outside = Outside(monkeypatch)
        for _ in range(60):
            model(prompts(4, 32), use_cache=False)  # more than the ring has room for
        calls, slept, sleeping = len(outside.slept), sum(outside.slept), outside.sleeping()
        if fault is stopped:
            os.kill(pid, signal.SIGCONT)
        until(lambda: session.status()["connected"])
        session.flush()
        ring, books = session.status()["ring"], session.coverage()
    assert calls >= 60 * 3, "opening, closing and at least one capture a forward"
    assert (ring["waits"], ring["wait_ns"]) == (0, 0)
    # Another thread of this process may have the interpreter when a call returns, and a busy machine take its time to give it back; a thread that waited for room
    # would sleep in every call.
    assert slept < calls * 0.3 and sleeping < 5, f"{slept} of {calls} calls slept, {sleeping:.3f} s in all"
    assert balanced(books) and books["rows"] == 61 * 4 * 32 * 2
    if fault is stopped:
        assert rows_of(books, "dropped") > 0, "or the test shows nothing: the ring was never full"


def lets_go_on(engine: int, thread: int, outcome: int) -> None:
    """Has an engine go on that is stopped, once a thread has waited for it for 0.4 s: that waits in many short naps. Writes how long that was."""
    before = naps(thread)
    time.sleep(0.1)
    while (now := naps(thread)) < before + 10:
        before = now
        time.sleep(0.1)
    begun = time.monotonic()
    time.sleep(0.4)
    waited = time.monotonic() - begun
    os.kill(engine, signal.SIGCONT)
    os.write(outcome, f"{waited}\n".encode())


def test_the_wait_counter_is_honest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In complete mode, where the thread does wait: no shorter than another process sees it wait, and no longer than the calls took in which it slept."""
    monkeypatch.setitem(native.ring_options.__kwdefaults__, "spill_mib", 0.25)
    model, store = llama(), tmp_path / "s"
    with dmi.attach(model, RESIDUAL, store=store, ring_mib=0.25, staging_mib=0.25) as session, torch.no_grad():
        model(prompts(4, 32), use_cache=False)
        session.flush()
        pid = engine_pid(store)
        before = session.status()["ring"]
        outside = Outside(monkeypatch)
        thread, (result, outcome) = threading.get_native_id(), os.pipe()
        for _ in range(4):
            os.kill(pid, signal.SIGSTOP)
            timer = os.fork()
            if timer == 0:  # another process lets the engine go on: a thread would need the interpreter that we may hold
                lets_go_on(pid, thread, outcome)
                os._exit(0)
            for _ in range(40):
                model(prompts(4, 32), use_cache=False)
            os.waitpid(timer, 0)
        os.close(outcome)
        with open(result) as lines:
            seen = sum(map(float, lines))
        after = session.status()["ring"]
        session.flush()
        books = session.coverage()
    waits, waited = after["waits"] - before["waits"], (after["wait_ns"] - before["wait_ns"]) / 1e9
    slept, sleeping = sum(outside.slept), outside.sleeping()
    print(f"the producer counts {waits} waits of {waited:.3f} s; outside, {slept} calls slept, {sleeping:.3f} s in all, and the thread was seen to wait for {seen:.3f} s")
    assert waits >= 4 and slept >= 4 and seen >= 1.6
    assert waited <= sum(outside.seconds), "more than all calls took"
    assert seen <= waited < sleeping + 0.1 * sleeping + 0.1
    assert rows_of(books, "captured") == books["rows"], "nothing is lost for it"
