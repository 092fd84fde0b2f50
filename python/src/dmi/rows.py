"""Which row of a forward pass is which token of which request: spans, as the ring's row table takes them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from dmi.hook import HookError
from dmi.sites import LOGITS, TOKENS

_SPAN = struct.Struct("<QIIIIIIHBBI")  # dmi_span of abi/ring.h
SPANS = np.dtype([("request", "<u8"), ("space", "<u4"), ("batch", "<u4"), ("first", "<u4"), ("count", "<u4"), ("position", "<u4"),
                  ("key_first", "<u4"), ("attempt", "<u2"), ("phase", "u1"), ("flags", "u1"), ("prompt", "<u4")])  # fmt: skip
assert SPANS.itemsize == _SPAN.size
PREFILL, DECODE = 0, 1


class Requests(Protocol):
    """The session's requests, by their numbers."""

    def begin(
        self, count: int, *, tokens: Sequence[list[int] | None] | None = None, hidden: bool = False, names: Sequence[str] = (),
        labels: Sequence[dict[str, str]] = (), tags: Sequence[list[str]] = (),
    ) -> list[int]: ...  # fmt: skip
    def update(
        self, request: int, *, tokens: list[int] | None = None, path: list[tuple[int, int, int]] | None = None
    ) -> None: ...
    def end(self, request: int, reason: str = "finished", step: int | None = None) -> None: ...
    def batch(self, requests: list[int]) -> None: ...
    def next_step(self) -> int: ...
    def reference(self, label: str, value: str) -> dict[str, Any]: ...


@dataclass
class Row:
    """A row of a batch as it goes on from step to step: one request, or one slot of a beam search."""

    request: int
    valid: int = 0
    """Tokens of it that are in the cache, pads not counted: the position of the next one."""
    key_first: int = 0
    """Cache slot of its position 0."""
    done: int = 0
    """Positions below this were computed; computing one again is another attempt."""
    attempt: int = 0
    prompt: int = 0
    """Tokens of its prompt: those of its first step; 0: nobody saw it begin."""
    flags: int = 0
    """Of its spans."""
    tokens: list[int] | None = field(default_factory=list)
    """Ids that went in; None where embeddings did."""
    told: list[int] | None = None
    """Of those, what the session was told."""
    next_column: int = 0
    """Where, in the sequences of `generate`, its next token will stand."""


@dataclass(frozen=True)
class Forward:
    """The shape of one forward pass. `mask`: 1 for tokens, 0 for pads, [batch, width of the cache and this step, or of
    this step]; None where every token counts. `kept`: columns whose logits are computed."""

    batch: int
    tokens: int
    past: int = 0
    """Cache slots in use before."""
    mask: list[list[int]] | None = None
    kept: Sequence[int] | None = None
    ids: list[list[int]] | None = None
    decoding: bool = False
    """A token a row behind those that are known: neither mask nor ids are."""

    @property
    def logits(self) -> int:
        return self.tokens if self.kept is None else len(self.kept)


def runs(flags: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of non-zero values."""
    first = None
    for index, flag in enumerate(flags):
        if flag and first is None:
            first = index
        elif not flag and first is not None:
            yield first, index - first
            first = None
    if first is not None:
        yield first, len(flags) - first


def kept_columns(logits_to_keep: object, tokens: int) -> Sequence[int] | None:
    """Columns whose logits a Hugging Face model computes, by its `logits_to_keep`; None: all."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.ndim == 0:
            return kept_columns(int(logits_to_keep), tokens)
        return [int(i) % tokens for i in logits_to_keep.tolist()]
    if isinstance(logits_to_keep, int) and logits_to_keep > 0:
        return range(max(0, tokens - logits_to_keep), tokens)
    return None


def spans(forward: Forward, rows: Sequence[Row], *, skip: Sequence[bool] = (), keyed: bool = False) -> bytes:
    """The step's spans, packed; moves `rows` on to the next step. `skip`: rows that are over, fed pads to fill the
    batch."""
    out: list[bytes] = []
    for index, row in enumerate(rows):
        if index < len(skip) and skip[index]:
            continue
        flags: Sequence[int] = [1] * forward.tokens
        if forward.mask is not None:
            mask = forward.mask[index]
            if len(mask) >= forward.past + forward.tokens:
                flags = mask[forward.past : forward.past + forward.tokens]
                row.valid = sum(1 for flag in mask[: forward.past] if flag)
                row.key_first = next((i for i, flag in enumerate(mask) if flag), 0)
            elif len(mask) == forward.tokens:
                flags = mask
            else:
                raise HookError(
                    f"attention_mask has {len(mask)} columns where the cache holds {forward.past} tokens and the "
                    "step adds "
                    f"{forward.tokens}: rows cannot be told from pads; pass one of "
                    f"{forward.past + forward.tokens} columns"
                )
        elif forward.past and row.done == 0:  # a cache that was filled before anybody looked
            row.valid = forward.past
        if row.valid == 0:
            row.key_first = forward.past + next((i for i, flag in enumerate(flags) if flag), 0)
        if row.valid < row.done:
            row.attempt += 1
        if row.valid == row.done == 0:
            row.prompt = sum(1 for flag in flags if flag)
        for first, count in runs(flags):
            position = row.valid
            if keyed and forward.past + first - row.key_first != position:
                raise HookError(
                    f"row {index} of the batch has pads between its tokens, so the keys of an attention row do "
                    "not follow each "
                    "other; pad on the left, or leave attn.hook_attn_scores and attn.hook_pattern out"
                )
            phase = DECODE if forward.tokens == 1 and position > 0 else PREFILL
            common = (row.key_first, row.attempt, phase, row.flags, row.prompt)
            out.append(_SPAN.pack(row.request, TOKENS, index, first, count, position, *common))
            for kept_first, column, kept_count in _kept(forward, first, count):
                out.append(
                    _SPAN.pack(row.request, LOGITS, index, kept_first, kept_count, position + column - first, *common)
                )
            if row.tokens is not None and not forward.decoding:
                if forward.ids is None or len(row.tokens) < position:
                    row.tokens = None
                else:
                    row.tokens[position:] = forward.ids[index][first : first + count]
            row.valid = row.done = position + count
    return b"".join(out)


def _kept(forward: Forward, first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """The part of a run of columns whose logits are kept: (index among the kept, column, count), in runs of both."""
    if forward.kept is None:
        yield first, first, count
        return
    start = None
    for index, column in enumerate(forward.kept):
        inside = first <= column < first + count
        if start is not None and (not inside or column != forward.kept[start] + index - start):
            yield start, forward.kept[start], index - start
            start = None
        if inside and start is None:
            start = index
    if start is not None:
        yield start, forward.kept[start], len(forward.kept) - start


class Decoding:
    """Steps that follow each other with one token a row. Their spans are those of the first, which libdmi moves on: a batch of hundreds would otherwise
    cost the model's thread a millisecond of packing at every token. `series`: as `native.Ring.series` gives it."""

    def __init__(self, rows: Sequence[Row], series: Any) -> None:
        self._rows = list(rows)
        self._series = series
        self._moved = 0

    def next(self) -> Any:
        self._moved += 1
        return self._series

    def leave(self) -> None:
        """Other steps follow: the rows are told how far they have come."""
        for row in self._rows:
            row.valid = row.done = row.valid + self._moved
        self._moved = 0


def packed(requests: Sequence[Row], counts: Sequence[int]) -> bytes:
    """Spans of one row dimension that holds the tokens of several requests one after another."""
    out, first = [], 0
    for row, count in zip(requests, counts, strict=True):
        phase = DECODE if count == 1 and row.valid > 0 else PREFILL
        if row.valid == row.done == 0:
            row.prompt = count
        common = (row.valid, row.key_first, row.attempt, phase, 0, row.prompt)
        for space in (TOKENS, LOGITS):
            out.append(_SPAN.pack(row.request, space, 0, first, count, *common))
        row.valid = row.done = row.valid + count
        first += count
    return b"".join(out)


def padded(rows: Sequence[Row], forward: Forward) -> bytes:
    """Spans of a padded batch that goes on from earlier steps without a cache that anybody can see."""
    assert forward.mask is not None
    out = []
    for index, row in enumerate(rows):
        if row.valid == row.done == 0:
            row.prompt = sum(1 for flag in forward.mask[index] if flag)
        for first, count in runs(forward.mask[index]):
            phase = DECODE if forward.tokens == 1 and row.valid > 0 else PREFILL
            for space in (TOKENS, LOGITS):
                out.append(
                    _SPAN.pack(row.request, space, index, first, count, row.valid, first, row.attempt, phase, 0, row.prompt)
                )
            row.valid = row.done = row.valid + count
    return b"".join(out)
