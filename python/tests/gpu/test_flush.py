"""flush() on a GPU: the host is far ahead of the device when it asks."""

from __future__ import annotations

from pathlib import Path

import torch

import dmi


class Slow(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)
        self.point = dmi.HookPoint("here", rows=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(200_000_000)  # cycles: about a tenth of a second
        return self.point(self.linear(x))


def test_flush_waits_for_the_steps_under_way(tmp_path: Path) -> None:
    model = Slow().cuda().eval()
    x = torch.randn(5, 64, device="cuda")
    with dmi.attach(model, "here", store=tmp_path / "s") as session, torch.no_grad():
        numbers = None
        for _ in range(6):
            with session.step(rows=5, requests=numbers) as numbers:
                model(x)
        assert session._ring is not None
        assert session._ring.counters()["captured_rows"] < 30, "the host was not ahead of the device: this shows nothing"
        session.flush()
        assert session._ring.counters()["captured_rows"] == 30
        cache = session.cache(request=session.requests[0])
        assert torch.equal(cache["here"], model.linear(x).cpu().repeat(6, 1))


def test_detach_waits_for_the_steps_under_way(tmp_path: Path) -> None:
    model = Slow().cuda().eval()
    x = torch.randn(5, 64, device="cuda")
    with dmi.attach(model, "here", store=tmp_path / "s") as session, torch.no_grad():
        for _ in range(6):
            with session.step(rows=5):
                model(x)
    assert session.coverage()["outcomes"] == {"captured": {"full": 30}}
