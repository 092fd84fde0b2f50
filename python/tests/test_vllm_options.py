"""What requests say of their captures, what workers say of themselves, and what responses carry: the parts that need no vLLM."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dmi.options import Options, options_of
from dmi.requests import ID_BYTES, UNCONFIRMED, Requests, new_run
from dmi.vllm import reference, status
from dmi.vllm.batches import LABEL, Batches, name_of
from dmi.vllm.memory import Memory


def parameters(**extra: Any) -> Any:
    return SimpleNamespace(extra_args=extra or None)


@pytest.mark.parametrize(
    ("extra", "labels", "tags"),
    [
        ({}, {}, []),
        ({"other": {"dmi": 1}}, {}, []),
        ({"dmi_capture": "off"}, {"dmi.capture": "off"}, []),
        ({"dmi_capture": "on"}, {}, []),
        ({"dmi_sites": "blocks.*.hook_resid_post, logits"}, {"dmi.sites": "blocks.*.hook_resid_post logits"}, []),
        ({"dmi_sites": ["logits"], "dmi_positions": ["prompt[-1]", "generated[:4]"]}, {"dmi.sites": "logits", "dmi.positions": "prompt[-1] generated[:4]"}, []),
        ({"dmi_tags": "trial eu", "kv_transfer_params": {}}, {}, ["trial", "eu"]),
    ],
)
def test_options(extra: dict[str, Any], labels: dict[str, str], tags: list[str]) -> None:
    assert options_of(parameters(**extra).extra_args) == Options(labels, tags)
    assert options_of(None) == Options()


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"dmi_site": "logits"}, "'dmi_site' is no option; there are dmi_capture, dmi_sites"),
        ({"dmi_capture": "none"}, "give 'off'"),
        ({"dmi_sites": ""}, "1 to 4096 bytes"),
        ({"dmi_sites": 5}, "a text or a list of texts"),
        ({"dmi_positions": [3]}, "a text or a list of texts"),
        ({"dmi_sites": "x" * 5000}, "1 to 4096 bytes"),
        ({"dmi_tags": ["t"] * 65}, "at most 64"),
        ({"dmi_tags": ["t" * 5000]}, "4096 bytes each"),
    ],
)
def test_options_that_cannot_be_meant_capture_nothing(extra: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture) -> None:
    """And never fail a request, nor end the session, whose bounds they keep to."""
    requests = Requests(new_run(None, ()))
    told: list[Any] = []
    requests.send = lambda *messages: told.extend(messages)
    with caplog.at_level(logging.WARNING, "vllm.dmi"):
        Batches(requests).begin([SimpleNamespace(req_id="chat-01234567", prompt_token_ids=[1, 2], sampling_params=parameters(dmi_reference=1, **extra))])
    assert why in caplog.text
    labels = told[0]["requests"][0]["labels"]
    assert labels["dmi.capture"] == "off" and why in labels["dmi.error"] and set(labels) == {"dmi.capture", "dmi.error", LABEL}


def test_names() -> None:
    assert name_of("chatcmpl-77-0a1b2c3d") == "chatcmpl-77"
    assert name_of("cmpl-77-0-0a1b2c3d") == "cmpl-77"
    assert name_of("cmpl-77-1-0a1b2c3d") == "cmpl-77-1"
    assert name_of("request-0") == "request-0" and name_of("x") == "x"


def test_what_the_engine_is_told_goes_out_together() -> None:
    """In the order in which it came, and before whatever says that all so far is to be durable."""
    requests = Requests(new_run(None, ()))
    sent: list[list[str]] = []
    requests.send = lambda *messages: sent.append([message["type"] for message in messages])
    requests.crowded = lambda: sent.append(["crowded"])
    requests.hold()
    first, second = requests.begin(2, names=["a", "b"], labels=[{"x": "1"}, {}], tags=[["t"], []])
    requests.end(first)
    assert sent == []
    requests.release()
    requests.end(second)
    assert sent == [["requests", "request_end"], ["request_end"]]
    requests.hold()
    for number in requests.begin(UNCONFIRMED):
        requests.end(number)
    told, crowded, rest = sent[2], sent[3], sent[4:]
    assert told == ["requests"] + ["request_end"] * (UNCONFIRMED - 2) and crowded == ["crowded"] and rest == [["request_end"]] * 2


@pytest.mark.parametrize("name", ["", "x" * (ID_BYTES + 1), "a\nb", "a\x7f", "\udc80", "\ufffd"])
def test_a_clients_id_that_the_engine_refuses_is_replaced(name: str) -> None:
    """It would end the session otherwise, and with it everybody's captures."""
    run = new_run(None, ())
    requests = Requests(run)
    requests.begin(2, names=[name, "good"])
    assert list(requests) == [f"{run.id}.0", "good"]


def test_workers_tell_of_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(status.FOLDER, str(tmp_path))
    assert status.told() == {}
    status.tell(0, {"observed": True, "session": "s1", "store": "/captures", "sites": 3})
    status.tell(1, {"observed": False, "reason": "why not"})
    status.tell(0, {"observed": False, "reason": "why"})
    assert status.told()[0] == {"observed": False, "reason": "why"} and set(status.told()) == {0, 1}
    (tmp_path / "2.json").write_text("{")
    assert set(status.told()) == {0, 1}
    monkeypatch.setenv(status.FOLDER, str(tmp_path / "gone"))
    status.tell(0, {})
    monkeypatch.delenv(status.FOLDER)
    status.tell(0, {})


def test_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(status.FOLDER, str(tmp_path))

    def of(**extra: Any) -> Any:
        return reference.reference(SimpleNamespace(request_id="chatcmpl-9-0a1b2c3d", sampling_params=parameters(**extra)))

    assert of() is None and of(dmi_sites="logits") is None
    assert of(dmi_reference=1) == {"observed": False, "reason": "DMI was not asked to observe"}
    status.tell(0, {"observed": False, "reason": "why"})
    assert of(dmi_reference=1) == {"observed": False, "reason": "why"}
    status.tell(0, {"observed": True, "session": "s1", "store": "/captures"})
    assert of(dmi_reference=1) == {"observed": True, "request": "chatcmpl-9", "session": "s1", "store": "/captures", LABEL: "chatcmpl-9-0a1b2c3d"}
    assert not of(dmi_reference=1, dmi_capture="off")["observed"]
    assert "no option" in of(dmi_reference=1, dmi_what=1)["reason"]


@pytest.mark.parametrize(("device", "fixed", "left", "cost"), [("cuda", None, 1000, 256), ("cpu", None, 488, 512), ("cpu", 1 << 30, 1000, 0)])
def test_memory_in_blocks(device: str, fixed: int | None, left: int, cost: int) -> None:
    """Blocks of 1 MiB, of 1,000 MiB; on a GPU vLLM has seen ours, on the CPU it has not."""
    known: list[int] = []
    cache = SimpleNamespace(kv_cache_memory_bytes=fixed, num_gpu_blocks_override=None)
    runner = SimpleNamespace(initialize_kv_cache=lambda config: "made")
    worker = SimpleNamespace(device=SimpleNamespace(type=device), vllm_config=SimpleNamespace(cache_config=cache), model_runner=runner,
                             determine_available_memory=lambda: 1000 << 20, dmi_status=lambda: {"observed": True})  # fmt: skip
    memory = Memory(worker)
    memory.holds({"ring": 256.0, "staging": 256.0})
    memory.watch(lambda: known.append(1))
    available = worker.determine_available_memory()
    assert available == left << 20 and "kv_blocks" not in memory.status()
    assert runner.initialize_kv_cache(SimpleNamespace(num_blocks=available >> 20)) == "made" and known == [1]
    assert memory.status() == {"device_bytes": (256 if device == "cuda" else 512) << 20, "kv_blocks": left, "kv_blocks_cost": cost}
