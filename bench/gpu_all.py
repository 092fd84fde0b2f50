#!/usr/bin/env python3
"""Everything that is to be tested and measured on a GPU, in the order of its worth, as far as there is time.

    python bench/gpu_all.py [--minutes 9.5] [--only NAME,...] [--again] [--list]

Each part runs in a process of its own, to a bound. What a part printed, and how it ended, is kept in build/gpu-all; one that came to its end is not run again until
--again, so that the same command goes on where it stopped. No part begins that would not end within the minutes, at its bound. The last lines are a table of all parts.
Tests run beside each other, one for each processor: it is those that they wait for, not the GPU. What measures runs alone, after them, in the order of PARTS.
Results go to bench/results. `make gpu-all` calls this with the Python of the GPU machine and the wheel on its path.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "build" / "gpu-all"
SAVE = "--save bench/results"


@dataclass(frozen=True)
class Part:
    name: str
    bound_s: int
    command: str  # behind this Python
    env: dict[str, str] = field(default_factory=dict)
    alone: bool = True
    """Nothing else runs on the GPU meanwhile."""


def tests(*files: str) -> str:
    return "-m pytest -q -o pythonpath= " + " ".join(f"python/tests/{file}" for file in files)


ON_CUDA = {"DMI_TEST_DEVICE": "cuda"}


def beside(name: str, bound_s: int, *files: str, only: str = "") -> Part:
    return Part(name, bound_s, f"{tests(*files)}{only and f' -k {shlex.quote(only)}'}", ON_CUDA, alone=False)


MODES = {"eager": "eager-eager or eager-sdpa", "graph": "graph-eager or graph-sdpa", "default": "default", "reduce-overhead": "reduce-overhead",
         "max-autotune": "max-autotune-eager or max-autotune-sdpa", "no-cudagraphs": "no-cudagraphs", "streams": "steps or session"}  # fmt: skip
PARTS = [
    Part("memory", 120, tests("gpu/test_memory.py"), ON_CUDA),  # it reads how much the whole GPU has left
    Part("native", 240, "cuda/build.py --gpu-test", alone=False),
    beside("ring", 240, "gpu/test_ring.py", "gpu/test_flush.py", "gpu/test_branches.py"),
    beside("levels-policy", 300, "test_levels.py", "test_selection.py", "test_policy_changes.py", "test_keep.py", "test_triggers.py"),
    *(beside(f"matrix-{mode}", 540, "gpu/test_matrix.py", only=only) for mode, only in MODES.items()),
    beside("compile", 420, "test_compile.py", "test_inductor.py", "test_lifetimes.py"),
    beside("compile-caches", 420, "test_compile_caches.py"),
    beside("fidelity", 480, "test_fidelity.py"),
    beside("generate", 480, "test_whole_path.py", "test_generate.py"),
    Part("overhead-38-graph", 420, f"bench/gpu_overhead.py residual:graph:1,8,32,64,128,256 --name gpu_overhead_38 {SAVE}"),
    Part("overhead-434-graph", 480, f"bench/gpu_overhead.py all:graph:1,8,32,64,128,256 --name gpu_overhead_434 {SAVE}"),
    Part("stats-434-graph", 420, f"bench/gpu_overhead.py all:graph:1,32,256:stats all:graph:256:stats:8 --name gpu_stats {SAVE}"),
    Part("latency", 300, f"bench/gpu_latency.py {SAVE}"),
    Part("drain", 180, f"bench/gpu_drain.py {SAVE}"),
    Part("seed-graph", 540, f"bench/gpu_seed.py --ways graph --name gpu_seed_graph --plot bench/results/gpu_seed_graph.svg {SAVE}"),
    Part("sweep", 300, f"bench/gpu_sweep.py --plot bench/results/gpu_sweep.svg {SAVE}"),
    Part("bytes", 90, "bench/bytes.py --device cuda --save"),
    Part("overload", 240, "bench/overload.py --device cuda --seconds 10 --save"),
    Part("overhead-38-eager", 480, f"bench/gpu_overhead.py residual:eager:1,8,32,64,128,256 --name gpu_overhead_38_eager {SAVE}"),
    Part("overhead-434-eager", 480, f"bench/gpu_overhead.py all:eager:1,32,256 --name gpu_overhead_434_eager {SAVE}"),
    Part("disk", 300, f"bench/gpu_overhead.py residual:graph:1,32,256 --sink disk --name gpu_overhead_disk {SAVE}"),
    Part("seed-eager", 540, f"bench/gpu_seed.py --ways eager --name gpu_seed_eager --plot bench/results/gpu_seed_eager.svg {SAVE}"),
    Part("soak", 560, "cuda/build.py --gpu-soak"),
    Part("sanitizers", 560, "cuda/build.py --gpu-sanitize"),
]


def kept(part: Part) -> dict[str, object]:
    path = KEPT / f"{part.name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def run(part: Part) -> dict[str, object]:
    """What a part prints that runs alone is shown; of others, how they ended."""
    KEPT.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    print(f"\n=== {part.name} (at most {part.bound_s} s)", flush=True)
    with (KEPT / f"{part.name}.txt").open("w") as log:
        process = subprocess.Popen([sys.executable, *shlex.split(part.command)], cwd=ROOT, env={**os.environ, **part.env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, start_new_session=True)  # fmt: skip
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        ended = None
        while True:
            for line in iter(process.stdout.readline, ""):
                log.write(line)
                if part.alone:
                    print(line, end="", flush=True)
            if ended is not None:
                break
            ended = process.poll()
            if ended is None and time.monotonic() - begin > part.bound_s:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.1)
    seconds = time.monotonic() - begin
    state = "ok" if ended == 0 else f"stopped at its bound of {part.bound_s} s" if seconds > part.bound_s else f"FAILED ({ended})"
    said = {"state": state, "seconds": round(seconds, 1)}
    (KEPT / f"{part.name}.json").write_text(json.dumps(said))
    if not part.alone:
        tail = (KEPT / f"{part.name}.txt").read_text().splitlines()[-1 if ended == 0 else -30 :]
        print("\n".join([f"\n=== {part.name}: {state}, {seconds:.0f} s", *tail]), flush=True)
    return said


def in_time(part: Part, end: float, first: Part) -> None:
    left = end - time.monotonic()
    if part.bound_s <= left or (part is first and left > 60):
        run(part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--only", default="", help="these parts alone, in this order")
    parser.add_argument("--again", action="store_true", help="also those that came to their end before")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    by_name = {part.name: part for part in PARTS}
    try:
        chosen = [by_name[name] for name in arguments.only.split(",")] if arguments.only else PARTS
    except KeyError as unknown:
        raise SystemExit(f"gpu_all: no part {unknown}; there are {', '.join(by_name)}") from None
    todo = [] if arguments.list else [part for part in chosen if arguments.again or not kept(part)]
    for alone, parts in itertools.groupby(todo, lambda part: part.alone):
        # They take their turn in the order that they have, and none that would not end; the first one is run in any case, to what there is.
        with ThreadPoolExecutor(1 if alone else os.cpu_count()) as turns:
            list(turns.map(functools.partial(in_time, end=end, first=todo[0]), parts))
    print()
    failed = False
    for part in PARTS:
        said = kept(part)
        state = str(said.get("state", "not run"))
        failed = failed or (bool(said) and state != "ok")
        print(f"{part.name:20} {state:36} {said.get('seconds', ''):>7} s" if said else f"{part.name:20} {state:36} (at most {part.bound_s} s)")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
