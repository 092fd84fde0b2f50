"""A wheel, as pip would install it: nothing of this checkout is on its path."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

CAPTURE = """
import sys, torch, dmi
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
    def forward(self, x):
        return self.linear(x)
model = Model()
with dmi.attach(model, "linear", store=sys.argv[1]) as session, torch.no_grad():
    want = model(torch.randn(2, 3, 8))
    assert torch.equal(session.cache()["linear"], want)
print(dmi.__file__, dmi.engine.binary())
"""


def test_a_wheel_captures_and_reads(tmp_path: Path) -> None:
    build = [sys.executable, str(ROOT / "python" / "wheel.py"), "--cpu", "--out", str(tmp_path / "dist")]
    done = subprocess.run(build, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("dmi-*+cpu-py3-none-manylinux_*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entries = configparser.ConfigParser()
        entries.read_string(archive.read(next(name for name in names if name.endswith(".dist-info/entry_points.txt"))).decode())
    assert entries["vllm.general_plugins"]["dmi"] == "dmi.vllm.plugin:register", "vLLM would not find us"
    assert "dmi/bin/dmi" in names and "dmi/lib/libdmi.so" in names and "dmi/py.typed" in names
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, timeout=600)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DMI_BIN")} | {"PYTHONPATH": str(site)}
    run = subprocess.run([sys.executable, "-c", CAPTURE, str(tmp_path / "store")], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    package, engine = run.stdout.split()
    assert Path(package).is_relative_to(site) and Path(engine) == site / "dmi" / "bin" / "dmi"
    command = subprocess.run([str(site / "bin" / "dmi"), "runs", "--store", str(tmp_path / "store"), "--json"], env=environment, capture_output=True, text=True, timeout=600)
    assert command.returncode == 0, command.stderr
    assert '"rows":6' in command.stdout
