"""What can go wrong between a session or a reader and the engine. Each message says what was attempted, on what, why it
failed and what to do next.

Elsewhere: `HookError` (hook.py) for hooks that cannot be placed, `CaptureError` and `NativeError` (native.py).
"""

from __future__ import annotations

from typing import Any


class EngineError(RuntimeError):
    """The engine cannot be found, started or reached, it refused something, or it failed."""

    def __init__(self, message: str, *, code: str = "") -> None:
        super().__init__(message)
        self.code = code
        """The engine's own word for what went wrong (`store`, `stopping`, `io`, ...), or ""."""


class NotCapturedError(KeyError):
    """No such request, run or site in what is asked."""

    def __str__(self) -> str:  # KeyError would show the message's repr
        return str(self.args[0]) if self.args else ""


class RaggedError(ValueError):
    """A batch whose requests have different lengths has no one tensor: name a request."""


class IncompleteError(RuntimeError):
    """Rows that were asked for are not all there. `partial=True` returns those that are."""

    def __init__(self, message: str, coverage: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.coverage = coverage
        """What became of the rows: `{rows, complete, outcomes: {outcome: {reason: rows}}, ranges: [...]}`, or None."""


class CaptureWarning(UserWarning):
    """Something is not, or may not be, captured as asked; the message says what, and the books have it exactly."""
