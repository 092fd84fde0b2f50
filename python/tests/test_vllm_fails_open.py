"""Whatever goes wrong with DMI, a vLLM worker does its work; one line of the log, `dmi_status` and the metrics say that nothing is captured, and why."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dmi.vllm import plugin, status
from dmi.vllm.plugin import Plugin, unsupported

SCHEDULED = SimpleNamespace(finished_req_ids=[], num_scheduled_tokens={}, scheduled_spec_decode_tokens={})
ASKED = {"dmi": {"hooks": ["blocks.*.hook_resid_post"], "store": "captures"}}


class Runner:
    """As much of vLLM's model runner as the plugin looks at."""

    def __init__(self, config: Any) -> None:
        self.vllm_config = config
        self.input_batch = SimpleNamespace(req_ids=[], num_computed_tokens_cpu=[])
        self.done: list[str] = []

    def load_model(self) -> None:
        self.done.append("load")

    def execute_model(self, scheduled: Any) -> str:
        self._model_forward()
        return "executed"

    def _model_forward(self) -> None:
        self.done.append("forward")

    def sample_tokens(self, grammar: Any) -> None: ...

    def initialize_kv_cache(self, config: Any) -> None:
        self.done.append("cache")

    def get_model(self) -> Any:
        return torch.nn.Linear(2, 2)


def worker(additional: Any, **parallel: Any) -> Any:
    layout = SimpleNamespace(**{"pipeline_parallel_size": 1, "tensor_parallel_size": 1, "world_size": 1, "data_parallel_rank": 0, "rank": 0, **parallel})
    cache = SimpleNamespace(kv_cache_memory_bytes=None, num_gpu_blocks_override=None)
    config = SimpleNamespace(additional_config=additional, parallel_config=layout, speculative_config=None, cache_config=cache, model_config=None)
    runner = Runner(config)
    return SimpleNamespace(rank=layout.rank, device=torch.device("cpu"), vllm_config=config, model_runner=runner, shutdown=lambda: None,
                           determine_available_memory=lambda: 1 << 30, compile_or_warm_up_model=lambda: runner.execute_model(SCHEDULED))  # fmt: skip


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv(status.FOLDER, str(tmp_path))
    fake = SimpleNamespace(__version__="0.32.0")
    monkeypatch.setitem(__import__("sys").modules, "vllm", fake)
    return fake


def serves(it: Any) -> None:
    """As vLLM drives a worker."""
    it.model_runner.load_model()
    assert it.determine_available_memory() == 1 << 30, "nothing is taken where nothing is observed"
    it.model_runner.initialize_kv_cache(SimpleNamespace(num_blocks=7))
    assert it.compile_or_warm_up_model() == "executed"
    assert [it.model_runner.execute_model(SCHEDULED) for _ in range(2)] == ["executed"] * 2
    assert it.model_runner.done == ["load", "cache", "forward", "forward", "forward"]
    it.shutdown()


def said(it: Any, log: pytest.LogCaptureFixture, reason: str) -> None:
    lines = [record.getMessage() for record in log.records if "UNOBSERVED" in record.getMessage()]
    assert len(lines) == 1 and reason in lines[0], lines
    assert not it.dmi_status()["observed"] and reason in it.dmi_status()["reason"]
    assert it.dmi_flush() is False
    assert status.told()[0] == {"observed": False, "reason": it.dmi_status()["reason"]}


@pytest.mark.parametrize("version", ["0.23.4", "0.33.0", "1.0.0", "dev"])
def test_other_versions(version: str, vllm: Any, caplog: pytest.LogCaptureFixture) -> None:
    vllm.__version__ = version
    it = worker(ASKED)
    with caplog.at_level(logging.WARNING, "vllm.dmi"):
        Plugin.into(it, it.vllm_config)
        serves(it)
    said(it, caplog, f"vLLM {version} is none of the versions that were tried, 0.24 to 0.32")


@pytest.mark.parametrize("version", ["0.24.0", "0.24.0rc1", "0.28.1+cu130", "0.32.9"])
def test_versions(version: str, vllm: Any) -> None:
    vllm.__version__ = version
    it = worker(ASKED)
    assert unsupported(it, it.vllm_config) == ""


def test_other_ranks_are_not_what_serves_unobserved(caplog: pytest.LogCaptureFixture) -> None:
    it = worker(ASKED, tensor_parallel_size=2, rank=1)
    with caplog.at_level(logging.WARNING, "vllm.dmi"):
        Plugin.into(it, it.vllm_config)
        serves(it)
    assert caplog.text == "" and status.told() == {} and not it.dmi_status()["observed"]


SPECULATION = SimpleNamespace(enable_adaptive_verification=False)


@pytest.mark.parametrize(
    ("parallel", "config", "reason"),
    [
        ({"pipeline_parallel_size": 2}, {}, "pipeline parallelism is not supported"),
        ({"prefill_context_parallel_size": 2}, {}, "prefill context parallelism"),
        ({"enable_batch_sharded_sampling": True}, {}, "batch-sharded sampling"),
        ({"enable_dbo": True}, {}, "micro-batches"),
        ({"tensor_parallel_size": 2}, {"compilation_config": SimpleNamespace(pass_config=SimpleNamespace(enable_sp=True))}, "sequence parallelism"),
        ({}, {"model_config": SimpleNamespace(is_diffusion=True)}, "diffusion models"),
        ({}, {"speculative_config": SPECULATION, "scheduler_config": SimpleNamespace(async_scheduling=True)}, "set --no-async-scheduling"),
        ({}, {"speculative_config": SimpleNamespace(enable_adaptive_verification=True), "scheduler_config": SimpleNamespace(async_scheduling=False)}, "adaptive verification"),
        ({}, {"speculative_config": SPECULATION, "scheduler_config": SimpleNamespace(async_scheduling=False)}, ""),
        ({}, {"scheduler_config": SimpleNamespace(async_scheduling=True)}, ""),
    ],
)
def test_what_is_refused(parallel: Any, config: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """What would put rows where we do not look for them; speculation without asynchronous scheduling, and that alone, are fine."""
    it = worker(ASKED, **parallel)
    vars(it.vllm_config).update(config)
    if not reason:
        assert unsupported(it, it.vllm_config) == ""
        return
    with caplog.at_level(logging.WARNING, "vllm.dmi"):
        Plugin.into(it, it.vllm_config)
        serves(it)
    said(it, caplog, reason)


def test_data_parallel_engines_tell_of_themselves(vllm: Any) -> None:
    """Each counts its ranks from 0; those of dense models reset their rank, and keep an index."""
    vllm.__version__ = "0.1"
    for engine in ({"data_parallel_rank": 1}, {"data_parallel_rank": 0, "data_parallel_index": 2}):
        it = worker(ASKED, world_size=2, tensor_parallel_size=2, **engine)
        Plugin.into(it, it.vllm_config)
    assert set(status.told()) == {2, 4} and all(not told["observed"] for told in status.told().values())


@pytest.mark.parametrize(
    ("additional", "reason"),
    [
        ({"dmi": {"hooks": ["logits"]}}, "say where captures go"),
        ({"dmi": {"hooks": ["blocks.9.hook_resid_post"], "store": "captures"}}, "Linear"),  # when the model is loaded
    ],
)
def test_attaching_fails(additional: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    it = worker(additional)
    with caplog.at_level(logging.WARNING, "vllm.dmi"):
        Plugin.into(it, it.vllm_config)
        serves(it)
    said(it, caplog, reason)


def test_something_goes_wrong_in_a_step(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error ends the observation."""
    ended: list[str] = []
    session = SimpleNamespace(id="s1", sites=["a"], store="captures", skipped=[], memory_mib={"ring": 1.0, "staging": 1.0}, status=lambda: {}, detach=lambda: ended.append("detached"))

    class Broken:
        def scheduled(self, output: Any) -> None:
            pass

        def open(self, batch: Any) -> None:
            raise ZeroDivisionError("in our code")

        def close(self, *, aborted: bool) -> None:
            ended.append("closed")

    monkeypatch.setattr(plugin, "observe", lambda runner, settings: (session, Broken()))
    it = worker(ASKED)
    with caplog.at_level(logging.WARNING, "vllm.dmi"):
        Plugin.into(it, it.vllm_config)
        it.model_runner.load_model()
        assert it.dmi_status()["observed"] and status.told()[0]["observed"]
        scheduled = SimpleNamespace(scheduled_spec_decode_tokens={})
        assert it.model_runner.execute_model(scheduled) == it.model_runner.execute_model(scheduled) == "executed"
    assert ended == ["detached"]
    said(it, caplog, "open: ZeroDivisionError: in our code")


def test_warming_up_is_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second model runner's warm-up comes as requests do."""
    calls: list[str] = []

    class Watching:
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: calls.append(name)

    session = SimpleNamespace(id="s1", sites=["a"], store="captures", skipped=[], memory_mib={"ring": 1.0, "staging": 1.0}, status=lambda: {}, detach=lambda: None)
    monkeypatch.setattr(plugin, "observe", lambda runner, settings: (session, Watching()))
    it = worker(ASKED)
    Plugin.into(it, it.vllm_config)
    it.model_runner.load_model()
    assert it.compile_or_warm_up_model() == "executed" and calls == []
    assert (it.dmi_status()["steps"], it.dmi_status()["thread_us"]) == (0, 0)
    it.model_runner.execute_model(SCHEDULED)
    assert calls == ["scheduled", "open", "launched", "close"] and it.dmi_status()["observed"]
    assert it.dmi_status()["steps"] == 1 and 0 < it.dmi_status()["thread_us"] < 1e6
