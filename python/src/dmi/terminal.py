"""Words and colours for a person at a terminal. Without one, or with NO_COLOR set, plain characters."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

SHADES = " .:-=+*#%@"
# Dark blue over green to yellow: perceptually even, in the terminal's 256 colours.
RAMP = (17, 18, 19, 25, 31, 37, 36, 35, 71, 107, 143, 179, 185, 221, 227)


def coloured(stream: TextIO) -> bool:
    """Whether escape codes make sense there."""
    return "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb" and stream.isatty()


def bold(text: str, colour: bool) -> str:
    return f"\033[1m{text}\033[0m" if colour else text


def dim(text: str, colour: bool) -> str:
    return f"\033[2m{text}\033[0m" if colour else text


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def heat_map(rows: Sequence[Sequence[float | None]], names: Sequence[str], low: float, high: float, *, colour: bool, cell: int = 1) -> list[str]:
    """One line per row: its name, and a cell per value, shaded by the value's logarithm between `low` and `high`, and no further
    outside. None is drawn as `?`: a value that is not there must not look like a small one."""
    bottom, span = math.log(low), max(math.log(high) - math.log(low), 1e-9)
    width = max(map(len, names), default=0)
    lines = []
    for name, row in zip(names, rows, strict=True):
        cells = []
        for value in row:
            if value is None:
                cells.append("\033[0m" * colour + "?" * cell)
                continue
            share = min(1.0, max(0.0, (math.log(value) - bottom) / span)) if value > 0 else 0.0
            if colour:
                cells.append(f"\033[48;5;{RAMP[round(share * (len(RAMP) - 1))]}m{' ' * cell}")
            else:
                cells.append(SHADES[round(share * (len(SHADES) - 1))] * cell)
        lines.append(f"{name:>{width}} " + "".join(cells) + "\033[0m" * colour)
    return lines


def legend(low: float, high: float, colour: bool) -> str:
    """The scale of a heat map."""
    ramp = "".join(f"\033[48;5;{code}m " for code in RAMP) + "\033[0m" if colour else SHADES
    return f"{low:.3g} {ramp} {high:.3g}"


@contextmanager
def progress(what: str, *, stage: Callable[[], str] = str, after_s: float = 1.0, stream: TextIO | None = None) -> Iterator[None]:
    """Say on stderr what is going on and for how long, once it has taken `after_s` seconds. `stage`: how far it is by now, in words."""
    out = sys.stderr if stream is None else stream
    live = out.isatty()
    done = threading.Event()
    begun = time.monotonic()
    shown = False

    def show() -> None:
        nonlocal shown
        pause = after_s
        while not done.wait(pause):
            shown = True
            said = f"{what} … {time.monotonic() - begun:.0f} s" + (f", {now}" if (now := stage()) else "")
            out.write(f"\r{said}\033[K" if live else f"{said}\n")
            out.flush()
            pause = 0.5 if live else 10.0

    thread = threading.Thread(target=show, name="dmi-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if shown:
            seconds = time.monotonic() - begun
            out.write(f"\r{what}: {seconds:.1f} s\033[K\n" if live else f"{what}: {seconds:.1f} s\n")
            out.flush()
