"""Captured rows of a vLLM engine against those of the same requests run alone through Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dmi
from served import Alone

TOLERANCE = {"float32": 2e-4, "tf32": 1e-2, "float16": 2e-2, "bfloat16": 1.5e-1}
"""Of the largest value of a site: another order of sums, and rounding after each of some dozen operations. tf32: float32 whose products a GPU makes of 10 bits."""
ALIKE = {"float32": 1e-5, "tf32": 5e-3, "float16": 5e-3, "bfloat16": 4e-2}
"""Two references that differ by less, of their norm, are not told apart."""


@dataclass
class Found:
    """What a comparison found; that it found no difference is asserted."""

    requests: int = 0
    rows: int = 0
    """Compared, of all sites."""
    aborted: int = 0
    cached: int = 0
    """Tokens from the prefix cache."""
    rejected: int = 0
    """Guesses that were booked so."""
    again: int = 0
    """Tokens of preempted requests, computed once more."""
    alike: int = 0
    """Rows that another's is too much like for the dtype to tell them apart."""
    worst: float = 0.0
    """Difference, over the largest value of its site."""


def compare(store: Path, alone: Alone, requests: Sequence[dict[str, Any]], result: dict[str, Any], *, whole: int = 6, refused: str = "",
            dtype: str = "float32", piece: int = 300, progress: Callable[[Found], None] = lambda found: None) -> Found:  # fmt: skip
    """The residual stream at every block and logits of all requests, every site that was captured of the first `whole`. And every row of the deepest site
    against all rows of a piece of so many requests, so that a mix-up shows. Sites that `refused` names are not there. The books hold what was computed, no more
    and no less."""
    reader = dmi.open(store)
    known = {info["id"]: info for info in reader.requests()}
    deepest = f"blocks.{alone.layers - 1}.hook_resid_post"
    found = Found()
    of_all: list[tuple[list[int], torch.Tensor, list[int], torch.Tensor]] = []
    for index, request in enumerate(requests):
        generated = result["tokens"].get(request["id"], [])
        aborted = request.get("abort") is not None and len(generated) < request["max_tokens"]
        found.requests += 1
        found.aborted += aborted
        if request["id"] not in known:
            assert aborted and not generated, f"{request['id']} is not in the store"
            continue
        cache = reader.cache(request=request["id"])
        tokens = cache.tokens.tolist()
        assert tokens[: len(request["prompt"])] == request["prompt"]
        assert tokens[len(request["prompt"]) :][: len(generated)] == generated
        reference = alone.run(tokens)
        computed = cache.positions_of(deepest).tolist()
        books = cache.coverage(deepest)["outcomes"]
        if not aborted:
            prefix = result["cached"].get(request["id"], 0)
            assert len(generated) == request["max_tokens"] == len(tokens) - len(request["prompt"])
            assert computed == list(range(prefix, len(tokens) - 1)), (request, computed)
            assert known[request["id"]]["reason"] == "finished"
            assert books.get("cached", {}).get("prefix", 0) == prefix, books
            found.again += books["captured"]["full"] - len(computed)
        assert set(books) <= {"captured", "cached", "rejected"} and set(books["captured"]) == {"full"}, books
        found.cached += books.get("cached", {}).get("prefix", 0)
        found.rejected += books.get("rejected", {}).get("speculation", 0)
        for name, expected in reference.items():
            if name in refused:
                assert name not in cache, f"{name} was refused, and is there"
                continue
            if index >= whole and name not in ("hook_embed", "logits") and not name.endswith("hook_resid_post"):
                continue
            got = cache.get(name, partial=True).flatten(1).float()
            positions = cache.positions_of(name).tolist()
            if name == "logits":
                assert set(positions) <= set(computed)
                assert aborted or set(range(len(request["prompt"]) - 1, len(tokens) - 1)) <= set(positions)
            else:
                assert positions == computed, name
            assert len(got) == len(positions), name
            expected = expected.flatten(1).float()[positions]
            worst = ((got - expected).abs().max() / expected.abs().max()).item() if len(got) else 0.0
            assert worst < TOLERANCE[dtype], f"{request['id']} {name}: {worst:.2e} off"
            found.worst = max(found.worst, worst)
            found.rows += len(got)
            if name == deepest:
                of_all.append((tokens, reference[name].float(), computed, got))
        if len(of_all) == piece:
            found.alike += assert_only_its_own(of_all, deepest, dtype)
            of_all = []
            progress(found)
    found.alike += assert_only_its_own(of_all, deepest, dtype)
    progress(found)
    return found


def balanced(store: Path) -> dict[str, Any]:
    """The books of a store, whose outcomes sum to its rows."""
    books = dmi.open(store).coverage()
    assert sum(rows for reasons in books["outcomes"].values() for rows in reasons.values()) == books["rows"], books
    assert set(books["outcomes"]) <= {"captured", "cached", "rejected", "not_computed"}, books["outcomes"]
    return books


def assert_only_its_own(of_all: Sequence[tuple[list[int], torch.Tensor, list[int], torch.Tensor]], site: str, dtype: str) -> int:
    """No row is nearer to another's: of another request, or another position, unless it has the same tokens up to there. Returns how many rows are so much like
    another's that the dtype does not tell them apart: after one token repeated, say, over whose equal values attention averages. In float64: distances come out
    of a product, whose rounding in float32 is larger than they are."""
    owners = [tokens[: position + 1] for tokens, reference, _, _ in of_all for position in range(len(reference))]
    everything = torch.cat([reference for _, reference, _, _ in of_all]).double() if of_all else torch.zeros(0, 1)
    alike = 0
    for tokens, reference, positions, got in of_all:
        nearest = torch.cdist(got.double(), everything).argmin(1).tolist() if len(got) else []
        for row, position, near in zip(got, positions, nearest, strict=True):
            if owners[near] == tokens[: position + 1]:
                continue
            own, other = reference[position], everything[near]
            assert (own - other).norm() < ALIKE[dtype] * own.norm(), (
                f"position {position} of {tokens[: position + 1]} is nearer to {owners[near]} at {site}: "
                f"{(row - other).norm():.3g}, and {(row - own).norm():.3g} from its own"
            )
            alike += 1
    return alike
