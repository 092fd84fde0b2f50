"""The page from Python: it answers, ends by itself, and says why where it cannot begin."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dmi
from dmi.page import serve_page


def test_the_page_answers_and_ends_by_itself(tmp_path: Path) -> None:
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)).eval()
    with dmi.attach(llama, hooks=["blocks.*.hook_resid_post"], store=tmp_path / "s") as session, torch.no_grad():
        llama(torch.tensor([[1, 2, 3]]))
        session.flush()
        (request,) = session.requests
    page = serve_page(tmp_path / "s", end_when_unused="10s")
    assert page.address == f"{page.base}/#token={page.token}"
    with urllib.request.urlopen(urllib.request.Request(f"{page.base}/v1/requests", headers={"Authorization": f"Bearer {page.token}"})) as answer:
        assert [r["id"] for r in json.load(answer)["items"]] == [request]
    for _ in range(3000):
        status = Path(f"/proc/{page.pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {page.pid} goes on, though nobody has asked for long")


def test_a_store_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(dmi.EngineError, match="serve the page of .*none"):
        serve_page(tmp_path / "none")
