"""What session tests share: a tiny model, plain hooks as the reference, and engines that end with the test."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dmi
from observed import fresh_seed, model_of

os.environ["PYTHONPATH"] = str(Path(__file__).parents[1] / "src")  # for the processes that tests start


def llama(**changes: Any) -> Any:
    fresh_seed()
    return model_of("llama", **changes)


def prompts(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(12, 128, (batch, length))


@contextlib.contextmanager
def plainly(module: nn.Module) -> Iterator[list[Tensor]]:
    """Clones of a module's output on the CPU, by a hook that knows nothing of DMI."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out).detach().clone().cpu()))
    try:
        yield seen
    finally:
        handle.remove()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that captures were lost: where that is the point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dmi.CaptureWarning)
        yield


def footprint(model: nn.Module) -> dict[str, Any]:
    """All that hooks and patches leave on a model."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called")
    return {
        path: (sorted(set(module.__dict__) - {"_dmi"}), [len(getattr(module, name)) for name in names],
               getattr(getattr(module, "config", None), "_attn_implementation", None))
        for path, module in model.named_modules()
    }  # fmt: skip


def engine_pid(store: Path) -> int:
    return int(json.loads((store / "engine.json").read_text())["pid"])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid))


def stop(store: Path) -> None:
    """End the engine of a store as an operator would."""
    pid = engine_pid(store)
    os.kill(pid, signal.SIGTERM)
    until(lambda: not alive(pid))


def alive(pid: int) -> bool:
    """Whether a process runs: one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def naps(thread: int) -> int:
    """How often a thread has given the processor away of its own will."""
    return int(Path(f"/proc/{thread}/status").read_text().rpartition("nonvoluntary")[0].rpartition("voluntary_ctxt_switches:")[2])


def until(condition: Callable[[], bool], bound_s: float = 300) -> None:
    deadline = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def rows_of(books: dict[str, Any], outcome: str) -> int:
    return sum(books["outcomes"].get(outcome, {}).values())


def balanced(books: dict[str, Any]) -> bool:
    return sum(sum(reasons.values()) for reasons in books["outcomes"].values()) == books["rows"]
