"""The page over a store, served by a process of its own (`dmi ui`) that outlives us and ends when nobody has asked it for a while."""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dmi.engine import binary, last_words, ready_line
from dmi.errors import EngineError

_served: list[subprocess.Popen[bytes]] = []  # asked now and then whether they have ended, so that none stays a zombie


@dataclass(frozen=True)
class Page:
    """Where the page is. Whoever has `address` can read the store: it holds a token."""

    address: str
    base: str
    token: str
    pid: int


def serve_page(store: str | os.PathLike[str], *, end_when_unused: str = "1h") -> Page:
    """Serves the page over a store, on loopback. `end_when_unused` is as `dmi ui` takes it: 90s, 15m, 1h; 0 for never.
    Raises EngineError where the store cannot be opened."""
    _served[:] = [child for child in _served if child.poll() is None]
    folder = Path(store).absolute()
    read, write = os.pipe()
    with tempfile.TemporaryFile() as log:
        try:
            child = subprocess.Popen(
                [binary(), "ui", str(folder), "--end-when-unused", end_when_unused, "--ready-fd", str(write)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, pass_fds=(write,), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            os.close(read)
            raise EngineError(f"serve the page of {folder}: {error}") from error
        finally:
            os.close(write)
        try:
            said = ready_line(read)
            if said is None:
                raise EngineError(f"serve the page of {folder}: {last_words(log, 0)}", code="store")
        except BaseException as error:
            child.kill()
            child.wait()
            if isinstance(error, TimeoutError):
                raise EngineError(f"serve the page of {folder}: {error}; try again, it may only be slow. Its log ends with\n  {last_words(log, 0)}", code="store") from None
            raise
        finally:
            os.close(read)
    _served.append(child)
    return Page(address=said["address"], base=said["base"], token=said["token"], pid=said["pid"])
