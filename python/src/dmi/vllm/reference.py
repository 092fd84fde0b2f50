"""The reference to its captures that a finished response carries where its request asked for one (`dmi_reference`).

It travels in what vLLM's scheduler gives a finished request for its client, `kv_transfer_params`, under the key `dmi`: of `RequestOutput` offline, of
the response's body over HTTP (of vLLM's own making: streamed chunks have none)."""

from __future__ import annotations

import functools
from typing import Any

from dmi.options import options_of
from dmi.vllm import status
from dmi.vllm.batches import LABEL, LABEL_LENGTH, name_of

KEY = "dmi"


def install() -> None:
    """In the process that has the scheduler; elsewhere it does nothing. More often does no harm."""
    from vllm.v1.core.sched.scheduler import Scheduler

    original = Scheduler._connector_finished
    if getattr(original, "dmi", False):
        return

    @functools.wraps(original)
    def _connector_finished(self: Any, request: Any) -> tuple[bool, dict[str, Any] | None]:
        delay, parameters = original(self, request)
        found = reference(request, status.number_of(self.vllm_config.parallel_config))
        return delay, parameters if found is None else {**(parameters or {}), KEY: found}

    _connector_finished.dmi = True  # type: ignore[attr-defined]
    Scheduler._connector_finished = _connector_finished


def reference(request: Any, worker: int = 0) -> dict[str, Any] | None:
    """`observed`, and where it is: `request`, the id for `dmi get --request`; `session`, `store`, and a label that no other request has. Else the `reason`.
    None where none was asked for. `worker`: the first of the engine that has the request. What has become of its rows, `coverage` says."""
    options = options_of(getattr(request.sampling_params, "extra_args", None))
    if not options.reference:
        return None
    told = status.told().get(worker)
    if told is None:
        return {"observed": False, "reason": "DMI was not asked to observe"}
    if not told.get("observed"):
        return {"observed": False, "reason": str(told.get("reason", ""))}
    if options.labels.get("dmi.capture") == "off":
        return {"observed": False, "reason": options.wrong or "the request asked for nothing to be captured"}
    key = str(request.request_id)
    return {"observed": True, "request": name_of(key), "session": told["session"], "store": told["store"], LABEL: key[:LABEL_LENGTH]}
