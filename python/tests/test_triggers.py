"""Something planted in one request of many is caught in its step, by its position, in a real session."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import dmi
from sessions import llama, prompts, until

BATCH, LENGTH = 16, 6


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    got: list[dict[str, Any]] = []

    class Door(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Door)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/dmi", got
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_is_planted_in_one_request_is_caught(tmp_path: Path, webhook: tuple[str, list[dict[str, Any]]]) -> None:
    model, store = llama(), tmp_path / "s"
    url, got = webhook
    plant: dict[str, Any] = {}

    def planted(_: Any, __: Any, out: Any) -> Any:
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        if plant:
            hidden[plant["row"], plant["position"]] = plant["value"]
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = model.model.layers[1].register_forward_hook(planted)
    width = model.config.hidden_size
    direction = torch.zeros(width)
    direction[3] = 1
    with dmi.attach(model, "blocks.*.hook_resid_post", store=store) as session, torch.no_grad():
        save_file({"weight": direction, "bias": torch.tensor([-5.0])}, store / "lies.safetensors")
        session.policy.set({"triggers": [
            {"name": "nan", "hooks": "resid_post", "when": {"nonfinite": True}, "webhook": url},
            {"name": "spike", "hooks": "resid_post", "layers": 1, "when": {"statistic": "l2", "zscore": 8, "warmup": 50}, "webhook": url},
            {"name": "lies", "hooks": "resid_post", "when": {"probe": "lies.safetensors", "above": 20}, "webhook": url},
        ]})  # fmt: skip
        model(prompts(BATCH, LENGTH), use_cache=False)
        session.flush()
        assert [t["rows"] for t in session.policy.get()["triggers"]] == [0, 0, 0]
        want = []
        lying = torch.zeros(width)
        lying[3] = 30.0
        for name, value in {"nan": torch.full((width,), torch.nan), "spike": torch.full((width,), 1e4), "lies": lying}.items():
            row, position = int(torch.randint(BATCH, ())), int(torch.randint(LENGTH, ()))
            plant.update(row=row, position=position, value=value)
            model(prompts(BATCH, LENGTH), use_cache=False)
            want.append((name, session.requests[-BATCH + row], position))
        plant.clear()
        model(prompts(BATCH, LENGTH), use_cache=False)
        session.flush()
        until(lambda: len(got) >= 3 + 1)
        # The spike also crosses the probe: 1e4 in direction 3.
        spiked = next(w for w in want if w[0] == "spike")
        assert sorted((g["trigger"], g["request"], g["position"]) for g in got) == sorted([*want, ("lies", *spiked[1:])])
        assert {g["site"] for g in got} == {"blocks.1.hook_resid_post"}
        assert next(g["value"] for g in got if g["trigger"] == "lies" and g["request"] != spiked[1]) == 30 - 5
        triggers = {t["name"]: t for t in session.policy.get()["triggers"]}
        assert (triggers["nan"]["rows"], triggers["spike"]["rows"], triggers["lies"]["rows"]) == (1, 1, 2)
        caught = session.cache(request=want[0][1])["resid_post", 1]
        assert caught[want[0][2]].isnan().all() and caught.isnan().sum() == width
        with pytest.raises(ValueError, match=r"line 1.*nowhere.*no such file"):
            session.policy.set('triggers: [{when: {probe: "nowhere.safetensors", above: 0}}]')
    handle.remove()
