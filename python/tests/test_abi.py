"""The generated Python view of shared memory reads what a C program wrote."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dmi import _abi

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "abi" / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


def plain(value: object) -> object:
    """A ctypes value as JSON would have it, padding left out."""
    if isinstance(value, _abi.WordStruct):
        return value.value
    if isinstance(value, ctypes.Structure):
        out: dict[str, object] = {}
        for name, *_ in value._fields_:
            if name.rstrip("0123456789") in ("spare", "pad"):
                continue
            field = plain(getattr(value, name))
            if name == "counters":
                assert isinstance(field, dict)
                out |= field
            else:
                out[name] = field
        return out
    if isinstance(value, ctypes.Array):
        return [plain(item) for item in value]
    return value


@pytest.mark.parametrize("name", EXPECTED)
def test_golden_dump(name: str) -> None:
    struct = getattr(_abi, f"{name.capitalize()}Struct")
    dump = (GOLDEN / f"{name}.bin").read_bytes()
    assert len(dump) == ctypes.sizeof(struct)
    got = plain(struct.from_buffer_copy(dump))
    assert isinstance(got, dict)
    if name == "site":
        got["name"] = bytes(got["name"][: got["name_bytes"]]).decode()
    assert got == EXPECTED[name]


def test_every_struct_has_a_dump() -> None:
    structs = {name.removesuffix("Struct").lower() for name in vars(_abi) if name.endswith("Struct")}
    assert structs - {"word", "counters", "lane"} == set(EXPECTED)


def test_views_are_those_of_the_header() -> None:
    done = subprocess.run([sys.executable, ROOT / "abi" / "generate.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
