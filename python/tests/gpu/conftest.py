"""Tests that need a GPU: `make gpu-test`. Everything that the CPU back end's tests share is imported from them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        here = Path(__file__).parent
        for item in items:  # all that were collected, not only those of this folder
            if not item.path.is_relative_to(here):
                continue
            item.add_marker(pytest.mark.skip(reason="no CUDA device; `make gpu-test` runs these on a machine with one"))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
    torch._dynamo.reset()
