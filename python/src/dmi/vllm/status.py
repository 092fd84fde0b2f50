"""Whether workers are observed, told to the processes of one vLLM: a file per worker, in a folder that they all know by the environment.

vLLM's front end serves metrics and lives in another process than its workers. The first process that loads the plugin makes the folder; those that it
starts inherit it. `/metrics` of `vllm serve` has what the files say, looked up when it is asked."""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = "DMI_VLLM_STATUS"
_registered = False

log = logging.getLogger("vllm.dmi")


def prepare() -> None:
    """In every process that loads the plugin, before it starts others. More often does no harm."""
    global _registered
    if not os.environ.get(FOLDER):
        folder = tempfile.mkdtemp(prefix="dmi-vllm-")
        os.environ[FOLDER] = folder
        owner = os.getpid()  # a forked child has its parent's atexit calls
        atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    if not _registered:
        _registered = True
        from prometheus_client import REGISTRY, multiprocess

        REGISTRY.register(_Collector())  # type: ignore[arg-type]
        _with_others(multiprocess.MultiProcessCollector)


def _with_others(kind: Any) -> None:
    """Several API servers add their metrics up, in a registry made for each answer; ours are the same from all of them."""
    plain = kind.__init__

    @functools.wraps(plain)
    def __init__(self: Any, registry: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, registry, *args, **kwargs)
        if registry is not None:
            registry.register(_Collector())

    kind.__init__ = __init__


def number_of(parallel: Any, rank: int = 0) -> int:
    """A worker's number among those of all data-parallel engines, each of which counts its ranks from 0. `parallel`: vLLM's ParallelConfig."""
    index = getattr(parallel, "data_parallel_index", None)  # the rank is reset where engines do not wait for each other
    engine = int(getattr(parallel, "data_parallel_rank", 0) if index is None else index)
    return engine * int(parallel.world_size) + rank


def tell(worker: int, status: dict[str, Any]) -> None:
    """What became of a worker. Never raises: it is told on the way of failing open."""
    try:
        folder = Path(os.environ[FOLDER])
        temporary = folder / f".{worker}"
        temporary.write_text(json.dumps(status))
        temporary.rename(folder / f"{worker}.json")
    except (KeyError, OSError, TypeError, ValueError) as error:
        log.warning("DMI: the state of worker %d is not in the metrics: %s", worker, error)


def told() -> dict[int, dict[str, Any]]:
    """By worker; empty where none was asked to observe."""
    found = {}
    for file in sorted(Path(os.environ.get(FOLDER) or os.devnull).glob("[0-9]*.json")):
        try:
            found[int(file.stem)] = json.loads(file.read_text())
        except (OSError, ValueError):  # going away, with its server
            continue
    return found


class _Collector:
    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        workers = told()
        if not workers:
            return
        observed = GaugeMetricFamily("dmi_vllm_observed", "1: the worker's model is observed. 0: it serves unobserved, nothing is captured", labels=["worker", "reason"])
        sites = GaugeMetricFamily("dmi_vllm_sites", "Sites that are captured", labels=["worker"])
        memory = GaugeMetricFamily("dmi_vllm_device_bytes", "Memory that the payload ring takes on the model's device", labels=["worker"])
        blocks = GaugeMetricFamily("dmi_vllm_kv_blocks_cost", "Blocks that vLLM's key-value cache would have more without that memory", labels=["worker"])
        for number, status in workers.items():
            worker = str(number)
            observed.add_metric([worker, str(status.get("reason", ""))[:200]], float(bool(status.get("observed"))))
            for family, key in ((sites, "sites"), (memory, "device_bytes"), (blocks, "kv_blocks_cost")):
                if isinstance(status.get(key), (int, float)):
                    family.add_metric([worker], float(status[key]))
        yield from (observed, sites, memory, blocks)
