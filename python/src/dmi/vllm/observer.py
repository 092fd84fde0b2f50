"""One model runner of vLLM's, observed: a session whose steps are its forwards."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dmi import native
from dmi.attaching import begin, device_of, new_session
from dmi.hook import HookError
from dmi.instrument import Plan, Ring
from dmi.requests import Requests
from dmi.session import Session
from dmi.sites import LOGITS
from dmi.vllm.batches import Asked, Batch, Batches
from dmi.vllm.hooks import Arrangement, Hooks, may_wait
from dmi.vllm.settings import DIGEST, KEY, Settings
from dmi.vllm.sites import plan


class Observer:
    """What `Session` needs of an instrumentation, driven by a model runner."""

    def __init__(self, runner: Any, model: nn.Module, arrangement: Arrangement, ring: Ring, numbers: Sequence[int], requests: Requests) -> None:
        self._ring = ring
        self._requests = requests
        self._batches = Batches(requests, runner.max_model_len)
        self._step = 0
        self._opened = False
        self._hooks = Hooks(model, arrangement, ring.tensor, numbers, ring.branch)
        self._later = ring.tensor.device.type == "cuda"
        """The model's thread does not wait for the forward: what the engine is told of requests can go out behind its launch, where it holds up no first token."""

    # -------------------------------------------------------------- the runner's calls
    def scheduled(self, output: Any) -> None:
        """The scheduler's output for a step comes in."""
        self.close(aborted=True)  # of a forward that nothing followed
        self._requests.hold()
        news = self._batches.learn()
        self._batches.finish(output.finished_req_ids)
        self._batches.begin(output.scheduled_new_reqs)
        if output.total_num_scheduled_tokens == 0:  # no table comes to tell the news, no step closes
            if news:
                self._judge()
            self._tell()

    def open(self, batch: Batch) -> None:
        """The model is about to run over a batch."""
        self._hooks.clear()
        spans = self._batches.spans(batch) or self._batches.table(batch)
        self._step = self._requests.next_step()
        self._ring.open_step(self._step, spans, width=(0, 0, 0), packed=True)
        self._opened = True
        if not self._later:
            self._requests.release()

    def launched(self) -> None:
        """The model ran over the batch, or on a GPU is going to: sampling comes next, which may take long where kernels are made for it, longer than the engine waits for
        the names of those whose rows it has."""
        self._tell()

    def close(self, *, aborted: bool) -> None:
        """Its logits are there: what the model computes from here on, prompt logprobs say, is no row."""
        if self._opened:
            self._opened = False
            if aborted:
                self._hooks.clear()
            self._ring.close_step(self._step, aborted=aborted)
            if aborted:
                self._tell()

    def _tell(self) -> None:
        """The engine is told who is over, and what was held."""
        self._requests.hold()
        self._batches.tell_finished(self._step)
        self._requests.release()

    def asked(self) -> Asked:
        """What to give `sampled` for the last step."""
        return self._batches.asked

    def sampled(self, asked: Asked, ids: Sequence[str], tokens: Sequence[list[int]]) -> None:
        """What was sampled in a step. Any thread."""
        self._batches.sampled(asked, ids, tokens)

    def _judge(self) -> None:
        """A step of no rows, which says of the guesses before it which were rejected."""
        table = self._batches.verdict()
        self._step = self._requests.next_step()
        self._ring.open_step(self._step, table, width=(0, 0, 0), packed=True)
        self._ring.close_step(self._step)

    # -------------------------------------------------------------- the session's
    def outside(self) -> int:
        return 0  # vLLM's own warm-up and dummy runs, which nobody asked to see

    def step(self, rows: Any, *, requests: Sequence[int] | None = None, keys: int | None = None) -> contextlib.AbstractContextManager[list[int]]:
        raise HookError("session.step: vLLM opens its steps itself")

    def settle(self) -> None:
        if (self._batches.learn(last=True) or self._batches.undecided) and not self._opened:
            self._judge()
        self._batches.settle()

    def remove(self) -> None:
        self._hooks.remove()
        self.settle()
        self._batches.end_all(self._step)


def observe(runner: Any, settings: Settings) -> tuple[Session, Observer]:
    """Attach to the model that a runner has loaded. Raises what `dmi.attach` does."""
    model = runner.get_model()
    ranks = runner.vllm_config.parallel_config.tensor_parallel_size
    chosen = plan(model, settings.hooks, ranks)
    # Norms that vLLM's passes fuse with a quantisation or with a reduction over ranks write over the residual, whoever reads it later.
    fused = ranks > 1 or getattr(runner.vllm_config, "quant_config", None) is not None
    device = device_of(model)
    tokens = runner.vllm_config.scheduler_config.max_num_batched_tokens
    arrangement = Arrangement(model, chosen, tokens, most=may_wait(device), careful=fused)
    _tell_compiler(runner.vllm_config, settings.digest(arrangement.words()))
    session = new_session(settings.mode, settings.text, None, None, ())
    observers: list[Observer] = []

    def install(model: nn.Module, plan: Plan, ring: Ring, numbers: Sequence[int], requests: Requests) -> Observer:
        observers.append(Observer(runner, model, arrangement, ring, numbers, requests))
        return observers[-1]

    ring = {
        "device": device,
        "keep_gil": True,  # scheduler and outputs are Python, in threads of the same process
        "payload_mib": settings.ring_mib,
        "usual_mib": usual_ring_mib(chosen, tokens, runner.vllm_config.scheduler_config.max_num_seqs, device),
        "staging_mib": settings.staging_mib,
        "wait_bound_s": settings.wait_bound_s,
    }
    begin(session, model, chosen, list(settings.hooks), store=settings.store or None, engine=settings.engine or None, token=settings.token,
          ring=ring, install=install)  # fmt: skip
    return session, observers[0]


RING_SHARE = 128
"""One part in so many of a GPU's memory may be the ring that nobody gave a size."""


def usual_ring_mib(plan: Plan, tokens: int, sequences: int, device: torch.device) -> float:
    """A ring for two steps of as many `tokens`, of as many `sequences`, as the scheduler gives at most: one is drained while the next is captured, and the model does not wait for
    room. The usual size at least, RING_SHARE at most. vLLM computes logits of each sequence's last row alone; of a user's own points nobody knows the size."""
    if device.type != "cuda":
        return native.USUAL_MIB
    step = sum((sequences if site.space == LOGITS else tokens) * (site.bytes_per_token or 0) for site in plan.sites)
    most = torch.cuda.get_device_properties(device).total_memory // RING_SHARE
    return max(native.USUAL_MIB, min(2 * step, most) >> 20)


def _tell_compiler(config: Any, digest: str) -> None:
    """vLLM keeps what it compiled, by a hash of its configuration, which hooks are no part of; `additional_config` is. Our settings, which are read by now,
    go out of it: compiled code does not depend on where captures go, say."""
    if not isinstance(config.additional_config, dict):
        raise HookError("additional_config is no dictionary, so that vLLM's compile cache cannot be told of hooks")
    config.additional_config = {**{key: value for key, value in config.additional_config.items() if key != KEY}, DIGEST: digest}
