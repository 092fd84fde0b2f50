"""Captured tensors live as long as they are needed and are read no later: each is overwritten right behind the last operation that reads it, be that the model's
or a capture, and every row is still what the model computed. With DMI_TEST_DEVICE=cuda the overwriting follows the capture on its stream alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from observed import fresh_seed, model_of, observed
from reference import Clones, check, expected


class Readers(TorchDispatchMode):
    """Numbers memory in the order in which operations make it, and operations in theirs. The first time it finds out which operation is the last to read or
    write each piece; given that, it overwrites the piece behind it."""

    def __init__(self, last: dict[int, int] | None = None) -> None:
        super().__init__()
        self.poison = last or {}
        self.last: dict[int, int] = {}
        self.poisoned = 0
        self._number: dict[int, int] = {}  # of memory that an operation of this run made, by address
        self._made = self._done = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._done += 1
        given = {t.untyped_storage().data_ptr(): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.numel()}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.numel() and (at := t.untyped_storage().data_ptr()) not in given:
                self._number[at] = self._made  # new, or what was there before is gone
                self._made += 1
                given[at] = t
        for at, t in given.items():
            number = self._number.get(at)
            if number is None:
                continue
            self.last[number] = self._done
            if self.poison.get(number) == self._done:
                with torch.utils._python_dispatch._disable_current_modes():
                    torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).fill_(0xFF)
                self.poisoned += 1
        return out

    def forget(self, kept: list[Tensor]) -> dict[int, int]:
        """The last operations on memory that nobody wants any more."""
        wanted = {self._number.get(t.untyped_storage().data_ptr()) for t in kept}
        return {number: done for number, done in self.last.items() if number not in wanted}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_poisoned_behind_the_last_reader(family: str) -> None:
    fresh_seed()
    model = model_of(family)
    ids = torch.randint(3, 128, (2, 9))
    with observed(model, ["**"]) as session, torch.no_grad():
        with Readers() as first:
            logits = model(ids, use_cache=False).logits
        with Readers(first.forget([logits])) as second:
            again = model(ids, use_cache=False).logits
        assert second.poisoned > len(session.names)
        assert torch.equal(again, logits), "the model itself still read what was overwritten: the test is wrong"
        session.check_books()
        for name in session.names:
            for row in range(2):
                assert torch.equal(session.tensor(name, row), session.tensor(name, 2 + row)), name
        with Clones(model) as clones:
            output = model(ids, use_cache=False).logits
        check(session, expected(family, model, clones, output), [2, 3])
