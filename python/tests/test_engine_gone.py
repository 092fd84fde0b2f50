"""What becomes of a session, its books and its captures when the engine is killed, stopped, or never comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import dmi
from dmi import engine as engines
from sessions import alive, balanced, engine_pid, footprint, kill, llama, plainly, prompts, quiet, rows_of, stop, until

RESIDUAL = "blocks.*.hook_resid_post"


def test_what_was_flushed_survives_a_kill(tmp_path: Path) -> None:
    model = llama()
    with quiet(), plainly(model.model.layers[1]) as seen, dmi.attach(model, RESIDUAL, store=tmp_path / "s", mode="best-effort") as session:
        model.generate(prompts(), max_new_tokens=5, do_sample=False)
        session.flush()
        kill(engine_pid(tmp_path / "s"))
    want = torch.cat(seen, dim=1)
    with dmi.open(tmp_path / "s") as store:
        for row, request in enumerate(session.requests):
            assert torch.equal(store.cache(request=request)["resid_post", 1], want[row])


def test_best_effort_goes_on_and_finds_the_engine_again(tmp_path: Path) -> None:
    model, store = llama(), tmp_path / "s"
    with quiet(), dmi.attach(model, RESIDUAL, store=store, mode="best-effort") as session, torch.no_grad():
        model(prompts(), use_cache=False)
        session.flush()
        kill(engine_pid(store))
        for _ in range(20):
            model(prompts(), use_cache=False)  # waits for nobody
        until(lambda: session.status()["reconnections"] > 0)
        with plainly(model.model.layers[0]) as seen:
            model(prompts(), use_cache=False)
        assert torch.equal(session.cache()["resid_post", 0], seen[0])
        assert torch.equal(session.cache(request=session.requests[0]).positions, torch.arange(7))
        session.flush()
        books = session.coverage()
        assert session.status()["ring"]["waits"] == 0
    assert balanced(books)
    assert books["rows"] == 22 * 2 * 7 * 2, "every row of every forward is on the books, whatever became of it"
    assert rows_of(books, "captured") + rows_of(books, "lost") + rows_of(books, "dropped") == books["rows"]


def test_complete_says_what_a_kill_cost(tmp_path: Path) -> None:
    model, store = llama(), tmp_path / "s"
    before = footprint(model)
    with quiet(), torch.no_grad():
        session = dmi.attach(model, RESIDUAL, store=store)
        for turn in range(10):
            model(prompts(), use_cache=False)
            if turn == 4:
                kill(engine_pid(store))
        until(lambda: session.status()["reconnections"] > 0)
        raised = None
        try:
            session.detach()
        except dmi.CaptureError as error:
            raised = error
    assert footprint(model) == before
    with dmi.open(store) as reader:
        books = reader.coverage(session=session.id)
    assert balanced(books)
    assert books["rows"] == 10 * 2 * 7 * 2
    assert (rows_of(books, "captured") < books["rows"]) == (raised is not None), books


def serve(store: Path, *flags: str) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([engines.binary(), "serve", "--store", str(store), *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert child.stdout is not None
    assert b"engine_id" in child.stdout.readline()
    return child


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
def test_complete_raises_when_nobody_makes_room(fault: signal.Signals, tmp_path: Path) -> None:
    model = llama()
    before = footprint(model)
    daemon = serve(tmp_path / "s")
    with quiet(), torch.no_grad():
        session = dmi.attach(model, RESIDUAL, engine=str(tmp_path / "s" / "engine.sock"), ring_mib=0.25, staging_mib=0.25, wait_bound_s=0.5)
        model(prompts(), use_cache=False)
        daemon.send_signal(fault)
        if fault == signal.SIGKILL:
            daemon.wait()
        with pytest.raises(dmi.CaptureError, match="no room within the 500 ms"):
            for _ in range(2000):
                model(prompts(4, 64), use_cache=False)
        if fault == signal.SIGKILL:
            until(lambda: not session.status()["connected"])
        with pytest.raises(dmi.EngineError, match="not connected" if fault == signal.SIGKILL else "durable within"):
            session.flush(timeout_s=0.2)
        daemon.kill()
        daemon.wait()
        begun = time.monotonic()
        with pytest.raises((dmi.EngineError, dmi.CaptureError)):
            session.detach()
        assert time.monotonic() - begun < 300
    assert footprint(model) == before


def test_an_engine_that_asks_for_a_token(tmp_path: Path) -> None:
    daemon = serve(tmp_path / "s", "--set", "control.admission=token")
    try:
        for arguments in ({"engine": str(tmp_path / "s" / "engine.sock")}, {"store": tmp_path / "s"}):
            with dmi.attach(llama(), "tokens", **arguments) as session:  # type: ignore[arg-type]
                assert session.status()["connected"], "the token file is ours to read"
            with pytest.raises(dmi.EngineError, match="token") as refused:
                dmi.attach(llama(), "tokens", token="wrong", **arguments)  # type: ignore[arg-type]
            assert refused.value.code == "token"
    finally:
        daemon.kill()
        daemon.wait()


def test_a_daemon_that_comes_back_is_found(tmp_path: Path) -> None:
    model, store = llama(), tmp_path / "s"
    daemon = serve(store)
    try:
        with quiet(), dmi.attach(model, "tokens", engine=f"unix:{store}/engine.sock", mode="best-effort") as session, torch.no_grad():
            first = prompts()
            model(first, use_cache=False)
            session.flush()
            daemon.terminate()
            daemon.wait()
            until(lambda: not session.status()["connected"])
            second = prompts()
            model(second, use_cache=False)
            daemon = serve(store)
            until(lambda: session.status()["connected"])
            assert torch.equal(session.cache()["tokens"].squeeze(-1), second), "what waited in the ring"
            assert torch.equal(torch.stack([session.cache(request=r)["tokens"].flatten() for r in session.requests[:2]]), first)
            books = session.coverage()
        assert rows_of(books, "captured") == books["rows"] == 28
    finally:
        daemon.kill()
        daemon.wait()


def test_a_stopped_engine_holds_nobody_up(tmp_path: Path) -> None:
    model, store = llama(), tmp_path / "s"
    with quiet(), dmi.attach(model, "tokens", store=store, mode="best-effort") as session, torch.no_grad():
        pid = engine_pid(store)
        os.kill(pid, signal.SIGSTOP)
        try:
            for _ in range(30):
                model(prompts(4, 3), use_cache=False)
            with pytest.raises(dmi.EngineError, match="durable within"):
                session.flush(timeout_s=0.2)
            ring = session.status()["ring"]
            assert ring["waits"] == 0
        finally:
            os.kill(pid, signal.SIGCONT)
        session.flush()
        books = session.coverage()
    assert rows_of(books, "captured") == books["rows"] == 30 * 12


def test_what_best_effort_drops_is_on_the_books(tmp_path: Path) -> None:
    """With the engine stopped, a small ring fills: the model waits for nobody, and every row is accounted for."""
    model, store = llama(), tmp_path / "s"
    session = dmi.attach(model, RESIDUAL, store=store, mode="best-effort", ring_mib=0.25, staging_mib=0.25)
    with torch.no_grad():
        pid = engine_pid(store)
        os.kill(pid, signal.SIGSTOP)
        try:
            for _ in range(40):
                model(prompts(4, 32), use_cache=False)
        finally:
            os.kill(pid, signal.SIGCONT)
        session.flush()
        books = session.coverage()
    assert session.status()["ring"]["waits"] == 0
    assert balanced(books)
    assert books["rows"] == 40 * 4 * 32 * 2
    assert set(books["outcomes"]["dropped"]) <= {"ring_full", "records_full"}
    assert rows_of(books, "dropped") > 0
    assert rows_of(books, "captured") + rows_of(books, "dropped") == books["rows"]
    with pytest.warns(dmi.CaptureWarning, match=f"{rows_of(books, 'dropped')} dropped"):
        session.detach()


def test_the_engine_goes_when_nobody_needs_it(tmp_path: Path) -> None:
    with dmi.attach(llama(), "tokens", store=tmp_path / "s"):
        pid = engine_pid(tmp_path / "s")
        time.sleep(0.3)  # sessions shorter than its tick it may not notice, and then waits longer for a first one
    until(lambda: not alive(pid))
    assert engines.live(tmp_path / "s") is None
    # A stale announcement is nobody, and the next session starts another.
    (tmp_path / "s" / "engine.json").write_text('{"engine_id": "x", "http_unix": "/nowhere", "control": "/nowhere", "pid": 1}')
    with dmi.attach(llama(), "tokens", store=tmp_path / "s") as session:
        assert session.status()["connected"]


def test_engines_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    before = footprint(model)
    (tmp_path / "file").write_text("")
    with pytest.raises(dmi.EngineError, match="give another folder"):
        dmi.attach(model, "tokens", store=tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "novel.txt").write_text("")
    with pytest.raises(dmi.EngineError, match="novel.txt"):
        dmi.attach(model, "tokens", store=tmp_path / "other")
    with dmi.attach(model, "tokens", store=tmp_path / "newer"):
        pass
    stop(tmp_path / "newer")
    identity = tmp_path / "newer" / "dmi.json"
    identity.write_text(identity.read_text().replace('"version":1', '"version":99').replace('"version": 1', '"version": 99'))
    for what in (lambda: dmi.attach(model, "tokens", store=tmp_path / "newer"), lambda: dmi.open(tmp_path / "newer")):
        with pytest.raises(dmi.EngineError, match="99"):
            what()
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\necho dmi: this takes a while >&2\nexec sleep 20\n")
    slow.chmod(0o700)
    monkeypatch.setenv("DMI_BIN", str(slow))
    monkeypatch.setattr("dmi.engine.READY_TIMEOUT_S", 1.0)
    with pytest.raises(dmi.EngineError, match=r"not ready within 1 s; try again(.|\n)*this takes a while"):
        dmi.open(tmp_path / "newer")
    monkeypatch.setenv("DMI_BIN", str(tmp_path / "nothing"))
    with pytest.raises(dmi.EngineError, match="DMI_BIN"):
        dmi.attach(model, "tokens", store=tmp_path / "fresh")
    assert footprint(model) == before


def test_a_store_too_deep_for_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    deep = tmp_path.joinpath(*["a-rather-long-folder-name"] * 5)
    model, ids = llama(), prompts()
    with dmi.attach(model, "tokens", store=deep) as session, torch.no_grad():
        model(ids)
        assert torch.equal(session.cache()["tokens"].squeeze(-1), ids)
        assert not (deep / "engine.sock").exists()
    stop(deep)
    with dmi.open(deep) as store:
        assert torch.equal(store.cache()["tokens"].squeeze(-1), ids)
