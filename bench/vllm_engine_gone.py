#!/usr/bin/env python3
"""What clients of `vllm serve` feel of an engine that is stopped, killed and started again, on the CPU.

    .venv-vllm/bin/python bench/vllm_engine_gone.py [--rounds 6] [--seconds 5] [--clients 2] [--server http://HOST:PORT --store DIR] [--save]

A tiny model behind vLLM's OpenAI server, a worker process of its own, all residuals and logits captured in best-effort mode into a running `dmi serve`.
Clients ask one request after the other. A round is six phases: the engine is there; stopped (SIGSTOP); there; killed (SIGKILL); started again; ended (SIGTERM)
and started. The figures are the medians and 99th percentiles of a request's time by phase, against those of "there" in the same rounds, in turns; and
how many requests failed. The model waits for nobody in this mode, so that what is left is noise, and what an engine that starts takes of two cores. With `--server`, of one that runs already and captures into the `dmi serve` of `--store`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import openai
import result

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "python" / "src"), str(ROOT / "python" / "tests")]

from dmi import engine as engines  # noqa: E402
from served import VOCABULARY, model_on_disk, tokenizer_on_disk  # noqa: E402
from vllm_server import Daemon, daemon, serving  # noqa: E402

THERE, STOPPED, KILLED, AGAIN = "engine there", "engine stopped", "engine killed", "engine starting again"


class Found:
    """The `dmi serve` of a store, which somebody else has started."""

    def __init__(self, store: Path) -> None:
        self.store = store

    def signal(self, which: signal.Signals) -> None:
        os.kill(json.loads((self.store / "engine.json").read_text())["pid"], which)
        while which in (signal.SIGKILL, signal.SIGTERM) and engines.live(self.store) is not None:
            time.sleep(0.02)

    def start(self) -> None:
        process = subprocess.Popen([engines.binary(), "serve", "--store", str(self.store)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None and b"engine_id" in process.stdout.readline()


def started(stack: contextlib.ExitStack) -> tuple[str, Daemon]:
    """A server of a tiny model, and its engine."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dmi-vllm-")))
    engine = stack.enter_context(daemon(folder / "captures"))
    model = model_on_disk(folder / "model")
    tokenizer_on_disk(model, VOCABULARY)
    observe = {"DMI_HOOKS": "tokens blocks.*.hook_resid_post logits", "DMI_ENGINE": str(engine.socket), "DMI_RING_MIB": "64", "DMI_STAGING_MIB": "64"}
    arguments = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager",
                 "--distributed-executor-backend", "mp"]  # fmt: skip
    print("starting vllm serve, a minute or two", flush=True)
    address, _ = stack.enter_context(serving(folder / "vllm", model, *arguments, environ=observe))
    return address, engine


def phases(given: argparse.Namespace, address: str, engine: Daemon | Found) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds that requests took, by phase; and what failed."""
    took: dict[str, list[float]] = defaultdict(list)
    failures: list[str] = []
    now, over = [""], threading.Event()

    def client(number: int) -> None:
        ask = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0, timeout=300).completions.create
        choose = random.Random(number)
        while not over.is_set():
            prompt = [choose.randrange(VOCABULARY) for _ in range(24)]
            phase, begun = now[0], time.perf_counter()
            try:
                ask(model="model", prompt=prompt, max_tokens=16, temperature=0, extra_body={"ignore_eos": True})
            except Exception as error:
                failures.append(f"{phase}: {error}")
                continue
            if phase == now[0]:  # within one phase
                took[phase].append(time.perf_counter() - begun)

    def during(phase: str) -> None:
        now[0] = phase
        time.sleep(given.seconds)
        now[0] = ""

    threads = [threading.Thread(target=client, args=(number,)) for number in range(given.clients)]
    for thread in threads:
        thread.start()
    time.sleep(given.seconds)  # warming up
    for number in range(given.rounds):
        during(THERE)
        engine.signal(signal.SIGSTOP)
        during(STOPPED)
        engine.signal(signal.SIGCONT)
        during(THERE)
        engine.signal(signal.SIGKILL)
        during(KILLED)
        starting = threading.Thread(target=engine.start)
        starting.start()
        during(AGAIN)
        starting.join()
        engine.signal(signal.SIGTERM)
        engine.start()
        print(f"round {number + 1} of {given.rounds}: " + ", ".join(f"{phase} {len(times)}" for phase, times in took.items() if phase), flush=True)
    over.set()
    for thread in threads:
        thread.join()
    return took, failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=5, help="of each phase")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--server", help="a vllm serve that runs already; with --store")
    parser.add_argument("--store", type=Path, help="what it captures into, by a `dmi serve`")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        address, engine = (given.server, Found(given.store)) if given.server else started(stack)
        took, failures = phases(given, address, engine)
    rows = [result.row("requests that failed", len(failures), "requests", goal="0", met=not failures)]
    took.pop("", None)
    there = sorted(took[THERE])
    for phase, times in took.items():
        times.sort()
        for name, pick in (("median", statistics.median), ("99th percentile", lambda t: t[int(0.99 * (len(t) - 1))])):
            baseline = None if phase == THERE else 1e3 * pick(there)
            rows.append(result.row(f"a request, {phase}, {name} of {len(times)}", 1e3 * pick(times), "ms", baseline=baseline))
    for row in rows:
        print(f"{row['metric']:55} {row['value']:10.2f} {row['unit']}" + (f"  x{row['ratio']:.3f}" if row["ratio"] else ""))
    for failure in failures[:5]:
        print(failure)
    if given.save:
        load = ", ".join(f"{value:.0f}" for value in os.getloadavg())
        note = f"{given.rounds} rounds of {given.seconds:g} s a phase, {given.clients} clients; load averages of the machine at the end: {load}"
        print("written to", result.write("vllm_engine_gone", rows, note=note, raw={phase: [round(1e3 * t, 3) for t in times] for phase, times in took.items()}))
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
