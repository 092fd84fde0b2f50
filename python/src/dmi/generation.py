"""What `generate` computes, attributed: requests of every returned sequence, padding left out, beams followed.

The model's own `generate` runs, unchanged. While attached, the instance has methods of ours in front of some of the
library's, which refuse what cannot be attributed and otherwise only take notes: where a call begins and ends, what it is about to compute, where its prompts end, and
which rows its stopping criteria ended.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dmi._abi import SPAN_CHOSEN
from dmi.batching import LABEL, LABEL_LENGTH, Batches, told
from dmi.hook import HookError
from dmi.options import REFERENCE, Options, asking, given_in, options_of
from dmi.requests import IDS_KEPT
from dmi.rows import Decoding, Forward, Requests, Row


class Generation:
    """One call of `generate`: its rows, and what it is about to compute."""

    def __init__(self, beams: int, name: str, options: Options) -> None:
        self.beams = beams
        self.name = name
        """Of its request, where a server gave it one."""
        self.options = options
        self.rows: list[Row] | None = None
        self.prompts: list[list[int] | None] = []
        self.lengths: list[int] = []
        """Positions of each row's prompt."""
        self.width = 0
        """Columns of the prompts, pads included."""
        self.pending: dict[str, Any] | None = None
        """Inputs that prepare_inputs_for_generation was last given, until the forward they are for."""
        self.over: Tensor | None = None
        """[batch], where the model is: rows that a stopping criterion ended; the model goes on computing pads for them."""
        self._ended: Tensor | None = None
        """The same on the host, once the stream has come to it; and the event that says so."""
        self._known: torch.cuda.Event | None = None
        self.slots: list[list[int]] = []
        """Beam search without a cache: the requests of every step's slots."""
        self.step = 0
        """The latest."""
        self.decoding: tuple[list[bool], Decoding] | None = None
        """Which rows are over, and the spans of the others' next token."""

    def note(self, done: Tensor) -> None:
        """Rows that the stopping criteria ended at this token. On a device the copy to the host is only begun: generate itself waits
        for these flags before the next forward, so that ours are there by then."""
        self.over = done.clone() if self.over is None else self.over | done
        if self.over.is_cuda:
            if self._ended is None:
                self._ended = torch.empty(self.over.shape, dtype=torch.bool, device="cpu", pin_memory=True)
                self._known = torch.cuda.Event()
            assert self._known is not None
            self._ended.copy_(self.over, non_blocking=True)
            self._known.record()

    def ended(self) -> list[bool]:
        """Rows that are over, fed padding to fill the batch; empty: none can be told."""
        if self.over is None or self.beams:
            return []
        if self._ended is None or self._known is None:
            return list(self.over.tolist())
        self._known.synchronize()
        return list(self._ended.tolist())


class Generations:
    """The calls of `generate` of one model, by thread."""

    def __init__(self, model: nn.Module, requests: Requests, lock: threading.RLock, batches: Batches) -> None:
        self._model = model
        self._batches = batches
        self._requests = requests
        self._lock = lock
        self._local = threading.local()
        self._patched: list[str] = []
        self._named: dict[str, None] = {}
        self._installed = False

    def install(self) -> None:
        self._installed = True
        for name, make in (
            ("generate", self._generate),
            ("init_continuous_batching", self._managed),
            ("prepare_inputs_for_generation", self._prepare),
            ("_prefill", self._prefill),
            ("_get_stopping_criteria", self._criteria),
        ):
            original = getattr(self._model, name, None)
            if callable(original):
                ours = make(original)
                ours.__dict__.update(dmi_owner=self, dmi_before=self._model.__dict__.get(name))
                self._model.__dict__[name] = ours
                self._patched.append(name)

    def remove(self) -> None:
        self._installed = False
        for name in self._patched:
            method: Any = self._model.__dict__.get(name)
            # Sessions on one model may end in any order: a method of ours below another's goes when that one does.
            while getattr(method, "dmi_owner", None) is not None and not method.dmi_owner._installed:
                method = method.dmi_before
            if method is None:
                self._model.__dict__.pop(name, None)
            else:
                self._model.__dict__[name] = method
        self._patched.clear()

    def current(self) -> Generation | None:
        """The call of generate that this thread is in."""
        stack = getattr(self._local, "generations", None)
        return stack[-1] if stack else None

    def rows(self, generation: Generation, forward: Forward, *, cached: bool) -> list[Row]:
        """The rows of the forward that generate is about to run; begins their requests with the first."""
        hidden = generation.beams > 1
        again = hidden and not cached  # slots hold other sequences at every step
        if generation.rows is None or again:
            for row in generation.rows or []:
                self._requests.end(row.request, "finished", generation.step)
            numbers = self._begin(generation, forward.batch, hidden=hidden)
            flags = SPAN_CHOSEN if generation.options.chosen else 0
            generation.rows = [Row(number, flags=flags) for number in numbers]
            if again:
                generation.slots.append(numbers)
            if not hidden:
                self._requests.batch(numbers)
        if len(generation.rows) != forward.batch:
            raise HookError(
                f"generate computes {forward.batch} rows where it began with {len(generation.rows)}: this way of "
                "generating reshapes its batch, and DMI cannot follow its requests; detach for it"
            )
        return generation.rows

    def _begin(self, generation: Generation, count: int, *, hidden: bool = False) -> list[int]:
        options, name = generation.options, generation.name
        labels = {**options.labels, **({LABEL: name[:LABEL_LENGTH]} if name else {})}
        names = [name] if name and count == 1 and not hidden and name not in self._named else []
        self._named.update(dict.fromkeys(names))
        if len(self._named) > IDS_KEPT:
            del self._named[next(iter(self._named))]
        return self._requests.begin(count, hidden=hidden, names=names, labels=[labels] * count, tags=[options.tags] * count)

    def opened(self, generation: Generation, columns: int, step: int) -> None:
        """The forward's step is open; its next tokens will stand in that column of the sequences."""
        generation.step = step
        ended = generation.ended()
        for index, row in enumerate(generation.rows or []):
            if not (ended and ended[index]):
                row.next_column = columns

    def _generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if not self._installed:
                return original(*args, **kwargs)
            given = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
            setting = functools.partial(_setting, self._model, given)
            self._refuse(given, setting)
            beams = int(setting("num_beams") or 1)
            server, options = asking.get(), given_in(kwargs)
            if REFERENCE in options:
                raise HookError(f"generate({REFERENCE}=...): what generate returns has no place for a reference; session.requests has the ids of its requests")
            name = server.name if server is not None else ""
            options = {**(server.given if server is not None else {}), **options}
            generation = Generation(beams if beams > 1 else 0, name, told(name or "of generate", options_of(options)))
            for key in options:
                kwargs.pop(key, None)
            bare = bool(generation.beams) and not setting("return_dict_in_generate")
            if bare:  # which slot computed what is in the dictionary only
                kwargs["return_dict_in_generate"] = True
            stack = self._local.__dict__.setdefault("generations", [])
            stack.append(generation)
            try:
                output = original(*args, **kwargs)
            except BaseException as error:
                self._end(generation, None, "error" if isinstance(error, Exception) else "aborted")
                raise
            else:
                self._end(generation, output, "finished")
            finally:
                stack.pop()
            return output.sequences if bare else output

        return generate

    def _refuse(self, given: dict[str, Any], setting: Callable[[str], Any]) -> None:
        for name, what in (
            ("assistant_model", "assisted generation"),
            ("prompt_lookup_num_tokens", "prompt lookup decoding"),
            ("assistant_early_exit", "early-exit decoding"),
            ("custom_generate", "a custom way of generating"),
            ("penalty_alpha", "contrastive search"),
            ("dola_layers", "DoLa decoding"),
        ):
            if given.get(name) is not None or (name not in ("assistant_model", "custom_generate") and setting(name)):
                raise HookError(
                    f"generate({name}=...): {what} computes rows that are thrown away again, which DMI cannot "
                    "attribute; generate without it, or detach"
                )
        if given.get("cache_implementation") == "paged":
            raise HookError(
                "generate(cache_implementation='paged'): call generate_batch, which this does, by itself; or use another "
                "cache, or detach"
            )

    def _managed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def init_continuous_batching(*args: Any, **kwargs: Any) -> Any:
            manager = original(*args, **kwargs)
            if self._installed:
                self._batches.check(manager)
            return manager

        return init_continuous_batching

    def _prepare(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """What generate is about to compute, with the mask as it was before static caches make it four-dimensional."""

        @functools.wraps(original)
        def prepare_inputs_for_generation(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            generation = self.current()
            if generation is not None:
                generation.pending = {
                    "input_ids": input_ids,
                    "attention_mask": kwargs.get("attention_mask"),
                    "decoding": generation.width > 0 and not generation.beams,
                }
            return original(input_ids, *args, **kwargs)

        return prepare_inputs_for_generation

    def _prefill(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Where the prompts end, however many forwards they take."""

        @functools.wraps(original)
        def _prefill(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(input_ids, *args, **kwargs)
            generation = self.current()
            if generation is not None and generation.rows is not None:
                generation.width = input_ids.shape[1]
                generation.prompts = [None if row.tokens is None else list(row.tokens) for row in generation.rows]
                generation.lengths = [row.valid for row in generation.rows]
                for row in generation.rows:
                    row.next_column = generation.width
                    if row.tokens and not generation.beams:
                        self._requests.update(row.request, tokens=list(row.tokens))
            return output

        return _prefill

    def _criteria(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Stopping criteria that note which rows they ended."""

        @functools.wraps(original)
        def _get_stopping_criteria(*args: Any, **kwargs: Any) -> Any:
            criteria = original(*args, **kwargs)
            generation = self.current()
            return criteria if generation is None or generation.beams else _watched(criteria, generation)

        return _get_stopping_criteria

    def _end(self, generation: Generation, output: Any, reason: str) -> None:
        with self._lock:
            rows = generation.rows or []
            sequences = getattr(output, "sequences", output)
            if output is not None and isinstance(sequences, Tensor) and generation.prompts:
                if generation.beams:
                    self._end_beams(generation, sequences, output.beam_indices)
                else:
                    for row, prompt, sequence in zip(rows, generation.prompts, sequences.tolist(), strict=True):
                        if prompt is not None:
                            generated = sequence[generation.width : row.next_column + 1]
                            self._requests.update(row.request, tokens=[*prompt, *generated])
            for row in rows:
                self._requests.end(row.request, reason, generation.step)

    def _end_beams(self, generation: Generation, sequences: Tensor, beam_indices: Tensor) -> None:
        """The returned sequences, as paths through the slots that computed them.

        Slot `beam_indices[s][t]` computed the logits of generated token t of sequence s; the row that it computed them
        from is the prompt's last for t = 0, and token t - 1's after.
        """
        assert generation.rows is not None
        slots = [row.request for row in generation.rows]
        tokens: list[list[int] | None] = []
        paths: list[list[tuple[int, int, int]]] = []
        for sequence, indices in zip(sequences.tolist(), beam_indices.tolist(), strict=True):
            indices = [index for index in indices if index >= 0]
            length, prompt = generation.lengths[indices[0]], generation.prompts[indices[0]]
            if generation.slots:  # no cache: the last step computed every position of the sequence anew
                steps = len(indices)
                path = [(generation.slots[steps - 1][indices[-1]], 0, length + steps - 1)]
            else:
                path = [(slots[indices[0]], 0, length)]
                for t, index in enumerate(indices[1:], start=1):
                    request, first, count = path[-1]
                    if request == slots[index]:
                        path[-1] = (request, first, count + 1)
                    else:
                        path.append((slots[index], length + t - 1, 1))
            paths.append(path)
            tokens.append(
                None if prompt is None else [*prompt, *sequence[generation.width : generation.width + len(indices)]]
            )
        numbers = self._begin(generation, len(paths))
        for number, path, ids in zip(numbers, paths, tokens, strict=True):
            self._requests.update(number, path=path, tokens=ids)
            self._requests.end(number, "finished", generation.step)
        self._requests.batch(numbers)


def _setting(model: Any, given: dict[str, Any], name: str) -> Any:
    """A generation setting as generate will see it: argument, configuration, the model's own."""
    for value in (
        given.get(name),
        getattr(given.get("generation_config"), name, None),
        getattr(getattr(model, "generation_config", None), name, None),
    ):
        if value is not None:
            return value
    return None


def _watched(criteria: Any, generation: Generation) -> Any:
    """The same list of criteria, noting what it answers. Its class is the library's, which is imported by now."""
    plain = type(criteria)

    class Watched(plain):  # type: ignore[misc,valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            done = super().__call__(*args, **kwargs)
            generation.note(done)
            return done

    return Watched(criteria)
