"""What holds for every run of the tests."""

from __future__ import annotations

import pytest


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which everything was skipped shows nothing, and must not look like success."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == 0 and session.testscollected > 0 and reporter is not None and not reporter.stats.get("passed"):
        reporter.write_line("\nno test ran: all of them were skipped", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
