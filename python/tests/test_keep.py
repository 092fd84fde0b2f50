"""A trigger keeps the rows of the very step that set it off: of one request among 256, in full, also where the step is larger than the ring; and of sites that had passed
before it was set off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

import dmi
from sessions import llama, plainly, prompts

pytestmark = pytest.mark.newest

WATCHED = "blocks.1.hook_resid_post"


class Plant:
    """Changes what one request's second token has after a layer. To be placed before DMI's hooks, which then see it."""

    def __init__(self, layer: nn.Module) -> None:
        self.row: int | None = None
        self.value, self.at = 0.0, slice(None)
        layer.register_forward_hook(self.hook)

    def hook(self, _module: nn.Module, _args: Any, out: Any) -> Any:
        if self.row is None:
            return out
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        hidden[self.row, 1, self.at] = self.value
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden


def levels_of(cache: Any, site: str) -> set[tuple[str, str]]:
    return {(r["outcome"], r["level"]) for r in cache.coverage(site)["ranges"]}


@pytest.mark.parametrize(("condition", "value", "at"), [
    ("{nonfinite: true}", float("nan"), slice(3, 4)),
    ("{statistic: l2, above: 3000}", 900.0, slice(None)),
    ("{probe: probe.safetensors, above: 5000}", 4000.0, slice(0, 1)),
])  # fmt: skip
@pytest.mark.parametrize("below", ["stats", "off"])
def test_an_anomaly_among_256_requests_is_caught_in_its_step(tmp_path: Path, condition: str, value: float, at: slice, below: str) -> None:
    model = llama()
    plant, store = Plant(model.model.layers[1]), tmp_path / "s"
    anomalous = int(torch.randint(0, 256, (1,)))
    print("row", anomalous)
    with dmi.attach(model, ["blocks.*.hook_resid_post"], store=store, mode="best-effort", ring_mib=0.125, staging_mib=4) as session, torch.no_grad():
        save_file({"weight": np.eye(1, 64, dtype=np.float32) * 2}, store / "probe.safetensors")
        session.policy.set(f"default: {below}\ntriggers:\n- {{name: caught, hooks: {WATCHED}, when: {condition}, keep: [{WATCHED}]}}\n")
        model(prompts(256, 4), use_cache=False)  # nothing is wrong
        session.flush()  # two steps' statistics are more than the ring holds
        plant.row, plant.value, plant.at = anomalous, value, at
        with plainly(model.model.layers[1]) as seen:
            # 256 x 4 rows of 64 float32 at two sites: four times the ring.
            model(prompts(256, 4), use_cache=False)
        session.flush()
        status = session.status()["ring"]
        assert status["kept_rows"] == 4
        assert status["rows"].get("ring_full", 0) == 0
        names = session.requests
        cache = session.cache(request=names[256 + anomalous])
        got, want = cache.get(WATCHED), seen[0][anomalous]
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7)) and got.isnan().equal(want.isnan())
        assert levels_of(cache, WATCHED) == {("captured", "full")}
        rest = ("captured", "stats") if below == "stats" else ("skipped", "off")
        for other in (256 + (anomalous + 1) % 256, anomalous):
            assert levels_of(session.cache(request=names[other]), WATCHED) == {rest}
        (trigger,) = session.policy.get()["triggers"]
        assert trigger["fired"] == 1
        outcomes = session.coverage()["outcomes"]
        assert sum(outcomes["captured"].values()) + sum(outcomes.get("skipped", {}).values()) == 2 * 2 * 256 * 4


@pytest.mark.parametrize("condition", ["above: 500", "zscore: 50, warmup: 8"])
def test_what_had_passed_is_kept_too(tmp_path: Path, condition: str) -> None:
    """The last layer's rows tell that those of the first are wanted: the op, or, where only the engine can know, what it has seen of the whole step."""
    model = llama()
    plant = Plant(model.model.layers[1])
    with dmi.attach(model, ["blocks.*.hook_resid_post", "hook_embed"], store=tmp_path / "s") as session, torch.no_grad():
        session.policy.set(f"default: stats\ntriggers:\n- {{name: caught, hooks: {WATCHED}, when: {{statistic: absmax, {condition}}}, keep: [hook_embed, hook_resid_post]}}\n")
        model(prompts(4, 3), use_cache=False)  # nothing is wrong
        plant.row, plant.value, plant.at = 2, 900, slice(5, 6)
        with plainly(model.model.layers[0]) as seen:
            model(prompts(4, 3), use_cache=False)
        session.flush()
        for request, name in enumerate(session.requests[4:]):
            cache = session.cache(request=name)
            for site in ("hook_embed", "blocks.0.hook_resid_post", WATCHED):
                assert levels_of(cache, site) == {("captured", "full" if request == 2 else "stats")}, (site, request)
        assert torch.equal(session.cache(request=session.requests[4 + 2]).get("blocks.0.hook_resid_post"), seen[0][2])
