"""`transformers serve --continuous-batching`, observed: an OpenAI client's requests, and their captures by the ids that the client knows."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import dmi
from dmi.serving import Observed, _escaped, main
from dmi.vllm.settings import Settings
from observed import fresh_seed, model_of
from served import free_port, tokenizer_on_disk

openai = pytest.importorskip("openai", reason="the oldest supported environment has what `transformers serve` needs")
SRC = Path(__file__).parents[1] / "src"
WORDS = 128


def on_disk(folder: Path) -> Any:
    """A tiny random model, and a tokenizer whose words are w0, w1, ..."""
    model = model_of("llama", "sdpa", eos_token_id=None)
    model.save_pretrained(folder)
    tokenizer_on_disk(folder, WORDS)
    return model


@contextlib.contextmanager
def served(folder: Path, model: Path, *arguments: str, **environment: str) -> Iterator[tuple[str, Path, subprocess.Popen[bytes]]]:
    """The server's address and its log."""
    port = free_port()
    log = folder / "log"
    command = [sys.executable, "-m", "dmi.serving", str(model), "--device", "cpu", "--dtype", "float32", "--attn-implementation", "sdpa",
               "--host", "127.0.0.1", "--port", str(port), *arguments]  # fmt: skip
    with open(log, "wb") as out:
        server = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SRC), "HF_HUB_OFFLINE": "1", **environment}, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 900
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert server.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", log, server
    finally:
        if server.poll() is None:
            server.kill()
        server.wait()


BATCHED = ("--continuous-batching", "--cb-block-size", "8", "--cb-num-blocks", "128", "--cb-max-batch-tokens", "32")


def ask(address: str, model: Path, prompts: dict[str, list[int]]) -> dict[str, Any]:
    """All at once; each with its own id."""
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)

    def one(item: tuple[str, list[int]]) -> Any:
        return client.completions.create(model=str(model), prompt=" ".join(f"w{t}" for t in item[1]), max_tokens=6, temperature=0, extra_headers={"X-Request-ID": item[0]})

    with ThreadPoolExecutor(len(prompts)) as threads:
        return dict(zip(prompts, threads.map(one, prompts.items()), strict=True))


def check_options(address: str, model: Path, captures: Path) -> None:
    """What a request says of itself holds, and its response says where its captures are; also as clients of vLLM say it, and of a stream."""
    client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600)

    def one(key: str, **body: Any) -> Any:
        return client.completions.create(model=str(model), prompt="w5 w6 w7", max_tokens=6, temperature=0, extra_headers={"X-Request-ID": key}, extra_body=body)

    first, last = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
    plain = one("plain", dmi_reference=1)
    off = one("off", dmi_capture="off", dmi_reference=1)
    ends = one("ends", vllm_xargs={"dmi_positions": ["prompt[-1]", "generated[:2]"], "dmi_sites": last, "dmi_tags": "trial"})
    wrong = one("wrong", dmi_layers=3)
    stream = client.completions.create(model=str(model), prompt="w5 w6 w7", max_tokens=6, temperature=0, stream=True, extra_headers={"X-Request-ID": "stream"},
                                       extra_body={"dmi_positions": "prompt[0]"})  # fmt: skip
    texts = {"".join(part.choices[0].text for part in stream if part.choices), *(answer.choices[0].text for answer in (plain, off, ends, wrong))}
    assert len({text.strip() for text in texts}) == 1, f"what is captured changes what is answered: {texts}"
    assert off.dmi == {"observed": False, "reason": "the request asked for nothing to be captured"} and not hasattr(ends, "dmi")
    store = dmi.open(captures)
    assert plain.dmi["observed"] and plain.dmi["request"] == "plain" and plain.dmi["store"] == str(captures)
    assert [info["id"] for info in store.requests(session=plain.dmi["session"], labels={"hf_request": "plain"})] == ["plain"]
    store._fresh().post("/flush")

    def kept(request: str, site: str) -> list[int]:
        books = store.cache(request=request).coverage(site)["outcomes"]
        assert set(books) <= {"captured", "skipped", "cached"}, books
        return store.cache(request=request).positions_of(site).tolist() if "captured" in books else []

    assert kept("plain", last) == kept("plain", first) == list(range(8))
    assert kept("ends", last) == [2, 3, 4] and kept("ends", first) == [] and [info["id"] for info in store.requests(tag="trial")] == ["ends"]
    assert kept("stream", first) == kept("stream", last) == [0]
    for nothing in ("off", "wrong"):
        assert kept(nothing, first) == kept(nothing, last) == kept(nothing, "tokens") == []
    assert "no option" in next(info["labels"]["dmi.error"] for info in store.requests() if info["id"] == "wrong")


def test_one_after_the_other(tmp_path: Path) -> None:
    """Without continuous batching, by `generate` in a thread of the server's."""
    fresh_seed()
    folder = tmp_path / "model"
    on_disk(folder)
    with served(tmp_path, folder, DMI_HOOKS="blocks.*.hook_resid_post, tokens", DMI_STORE=str(tmp_path / "captures"), DMI_MODE="complete") as (address, _, _):
        check_options(address, folder, tmp_path / "captures")


def test_a_clients_request_has_its_capture(tmp_path: Path) -> None:
    fresh_seed()
    folder = tmp_path / "model"
    model = on_disk(folder)
    prompts = {f"chat-{i}": torch.randint(3, WORDS, (int(torch.randint(1, 40, ())),)).tolist() for i in range(6)}
    hooks = "blocks.*.hook_resid_post, tokens"
    with served(tmp_path, folder, *BATCHED, DMI_HOOKS=hooks, DMI_STORE=str(tmp_path / "captures"), DMI_MODE="complete") as (address, log, server):
        answers = ask(address, folder, prompts)
        check_options(address, folder, tmp_path / "captures")
        with urllib.request.urlopen(address.removesuffix("/v1") + "/metrics", timeout=300) as answer:
            metrics = answer.read().decode()
        assert f'dmi_transformers_observed{{model="{folder}",reason=""}} 1\n' in metrics and f'dmi_transformers_sites{{model="{folder}"}} 3\n' in metrics
        assert all(answers[key].id == key for key in prompts)
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=300) == -signal.SIGTERM, log.read_text(errors="replace")[-4000:]
        assert "captures 3 sites" in log.read_text(errors="replace")
    store = dmi.open(tmp_path / "captures")
    assert set(store.coverage()["outcomes"]) == {"captured", "skipped"}
    for key, prompt in prompts.items():
        (request,) = store.requests(labels={"hf_request": key})
        assert request["id"] == key and request["reason"] == "finished"
        cache = store.cache(request=key)
        told = cache["tokens"].tolist()  # the last token of the answer never goes into the model
        assert told[: len(prompt)] == prompt and len(told) == len(prompt) + 5
        words = [int(word.removeprefix("w")) for word in answers[key].choices[0].text.split()]
        seen = [token for token in told[len(prompt) :] if token]  # w0 is not written
        assert words[: len(seen)] == seen
        tokens = torch.tensor([told])
        with torch.no_grad():
            want = model(tokens, output_hidden_states=True).hidden_states[1][0]
        assert torch.allclose(cache["resid_post", 0], want, atol=3e-4)


def test_what_cannot_be_observed_is_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("llama", "sdpa")
    server = Observed(Settings(("blocks.*.hook_pattern",), store=str(tmp_path / "captures")))
    server.attach(model)
    assert "LlamaForCausalLM is served UNOBSERVED, nothing is captured: HookError: " in caplog.text and not model._forward_hooks
    (line,) = [line for line in server.metrics().splitlines() if not line.startswith("#")]
    assert line.startswith('dmi_transformers_observed{model="LlamaForCausalLM",reason="HookError: ') and line.endswith('"} 0')
    assert _escaped('a "name"\\\n') == 'a \\"name\\"\\\\\\n'
    assert server.reference("x")["reason"].startswith("HookError: ") and not server.reference("x")["observed"]
    assert Observed(None).reference("x") == {"observed": False, "reason": "DMI was not asked to observe"}
    server.detach(model)


def test_an_environment_that_cannot_be_meant_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMI_HOOKS", "logits")
    with pytest.raises(dmi.HookError, match="say where captures go"):
        main(["model"])
