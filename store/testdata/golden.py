"""What the golden stores answer: from the rule by which their rows were made, and by none of DMI's code.

    golden.py            writes vN.json beside this file
    golden.py --check    compares them, and reads sealed segments with the safetensors library: `pip install safetensors numpy`
"""

import json
import pathlib
import sys

import numpy as np
from safetensors import deserialize

HERE = pathlib.Path(__file__).parent

Rows = dict[str, dict[str, str]]


def row(session: int, request: int, site: int, attempt: int, position: int, size: int) -> str:
    """The bytes of a row, as hexadecimal digits."""
    i = np.arange(size, dtype=np.uint32)
    return (i * 7 + request * 31 + site * 5 + position * 3 + attempt * 11 + (session - 1) * 17).astype(np.uint8).tobytes().hex()


def rows(session: int, request: int, site: int, size: int, *runs: tuple[int, int, int]) -> dict[str, str]:
    """Of one site, for runs of attempt, first position and count."""
    return {f"{p}@{a}": row(session, request, site, a, p, size) for a, first, count in runs for p in range(first, first + count)}


FIRST_REQUEST = {
    "run": "r00000001", "tokens": [5, 6, 7, 8], "text": "hello", "pieces": None, "reason": "finished",
    "rows": {
        "blocks.0.hook_resid_post full": rows(1, 1, 0, 16, (0, 0, 3)),
        "blocks.0.attn.hook_pattern full": rows(1, 1, 1, 32, (0, 0, 3)),
        "expert full": rows(1, 1, 2, 16, (0, 1, 1)),
    },
}  # fmt: skip
FIRST_SITES = ["blocks.0.hook_resid_post resid", "blocks.0.attn.hook_pattern", "expert"]
FIRST_BOOKS = ["s00000001 captured  full 7", "s00000001 dropped ring_full full 2"]
RUNS = {"r00000001": ["demo", "topic=capitals"]}


def second(request: int, resid: list[tuple[int, int, int]], statistics: list[tuple[int, int, int]]) -> Rows:
    """Rows of the second session: int8 ones are a scale and a code each of 8 elements, statistics 8 figures."""
    return {
        "blocks.0.hook_resid_post full": rows(2, request, 0, 16, *resid),
        "blocks.0.hook_mlp_out int8": rows(2, request, 1, 4 + 8, *resid),
        "blocks.0.hook_attn_out stats": rows(2, request, 2, 4 * 8, *statistics),
        "tokens full": rows(2, request, 3, 8, *statistics),
    }


def format2(cut: str) -> dict:
    """Both sessions, the last row of the second one booked as cut off for a reason."""
    again = [(0, 0, 8), (1, 4, 2)]
    nobody = {"run": "", "tokens": None, "text": "", "pieces": None, "reason": ""}
    return {
        "formats": {"store": 1, "segment": 1, "manifest": 2, "catalogue": 2},
        "sites": {"s00000001": FIRST_SITES, "s00000002": ["blocks.0.hook_resid_post", "blocks.0.hook_mlp_out", "blocks.0.hook_attn_out", "tokens"]},
        "runs": RUNS,
        "requests": {
            "r00000001.0": FIRST_REQUEST,
            "r00000002.0": nobody | {"tokens": [9, 10], "text": "kept", "pieces": ["ke", "pt"], "reason": "finished",
                                     "rows": second(1, [(0, 0, 8)], [(0, 0, 6)])},
            "r00000002.1": nobody | {"rows": {}},  # deleted
            "r00000002.2": nobody | {"rows": second(3, again, again)},
        },
        "produced": 9 + 100,
        "books": FIRST_BOOKS + ["s00000002 captured  full 46", "s00000002 captured  int8 24", "s00000002 captured  stats 22",
                                "s00000002 skipped policy full 4", f"s00000002 {cut} full 4"],
        "expired": {"s00000002": 3 * 2 * 4},
        "resume": {"ab" * 16: 2, "cd" * 16: 12},
    }  # fmt: skip


def format3(cut: str) -> dict:
    """Of the last step that was captured, the first site's two rows were given again."""
    answers = format2(cut)
    books = ["s00000002 captured  full 44" if line == "s00000002 captured  full 46" else line for line in answers["books"]]
    books.insert(books.index("s00000002 captured  stats 22") + 1, "s00000002 captured repeated full 2")
    return answers | {"formats": answers["formats"] | {"manifest": 3}, "books": books}


def format4(cut: str) -> dict:
    """The catalogue has lists of chunks: the answers are the same."""
    answers = format3(cut)
    return answers | {"formats": answers["formats"] | {"catalogue": 3}}


STORES = {
    "v1": {
        "formats": {"store": 1, "segment": 1, "manifest": 1, "catalogue": 1},
        "sites": {"s00000001": FIRST_SITES},
        "runs": RUNS,
        "requests": {"r00000001.0": FIRST_REQUEST},
        "produced": 9,
        "books": FIRST_BOOKS,
        "expired": {},
        "resume": {"ab" * 16: 2},
    },
    "v2": format2("dropped ring_full"),
    "v2-killed": format2("lost engine_exit"),
    "v3": format3("dropped ring_full"),
    "v3-killed": format3("lost engine_exit"),
    "v4": format4("dropped ring_full"),
    "v4-killed": format4("lost engine_exit"),
}


def in_segments(store: pathlib.Path) -> dict[tuple[str, str, str], str]:
    """Rows in sealed segments, by request, site and POSITION@ATTEMPT."""
    found = {}
    for segment in sorted((store / "segments").glob("*.safetensors")):
        for name, tensor in deserialize(segment.read_bytes()):
            if name.startswith("dmi."):
                continue
            request, site, positions = name.split("#")[0].split("/")
            positions, _, attempt = positions.partition("@")
            first, end = map(int, positions.split(":"))
            data = np.frombuffer(bytes(tensor["data"]), np.uint8).reshape(end - first, -1)
            for i, bytes_of_row in enumerate(data):
                found[request, site, f"{first + i}@{attempt or 0}"] = bytes_of_row.tobytes().hex()
    return found


def check(name: str, answers: dict) -> None:
    if json.loads((HERE / f"{name}.json").read_text()) != answers:
        raise SystemExit(f"{name}.json is not what {sys.argv[0]} says: run it without --check, and look at what changes")
    expected = {
        (request, site.split(" ")[0], at): data
        for request, r in answers["requests"].items() for site, by_position in r["rows"].items() for at, data in by_position.items()
    }  # fmt: skip
    found = in_segments(HERE / name)
    for at, data in found.items():
        if expected.get(at) != data:
            raise SystemExit(f"{name}: row {at} is {data} in its segment, and should be {expected.get(at)}")
    if not name.endswith("-killed") and found.keys() != expected.keys():
        raise SystemExit(f"{name}: rows {sorted(expected.keys() - found.keys())} are in no sealed segment")
    print(f"{name}: {len(found)} of {len(expected)} rows in sealed segments, as they should be")


for name, answers in STORES.items():
    if sys.argv[1:] == ["--check"]:
        check(name, answers)
    else:
        (HERE / f"{name}.json").write_text(json.dumps(answers, indent=1) + "\n")
