#!/usr/bin/env python3
"""What clients of `vllm serve` feel of an engine that is stopped, killed and started again, on the CPU.

    .venv-vllm/bin/python bench/vllm_engine_gone.py [--rounds 8] [--seconds 4] [--clients 2] [--save]

Two servers of the same tiny model behind vLLM's OpenAI front end, each with a worker process of its own: one is observed by nobody; of the other all residuals and
logits are captured in best-effort mode into a running `dmi serve`. Clients ask one request after the other, all of one server, the other idle. A round is seven
phases: unobserved; the engine there; stopped (SIGSTOP); there; killed (SIGKILL); starting again; unobserved. Then it is ended (SIGTERM) and started for the next.
Figures are a request's time by phase, median and 99th percentile, against those of the unobserved server; and for the phases without an
engine, the median over rounds of their ratio to "there" in the same round, beside the spread of that ratio between two phases that do not differ: the two
unobserved ones. The model waits for nobody in this mode, so that what is left is noise, and what an engine that starts takes of two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import openai
import result

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "python" / "src"), str(ROOT / "python" / "tests")]

from served import VOCABULARY, model_on_disk, tokenizer_on_disk  # noqa: E402
from vllm_server import Daemon, daemon, serving  # noqa: E402

PLAIN, THERE, STOPPED, KILLED, AGAIN = "unobserved", "engine there", "engine stopped", "engine killed", "engine starting again"
Times = dict[str, list[list[float]]]
"""By phase, of each turn."""


def started(stack: contextlib.ExitStack) -> tuple[str, str, Daemon]:
    """Servers of a tiny model, unobserved and observed, and the engine."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dmi-vllm-")))
    engine = stack.enter_context(daemon(folder / "captures"))
    model = model_on_disk(folder / "model")
    tokenizer_on_disk(model, VOCABULARY)
    observe = {"DMI_HOOKS": "tokens blocks.*.hook_resid_post logits", "DMI_ENGINE": str(engine.socket), "DMI_RING_MIB": "64", "DMI_STAGING_MIB": "64"}
    arguments = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager",
                 "--distributed-executor-backend", "mp"]  # fmt: skip
    addresses = []
    for name, environ in (("unobserved", {"DMI_DISABLE": "1"}), ("observed", observe)):
        print(f"starting vllm serve, {name}: a minute or two", flush=True)
        addresses.append(stack.enter_context(serving(folder / name, model, *arguments, environ=environ))[0])
    return addresses[0], addresses[1], engine


class Clients:
    """They ask the server of the phase that it is; a request counts that begins and ends in one phase."""

    def __init__(self, count: int, plain: str, observed: str) -> None:
        self._servers = {name: openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0, timeout=300) for name, address in (("plain", plain), ("observed", observed))}
        self._turn = 0
        self._phase = PLAIN
        self._took: dict[tuple[str, int], list[float]] = defaultdict(list)
        self._over = threading.Event()
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._ask_on, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask_on(self, number: int) -> None:
        choose = random.Random(number)
        while not self._over.is_set():
            prompt = [choose.randrange(VOCABULARY) for _ in range(24)]
            turn, phase = self._turn, self._phase
            ask = self._servers["plain" if phase == PLAIN else "observed"].completions.create
            begun = time.perf_counter()
            try:
                ask(model="model", prompt=prompt, max_tokens=16, temperature=0, extra_body={"ignore_eos": True})
            except Exception as error:
                self.failures.append(f"{phase}: {error}")
                continue
            if turn == self._turn:
                self._took[phase, turn].append(time.perf_counter() - begun)

    def during(self, phase: str, seconds: float) -> None:
        self._phase, self._turn = phase, self._turn + 1
        time.sleep(seconds)

    def forget(self) -> None:
        self._turn += 1  # what is under way counts for no phase
        self._took = defaultdict(list)

    def end(self) -> Times:
        self._over.set()
        for thread in self._threads:
            thread.join()
        times: Times = defaultdict(list)
        for (phase, _), took in sorted(self._took.items(), key=lambda item: item[0][1]):
            times[phase].append(took)
        return times


def rounds(given: argparse.Namespace, clients: Clients, engine: Daemon) -> None:
    for phase in (THERE, PLAIN):
        clients.during(phase, given.seconds)
    clients.forget()  # they warmed up
    for number in range(given.rounds):
        clients.during(PLAIN, given.seconds)
        clients.during(THERE, given.seconds)
        engine.signal(signal.SIGSTOP)
        clients.during(STOPPED, given.seconds)
        engine.signal(signal.SIGCONT)
        clients.during(THERE, given.seconds)
        engine.signal(signal.SIGKILL)
        clients.during(KILLED, given.seconds)
        starting = threading.Thread(target=engine.start)
        starting.start()
        clients.during(AGAIN, given.seconds)
        starting.join()
        clients.during(PLAIN, given.seconds)
        engine.signal(signal.SIGTERM)
        engine.start()
        print(f"round {number + 1} of {given.rounds}", flush=True)


def p99(values: Sequence[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def figures(times: Times, failures: Sequence[str]) -> list[dict[str, object]]:
    everything = {phase: [t for turn in turns for t in turn] for phase, turns in times.items()}
    rows = [result.row("requests that failed", len(failures), "requests", goal="0", met=not failures)]
    for phase in (PLAIN, THERE, STOPPED, KILLED, AGAIN):
        for name, pick in (("median", statistics.median), ("99th percentile", p99)):
            baseline = None if phase == PLAIN else 1e3 * pick(everything[PLAIN])
            rows.append(result.row(f"a request, {phase}, {name} of {len(everything[phase])}", 1e3 * pick(everything[phase]), "ms", baseline=baseline))
    middle = {phase: [statistics.median(turn) for turn in turns] for phase, turns in times.items()}
    same = [second / first for first, second in zip(middle[PLAIN][::2], middle[PLAIN][1::2], strict=True)]
    noise = max(abs(ratio - 1) for ratio in same)
    rows.append(result.row("noise: how far apart two unobserved phases of a round are at most, of medians", noise, "ratio"))
    for phase, before in ((STOPPED, 0), (KILLED, 1), (AGAIN, 1)):
        ratio = statistics.median(a / b for a, b in zip(middle[phase], middle[THERE][before::2], strict=True))
        rows.append(result.row(f"{phase}, against there in the same round", ratio, "ratio", goal="within the noise", met=ratio <= 1 + noise))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4, help="of each phase")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        plain, observed, engine = started(stack)
        clients = Clients(given.clients, plain, observed)
        try:
            rounds(given, clients, engine)
        finally:
            times = clients.end()
    rows = figures(times, clients.failures)
    for row in rows:
        met = {None: "", True: "  yes", False: "  NO"}[row["met"]]  # type: ignore[index]
        print(f"{row['metric']:82} {row['value']:10.3f} {row['unit']}" + (f"  x{row['ratio']:.3f}" if row["ratio"] else "") + met)
    for failure in clients.failures[:5]:
        print(failure)
    if given.save:
        load = ", ".join(f"{value:.0f}" for value in os.getloadavg())
        note = f"{given.rounds} rounds of {given.seconds:g} s a phase, {given.clients} clients; load averages of the machine at the end: {load}"
        raw = {phase: [[round(1e3 * t, 3) for t in turn] for turn in turns] for phase, turns in times.items()}
        print("written to", result.write("vllm_engine_gone", rows, note=note, raw=raw))
    if clients.failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
