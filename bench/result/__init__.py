"""What a benchmark has measured, as bench/results/NAME.MACHINE.DATE.json: the same file as result.go writes, which says what is in it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "bench" / "results"


def row(metric: str, value: float, unit: str, *, baseline: float | None = None, ratio: float | None = None, goal: str = "", met: bool | None = None) -> dict[str, Any]:
    """One figure. The ratio is that to the baseline, unless another is given: the median of the rounds' own ratios, say."""
    if baseline is not None and ratio is None:
        ratio = value / baseline
    return {"metric": metric, "value": value, "unit": unit, "baseline": baseline, "ratio": ratio, "goal": goal, "met": met}


def write(name: str, rows: Sequence[dict[str, Any]], *, folder: Path = FOLDER, commit: str = "", machine: str = "", short: str = "", **more: Any) -> Path:
    """Writes a result of today. `commit`: where this is no checkout. `machine`: where its cores do not tell enough, `short` then in the
    file's name. `more`: torch, note, raw."""
    machine = machine or f"{os.cpu_count()}core-{platform.machine()}"
    if not commit:
        found = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = found.stdout.strip() or "unknown"
    date = datetime.now(timezone.utc).date().isoformat()
    command = "python " + " ".join(sys.argv)
    result = {"name": name, "command": command, "commit": commit, "machine": machine, "date": date, **more, "rows": list(rows)}
    path = folder / f"{name}.{short or machine}.{date}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    return path
