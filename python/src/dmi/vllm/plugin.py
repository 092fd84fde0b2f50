"""What vLLM calls in each of its processes, by the entry point `vllm.general_plugins`. In those with a worker, the worker's model runner is
observed where that was asked for.

It fails open: whatever goes wrong here, vLLM serves as it would without us, and says once in its log that nothing is captured and why.
`collective_rpc("dmi_status")` tells it too, and the metric dmi_vllm_observed at vLLM's /metrics."""

from __future__ import annotations

import functools
import logging
import re
import time
from typing import Any

from dmi.hook import HookError
from dmi.session import Session
from dmi.vllm import reference, runners, status
from dmi.vllm.memory import Memory
from dmi.vllm.observer import Observer, observe
from dmi.vllm.settings import Settings, asked_for

OLDEST, NEWEST = (0, 24), (0, 32)
"""Versions of vLLM that this was tried with."""

log = logging.getLogger("vllm.dmi")  # vLLM configures loggers below its own name


def register() -> None:
    """Called by vLLM, more than once in a process maybe."""
    try:
        status.prepare()
        reference.install()
    except Exception as error:
        log.warning("DMI: metrics and references are not to be had: %s: %s", type(error).__name__, error)
    try:
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        original = WorkerWrapperBase.init_device
        if getattr(original, "dmi", False):
            return

        @functools.wraps(original)
        def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            Plugin.into(self.worker, self.vllm_config)
            return result

        init_device.dmi = True  # type: ignore[attr-defined]
        WorkerWrapperBase.init_device = init_device
    except Exception as error:
        log.warning("DMI: nothing is captured: this vLLM has no such worker as is known: %s: %s", type(error).__name__, error)


class Plugin:
    """One worker's. Its calls into DMI never raise: the first error ends the observation, not the request."""

    def __init__(self, worker: Any, settings: Settings) -> None:
        self._runner = worker.model_runner
        self._settings = settings
        self._session: Session | None = None
        self._observer: Observer | None = None
        self._reason = "the model is not loaded yet"
        self._memory = Memory(worker)
        self._number = status.number_of(worker.vllm_config.parallel_config, int(worker.rank))
        worker.dmi_status = self.status
        worker.dmi_flush = self.flush
        self._wrap(worker, "shutdown", self._detach)
        self._steps = self._thread_ns = 0
        """That were opened, and nanoseconds that the model's thread was ours for: since the model was loaded."""
        self._warming_up = False
        self._unseen_while(worker, "compile_or_warm_up_model")

    @classmethod
    def into(cls, worker: Any, config: Any) -> None:
        """Make a worker ours, where that was asked for and is possible."""
        reason = ""
        try:
            settings = asked_for(config.additional_config)
            if settings is None:
                return
            if config.parallel_config.rank % config.parallel_config.tensor_parallel_size:
                worker.dmi_status = lambda: {"observed": False, "reason": "the first tensor-parallel rank captures what all have"}
                worker.dmi_flush = lambda: False
                return
            reason = unsupported(worker, config)
            if not reason:
                cls(worker, settings)._take_over()
                return
        except Exception as error:
            reason = _said(error)
        _unobserved(reason, worker)
        worker.dmi_status = lambda: {"observed": False, "reason": reason}
        worker.dmi_flush = lambda: False

    # -------------------------------------------------------------- what people ask
    def status(self) -> dict[str, Any]:
        """`observed`; where it is not, the `reason`; where it is, what `Session.status` says, and how many `steps` the model's thread opened and was ours for how many
        microseconds (`thread_us`), captures in the model aside."""
        if self._session is None:
            return {"observed": False, "reason": self._reason}
        return {"observed": True, "reason": "", **self._session.status(), "skipped": self._session.skipped, **self._memory.status(),
                "steps": self._steps, "thread_us": self._thread_ns / 1e3}  # fmt: skip

    def _tell(self) -> None:
        session = self._session
        if session is None:
            status.tell(self._number, {"observed": False, "reason": self._reason})
        else:
            facts = {"session": session.id, "store": session.store, "sites": len(session.sites)}
            status.tell(self._number, {"observed": True, "reason": "", **facts, **self._memory.status()})

    def flush(self) -> bool:
        """Everything captured so far is durable. False where nothing is observed."""
        if self._session is None:
            return False
        self._session.flush()
        return True

    # -------------------------------------------------------------- the runner
    def _take_over(self) -> None:
        runners.wrap(self._runner, self._attach, self._do)
        self._memory.watch(self._tell)

    @staticmethod
    def _wrap(thing: Any, name: str, first: Any) -> None:
        original = getattr(thing, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            first()
            return original(*args, **kwargs)

        setattr(thing, name, wrapped)

    def _unseen_while(self, worker: Any, name: str) -> None:
        """The second model runner warms its kernels up by requests of its own making, which come as anybody's do."""
        original = getattr(worker, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._warming_up = True
            try:
                return original(*args, **kwargs)
            finally:
                self._warming_up = False

        setattr(worker, name, wrapped)

    def _attach(self) -> None:
        if self._session is not None:  # weights were loaded again, into the same modules
            return
        try:
            session, observer = observe(self._runner, self._settings)
            self._session, self._observer, self._reason = session, observer, ""
            self._memory.holds(session.memory_mib)
            log.info("DMI: session %s captures %d sites into %s", session.id, len(session.sites), session.store)
            for refusal in session.skipped[:3]:
                log.warning("DMI: not captured: %s", refusal)
            self._tell()
        except Exception as error:
            self._reason = _said(error)
            _unobserved(self._reason)
            self._tell()

    def _do(self, what: str, *args: Any, **kwargs: Any) -> Any:
        """Call the observer, if there is one. An argument that is a function is called for its value."""
        observer = self._observer
        if observer is None or self._warming_up:
            return None
        begun = time.perf_counter_ns()
        try:
            return getattr(observer, what)(*[argument() if callable(argument) else argument for argument in args], **kwargs)
        except Exception as error:
            self._reason = f"{what}: {_said(error)}"
            _unobserved(self._reason)
            self._detach()
            return None
        finally:
            if what != "sampled":  # by another thread, perhaps
                self._thread_ns += time.perf_counter_ns() - begun
                self._steps += what == "open"

    def _detach(self) -> None:
        session, self._session, self._observer = self._session, None, None
        if session is None:
            return
        self._reason = self._reason or "the worker is shut down"
        self._tell()
        try:
            session.detach()
        except Exception as error:
            log.warning("DMI: session %s: %s", session.id, _said(error))


def unsupported(worker: Any, config: Any) -> str:
    """Why a worker cannot be observed; empty where it can."""
    import vllm

    version = re.match(r"(\d+)\.(\d+)", vllm.__version__)
    if version is None or not OLDEST <= tuple(map(int, version.groups())) <= NEWEST:
        return f"vLLM {vllm.__version__} is none of the versions that were tried, {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    runner = worker.model_runner
    if not runners.known(runner):
        return f"{type(runner).__module__}.{type(runner).__name__} serves this model, which is none of the two model runners that are known"
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        return "pipeline parallelism is not supported"
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return "prefill context parallelism is not supported: each rank has some of the rows"
    if getattr(parallel, "enable_batch_sharded_sampling", False):
        return "batch-sharded sampling is not supported: each rank has logits of some of the rows"
    if parallel.tensor_parallel_size > 1 and getattr(config.compilation_config.pass_config, "enable_sp", False):
        return "sequence parallelism is not supported: each rank has some of the rows between blocks"
    if config.speculative_config is not None:
        if config.scheduler_config.async_scheduling:
            return "speculative decoding with asynchronous scheduling is not supported: only the device knows where rows stand then; set --no-async-scheduling"
        if getattr(config.speculative_config, "enable_adaptive_verification", False):
            return "adaptive verification of drafts is not supported: only the device knows whose rows are there"
    if getattr(config.model_config, "is_diffusion", False):
        return "diffusion models are not supported: their tokens come in no order"
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False):
        return "micro-batches are not supported: they change the order of rows"
    return ""


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, HookError) else f"{type(error).__name__}: {error}"


def _unobserved(reason: str, worker: Any = None) -> None:
    if worker is not None:
        status.tell(status.number_of(worker.vllm_config.parallel_config, int(worker.rank)), {"observed": False, "reason": reason})
    log.warning("DMI: this model is served UNOBSERVED, nothing is captured: %s", reason)
