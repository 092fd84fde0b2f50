"""`transformers serve`, observed: each model that it loads is attached to, as the environment says.

    DMI_HOOKS="blocks.*.hook_resid_post logits" DMI_STORE=captures python -m dmi.serving MODEL --continuous-batching

The arguments are those of `transformers serve`; docs/batching.md has the rest. It fails open: where a model cannot be observed it is served
unobserved, and the log and the server's /metrics say so and why.
"""

from __future__ import annotations

import contextvars
import functools
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dmi
from dmi.batching import LABEL, LABEL_LENGTH
from dmi.options import REFERENCE, Asked, asking, given_in
from dmi.vllm.settings import Settings, asked_for

XARGS = "vllm_xargs"
"""Where a client of vLLM says what is captured of its request; it may say it here in the same way."""

log = logging.getLogger("dmi.serving")


class Observed:
    """The models that one server has loaded, and their sessions. `settings`: None where nobody asked for anything."""

    def __init__(self, settings: Settings | None) -> None:
        self._settings = settings
        self._sessions: dict[int, dmi.Session] = {}
        self._models: dict[int, tuple[str, str]] = {}
        """Their names, and why they are not observed."""

    def attach(self, model: Any) -> None:
        given = self._settings
        if given is None:
            return
        name, reason = str(getattr(model.config, "name_or_path", "") or type(model).__name__), ""
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
            self._sessions[id(model)] = session
            log.warning("session %s captures %d sites of %s into %s", session.id, len(session.sites), name, session.store)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            log.warning("%s is served UNOBSERVED, nothing is captured: %s", name, reason)
        self._models[id(model)] = name, reason

    def detach(self, model: Any) -> None:
        self._models.pop(id(model), None)
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

    def reference(self, request: str) -> dict[str, Any]:
        """Where the captures of a client's request are, or why there are none."""
        if self._settings is None:
            return {"observed": False, "reason": "DMI was not asked to observe"}
        found = [session.requests.reference(LABEL, request[:LABEL_LENGTH]) for session in tuple(self._sessions.values())]
        found += [{"observed": False, "reason": reason} for _, reason in tuple(self._models.values()) if reason]
        return next((reference for reference in found if reference["observed"]), found[0] if found else {"observed": False, "reason": "no model is loaded"})

    def metrics(self) -> str:
        """In Prometheus's text format, as vLLM's plugin has them for vLLM."""
        series: dict[tuple[str, str], list[str]] = {}
        for key, (name, reason) in tuple(self._models.items()):
            session = self._sessions.get(key)
            model = f'model="{_escaped(name)}"'
            series.setdefault(OBSERVED, []).append(f'{{{model},reason="{_escaped(reason[:200])}"}} {int(session is not None)}')
            if session is not None:
                series.setdefault(SITES, []).append(f"{{{model}}} {len(session.sites)}")
                series.setdefault(MEMORY, []).append(f"{{{model}}} {int(session.memory_mib['ring'] * (1 << 20))}")
        lines = []
        for (metric, what), values in series.items():
            lines += [f"# HELP {metric} {what}", f"# TYPE {metric} gauge", *(metric + value for value in values)]
        return "".join(line + "\n" for line in lines)

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

    def handling(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """A request's options are ours, not the library's, which refuses what it does not know."""

        @functools.wraps(plain)
        async def handle_request(handler: Any, body: dict[str, Any], request_id: str) -> Any:
            from fastapi.responses import JSONResponse

            given = _taken(body)
            token = asking.set(Asked(request_id, given))
            try:
                response = await plain(handler, body, request_id)
            finally:
                asking.reset(token)
            if given.get(REFERENCE) and isinstance(response, JSONResponse):
                return JSONResponse({**json.loads(bytes(response.body)), "dmi": self.reference(request_id)}, response.status_code)
            return response

        return handle_request

    def building(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def build_server(*args: Any, **kwargs: Any) -> Any:
            from fastapi.responses import PlainTextResponse

            app = plain(*args, **kwargs)
            app.add_api_route("/metrics", lambda: PlainTextResponse(self.metrics(), media_type="text/plain; version=0.0.4"), response_model=None)
            return app

        return build_server


OBSERVED = "dmi_transformers_observed", "1: the model is observed. 0: it serves unobserved, nothing is captured"
SITES = "dmi_transformers_sites", "Sites that are captured"
MEMORY = "dmi_transformers_device_bytes", "Memory that the payload ring takes on the model's device"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _taken(body: dict[str, Any]) -> dict[str, Any]:
    """Options out of a request's body."""
    given = given_in(body)
    for key in given:
        del body[key]
    xargs = body.get(XARGS)
    if given_in(xargs):
        given = {**given_in(xargs), **given}
        del body[XARGS]
    return given


def _in_its_context(plain: Callable[..., Any]) -> Callable[..., Any]:
    """What a server has another thread do is done for the same request."""

    @functools.wraps(plain)
    def submit(thread: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return plain(thread, functools.partial(contextvars.copy_context().run, function), *args, **kwargs)

    return submit


def _places(observed: Observed) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """Where, in the library's server, what stands before what."""
    from transformers.cli.serving import chat_completion, completion, model_manager, response, server, utils

    yield model_manager.ModelManager, "_load_model", observed.loading
    yield model_manager.TimedModel, "delete_model", observed.unloading
    for handler in (chat_completion.ChatCompletionHandler, completion.CompletionHandler, response.ResponseHandler):
        yield handler, "handle_request", observed.handling
    for name in ("submit", "async_submit"):
        yield utils.InferenceThread, name, _in_its_context
    yield server, "build_server", observed.building


def main(arguments: Sequence[str]) -> None:
    """Raises HookError for an environment that cannot be meant."""
    settings = asked_for(None, os.environ)
    from transformers.cli import transformers as command

    logging.basicConfig(format="DMI: %(message)s")
    if settings is None:
        log.warning("DMI_HOOKS is not set (or DMI_DISABLE is): nothing is captured")
    observed = Observed(settings)
    for owner, name, wrap in _places(observed):
        setattr(owner, name, wrap(getattr(owner, name)))
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
        observed.detach_all()
        if told:  # the library's loop is a thread that nobody stops: ending takes the signal itself, once all is drained
            signal.signal(told[0], signal.SIG_DFL)
            signal.raise_signal(told[0])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except dmi.HookError as error:
        sys.exit(f"dmi.serving: {error}")
