"""`make demo-vllm`: `vllm serve` of a real model, observed, an OpenAI client with a mixed load, and who watches: `dmi top` and the page.

What it shows at the end is read back from the store: what kinds of requests there were, and what became of their rows."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dmi import engine as engines
from dmi.demo import CONVERTED
from dmi.page import serve_page
from dmi.store import Store
from dmi.store import open as open_store
from dmi.terminal import bold, coloured, dim, progress

STORE = Path("captures/demo-vllm")
LOG = Path("captures/demo-vllm.log")
HOOKS = "tokens blocks.*.hook_resid_post logits"
NAME = "smollm2"
CLIENTS = 4
START_S = 1800
STAGES = {  # of vLLM's log
    "non-default args": "reading the configuration",
    "Initializing a V1 LLM engine": "starting the worker",
    "Starting to load model": "loading weights",
    "Warming up model for the compilation": "compiling, which takes longest",
    "Initial profiling/warmup run took": "warming up",
    "Starting vLLM server": "opening the port",
}
"""What is told of vLLM's start, by what its log says."""

KINDS: dict[str, dict[str, Any]] = {
    "everything": {},
    "opted out": {"dmi_capture": "off"},
    "last layer, where the answer begins": {"dmi_sites": "blocks.29.hook_resid_post", "dmi_positions": ["prompt[-1]", "generated[:4]"]},
    "tagged, with a reference": {"dmi_tags": "demo", "dmi_reference": 1},
    "broken off by its client": {},
}
QUESTIONS = ("What is the capital of France?", "Write a short poem about the sea.", "Explain photosynthesis to a child.", "List five animals.", "What is 12 times 12?")


def stage() -> str:
    """How far vLLM's start is."""
    text = LOG.read_text(errors="replace")
    return max(STAGES.items(), key=lambda item: text.rfind(item[0]))[1] if any(said in text for said in STAGES) else "importing PyTorch and vLLM"


@contextlib.contextmanager
def served() -> Iterator[str]:
    """The server's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    LOG.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "dmi.vllm.serve", str(CONVERTED), "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port),
               "--max-model-len", "1024", "--max-num-seqs", str(2 * CLIENTS), "--kv-cache-memory-bytes", str(512 << 20)]  # fmt: skip
    observe = {"DMI_HOOKS": HOOKS, "DMI_STORE": str(STORE.absolute()), "DMI_TEXT": "ids", "DMI_BIN": engines.binary()}
    print(dim(" ".join(f"{name}={value!r}" for name, value in observe.items() if name != "DMI_BIN") + " " + " ".join(command), coloured(sys.stdout)))
    with open(LOG, "wb") as out:
        server = subprocess.Popen(command, env={**os.environ, **observe}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        with progress(f"starting vllm serve ({LOG})", stage=stage, after_s=0.1, stream=sys.stdout):
            deadline = time.monotonic() + START_S
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(address + "/health", timeout=5):
                    break
                if server.poll() is not None or time.monotonic() > deadline:
                    sys.exit(f"demo: vllm serve did not start; the end of {LOG}:\n" + LOG.read_text(errors="replace")[-3000:])
                time.sleep(0.3)
        yield address
    finally:
        with contextlib.suppress(ProcessLookupError), progress("stopping vllm serve", after_s=0.5, stream=sys.stdout):
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


class Load:
    """Clients that ask until `seconds` are over, and at least once for each kind."""

    def __init__(self, address: str, seconds: float) -> None:
        from openai import OpenAI

        self._client = OpenAI(base_url=address + "/v1", api_key="none", max_retries=0, timeout=300)
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._next = 0
        self.ids: dict[str, str] = {}
        """Kind by response id."""
        self.references: list[dict[str, Any]] = []

    def run(self) -> None:
        with ThreadPoolExecutor(CLIENTS) as threads:
            for client in [threads.submit(self._ask_on) for _ in range(CLIENTS)]:
                client.result()

    def _ask_on(self) -> None:
        while True:
            with self._lock:
                number, self._next = self._next, self._next + 1
            if time.monotonic() > self._end and number >= len(KINDS):
                return
            self._ask(number)

    def _ask(self, number: int) -> None:
        kind = list(KINDS)[number % len(KINDS)]
        choose = random.Random(number)
        question = choose.choice(QUESTIONS) + " " * (number % 3)
        arguments: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": question}], "max_tokens": choose.randrange(8, 48), "temperature": 0}
        if KINDS[kind]:
            arguments["extra_body"] = {"vllm_xargs": KINDS[kind]}
        if kind.startswith("broken off"):
            with self._client.chat.completions.create(**{**arguments, "max_tokens": 200}, stream=True) as stream:
                answer_id = [part.id for _, part in zip(range(6), stream, strict=False)][0]
            reference = None
        else:
            answer = self._client.chat.completions.create(**arguments)
            answer_id, reference = answer.id, (getattr(answer, "kv_transfer_params", None) or {}).get("dmi")
        with self._lock:
            self.ids[answer_id] = kind
            if reference:
                self.references.append(reference)


def books(store: Store, load: Load, colour: bool) -> None:
    """By kind: requests, and what became of their rows."""
    known = {info["id"] for info in store.requests()}
    kinds: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    count: Counter[str] = Counter()
    for request, kind in load.ids.items():
        count[kind] += 1
        if request not in known:  # broken off before its first row
            continue
        for outcome, reasons in store.cache(request=request).coverage()["outcomes"].items():
            for reason, rows in reasons.items():
                kinds[kind][f"{outcome}({reason})" if reason else outcome] += rows
    print(bold("what was asked for, and what became of the rows", colour))
    for kind, outcomes in kinds.items():
        told = " + ".join(f"{rows} {outcome}" for outcome, rows in sorted(outcomes.items()))
        print(f"  {count[kind]:>3} {kind:<36} {told or 'no rows'}")


def main() -> None:
    seconds = float(os.environ.get("DEMO_SECONDS", "20"))
    colour = coloured(sys.stdout)
    with served() as address:
        page = serve_page(STORE)
        print(f"\n{bold('the page', colour)}    {page.address}   (Now follows what is captured)\n{bold('the server', colour)}  {address}/v1   (OpenAI's API, model {NAME!r})\n")
        load = Load(address, seconds)
        client = threading.Thread(target=load.run)
        client.start()
        top = [engines.binary(), "top", "--store", str(STORE)]
        watching = subprocess.Popen(top) if sys.stdout.isatty() else None
        try:
            if watching is None:
                asking = f"asking, {CLIENTS} clients, {seconds:g} s and what is under way then"
                with progress(asking, after_s=0.1, stream=sys.stdout):
                    client.join(seconds / 2)
                    subprocess.run([*top, "--once"], check=True)
                    client.join()
            client.join()
        finally:
            if watching is not None:
                watching.terminate()
                watching.wait()
        if not load.ids:
            sys.exit(f"demo: no request was answered; see {LOG}")
        reference = load.references[-1]
        if not reference["observed"]:
            sys.exit(f"demo: the model was served, unobserved: {reference['reason']}; see {LOG}")
        with open_store(STORE) as store:
            store._fresh().post("/flush")
            print()
            books(store, load, colour)
        print(f"""
{bold("a response's reference to its captures", colour)}
  {reference}

{bold("look further", colour)}
  bin/dmi requests  --store {STORE} --tag demo
  bin/dmi ls        --store {STORE} --request {reference['request']}
  bin/dmi get       --store {STORE} --request {reference['request']} --site blocks.29.hook_resid_post --out resid29.safetensors
  bin/dmi coverage  --store {STORE} --request {reference['request']}""")
        if sys.stdout.isatty():
            print(f"  curl -s {address}/metrics | grep dmi_vllm\n\nCtrl-C ends the server; the captures stay.")
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()


if __name__ == "__main__":
    main()
