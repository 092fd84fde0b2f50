"""What a test of large counts came to, as a result of bench/: written where DMI_FIGURES names a folder, of DMI_FIGURES_COMMIT where this is no checkout."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("dmi_bench_result", ROOT / "bench" / "result" / "__init__.py")
assert _spec is not None and _spec.loader is not None
result = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(result)


def figures(name: str, command: str, rows: Sequence[dict[str, Any]]) -> None:
    """`command` redoes it from the root of the repository. `rows`: of `result.row`."""
    folder, machine, short = os.environ.get("DMI_FIGURES"), "", ""
    if not folder:
        return
    if os.environ.get("DMI_TEST_DEVICE") == "cuda":
        gpu = torch.cuda.get_device_name().replace(" ", "-")
        name, command = f"gpu_{name}", f"DMI_TEST_DEVICE=cuda {command}"
        machine, short = f"{gpu}, {platform.machine()}, torch {torch.__version__}", gpu.split("-")[1]
    result.write(name, rows, folder=Path(folder), commit=os.environ.get("DMI_FIGURES_COMMIT", ""), machine=machine, short=short, command=command)
