"""Which requests the policy's rules by ids and tags mean, so that a producer can tell their rows apart before they leave the device."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def _pattern(texts: Sequence[str]) -> re.Pattern[str]:
    """Of what fits one of some: `*`: any bytes, `?`: one. As the engine matches ids (tensor.MatchText). One expression, because the model's thread asks it of every
    request that begins."""
    return re.compile("|".join(fnmatch.translate(_bytes(text).replace("[", "[[]")) for text in texts))


def _bytes(text: str) -> str:
    """A character for each byte of its UTF-8."""
    return text.encode(errors="surrogatepass").decode("latin-1")


class Groups:
    """Sets of requests, in the engine's words: `ids`, one of which must fit (none: all do), and `tags`, which must all be there."""

    def __init__(self, name: int, sets: Sequence[Mapping[str, Any]]) -> None:
        self.name = name
        """The engine's, which gates repeat."""
        self._sets = [(_pattern(each["ids"]) if each["ids"] else None, frozenset(each["tags"])) for each in sets]

    def of(self, request: str, tags: Collection[str]) -> int:
        """The groups that a request of this id with these tags, its own and its run's, is in: a bit each."""
        text = _bytes(request)
        return sum(
            1 << index
            for index, (ids, needed) in enumerate(self._sets)
            if needed.issubset(tags) and (ids is None or ids.match(text))
        )
