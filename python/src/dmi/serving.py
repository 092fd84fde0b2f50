"""`transformers serve`, observed: each model that it loads is attached to, as the environment says.

    DMI_HOOKS="blocks.*.hook_resid_post logits" DMI_STORE=captures python -m dmi.serving MODEL --continuous-batching

The arguments are those of `transformers serve`; docs/batching.md has the rest. It fails open: where a model cannot be observed it is served
unobserved, and the log says so and why.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import dmi
from dmi.vllm.settings import Settings, asked_for

log = logging.getLogger("dmi.serving")


class Observed:
    """The models that one server has loaded, and their sessions."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sessions: dict[int, dmi.Session] = {}

    def attach(self, model: Any) -> None:
        given = self._settings
        try:
            session = dmi.attach(
                model,
                hooks=given.hooks,
                store=given.store or None,
                engine=given.engine or None,
                mode=given.mode,
                text=given.text,
                ring_mib=given.ring_mib,
                staging_mib=given.staging_mib,
                wait_bound_s=given.wait_bound_s,
                token=given.token,
                labels={"server": "transformers"},
            )
        except Exception as error:
            log.warning("%s is served UNOBSERVED, nothing is captured: %s: %s", type(model).__name__, type(error).__name__, error)
            return
        self._sessions[id(model)] = session
        log.warning("session %s captures %d sites of %s into %s", session.id, len(session.sites), type(model).__name__, session.store)

    def detach(self, model: Any) -> None:
        session = self._sessions.pop(id(model), None)
        if session is not None:
            self._end(session)

    def detach_all(self) -> None:
        while self._sessions:
            self._end(self._sessions.popitem()[1])

    def _end(self, session: dmi.Session) -> None:
        try:
            session.detach()
        except Exception as error:
            log.warning("session %s: %s", session.id, error)

    # -------------------------------------------------------------- the server's classes
    def loading(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def _load_model(*args: Any, **kwargs: Any) -> Any:
            model = plain(*args, **kwargs)
            self.attach(model)
            return model

        return _load_model

    def unloading(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def delete_model(timed: Any) -> Any:
            if getattr(timed, "model", None) is not None:
                self.detach(timed.model)
            return plain(timed)

        return delete_model


def main(arguments: Sequence[str]) -> None:
    """Raises HookError for an environment that cannot be meant."""
    settings = asked_for(None, os.environ)
    from transformers.cli import transformers as command
    from transformers.cli.serving import model_manager

    logging.basicConfig(format="DMI: %(message)s")
    observed = None
    if settings is None:
        log.warning("DMI_HOOKS is not set (or DMI_DISABLE is): nothing is captured")
    else:
        observed = Observed(settings)
        model_manager.ModelManager._load_model = observed.loading(model_manager.ModelManager._load_model)
        model_manager.TimedModel.delete_model = observed.unloading(model_manager.TimedModel.delete_model)
    told: list[int] = []

    def end(number: int, frame: Any) -> None:
        told.append(number)
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):  # the server stops at one, and then raises it again
        signal.signal(number, end)
    sys.argv = ["transformers", "serve", *arguments]
    try:
        command.main()
    finally:
        if observed is not None:
            observed.detach_all()
        if told:  # the library's loop is a thread that nobody stops: ending takes the signal itself, once all is drained
            signal.signal(told[0], signal.SIG_DFL)
            signal.raise_signal(told[0])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except dmi.HookError as error:
        sys.exit(f"dmi.serving: {error}")
