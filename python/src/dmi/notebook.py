"""What a notebook shows: sessions, runs and caches as tables, and the page's views in a cell."""

from __future__ import annotations

import atexit
import os
import signal
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from dmi.page import Page, serve_page

if TYPE_CHECKING:
    from dmi.session import Run, Session

VIEWS = ("now", "requests", "request", "attention", "statistics", "structure", "compare")
MOST_LINES = 60
"""Of a table: what is beyond is counted."""

_pages: dict[Path, Page] = {}


def table(title: str, facts: Mapping[str, Any], header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """HTML, everything in it escaped: a title, facts by name, and a table of at most MOST_LINES lines."""
    parts = [f"<div><b>{escape(title)}</b>"]
    parts += [f"<div>{escape(name)}: {escape(_text(value))}</div>" for name, value in facts.items()]
    if lines:
        cells = "".join(f"<th style='text-align:left'>{escape(name)}</th>" for name in header)
        parts.append(f"<table><thead><tr>{cells}</tr></thead><tbody>")
        for line in lines[:MOST_LINES]:
            parts.append("<tr>" + "".join(f"<td style='text-align:left'>{escape(_text(value))}</td>" for value in line) + "</tr>")
        parts.append("</tbody></table>")
    if len(lines) > MOST_LINES:
        parts.append(f"<div>and {len(lines) - MOST_LINES} more</div>")
    return "".join([*parts, "</div>"])


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def outcomes(coverage: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Lines of outcome, reason (of captured rows their level), rows; most rows first."""
    every = [(outcome, why, rows) for outcome, reasons in coverage["outcomes"].items() for why, rows in reasons.items()]
    return sorted(every, key=lambda line: -line[2])


class View:
    """A view of the page, shown in a notebook's cell. Whoever has `address` can read the store: it holds a token."""

    def __init__(self, store: Path, page: Page, address: str, height: int) -> None:
        self.store = store
        self.address = address
        self._page = page
        self._height = height

    def close(self) -> None:
        """Ends the process that serves the page of this store, for all views of it; it ends with this process at the latest."""
        if _pages.get(self.store) is self._page:
            del _pages[self.store]
        _end(self._page)

    def __repr__(self) -> str:
        return f"View({self.address})"

    def _repr_html_(self) -> str:
        address = escape(self.address)
        return f'<iframe src="{address}" title="DMI" style="width:100%;height:{self._height}px;border:0"></iframe><div><a href="{address}" target="_blank">open in a tab</a></div>'


def view(what: Session | Run | str | os.PathLike[str], name: str = "now", *, height: int = 640, **arguments: str) -> View:
    """The page's view `name` of a session's store, or of the store in a folder, for a notebook's cell. `arguments` are the view's own, as its
    address has them: `dmi.view(session, "request", id=session.requests[0])`. `height` is in pixels.

    The page is served on loopback, by one process a store, until `close()` or the end of this process: where the browser is on another machine, its port has to be forwarded.
    Raises ValueError for a view that does not exist, EngineError where the store cannot be opened.
    """
    if name not in VIEWS:
        raise ValueError(f"view {name!r}: the page has {', '.join(VIEWS)}")
    session: Any = getattr(what, "_session", what)
    folder = str(getattr(session, "store", session) or "")
    if not folder:
        raise ValueError(f"view of {what!r}: it has no store; capture with store= or engine=")
    store = Path(folder).absolute()
    page = _pages.get(store)
    if page is None or not _alive(page):
        page = _pages[store] = serve_page(store, end_when_unused="0")
    return View(store, page, f"{page.base}/#/{name}?{urlencode({**arguments, 'token': page.token})}", height)


def _alive(page: Page) -> bool:
    try:
        return os.waitpid(page.pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


def _end(page: Page) -> None:
    if _alive(page):
        os.kill(page.pid, signal.SIGTERM)


@atexit.register
def _end_all() -> None:
    for page in _pages.values():
        _end(page)
    _pages.clear()
