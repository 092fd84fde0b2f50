"""`dmi.attach` and `dmi.run_with_cache`: what is asked is checked, an engine found, and a session made of both."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmi import engine as engines
from dmi import instrument, native
from dmi.cache import Cache
from dmi.client import Client
from dmi.errors import CaptureWarning, NotCapturedError
from dmi.families import Mapping as Family
from dmi.hook import HookError
from dmi.requests import TEXTS, new_run
from dmi.session import FLUSH_TIMEOUT_S, Install, Session
from dmi.sites import Refusal
from dmi.store import Reader, Temporary, address_of


class _Disabled(Session):
    """DMI_DISABLE=1: nothing is attached, nothing is captured, and the program runs as it is."""

    def step(self, rows: Any, *, requests: Sequence[int] | None = None, keys: int | None = None) -> contextlib.AbstractContextManager[list[int]]:
        return contextlib.nullcontext([])

    def flush(self, timeout_s: float = FLUSH_TIMEOUT_S) -> None:
        pass

    def _cache_of(self, requests: Sequence[str], *, batch: bool) -> Cache:
        raise NotCapturedError("cache: DMI_DISABLE is set in the environment, so nothing is captured")

    def _answering(self) -> Client:
        raise NotCapturedError("policy: DMI_DISABLE is set in the environment, so nothing is captured, and no policy is in force")

    def cache(self, request: str | None = None) -> Cache:
        return self._cache_of([], batch=False)

    def _finish(self, *, raising: bool) -> None:
        self._detached = True


def attach(
    model: nn.Module,
    hooks: str | Sequence[str],
    *,
    store: str | os.PathLike[str] | None = None,
    engine: str | None = None,
    mode: str = "complete",
    text: str = "ids",
    tokenizer: Any = None,
    lens: bool = False,
    labels: Mapping[str, str] | None = None,
    tags: Sequence[str] = (),
    mapping: Family | None = None,
    budget_gib: float | None = None,
    ring_mib: float | None = None,
    staging_mib: float | None = None,
    wait_bound_s: float = 30,
    token: str = "",
) -> Session:
    """Capture what `hooks` name in `model` into a store, until the session is detached.

    hooks: names (docs/sites.md), aliases, HookPoints, module paths, and globs over them (`*` within a component, `**` across).
    store: a folder; its engine is joined, or started and ended with its last session. engine: the control socket of a running
        `dmi serve`, instead.
    mode: "complete" loses nothing: the model waits where the engine falls behind, to `wait_bound_s`, and then raises CaptureError.
        "best-effort" never holds the model up, and books what it drops.
    text: what is kept of prompts: "none", "ids", or "text", which needs the `tokenizer` (anything with `decode(ids)`).
    lens: save the model's final norm and unembedding in the store, once per model, so that the logit lens works there after the model has gone; with a
        `tokenizer`, also what each token of the vocabulary is written as.
    labels, tags: of the run that holds what is captured outside `session.record()`.
    mapping: for a model family that DMI does not know. budget_gib: refuse hooks that would capture more for a request of 2,048 tokens.
    ring_mib, staging_mib: memory between model and engine: on the model's device, and of the host. Not said: 256 each, or what the policy's budgets
        `device_bytes` and `pinned_bytes` leave; said, and more than that: an EngineError. Beside them the host has records and row tables, and what is
        little or overflows: 64 MiB in complete mode, an eighth of the ring in best-effort mode; `pinned_bytes` counts it. token: where the engine asks for one (otherwise $DMI_TOKEN, or
        the token file of its store).

    Raises HookError (what cannot be captured, with the reason and close matches), EngineError (no engine, its store unreadable, newer,
    in use), NativeError (no libdmi). The model is then as it was. With DMI_DISABLE=1 in the environment nothing is attached.
    """
    given = [hooks] if isinstance(hooks, str) else list(hooks)
    if store is not None and engine is not None:
        raise ValueError("attach: store= and engine= exclude each other: a running engine has its own store")
    if store is None and engine is None:
        raise ValueError('attach: say where captures go: store="captures/", or engine= of a running `dmi serve`')
    if engine is not None and engine.startswith(("http://", "https://")):
        raise ValueError(f"attach: engine={engine!r} is for readers; capture needs the engine's control socket, a path on this machine (STORE/engine.sock)")
    session = new_session(mode, text, tokenizer, labels, tags)
    if isinstance(session, _Disabled):
        return session
    plan = _plan(model, given, mapping, budget_gib)
    _report_skipped(plan.skipped)  # first: where warnings are errors, nothing is attached
    ring = {"device": device_of(model), "payload_mib": ring_mib, "staging_mib": staging_mib, "wait_bound_s": wait_bound_s}
    begin(session, model, plan, given, store=store, engine=engine, token=token, ring=ring)
    if lens:
        try:
            session._save_lens()
        except BaseException:
            session.detach()
            raise
    return session


def begin(
    session: Session,
    model: nn.Module,
    plan: instrument.Plan,
    hooks: Sequence[str],
    *,
    store: str | os.PathLike[str] | None,
    engine: str | None,
    token: str,
    ring: dict[str, Any],
    install: Install = instrument.install,
) -> None:
    """Find the engine of `store`, or start it, or find the one at `engine`; and have `install` place the hooks."""
    native.load()  # before an engine is started for nothing
    if store is not None:
        reader = Reader(store)
        session._client, session._keep = Client(reader.find), reader

        def find() -> str:
            return engines.join_or_start(reader.folder).control

        session._begin(model, plan, hooks, find, True, lambda: _token(token, reader.folder), ring, install)
    else:
        assert engine is not None
        path = os.path.abspath(engine.removeprefix("unix:"))
        session._begin(model, plan, hooks, lambda: path, False, lambda: _token(token, Path(path).parent), ring, install)
        assert session._link is not None
        door = session._link.welcome.get("http") or {}
        address = address_of(str(door.get("unix") or door.get("url") or ""))
        session._client = Client(lambda: address, token)


def run_with_cache(
    model: nn.Module,
    *args: Any,
    names_filter: str | Sequence[str] | Callable[[str], bool] | None = None,
    **inputs: Any,
) -> tuple[Any, Cache]:
    """Run `model(*args, **inputs)` once; returns what it returned, and a cache of what `names_filter` selects: hook patterns as in
    `attach`, a function of names, or None for every site. The captures are in a temporary store, which goes with the cache.
    """
    lacking: list[Refusal] | None = None
    if names_filter is None:
        given = ["**"]
    elif callable(names_filter):
        everything = instrument.plan(model, ["**"])
        given = [site.name for site in everything.sites if names_filter(site.name)]
        lacking = [refusal for refusal in everything.skipped if names_filter(refusal.name)]
        if not given:
            reasons = "".join(f"\n  it cannot give {refusal}" for refusal in lacking[:4])
            raise HookError(f"names_filter selects none of the sites of {type(model).__name__}{reasons}")
    else:
        given = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    session = new_session("complete", "ids", None, None, ())
    if isinstance(session, _Disabled):
        raise NotCapturedError("run_with_cache: DMI_DISABLE is set in the environment, so nothing can be captured")
    plan = _plan(model, given, None, None)
    _report_skipped(plan.skipped if lacking is None else lacking)
    native.load()
    folder = tempfile.mkdtemp(prefix="dmi-cache-")
    try:
        temporary = Temporary(folder, engines.start_own(folder))
    except BaseException:
        os.rmdir(folder) if not os.listdir(folder) else Temporary._discard(folder, engines.Engine("", folder, "", ""))
        raise
    try:
        own = temporary.engine
        session._client, session._keep = Client(lambda: "unix:" + own.http_unix), temporary
        session._begin(model, plan, given, lambda: own.control, False, lambda: _token("", Path(folder)), {"device": device_of(model)})
        with session:
            output = model(*args, **inputs)
        cache = session.cache()
        session._keep = None  # the cache's from here on: the link's thread, which is ending, may hold the session a moment longer
        return output, cache
    except BaseException:
        temporary.close()
        raise


def new_session(mode: str, text: str, tokenizer: Any, labels: Mapping[str, str] | None, tags: Sequence[str]) -> Session:
    if mode not in native.MODES:
        raise ValueError(f"attach: mode={mode!r}; give one of {', '.join(map(repr, native.MODES))}")
    if text not in TEXTS:
        raise ValueError(f"attach: text={text!r}; give one of {', '.join(map(repr, TEXTS))}")
    if text == "text" and tokenizer is None:
        raise ValueError('attach: text="text" needs tokenizer=, to tell the text of token ids')
    own = new_run(labels, tags)
    if os.environ.get("DMI_DISABLE", "") not in ("", "0"):
        warnings.warn("DMI_DISABLE is set in the environment: nothing is attached, and nothing will be captured", CaptureWarning, stacklevel=3)
        disabled = _Disabled(own, mode, text, None)
        disabled._detached = True
        return disabled
    return Session(own, mode, text, tokenizer.decode if tokenizer is not None else None)


def _plan(model: nn.Module, hooks: Sequence[str], mapping: Family | None, budget_gib: float | None) -> instrument.Plan:
    device_of(model)  # before anything else is done for a model that cannot be captured
    return instrument.plan(model, hooks, mapping=mapping, budget_bytes=None if budget_gib is None else int(budget_gib * (1 << 30)))


def device_of(model: nn.Module) -> torch.device:
    """Where the model is: a ring captures there. Raises HookError where that is several places, or none that we know."""
    devices = {tensor.device for tensor in model.parameters()} or {torch.device("cpu")}
    if len(devices) > 1:
        raise HookError(f"attach: the model is on {', '.join(sorted(map(str, devices)))}; a session captures on one device: move the model to one, "
                        "or attach to the parts one by one")  # fmt: skip
    (device,) = devices
    if device.type not in ("cpu", "cuda"):
        raise HookError(f"attach: the model is on {device}; tensors are captured on the CPU and on CUDA devices: move it with model.to(...)")
    if device.type == "cuda" and not native.load().dmi_has_cuda():
        raise HookError(f"attach: the model is on {device}, and this libdmi was built without CUDA; install the wheel with CUDA, or build it where nvcc is on PATH")
    return device


def _token(given: str, folder: Path) -> str:
    """What to show an engine that asks for a token: the one given, $DMI_TOKEN, or the store's own, where it is ours to read."""
    token = given or os.environ.get("DMI_TOKEN", "")
    if not token:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            token = (folder / "token").read_text().strip()
    return token


def _report_skipped(skipped: Iterable[Refusal]) -> None:
    """Told is what this model cannot give of its own family's sites; session.skipped has other families' too."""
    told = [str(refusal) for refusal in skipped if not refusal.foreign]
    if told:
        more = f"\n  and {len(told) - 3} more: session.skipped" if len(told) > 3 else ""
        warnings.warn("the patterns also match what this model cannot give:\n  " + "\n  ".join(told[:3]) + more, CaptureWarning, stacklevel=3)
