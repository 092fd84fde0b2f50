"""What is captured, changed while the model runs: `session.policy` and `store.policy`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dmi.client import Client

WATCHED = frozenset({"policy", "trigger", "governor"})
"""Codes of events that `watch` gives, as `dmi policy watch` does."""


class Policy:
    """The policy of a store (docs/format/policy.md). Changes take effect at the next step of every model attached to its engine."""

    def __init__(self, client: Callable[[], Client]) -> None:
        self._client = client

    def get(self, revision: int | None = None) -> dict[str, Any]:
        """The policy in force, or that of a revision that coverage names: `revision` {revision, time, document, text, off, lowered,
        why}, `rules` [{name, level, in_force, priority, sites, bytes_per_s, ladder}], `default`, `current`, and `unheld`,
        budgets that nobody holds because sessions are in complete mode."""
        return dict(self._client().get("/policy", {"revision": revision}))

    @property
    def text(self) -> str:
        """The document in force."""
        return str(self.get()["revision"]["text"])

    def set(self, document: str | Mapping[str, Any]) -> dict[str, Any]:
        """Put a document into force: YAML text, or the same as a dictionary. Raises ValueError with line and column of everything that
        is wrong, or that producers cannot do; then nothing changes."""
        if isinstance(document, str):
            return dict(self._client().put("/policy", document.encode()))
        text = json.dumps(document, indent=1)
        try:
            return dict(self._client().put("/policy", text.encode()))
        except ValueError as error:  # whose lines are of a text that nobody wrote
            lines = text.splitlines()
            numbers = sorted({int(number) for number in re.findall(r"\bline (\d+)", str(error)) if 0 < int(number) <= len(lines)})
            raise ValueError("\n".join([str(error), "where the document is, as JSON:", *(f"line {n}: {lines[n - 1]}" for n in numbers)])) from None

    def off(self) -> dict[str, Any]:
        """The brake: nothing is captured any more, whatever the document says."""
        return dict(self._client().post("/policy/off"))

    def on(self) -> dict[str, Any]:
        """Release the brake."""
        return dict(self._client().post("/policy/on"))

    def explain(self, request: str, name: str | None = None, *, position: int = 0, phase: str | None = None) -> list[dict[str, Any]]:
        """Which rule decides about a token's rows, by site: `site, rule, line, level, captured, why, bytes_per_s`. `name` may be a glob; `phase`
        "prefill" or "decode", or what the position is."""
        return list(self._client().list("/policy/explain", {"request": request, "site": name, "position": position, "phase": phase}))

    def watch(self) -> Iterator[dict[str, Any]]:
        """What the policy, its triggers and the governor do, as events (see `Store.events`): those among the latest 256, then as they come, until the
        engine stops. Raises NotCapturedError where nothing is captured."""
        yield from self._client().happenings(WATCHED)

    def revisions(self) -> list[dict[str, Any]]:
        """Everything that was ever in force, oldest first, without the documents' texts."""
        return list(self._client().list("/policy/revisions"))
