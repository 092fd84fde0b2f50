"""Sessions against the real engine: what is read back equals what plain hooks saw, and the model is left as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import dmi
from dmi import engine as engines
from dmi import requests as ledger
from observed import fresh_seed, model_of
from sessions import alive, balanced, engine_pid, footprint, llama, plainly, prompts, rows_of, until

RESIDUAL = "blocks.*.hook_resid_post"
pytestmark = pytest.mark.newest


def test_generate_and_read(tmp_path: Path) -> None:
    model, ids = llama(), prompts()
    before = footprint(model)
    with plainly(model.model.layers[1]) as seen, dmi.attach(model, [RESIDUAL, "blocks.*.attn.hook_pattern"], store=tmp_path / "s") as session:
        with session.record(labels={"topic": "capitals"}, tags=["demo"]) as run:
            output = model.generate(ids, max_new_tokens=5, do_sample=False)
        session.flush()
        cache = session.cache()
        want = torch.cat(seen, dim=1)
        assert torch.equal(cache["blocks.1.hook_resid_post"], want)
        assert torch.equal(cache["resid_post", 1], want)
        assert torch.equal(run.cache["resid_post", 1], want)
        for row, request in enumerate(session.requests):
            assert torch.equal(session.cache(request=request)["resid_post", 1], want[row])
        pattern = cache["blocks.0.attn.hook_pattern"]
        assert pattern.shape == (2, 4, 11, 11)
        assert torch.allclose(pattern.sum(-1), torch.ones(2, 4, 11), atol=1e-5)
        assert torch.equal(cache.tokens, output)
        assert torch.equal(cache.positions, torch.arange(11).expand(2, -1))
        assert list(session.requests) == run.requests == [f"{run.id}.0", f"{run.id}.1"]
    assert footprint(model) == before
    assert torch.equal(session.cache()["resid_post", 1], want), "a cache works after its session ended"
    books = dmi.open(tmp_path / "s").coverage(session=session.id)
    assert balanced(books)
    assert rows_of(books, "captured") == books["rows"] == 2 * 11 * 4


def test_as_users_type_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From attaching to the last answer, in a folder of one's own, of prompts that a tokenizer padded."""
    monkeypatch.chdir(tmp_path)
    model = llama(num_hidden_layers=6)
    inputs = {"input_ids": prompts(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    with plainly(model.model.layers[5]) as seen, dmi.attach(model, hooks=["blocks.*.hook_resid_post", "**.hook_pattern", "logits"], store="captures/", mode="complete") as session:
        with session.record(labels={"topic": "capitals"}, tags=["demo"]) as run:
            output = model.generate(**inputs, max_new_tokens=4)
        session.flush()
        want = torch.cat(seen, dim=1)
        for cache in (session.cache(), run.cache, dmi.open("captures/").cache(run=run.id)):
            resid = cache["blocks.5.hook_resid_post"]
            assert resid.device.type == "cpu" and resid.dtype == torch.float32
            assert torch.equal(resid, want) and torch.equal(cache["resid_post", 5], want)
            pattern = cache.get("blocks.5.attn.hook_pattern", heads=[0, 3], tokens=slice(4, 9), steps=None, device=None, dtype=None)
            assert torch.equal(pattern, cache["blocks.5.attn.hook_pattern"][:, [0, 3], 4:9, :9])
            assert torch.equal(torch.cat(list(cache.iter("blocks.5.hook_resid_post", rows=65536))), want.flatten(0, 1))
            assert cache.coverage("blocks.5.hook_resid_post")["outcomes"] == {"captured": {"full": 2 * 10}}
            assert torch.equal(cache["logits"].argmax(-1), output[:, 7:])
        request = session.requests[1]
        assert torch.equal(dmi.open("captures/").cache(request=request)["resid_post", 5], want[1])
    out, cache = dmi.run_with_cache(model, **inputs, names_filter="blocks.*.attn.hook_pattern")
    assert cache.keys() == [f"blocks.{n}.attn.hook_pattern" for n in range(6)]
    assert out.logits.shape == (2, 7, 128) and cache["blocks.5.attn.hook_pattern"].shape == (2, 4, 7, 7)


def test_forwards_of_one_conversation(tmp_path: Path) -> None:
    model = llama()
    with plainly(model.model.layers[0]) as seen, dmi.attach(model, "blocks.0.hook_resid_post", store=tmp_path / "s") as session, torch.no_grad():
        out = model(prompts(1, 4), use_cache=True)
        model(prompts(1, 1), past_key_values=out.past_key_values)
        assert torch.equal(session.cache()["resid_post", 0], torch.cat(seen, dim=1))
        assert session.cache().tokens.shape == (1, 5)
        model(prompts(1, 3), use_cache=False)
        assert len(session.requests) == 2
        assert torch.equal(session.cache(request=session.requests[-1])["resid_post", 0], seen[-1][0])


def test_exception_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = llama()
    before = footprint(model)
    with pytest.raises(ZeroDivisionError), dmi.attach(model, RESIDUAL, store=tmp_path / "s") as session:
        with torch.no_grad():
            model(prompts(), use_cache=False)
        assert footprint(model) != before
        raise ZeroDivisionError
    assert footprint(model) == before
    assert session.cache()["resid_post", 1].shape == (2, 7, 64)
    session.detach()  # idempotent
    with pytest.raises(RuntimeError, match="detached"):
        session.step(rows=1)


def test_failed_attach_leaves_nothing(tmp_path: Path) -> None:
    model = llama()
    before = footprint(model)
    with pytest.raises(dmi.HookError, match="hook_resid_pots.*close: .*hook_resid_post"):
        dmi.attach(model, ["blocks.0.hook_resid_pots"], store=tmp_path / "s")
    with pytest.raises(dmi.HookError, match="no hooks"):
        dmi.attach(model, [], store=tmp_path / "s")
    with pytest.raises(dmi.HookError, match="over the budget"):
        dmi.attach(model, [RESIDUAL], store=tmp_path / "s", budget_gib=1e-6)
    assert not (tmp_path / "s").exists(), "an engine was started for nothing"
    assert footprint(model) == before


def test_what_a_pattern_matches_and_the_model_lacks_is_told(tmp_path: Path) -> None:
    """In session.skipped, as a warning, and as an event to whoever watches the engine."""
    fresh_seed()
    model = model_of("gpt_neox", "sdpa")
    lacking = {f"blocks.{n}.{name}" for n in range(2) for name in ("hook_resid_mid", "attn.hook_attn_scores", "attn.hook_pattern")}
    with pytest.warns(dmi.CaptureWarning, match="cannot give"), dmi.attach(model, ["blocks.*.hook_resid_*", "blocks.*.attn.*"], store=tmp_path / "s") as session:
        assert not set(session.sites) & lacking
        assert {line.split(":")[0] for line in session.skipped} == lacking
        watch = [engines.binary(), "tail", "--events", "--count", "2", "--json", "--store", tmp_path / "s"]
        told = subprocess.run(watch, capture_output=True, check=True, text=True, timeout=600).stdout.splitlines()
        event = next(event for event in map(json.loads, told) if event["code"] == "lacking")
        assert event["session"] == session.id
        assert "match 6 sites" in event["message"] and session.skipped[0] in event["message"]


def test_sessions_share_an_engine(tmp_path: Path) -> None:
    one, two = llama(), llama()
    store = tmp_path / "s"
    with dmi.attach(one, RESIDUAL, store=store) as a, dmi.attach(two, "tokens", store=store) as b:
        assert a.status()["engine"] == b.status()["engine"]
        ids = prompts()
        with torch.no_grad():
            one(ids)
            two(ids + 0)
        assert torch.equal(b.cache()["tokens"].squeeze(-1), ids)
        assert a.cache()["resid_post", 0].shape == (2, 7, 64)
        with pytest.raises(dmi.NotCapturedError, match="none of that id"):
            a.cache(request=b.requests[0])


CHILD = """
import sys, torch, dmi
sys.path.insert(0, {tests!r})
from sessions import llama, prompts
model = llama()
with dmi.attach(model, "blocks.*.hook_resid_post", store={store!r}) as session:
    with session.record(tags=["child"]), torch.no_grad():
        model(prompts(3, 5))
    print("engine", session.status()["engine"])
"""


def test_processes_share_an_engine(tmp_path: Path) -> None:
    store = tmp_path / "s"
    script = CHILD.format(tests=os.path.dirname(__file__), store=str(store))
    children = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [child.communicate(timeout=600) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    said = {line for out, _ in outputs for line in out.splitlines() if line.startswith("engine")}
    reader = dmi.open(store)
    runs = reader.runs(tag="child")
    assert len(runs) == 2
    assert all(run["requests"] == 3 for run in runs)
    assert len({run["session"] for run in runs}) == 2
    # Where one ended before the other began, the engine may have gone in between; it does not within its grace of 2 s.
    assert len(said) == 1 or abs(runs[0]["ended_unix_ns"] - runs[1]["begun_unix_ns"]) > 1e9


def test_runs_find_their_requests(tmp_path: Path) -> None:
    model = llama()
    with dmi.attach(model, "tokens", store=tmp_path / "s", labels={"own": "yes"}) as session, torch.no_grad():
        model(prompts(1))
        with session.record(labels={"n": "1"}, tags=["a"]) as first:
            model(prompts(2))
            with session.record(labels={"n": "2"}, tags=["a", "b"]) as second:
                thread = threading.Thread(target=lambda: model(prompts(1)))  # has no run of its own: the innermost
                thread.start()
                thread.join()
            model(prompts(1))
        model(prompts(1))
        session.flush()
        store = dmi.open(tmp_path / "s")
        assert {run["id"]: run["requests"] for run in store.runs()} == {session.requests[0].split(".")[0]: 2, first.id: 3, second.id: 1}
        assert [run["id"] for run in store.runs(tag="a")] == [first.id, second.id]
        assert [run["id"] for run in store.runs(labels={"n": "2"})] == [second.id]
        assert [run["labels"] for run in store.runs(labels={"own": "yes"})] == [{"own": "yes"}]
        assert [info["id"] for info in store.requests(run=first.id)] == first.requests == [f"{first.id}.{i}" for i in range(3)]
        assert first.cache.requests == [f"{first.id}.2"], "the last forward's"
        assert store.cache(run=first.id).requests == [f"{first.id}.2"]
        assert len(session.requests) == 6
    with pytest.raises(TypeError, match="tags="), session.record(tags="x"):
        pass


def test_what_is_kept_of_text(tmp_path: Path) -> None:
    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return " ".join(f"<{i}>" for i in ids)

    ids = prompts(1, 3)
    for text in ("none", "ids", "text"):
        model = llama()
        with dmi.attach(model, "tokens", store=tmp_path / "s", text=text, tokenizer=Tokenizer()) as session:
            output = model.generate(ids, max_new_tokens=2, do_sample=False)[0].tolist()
        cache = session.cache(request=session.requests[0])
        if text == "none":
            with pytest.raises(dmi.NotCapturedError, match="not kept"):
                cache.tokens  # noqa: B018
        else:
            assert cache.tokens.tolist() == output
        if text == "text":
            assert cache.text == Tokenizer().decode(output)
            assert cache._described()[0]["pieces"] == [Tokenizer().decode([token]) for token in output]  # what the page writes
        else:
            with pytest.raises(dmi.NotCapturedError, match="not kept"):
                cache.text  # noqa: B018
            assert "pieces" not in cache._described()[0]
    with pytest.raises(ValueError, match="needs tokenizer"):
        dmi.attach(llama(), "tokens", store=tmp_path / "s", text="text")


def test_steps_by_hand(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)
            self.point = dmi.HookPoint("here", rows=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.point(self.linear(x)).relu()

    model = Model()
    with dmi.attach(model, "here", store=tmp_path / "s") as session, torch.no_grad():
        x = torch.randn(5, 8)
        with session.step(rows=[2, 3]) as numbers:
            model(x)
        with session.step(rows=[1, 1], requests=numbers):
            model(x[:2])
        one = [1, 1]
        with session.step(rows=one, requests=numbers):  # the next, a token later, is told as such: of an equal list
            model(x[1:3])
        one[1] = 2  # of the same list that is another
        with session.step(rows=one, requests=numbers):
            model(x[:3])
        with session.step(rows=(1, 1), requests=numbers):
            model(x[3:])
        want = model.linear(x)
        token = model.linear(x[:2])
        for number, parts in enumerate(([want[:2], token[:1], model.linear(x[1:3])[:1], model.linear(x[:3])[:1], model.linear(x[3:])[:1]],
                                        [want[2:], token[1:], model.linear(x[1:3])[1:], model.linear(x[:3])[1:], model.linear(x[3:])[1:]])):  # fmt: skip
            assert torch.equal(session.cache(request=session.requests[number])["here"], torch.cat(parts))


def test_a_step_by_hand_is_told_how_many_keys_a_cache_holds(tmp_path: Path) -> None:
    """As around a replayed graph: the cache's width is fixed, and what of it is in use nobody but the caller knows."""
    from transformers import StaticCache

    model = llama()
    ids = prompts(2, 6)
    cache = StaticCache(config=model.config, max_cache_len=16)
    want = []
    with dmi.attach(model, "blocks.1.attn.hook_pattern", store=tmp_path / "s") as session, torch.no_grad():
        numbers = None
        for first, count in ((0, 4), (4, 1), (5, 1)):
            with session.step(rows=torch.ones(2, count, dtype=torch.long), requests=numbers, keys=first + count) as numbers:
                out = model(ids[:, first : first + count], past_key_values=cache, output_attentions=True)
            assert out.attentions[1].shape[-1] == 16
            want.append(out.attentions[1][..., : first + count])
        for row, request in enumerate(session.requests):
            pattern = session.cache(request=request)["attn.hook_pattern", 1]
            assert pattern.shape[1:] == (6, 6)
            for step, rows in zip(want, (slice(0, 4), slice(4, 5), slice(5, 6)), strict=True):
                assert torch.equal(pattern[:, rows, : step.shape[-1]], step[row])


def test_complete_raises_for_what_did_not_come_by(tmp_path: Path) -> None:
    """A site that a model has, and that its forward passes by."""
    model = llama()
    model.model.layers[1].forward = lambda hidden, *args, **kwargs: hidden
    with dmi.attach(model, "blocks.*.mlp.hook_post", store=tmp_path / "s") as session, torch.no_grad():
        with pytest.warns(dmi.CaptureWarning, match="blocks.1.mlp.hook_post"):
            model(prompts(), use_cache=False)
            session.flush()
        assert session.cache()["mlp.hook_post", 0].shape == (2, 7, 96)
        with pytest.raises(dmi.IncompleteError):
            session.cache()["mlp.hook_post", 1]
        with pytest.raises(dmi.CaptureError, match=r"14 lost\(not_fired\)"):
            session.detach()


def test_a_site_that_fires_again_in_a_step_says_so(tmp_path: Path) -> None:
    """A module that is called in a loop: the first call's rows are kept whole, and what is not kept is told."""

    class Loop(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = self.layer(x)
            return x

    model, x = Loop(), torch.randn(2, 5, 4)
    want = model.layer(x)
    with dmi.attach(model, "layer", store=tmp_path / "s") as session, torch.no_grad():
        with pytest.warns(dmi.CaptureWarning, match='site "layer" fired more than once in step') as told:
            model(x)
            model(x)
            session.flush()
            until(lambda: len(told) > 0)
        assert len([w for w in told if "fired more than once" in str(w.message)]) == 1
        assert torch.equal(session.cache()["layer"], want)
        books = session.cache().coverage("layer")
        assert books["rows"] == rows_of(books, "captured") == books["repeated"] == 10
        assert {r["reason"] for r in books["ranges"]} == {"repeated"} and books["complete"]
        assert session.coverage()["repeated"] == 20


def test_forgets_what_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "UNCONFIRMED", 8)
    model = llama()
    with dmi.attach(model, "tokens", store=tmp_path / "s") as session, torch.no_grad():
        wanted = []
        for _ in range(40):
            ids = prompts(1, 3)
            model(ids, use_cache=False)
            wanted.append(ids[0])
        until(lambda: len(session.requests._requests) < 24)
        session.flush()
        for request, ids in zip(session.requests, wanted, strict=True):
            assert torch.equal(session.cache(request=request)["tokens"].flatten(), ids)


def test_disabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMI_DISABLE", "1")
    model = llama()
    before = footprint(model)
    with pytest.warns(dmi.CaptureWarning, match="DMI_DISABLE"):
        session = dmi.attach(model, RESIDUAL, store=tmp_path / "s")
    with session, session.record() as run, session.step(rows=1):
        assert footprint(model) == before
        session.flush()
    with pytest.raises(dmi.NotCapturedError, match="DMI_DISABLE"):
        session.cache()
    with pytest.raises(dmi.NotCapturedError):
        run.cache  # noqa: B018
    with pytest.raises(dmi.NotCapturedError, match="policy: DMI_DISABLE"):
        session.policy.off()
    assert not (tmp_path / "s").exists()


def test_forked_child_captures_nothing(tmp_path: Path) -> None:
    script = f"""
import os, sys, torch, dmi
sys.path.insert(0, {os.path.dirname(__file__)!r})
from sessions import llama, prompts
model, ids = llama(), prompts()
with dmi.attach(model, "tokens", store={str(tmp_path / "s")!r}) as session, torch.no_grad():
    model(ids)
    child = os.fork()
    if child == 0:
        model(ids)
        session.detach()
        assert "generate" not in model.__dict__
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    model(ids)
    session.flush()
    assert len(session.requests) == 4, session.requests
    assert session.coverage()["rows"] == 28, session.coverage()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_a_process_that_ends_without_detaching(tmp_path: Path) -> None:
    script = f"""
import sys, torch, dmi
sys.path.insert(0, {os.path.dirname(__file__)!r})
from sessions import llama, prompts
model = llama()
session = dmi.attach(model, "tokens", store={str(tmp_path / "s")!r})
model(prompts(2, 5))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    store = dmi.open(tmp_path / "s")
    assert store.cache()["tokens"].shape[:2] == (2, 5)
    assert all(session["state"] == "ended" for session in store.sessions())


def test_run_with_cache() -> None:
    model, ids = llama(), prompts()
    before = footprint(model)
    with torch.no_grad(), plainly(model.model.layers[0]) as seen:
        out, cache = dmi.run_with_cache(model, ids, names_filter=["blocks.*.hook_resid_post", "logits"])
        assert torch.equal(cache["resid_post", 0], seen[0])
        assert torch.equal(cache["logits"], out.logits)
        _, chosen = dmi.run_with_cache(model, input_ids=ids, names_filter=lambda name: name.endswith("hook_z"))
        assert chosen.keys() == ["blocks.0.attn.hook_z", "blocks.1.attn.hook_z"]
        _, everything = dmi.run_with_cache(model, ids)
        assert len(everything) > 30
        for name, tensor in everything.items():
            assert len(tensor) == 2, name
    assert footprint(model) == before
    folder, child = cache._keep.folder, cache._keep.engine.child
    assert os.path.isdir(folder)
    cache.close()
    assert not os.path.exists(folder)
    assert not alive(child.pid)
    folder = chosen._keep.folder
    del chosen
    assert not os.path.exists(folder), "a store outlived its cache"
    with pytest.raises(dmi.HookError, match="selects none"):
        dmi.run_with_cache(model, ids, names_filter=lambda name: False)


def test_engine_by_socket(tmp_path: Path) -> None:
    with dmi.attach(llama(), "tokens", store=tmp_path / "s") as first:
        path = first._link.welcome["store"] + "/engine.sock"  # type: ignore[union-attr]
        model, ids = llama(), prompts()
        with dmi.attach(model, "tokens", engine=path, mode="best-effort") as second, torch.no_grad():
            model(ids)
            assert torch.equal(second.cache()["tokens"].squeeze(-1), ids)
        assert second.store == str(tmp_path / "s")
        assert alive(engine_pid(tmp_path / "s"))
    with pytest.raises(dmi.EngineError, match="is it running"):
        dmi.attach(llama(), "tokens", engine=str(tmp_path / "nobody.sock"))
    with pytest.raises(dmi.EngineError, match=r"its path has \d+ bytes, and that of a Unix socket may have 107"):
        dmi.attach(llama(), "tokens", engine=str(tmp_path / ("x" * 120) / "engine.sock"))


def test_bad_arguments(tmp_path: Path) -> None:
    model = llama()
    for arguments, message in (
        ({}, "say where captures go"),
        ({"store": "a", "engine": "b"}, "exclude each other"),
        ({"engine": "http://localhost:1"}, "control socket"),
        ({"store": "a", "mode": "fast"}, "mode='fast'"),
        ({"store": "a", "text": "all"}, "text='all'"),
    ):
        with pytest.raises(ValueError, match=message):
            dmi.attach(model, "tokens", **arguments)  # type: ignore[arg-type]
    with pytest.raises(dmi.HookError, match="is on meta"):
        dmi.attach(model.to("meta"), "tokens", store=tmp_path / "s")


def test_the_engine_is_nobodys_child(tmp_path: Path) -> None:
    """Servers that end kill what descends from their processes; an engine among that would lose what it has not written."""
    with dmi.attach(llama(), RESIDUAL, store=tmp_path / "s"):
        pid = engine_pid(tmp_path / "s")
        ancestors = []
        while pid > 1:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            ancestors.append(pid)
    assert os.getpid() not in ancestors
