"""Which requests the policy's rules by ids and tags mean, so that a producer can tell their rows apart before they leave the device."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def _pattern(text: str) -> re.Pattern[str]:
    """`*`: any bytes, `?`: one. As the engine matches ids (tensor.MatchText)."""
    return re.compile(fnmatch.translate(_bytes(text).replace("[", "[[]")))


def _bytes(text: str) -> str:
    """A character for each byte of its UTF-8."""
    return text.encode(errors="surrogatepass").decode("latin-1")


class Groups:
    """Sets of requests, in the engine's words: `ids`, one of which must fit (none: all do), and `tags`, which must all be there."""

    def __init__(self, name: int, sets: Sequence[Mapping[str, Any]]) -> None:
        self.name = name
        """The engine's, which gates repeat."""
        self._sets = [([_pattern(text) for text in each["ids"]], frozenset(each["tags"])) for each in sets]

    def of(self, request: str, tags: Collection[str]) -> int:
        """The groups that a request of this id with these tags, its own and its run's, is in: a bit each."""
        text = _bytes(request)
        return sum(
            1 << index
            for index, (ids, needed) in enumerate(self._sets)
            if needed.issubset(tags) and (not ids or any(pattern.match(text) for pattern in ids))
        )
