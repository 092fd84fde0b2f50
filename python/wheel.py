"""Build the wheels: the Python package, libdmi and the engine in one file, for any Python and any torch from 2.11 on.

    python python/wheel.py [--out dist]

Gives dist/dmi-VERSION-py3-none-manylinux_...whl, and the same as VERSION+cpu with a libdmi that captures CPU tensors only, for machines
without a GPU. bin/dmi must be built (`make wheel` does). The oldest C library that they run on is that which their parts ask for.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PYTHON = Path(__file__).resolve().parent
ROOT = PYTHON.parent


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"build wheels: failed: {' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def oldest_glibc(library: Path) -> tuple[int, int]:
    asked = re.findall(r"GLIBC_(\d+)\.(\d+)", run("objdump", "-p", library))
    return max((int(major), int(minor)) for major, minor in asked)


def build(out: Path, engine: Path, cpu: bool) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "dmi"
        shutil.copytree(PYTHON / "src", tree / "src", ignore=shutil.ignore_patterns("__pycache__", "lib", "bin", "*.egg-info"))
        for kept in (PYTHON / "pyproject.toml", ROOT / "LICENSE"):
            shutil.copy(kept, tree)
        package = tree / "src" / "dmi"
        library = package / "lib" / "libdmi.so"
        run(sys.executable, ROOT / "cuda" / "build.py", "--to", library, *(["--cpu"] if cpu else []))
        (package / "bin").mkdir()
        shutil.copy(engine, package / "bin" / "dmi")
        if cpu:
            version = package / "version.py"
            version.write_text(re.sub(r'VERSION = "([^"]+)"', r'VERSION = "\1+cpu"', version.read_text()))
        major, minor = oldest_glibc(library)
        tag = f"manylinux_{major}_{minor}_{platform.machine()}"
        made = Path(folder) / "wheel"
        run(sys.executable, "-m", "pip", "wheel", tree, "--no-deps", "--no-build-isolation", "--wheel-dir", made,
            f"--config-settings=--build-option=--plat-name={tag}", "--config-settings=--build-option=--python-tag=py3")  # fmt: skip
        (wheel,) = made.glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(wheel, out / wheel.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--cpu", action="store_true", help="only the one without CUDA")
    arguments = parser.parse_args()
    engine = ROOT / "bin" / "dmi"
    if not engine.exists():
        raise SystemExit("build wheels: bin/dmi is not there; `make wheel` builds it first")
    for cpu in (True,) if arguments.cpu else (False, True):
        wheel = build(arguments.out, engine, cpu)
        print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
