"""Which row of a vLLM step is which token of which request.

vLLM's scheduler mixes whole prompts, chunks of prompts and single tokens of any number of requests in one step. Its model runner puts them
one after another into one dimension; logits are computed of each request's last row alone. Where it speculates, guesses follow the last token, logits
are computed of them too, and those that the model does not agree with are rejected: their positions come again."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dmi._abi import SPAN_CACHED, SPAN_CHOSEN, SPAN_DRAFT, SPAN_REJECTED
from dmi.native import SEQUENCES, Pack, SpansAt
from dmi.options import Options, options_of
from dmi.requests import IDS_KEPT, Requests
from dmi.rows import DECODE, PREFILL, SPANS
from dmi.sites import LOGITS, TOKENS

LABEL = "vllm_request"
"""Label of a request under which it has the id that vLLM's processes know it by."""

LABEL_LENGTH = 1024
"""Characters of it at most; clients choose them, and the engine takes 4096 bytes."""

log = logging.getLogger("vllm.dmi")


def name_of(key: str) -> str:
    """What a client knows a request by. vLLM puts eight characters behind it, so that none comes twice; and the OpenAI front end, of a completion, which
    of its prompts it is: that of the first, or only one, has the id of the response."""
    name, dash, random = key.rpartition("-")
    if not dash or not name or len(random) != 8:
        return key
    return name.removesuffix("-0") if name.startswith("cmpl-") else name


@dataclass(frozen=True)
class Batch:
    """What a model runner has put together for a step, in the order of its rows."""

    ids: Sequence[str]
    counts: Sequence[int]
    """Tokens of each request."""
    positions: Sequence[int]
    """Of its first."""
    drafts: Sequence[int] = ()
    """So many of them, the last, are guesses. Empty: none of anybody."""


@dataclass(slots=True)
class _Sequence:
    """A request that vLLM has under way."""

    number: int
    slot: int
    """Its place among the sequences of `Batches`'s pack; -1: it is over, and another one may have that."""
    prompt: int
    tokens: list[int]
    """That it has, prompt included, as far as is known; none, ever, where the prompt is embeddings."""
    flags: int = 0
    """Of its spans."""
    parameters: Any = None
    """vLLM's, of its sampling."""
    longest: int | None = None
    """Tokens that the model takes."""
    ends: tuple[int | None, frozenset[int]] | None = None
    """Tokens that it can come to have, and those that end it. None: nobody has asked."""
    over: bool = False
    """It has its last token."""
    attempt: int = 0
    highest: int = 0
    """Attempt that any row had."""
    rejected: dict[int, int] = field(default_factory=dict)
    """Positions that were computed for a guess that was rejected and are to be computed again, and in which attempt they were."""

    def at(self, position: int) -> int:
        """The attempt in which a position is computed next."""
        return max(self.attempt, self.rejected.get(position, -1) + 1)

    def parts(self, first: int, count: int, drafts: int) -> Iterator[tuple[int, int, int, int]]:
        """Rows from a position on, the last of them guesses: runs of one kind and attempt, as (place, count, attempt, flags)."""
        place = 0
        while place < count:
            guess, attempt = place >= count - drafts, self.at(first + place)
            end = place + 1
            while end < count and (end >= count - drafts) == guess and self.at(first + end) == attempt:
                end += 1
            self.highest = max(self.highest, attempt)
            yield place, end - place, attempt, self.flags | (SPAN_DRAFT if guess else 0)
            place = end

    def take(self, first: int, new: list[int]) -> int:
        """Tokens that were sampled, to stand from a position on. Returns how many of them it keeps: none follows its last."""
        if self.over:
            return 0
        kept = len(new)
        most, stops = self.ends = self.ends or self._ends()
        for index, token in enumerate(new):
            if token in stops or first + index + 1 == most:
                self.over, kept = True, index + 1
                break
        if new and first <= len(self.tokens):  # of a prompt's part nothing is sampled
            self.tokens[first:] = new[:kept]
        return kept

    def _ends(self) -> tuple[int | None, frozenset[int]]:
        wanted = getattr(self.parameters, "max_tokens", None)
        bounds = [bound for bound in (self.longest, None if wanted is None else self.prompt + wanted) if bound is not None]
        stops = {getattr(self.parameters, "eos_token_id", None), *(getattr(self.parameters, "stop_token_ids", None) or ())} - {None}
        return min(bounds, default=None), frozenset(stops)


@dataclass(frozen=True)
class Asked:
    """Of a step's requests: who, the position of the first row whose logits were computed, and the guesses behind it."""

    ids: Sequence[str] = ()
    sequences: Sequence[_Sequence] = ()
    first: Any = ()
    drafts: Any = None
    """Arrays; no drafts: none of anybody."""

    def of(self, ids: Sequence[str]) -> Iterator[tuple[_Sequence, int, int] | None]:
        """Those of some requests, in turn; None: not of this step. What is sampled comes in the order of the rows, as a rule."""
        places = range(len(ids)) if ids == self.ids else map({key: place for place, key in enumerate(self.ids)}.get, ids)
        for place in places:
            yield None if place is None else (self.sequences[place], int(self.first[place]), 0 if self.drafts is None else int(self.drafts[place]))


LAST_SAMPLED = 4
"""Steps whose tokens are kept where nobody is told any: the last ones tell which requests were over when the engine ended. vLLM has two under way."""


class Batches:
    """The requests of one model runner, and the row tables of its steps. All but `sampled` belongs to the model's thread."""

    def __init__(self, requests: Requests, longest: int | None = None) -> None:
        """`longest`: tokens that the model takes."""
        self._requests = requests
        self._longest = longest
        self._sequences: dict[str, _Sequence] = {}
        self._finished: list[_Sequence] = []
        self._wrong: list[tuple[_Sequence, int, int, int]] = []  # rejected guesses: of whom, from which position, how many, their attempt
        self._sampled: deque[tuple[Asked, Sequence[str], Sequence[list[int]]]] = deque()
        self._guessed: Asked | None = None
        """The last table's, where it had guesses,"""
        self.undecided = False
        """and whether what came of them is known and no table has told it: none says that all were right but the next one."""
        self._guessing = False
        """There have been guesses."""
        self._named: dict[str, None] = {}
        self.asked = Asked()
        """Of the last step."""
        self._ids: list[str] = []
        """Whose rows the last step had, in order, and"""
        self._going: list[_Sequence] = []
        self._pack = Pack(256)
        """of all sequences, by slot, what their spans have. `next`: positions below were computed, and not as guesses; computing one again, after a preemption, is
        another attempt."""
        self._free = list(range(255, -1, -1))

    # -------------------------------------------------------------- who comes and goes
    def begin(self, arrivals: Iterable[Any]) -> None:
        """Requests that the scheduler tells of for the first time, or once more: resumed, or with a longer prompt. `arrivals`: vLLM's NewRequestData."""
        new: list[tuple[Any, Options]] = []
        for data in arrivals:
            sequence = self._sequences.get(data.req_id)
            if sequence is None:
                new.append((data, self._options(data)))
            else:
                if len(data.prompt_token_ids or ()) > sequence.prompt:
                    sequence.prompt, sequence.over = len(data.prompt_token_ids), False
                    sequence.parameters, sequence.ends = data.sampling_params, None
                    self._pack.sequences["prompt"][sequence.slot] = sequence.prompt
                self._know(sequence, data)
        if not new:
            return
        numbers = self._requests.begin(len(new), names=[self._name(data.req_id) for data, _ in new], tags=[options.tags for _, options in new],
                                       labels=[{**options.labels, LABEL: data.req_id[:LABEL_LENGTH]} for data, options in new])  # fmt: skip
        rows = []
        for number, (data, options) in zip(numbers, new, strict=True):
            embedded = getattr(data, "prompt_embeds", None)
            prompt = len(data.prompt_token_ids) if data.prompt_token_ids is not None else len(embedded) if embedded is not None else 0
            flags = SPAN_CHOSEN if options.chosen else 0
            sequence = self._sequences[data.req_id] = _Sequence(number, self._slot(), prompt, [], flags, data.sampling_params, self._longest)
            rows.append((number, prompt, 0, 0, flags, b""))
            self._know(sequence, data)
        self._pack.sequences[[self._sequences[data.req_id].slot for data, _ in new]] = np.array(rows, SEQUENCES)

    def _slot(self) -> int:
        """One that no sequence has."""
        if not self._free:
            had, small = len(self._pack.sequences), self._pack
            self._pack = Pack(2 * had)
            self._pack.sequences[:had] = small.sequences
            self._ids = []  # their slots are in the smaller one
            self._free = list(range(2 * had - 1, had - 1, -1))
        return self._free.pop()

    def _know(self, sequence: _Sequence, data: Any) -> None:
        known = getattr(data, "prefill_token_ids", None) or data.prompt_token_ids or []
        if len(known) > len(sequence.tokens):
            sequence.tokens = list(known)

    def _options(self, data: Any) -> Options:
        options = options_of(getattr(data.sampling_params, "extra_args", None))
        if options.wrong:
            log.warning("DMI: request %s: nothing of it is captured: %s", data.req_id, options.wrong)
        return options

    def _name(self, key: str) -> str:
        name = name_of(key)
        if name in self._named:
            return key
        self._named[name] = None
        if len(self._named) > IDS_KEPT:
            del self._named[next(iter(self._named))]
        return name

    def finish(self, ids: Iterable[str]) -> None:
        """They are over: finished or aborted, which a worker is not told."""
        for key in ids:
            sequence = self._sequences.pop(key, None)
            if sequence is not None:
                self._free.append(sequence.slot)
                self._ids = []  # another one may come by that name
                sequence.slot = -1
                self._finished.append(sequence)

    def tell_finished(self, step: int) -> None:
        """No rows of those that are over come after a step."""
        for sequence in self._finished:
            self._end(sequence, "finished", step)
        self._finished.clear()

    def end_all(self, step: int) -> None:
        """Nothing comes any more. vLLM does not say of its last requests that they are over: they have all their tokens then."""
        self.tell_finished(step)
        for sequence in self._sequences.values():
            self._end(sequence, "finished" if sequence.over else "aborted", step)
        self._sequences.clear()

    def _end(self, sequence: _Sequence, reason: str, step: int) -> None:
        if sequence.tokens and self._requests.tells_tokens:
            self._requests.update(sequence.number, tokens=sequence.tokens)
        self._requests.end(sequence.number, reason, step)

    def settle(self) -> None:
        """Tell the tokens of those that are under way."""
        for sequence in self._sequences.values():
            if sequence.tokens and self._requests.tells_tokens:
                self._requests.update(sequence.number, tokens=list(sequence.tokens))

    # -------------------------------------------------------------- rows
    def spans(self, batch: Batch) -> SpansAt | None:
        """Spans of a step, where that has neither guesses nor their fates, and each of its requests goes on where its last rows ended: made by libdmi, since a step of vLLM's is bound by
        its Python as often as not. None: it takes a `table`."""
        if self._guessing or self._wrong or len(batch.drafts):
            return None
        n, pack = self._place(batch), self._pack
        spans = pack.spans(n)
        if spans is not None:
            self.asked = Asked(self._ids, self._going, pack.sequences["next"].take(pack.slots[:n]) - 1)
        return spans

    def _place(self, batch: Batch) -> int:
        """Puts a step's requests, their tokens and positions where spans are made of them; so many."""
        pack, n = self._pack, len(batch.ids)
        if batch.ids != self._ids:
            self._ids = list(batch.ids)
            self._going = [self._sequences[key] for key in self._ids]
            pack.slots[:n] = [sequence.slot for sequence in self._going]
        pack.counts[:n], pack.positions[:n] = batch.counts, batch.positions
        return n

    def table(self, batch: Batch) -> bytes:
        """Spans of any step, and of what was rejected in the one before."""
        n = self._place(batch)
        going, slots, known = self._going, self._pack.slots[:n], self._pack.sequences
        count, first = (array[:n].astype(np.int64) for array in (self._pack.counts, self._pack.positions))
        drafts = np.asarray(batch.drafts, np.int64) if len(batch.drafts) else np.zeros(n, np.int64)
        guesses = bool(drafts.any())
        self._guessing = self._guessing or guesses
        cached = self._arrive(going, known["next"].take(slots), first)
        sure = first + count - drafts  # positions below, guesses aside
        known["next"][slots] = sure
        self.asked = Asked(self._ids, going, sure - 1, drafts)
        self._guessed, self.undecided = self.asked if guesses else None, False

        tokens, logits = spans = np.zeros((2, n), SPANS)
        of = known.take(slots)
        for name in ("request", "prompt", "attempt", "flags"):
            spans[name] = of[name]
        for half, space, rows, position in ((tokens, TOKENS, count, first), (logits, LOGITS, drafts + 1, sure - 1)):
            half["space"], half["count"], half["position"], half["first"] = space, rows, position, np.cumsum(rows) - rows
        spans["phase"] = np.where((count == 1 + drafts) & (first >= of["prompt"]), DECODE, PREFILL)
        split = guesses or any(sequence.rejected for sequence in going)
        table = b"".join(_split(half, going, drafts.tolist()).tobytes() for half in spans) if split else spans.tobytes()
        return table + _cached(cached) + self.verdict()

    def _arrive(self, going: Sequence[_Sequence], after: Any, first: Any) -> list[tuple[int, int, int]]:
        """What is known of those whose rows do not begin `after` the last ones: they are new, or computed once more after a preemption. Of the new ones
        what the prefix cache has: number, tokens, prompt."""
        cached = []
        for place in np.flatnonzero(after != first).tolist():
            sequence, at = going[place], int(first[place])
            if at < after[place]:
                sequence.attempt = sequence.highest = sequence.highest + 1
                sequence.rejected.clear()
                self._pack.sequences["attempt"][sequence.slot] = sequence.attempt
            elif after[place] == 0:
                cached.append((sequence.number, at, sequence.prompt))
        return cached

    def sampled(self, asked: Asked, ids: Sequence[str], tokens: Sequence[list[int]]) -> None:
        """What came of a step that `asked` was said of, as vLLM has it: which cuts off what follows a request's last token, as we do. Any thread."""
        if self._guessing or self._requests.tells_tokens:
            tokens = [list(each) for each in tokens]
        self._sampled.append((asked, ids, tokens))

    def learn(self, last: bool = False) -> bool:
        """Take in what was sampled. True: there is a verdict on guesses that no table has told of. `last`: it matters who is over."""
        left = 0 if last or self._guessing or self._requests.tells_tokens else LAST_SAMPLED
        while len(self._sampled) > left:
            asked, ids, tokens = self._sampled.popleft()
            self.undecided = self.undecided or asked is self._guessed
            if left:
                continue
            for found, new in zip(asked.of(ids), tokens, strict=False):
                if found is not None:
                    self._learn(*found, new)
        return bool(self._wrong)

    def _learn(self, sequence: _Sequence, first: int, drafts: int, new: list[int]) -> None:
        kept = sequence.take(first + 1, new)
        if drafts == 0:
            return
        accepted = min(drafts, max(0, kept - 1))
        for place, count, attempt, _ in sequence.parts(first + 1 + accepted, drafts - accepted, 0):
            self._wrong.append((sequence, first + 1 + accepted + place, count, attempt))
        again = {position: sequence.at(position) for position in range(first + 1 + accepted, first + 1 + drafts)}
        done = first + 1 + accepted
        if sequence.slot >= 0:
            self._pack.sequences["next"][sequence.slot] = done
        sequence.rejected = {position: attempt for position, attempt in (sequence.rejected | again).items() if position >= done}

    def verdict(self) -> bytes:
        """Spans of the guesses that were rejected since the last table."""
        self.undecided = False
        spans = np.zeros(len(self._wrong), SPANS)
        for span, (sequence, position, count, attempt) in zip(spans, self._wrong, strict=True):
            span["request"], span["position"], span["count"], span["attempt"] = sequence.number, position, count, attempt
        spans["space"], spans["flags"], spans["phase"] = TOKENS, SPAN_REJECTED, DECODE
        self._wrong.clear()
        return spans.tobytes()


def _split(spans: Any, going: Sequence[_Sequence], drafts: Sequence[int]) -> Any:
    """Spans whose rows are all of one attempt, and all guesses or none."""
    out = []
    for span, sequence, guesses in zip(spans, going, drafts, strict=True):
        for place, count, attempt, flags in sequence.parts(int(span["position"]), int(span["count"]), guesses):
            part = span.copy()
            part["first"] += place
            part["position"] += place
            part["count"], part["attempt"], part["flags"] = count, attempt, flags
            out.append(part)
    return np.array(out, SPANS)


def _cached(prefixes: Sequence[tuple[int, int, int]]) -> bytes:
    if not prefixes:
        return b""
    spans = np.zeros(len(prefixes), SPANS)
    spans["space"] = TOKENS
    spans["request"], spans["count"], spans["prompt"] = np.asarray(prefixes).T
    spans["flags"] = SPAN_CACHED
    return spans.tobytes()
