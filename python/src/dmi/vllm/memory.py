"""What our memory costs vLLM: it is inside what vLLM's profiling counts, and said in blocks of the key-value cache.

On a GPU the payload ring is taken from the driver when the model is loaded, which is before vLLM measures what is left for its cache: it counts as
what others than torch hold. On the CPU the ring is shared memory whose pages come with their first use, after vLLM has looked at what its process
holds: there it is taken off by hand. Where the user says how large the cache is, it is that large, and our memory is beside it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger("vllm.dmi")


class Memory:
    """One worker's."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._on_cpu = worker.device.type == "cpu"
        self._bytes = 0
        self._available = 0
        self._blocks: int | None = None

    def holds(self, mib: dict[str, float]) -> None:
        """A session's memory, before vLLM looks."""
        self._bytes = int((mib["ring"] + (mib["staging"] if self._on_cpu else 0)) * (1 << 20))

    def status(self) -> dict[str, Any]:
        """`device_bytes`, and once the cache is there `kv_blocks` and `kv_blocks_cost`: how many more there would be without."""
        found: dict[str, Any] = {"device_bytes": self._bytes}
        if self._blocks is not None:
            found |= {"kv_blocks": self._blocks, "kv_blocks_cost": self.cost()}
        return found

    def cost(self) -> int:
        """Blocks share what was available equally, so that bytes are so many of them."""
        if self._blocks is None or self._available <= 0 or self._fixed():
            return 0
        return round(self._bytes * self._blocks / self._available)

    def _fixed(self) -> bool:
        config = self._worker.vllm_config.cache_config
        return config.kv_cache_memory_bytes is not None or config.num_gpu_blocks_override is not None

    def watch(self, known: Callable[[], None]) -> None:
        """`known` is called once the cache's size is."""
        worker, runner = self._worker, self._worker.model_runner
        measure, initialize = worker.determine_available_memory, runner.initialize_kv_cache

        @functools.wraps(measure)
        def determine_available_memory(*args: Any, **kwargs: Any) -> int:
            available = int(measure(*args, **kwargs))
            if self._on_cpu and worker.vllm_config.cache_config.kv_cache_memory_bytes is None and worker.dmi_status()["observed"]:
                available -= self._bytes
            self._available = available
            return available

        @functools.wraps(initialize)
        def initialize_kv_cache(config: Any, *args: Any, **kwargs: Any) -> Any:
            result = initialize(config, *args, **kwargs)
            self._blocks = int(config.num_blocks)
            if worker.dmi_status()["observed"]:
                log.info("DMI: %.0f MiB of memory on %s: %d blocks of the key-value cache, which has %d", self._bytes / (1 << 20), worker.device.type, self.cost(), self._blocks)
            known()
            return result

        worker.determine_available_memory, runner.initialize_kv_cache = determine_available_memory, initialize_kv_cache
