"""What holds for every run of the tests."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from dmi import native


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which everything was skipped shows nothing, and must not look like success."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and session.testscollected > 0 and reporter is not None and not reporter.stats.get("passed"):
        reporter.write_line("\nno test ran: all of them were skipped", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def seeded() -> None:
    """Random numbers of a seed that the output names."""
    import torch

    seed = int(os.environ.get("DMI_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"DMI_TEST_SEED={seed}")
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def ring() -> Iterator[native.Ring]:
    """A small one, without an engine."""
    from dmi import native

    ring = native.Ring(mode="best-effort", payload_mib=4, staging_mib=1)
    yield ring
    ring.close()
