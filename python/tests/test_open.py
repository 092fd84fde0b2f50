"""`dmi.open`: on a live store, on a finished one, and on one that changes while it is open."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
import torch

import dmi
from dmi import engine
from sessions import alive, llama, prompts, stop


def test_live_then_finished(tmp_path: Path) -> None:
    model, ids = llama(), prompts()
    store = tmp_path / "s"
    with dmi.attach(model, "tokens", store=store) as session, torch.no_grad():
        model(ids)
        session.flush()
        reader = dmi.open(store)
        assert reader._reader is not None
        assert reader._reader._own is None, "the session's engine answers"
        assert reader.status()["engine"]["id"] == session.status()["engine"]
        cache = reader.cache()
        assert cache.requests == list(session.requests)
        assert torch.equal(cache["tokens"].squeeze(-1), ids)
        assert reader.sessions()[0]["state"] == "attached"
    stop(store)
    assert torch.equal(cache["tokens"].squeeze(-1), ids), "a cache outlives the engine"
    own = reader._reader._own
    assert own is not None
    assert own.child is not None
    assert reader.status()["engine"]["read_only"]
    assert reader.sessions()[0]["state"] == "ended"
    assert torch.equal(reader.cache(request=session.requests[1])["tokens"].flatten(), ids[1])
    with pytest.raises(dmi.NotCapturedError, match=r"r0\.9"):
        reader.cache(request="r0.9")
    with pytest.raises(dmi.NotCapturedError, match="belongs to run"):
        reader.cache(run="r00000000", request=session.requests[0])
    # Another session writes; the reader sees it, and its own engine, overtaken, is gone.
    with dmi.attach(model, "tokens", store=store) as another, torch.no_grad():
        model(ids)
        another.flush()
        assert len(reader.requests()) == 4
        assert not alive(own.child.pid)
    stop(store)
    assert len(reader.sessions()) == 2
    child = reader._reader._own
    assert child is not None
    assert child.child is not None
    reader.close()
    assert not alive(child.child.pid)


def test_a_reader_sees_what_came_and_went(tmp_path: Path) -> None:
    model, store = llama(), tmp_path / "s"
    with dmi.attach(model, "tokens", store=store), torch.no_grad():
        model(prompts())
    stop(store)
    with dmi.open(store) as reader:
        assert len(reader.requests()) == 2
        with dmi.attach(model, "tokens", store=store), torch.no_grad():
            model(prompts())
        stop(store)
        assert len(reader.requests()) == 4


def test_delete(tmp_path: Path) -> None:
    model, ids, store = llama(), prompts(), tmp_path / "s"
    with dmi.attach(model, "tokens", store=store, text="ids") as session, torch.no_grad():
        model(ids)
        session.flush()
        with dmi.open(store) as reader:
            assert reader.requests()[0]["rows"] == 7
            done = reader.delete(session.requests[0])
            assert (done["requests"], done["rows"]) == (1, 7)
            assert [r["rows"] for r in reader.requests()] == [0, 7]
            with pytest.raises(dmi.IncompleteError, match="expired"):
                reader.cache(request=session.requests[0])["tokens"]
            assert torch.equal(reader.cache(request=session.requests[1])["tokens"].flatten(), ids[1])
            with pytest.raises(dmi.NotCapturedError, match="nothing is deleted"):
                reader.delete("none")
            with pytest.raises(ValueError, match="name requests"):
                reader.delete()
    stop(store)
    with dmi.open(store) as reader:  # nobody has the store open now
        assert reader.requests()[1]["rows"] == 7
        assert reader.delete(tag="none")["requests"] == 0
        assert reader.delete(before=datetime.now())["rows"] == 7
        assert [r["rows"] for r in reader.requests()] == [0, 0]
        assert reader.coverage()["expired"] == 14


def test_over_tcp(tmp_path: Path) -> None:
    import json
    import subprocess

    from dmi import engine as engines

    with dmi.attach(llama(), "tokens", store=tmp_path / "s"):
        pass
    stop(tmp_path / "s")
    command = [engines.binary(), "serve", "--store", str(tmp_path / "s"), "--http", "127.0.0.1:0"]
    daemon = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert daemon.stdout is not None
        said = json.loads(daemon.stdout.readline())
        token = (tmp_path / "s" / "token").read_text().strip()
        with dmi.open(engine=said["http"], token=token) as store:
            assert len(store.sessions()) == 1
        with pytest.raises(dmi.EngineError, match="token"):
            dmi.open(engine=said["http"], token="wrong")
        with dmi.open(engine=said["http_unix"]) as store:
            assert len(store.sessions()) == 1
        model, ids = llama(), prompts()
        with dmi.attach(model, "tokens", engine=said["control"]) as session, torch.no_grad():
            model(ids)
            assert torch.equal(session.cache()["tokens"].squeeze(-1), ids)
    finally:
        daemon.kill()
        daemon.wait()


def test_what_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(dmi.EngineError, match="no such folder"):
        dmi.open(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(dmi.EngineError, match=str(tmp_path / "empty")):
        dmi.open(tmp_path / "empty")
    with pytest.raises(ValueError, match="give a store"):
        dmi.open()
    with pytest.raises(dmi.EngineError, match="is it running"):
        dmi.open(engine=str(tmp_path / "http.sock"))
    with dmi.attach(llama(), "tokens", store=tmp_path / "s"):
        pass
    with pytest.raises(dmi.NotCapturedError, match="no requests"):
        dmi.open(tmp_path / "s").cache()


def test_the_copy_of_a_live_store_is_a_store_of_its_own(tmp_path: Path) -> None:
    """Its announcement came with it, and is about the original's engine."""
    model, original, copy = llama(), tmp_path / "original", tmp_path / "copy"
    with dmi.attach(model, "tokens", store=original) as session, torch.no_grad():
        model(prompts())
        session.flush()
        shutil.copytree(original, copy, ignore=shutil.ignore_patterns("*.sock"))
        with dmi.attach(model, "tokens", store=copy) as another:
            assert another.store == str(copy)
            model(prompts())
            another.flush()
            listed = subprocess.run([engine.binary(), "--json", "runs", "--store", copy], capture_output=True, check=True, timeout=600)
            assert len(json.loads(listed.stdout)) == 2
        listed = subprocess.run([engine.binary(), "--json", "runs", "--store", original], capture_output=True, check=True, timeout=600)
        assert len(json.loads(listed.stdout)) == 1
    stop(original)
    stop(copy)


NOBODY = 65534


@contextlib.contextmanager
def bound_by_permissions() -> Iterator[None]:
    """As another user where this is root, whom permissions do not bind."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    except OSError as error:
        os.setegid(0)
        pytest.skip(f"root here may not become another user, and permissions do not bind root: {error}")
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def test_a_store_that_may_not_be_read() -> None:
    model = llama()
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        store, hidden = Path(folder) / "s", Path(folder) / "closed" / "s"
        with dmi.attach(model, "tokens", store=store) as session, torch.no_grad():
            model(prompts())
            requests = list(session.requests)
        stop(store)
        hidden.parent.mkdir()
        shutil.copytree(store, hidden)
        with dmi.open(store) as opened:
            assert opened.cache().requests == requests
        if os.geteuid() == 0:
            for path in (Path(folder), *Path(folder).rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        with bound_by_permissions():
            try:
                subprocess.run([engine.binary(), "version"], check=True, capture_output=True)
            except PermissionError as error:
                pytest.skip(f"permissions do not bind root, and another user may not run the engine of this checkout: {error}")
            with dmi.open(store) as opened:
                assert opened.cache().requests == requests
            hidden.parent.chmod(0)
            store.chmod(0)
            for path in (store, hidden):
                with pytest.raises(dmi.EngineError, match=f"(?s)open.*{path}.*ermission denied.*run as the user who owns it") as refused:
                    dmi.open(path)
                assert refused.value.code == "store"
                with pytest.raises(dmi.EngineError, match=f"{path}.*ermission denied.*(is the folder yours|give another folder)"):
                    dmi.attach(model, "tokens", store=path)
            hidden.parent.chmod(0o700)
            store.chmod(0o700)
        with dmi.open(store) as opened:
            assert opened.cache().requests == requests
