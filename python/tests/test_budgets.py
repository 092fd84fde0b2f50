"""Budgets of a policy that no rule can hold: memory of rings, which is fixed when a producer attaches, and what the store keeps."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import dmi
from sessions import alive, balanced, engine_pid, llama, prompts, until

HOOK = "blocks.*.hook_resid_post"
MIB = 1 << 20


def test_rings_are_fitted_to_what_a_budget_leaves_or_refused(tmp_path: Path) -> None:
    store = tmp_path / "s"
    first = dmi.attach(llama(), HOOK, store=store, ring_mib=2, staging_mib=2)
    assert first.memory_mib == {"ring": 2, "staging": 2}
    status = first.policy.set("budgets: {device_bytes: 5 MiB, pinned_bytes: 300 MiB}\n")
    assert status["revision"]["document"] == status["revision"]["revision"]
    model = llama()
    with pytest.raises(dmi.EngineError, match=r"budget device_bytes is 5242880, of which sessions that are attached have 2097152, and the ring of this one \(payload\) has 4194304") as refused:
        dmi.attach(model, HOOK, store=store, ring_mib=4)
    assert refused.value.code == "memory"
    with pytest.raises(dmi.EngineError, match="pinned_bytes is 314572800"):
        dmi.attach(model, HOOK, store=store, ring_mib=1, staging_mib=256)
    before = model(prompts(1, 4)).logits
    with dmi.attach(model, HOOK, store=store) as fitted, torch.no_grad():
        # of 5 MiB the first has 2; of 300 MiB what the first shares, and what both need besides staging
        assert fitted.memory_mib["ring"] == 3
        shared = sum(dmi_shared(s, staging) for s, staging in ((first, 2.0), (fitted, fitted.memory_mib["staging"])))
        assert 300 * MIB - 4096 < shared <= 300 * MIB
        assert model(prompts(1, 4)).logits.shape == before.shape
        model(prompts(1, 4))
        assert fitted.cache()["resid_post", 0].shape[-1] == model.config.hidden_size
        with pytest.raises(dmi.EngineError, match="the policy's budget device_bytes leaves 0 bytes"):
            dmi.attach(llama(), HOOK, store=store)
        # A smaller budget takes nothing away from who is attached, not even when the engine comes back.
        fitted.policy.set("budgets: {device_bytes: 1 MiB}\n")
        pid = engine_pid(store)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid) and fitted.status()["reconnections"] == 1 and fitted.status()["connected"])
        until(lambda: first.status()["reconnections"] == 1 and first.status()["connected"])
        model(prompts(1, 3))
        fitted.flush()
        assert fitted.coverage()["complete"]
        with pytest.raises(dmi.EngineError, match="leaves 0 bytes"):
            dmi.attach(llama(), HOOK, store=store)
    first.policy.set("default: full")
    with dmi.attach(llama(), HOOK, store=store) as free:
        assert free.memory_mib == {"ring": 256, "staging": 256}
    first.detach()


def dmi_shared(session: dmi.Session, staging_mib: float) -> int:
    """What a session's ring shares, as the kernel counts it."""
    assert session._ring is not None
    size = os.fstat(session._ring.fds[0]).st_size
    assert size > staging_mib * MIB
    return size


def kept_in(store: Path) -> int:
    """Bytes of a store's segments; of those that go meanwhile, 0."""
    total = 0
    for path in (store / "segments").glob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_a_policy_bounds_what_the_store_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMI_STORE_SEGMENT_TENSORS", "20")
    monkeypatch.setenv("DMI_STORE_FLUSH_AGE_MS", "10")
    monkeypatch.setenv("DMI_STORE_TIDY_EVERY_S", "0.1")
    model = llama()
    with dmi.attach(model, HOOK, store=tmp_path / "s") as session, torch.no_grad():
        for _ in range(40):
            model(prompts(2, 30), use_cache=False)
        session.flush()
        kept = kept_in(tmp_path / "s")
        assert session.coverage()["expired"] == 0
        bound = kept // 3
        session.policy.set(f"budgets: {{retain_bytes: {bound}}}\n")
        until(lambda: session.coverage()["expired"] > 0 and kept_in(tmp_path / "s") <= bound)
        books = session.coverage()
        assert 0 < books["expired"] < books["rows"] == 40 * 2 * 30 * len(session.sites)
        with pytest.raises(dmi.IncompleteError, match="expired"):
            session.cache(request=session.requests[0])["resid_post", 0]
        assert session.cache(request=session.requests[-1])["resid_post", 0].shape[0] == 30
        until(lambda: f"the store keeps {bound} bytes" in (tmp_path / "s" / "engine.log").read_text())


def test_a_policy_bounds_how_long_rows_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMI_STORE_SEGMENT_AGE_S", "1")
    monkeypatch.setenv("DMI_STORE_FLUSH_AGE_MS", "10")
    monkeypatch.setenv("DMI_STORE_TIDY_EVERY_S", "0.1")
    model = llama()
    with dmi.attach(model, HOOK, store=tmp_path / "s") as session, torch.no_grad():
        model(prompts(2, 30), use_cache=False)
        session.flush()
        rows = 2 * 30 * len(session.sites)
        time.sleep(2.5)  # nothing goes by itself
        assert session.coverage()["expired"] == 0
        session.policy.set("budgets: {retain_age: 1s}\n")
        until(lambda: session.coverage()["expired"] == rows)
        with pytest.raises(dmi.IncompleteError, match="expired"):
            session.cache(request=session.requests[0])["resid_post", 0]
        until(lambda: "the store keeps" in (tmp_path / "s" / "engine.log").read_text())
        session.policy.set("budgets: {retain_age: 720h}\n")
        model(prompts(2, 30), use_cache=False)
        session.flush()
        time.sleep(2.5)
        assert session.cache(request=session.requests[-1])["resid_post", 0].shape[0] == 30
        books = session.coverage()
        assert (books["expired"], books["rows"]) == (rows, 2 * rows) and balanced(books)


def test_a_budget_that_complete_mode_exceeds_is_said_to_be_unheld(tmp_path: Path) -> None:
    with dmi.attach(llama(), HOOK, store=tmp_path / "s", mode="best-effort") as lowered:
        status = lowered.policy.set("budgets: {copied_bytes_per_s: 1 MB, disk_free_bytes: 1 MB, device_bytes: 1 GiB}\n")
        assert status["unheld"] == []
        with dmi.attach(llama(), HOOK, store=tmp_path / "s") as waiting:
            unheld = lowered.policy.get()["unheld"]
            assert [text.split()[0] for text in unheld] == ["copied_bytes_per_s", "disk_free_bytes"]
            assert all(f"not held for {waiting.id}: in complete mode" in text for text in unheld)
        assert lowered.policy.get()["unheld"] == []
