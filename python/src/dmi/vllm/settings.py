"""What the plugin was asked to do: by vLLM's `additional_config={"dmi": {...}}`, or by the environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any

from dmi import native
from dmi.hook import HookError

KEY = "dmi"
DIGEST = "dmi_hooks"
"""Key of `additional_config` under which vLLM's compile cache finds what was hooked."""


@dataclass(frozen=True)
class Settings:
    """Each is a key of `additional_config["dmi"]`, and an environment variable: DMI_HOOKS, DMI_STORE, ... The former go first."""

    hooks: tuple[str, ...]
    store: str = ""
    engine: str = ""
    mode: str = "best-effort"
    text: str = "none"  # of other people's prompts nothing is kept unless the operator says so
    ring_mib: float | None = None  # None: what observer.usual_ring_mib says, or a budget leaves
    staging_mib: float | None = None  # None: as dmi.attach has it
    wait_bound_s: float = 30
    token: str = ""

    def digest(self, words: Sequence[str]) -> str:
        """Of what compiled code depends on: which hooks there are, the numbers that they have got, which are their places, and where groups end."""
        return sha256("\n".join(words).encode()).hexdigest()[:16]


def asked_for(additional: Any, environ: Mapping[str, str] = os.environ) -> Settings | None:
    """None: nobody asked for anything. Raises HookError for what cannot be meant."""
    given = additional.get(KEY) if isinstance(additional, dict) else None
    if given is None and not environ.get("DMI_HOOKS"):
        return None
    if environ.get("DMI_DISABLE", "") not in ("", "0"):
        return None
    if given is not None and not isinstance(given, dict):
        raise HookError(f'additional_config["dmi"] is {given!r}: give an object, for example {{"hooks": ["logits"], "store": "captures/"}}')
    names = [field.name for field in fields(Settings)]
    values: dict[str, Any] = {name: environ[f"DMI_{name.upper()}"] for name in names if environ.get(f"DMI_{name.upper()}")}
    for name, value in (given or {}).items():
        if name not in names:
            raise HookError(f'additional_config["dmi"] has {name!r}, which is nothing; there are {", ".join(names)}')
        values[name] = value
    if given is not None and {"store", "engine"} & set(given):  # where captures go is said as a whole
        for name in {"store", "engine"} - set(given):
            values.pop(name, None)
    values["hooks"] = _hooks(values.get("hooks"))
    for name in ("ring_mib", "staging_mib", "wait_bound_s"):
        if name in values:
            try:
                values[name] = float(values[name])
            except (TypeError, ValueError):
                raise HookError(f"{name}={values[name]!r} is no number") from None
    settings = Settings(**values)
    if settings.mode not in native.MODES:
        raise HookError(f"mode={settings.mode!r}; give one of {', '.join(map(repr, native.MODES))}")
    if settings.text not in ("none", "ids"):
        raise HookError(f"text={settings.text!r}; give 'none' or 'ids': vLLM's workers have no tokenizer")
    if bool(settings.store) == bool(settings.engine):
        raise HookError("say where captures go, once: store (DMI_STORE), or engine (DMI_ENGINE) of a running `dmi serve`")
    return settings


def _hooks(value: Any) -> tuple[str, ...]:
    """A list; or a text, which is a JSON list or names with commas or blanks between them."""
    if isinstance(value, str):
        value = json.loads(value) if value.lstrip().startswith("[") else value.replace(",", " ").split()
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(item, str) for item in value):
        raise HookError(f"hooks={value!r}: give names, for example blocks.*.hook_resid_post,logits")
    return tuple(value)
