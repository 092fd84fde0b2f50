"""Captured rows of a vLLM engine against those of the same requests run alone through Hugging Face."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import dmi
from dmi.client import Client
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


def compare(store: Path, alone: Alone, requests: Sequence[dict[str, Any]], result: dict[str, Any], *, whole: int = 6, also: Sequence[str] = (), refused: str = "",
            dtype: str = "float32", piece: int = 100, progress: Callable[[Found], None] = lambda found: None) -> Found:  # fmt: skip
    """The residual stream at every block, logits and the sites of `also` of all requests, every site that was captured of the first `whole`. And every row of the deepest site
    against all rows of a piece of so many requests, so that a mix-up shows. Sites that `refused` names are not there. The books hold what was computed, no more
    and no less. Rows are read for many requests at once, and references computed so (`Alone.run_all`)."""
    found = Found()
    with dmi.open(store) as reader:
        for start in range(0, len(requests), piece):
            _compare_piece(reader._fresh(), alone, requests[start : start + piece], result, max(0, whole - start), also, refused, dtype, found)
            progress(found)
    return found


@dataclass
class _Request:
    """A request whose captures are there."""

    id: str
    tokens: list[int]
    aborted: bool
    prompt: int
    positions: dict[str, list[int]]
    """That were captured, by site."""


def _compare_piece(client: Client, alone: Alone, requests: Sequence[dict[str, Any]], result: dict[str, Any], whole: int, also: Sequence[str],
                   refused: str, dtype: str, found: Found) -> None:  # fmt: skip
    deepest = f"blocks.{alone.layers - 1}.hook_resid_post"
    there: list[_Request] = []
    in_whole: set[str] = {request["id"] for request in requests[:whole]}
    for request in requests:
        generated = result["tokens"].get(request["id"], [])
        aborted = request.get("abort") is not None and len(generated) < request["max_tokens"]
        found.requests += 1
        found.aborted += aborted
        try:
            info = client.get(f"/requests/{request['id']}")
        except dmi.NotCapturedError:
            assert aborted and not generated, f"{request['id']} is not in the store"
            continue
        tokens = info["tokens"]
        assert tokens[: len(request["prompt"])] == request["prompt"]
        assert tokens[len(request["prompt"]) :][: len(generated)] == generated
        captured, outcomes = _books(client.get("/coverage", {"request": request["id"]})["ranges"], deepest)
        computed = captured[deepest]
        assert set(outcomes) <= {"captured(full)", "cached(prefix)", "rejected(speculation)"}, outcomes
        if not aborted:
            prefix = result["cached"].get(request["id"], 0)
            assert len(generated) == request["max_tokens"] == len(tokens) - len(request["prompt"])
            assert computed == list(range(prefix, len(tokens) - 1)), (request, computed)
            assert info["reason"] == "finished"
            assert outcomes["cached(prefix)"] == prefix, outcomes
            found.again += outcomes["captured(full)"] - len(computed)
        found.cached += outcomes["cached(prefix)"]
        found.rejected += outcomes["rejected(speculation)"]
        there.append(_Request(request["id"], tokens, aborted, len(request["prompt"]), captured))
    common = {"hook_embed", "logits", *also, *(f"blocks.{layer}.hook_resid_post" for layer in range(alone.layers))}
    references = {each.id: reference for part, only in ((False, common), (True, None))
                  for each, reference in _references(alone, [one for one in there if (one.id in in_whole) == part], only)}  # fmt: skip
    for name in dict.fromkeys(name for reference in references.values() for name in reference):
        those = [each for each in there if name in references[each.id]]
        if name in refused:
            assert not any(name in each.positions for each in those), f"{name} was refused, and is there"
            continue
        read = _rows(client, name, those)
        for each in those:
            positions, computed = each.positions.get(name, []), each.positions[deepest]
            if name == "logits":
                assert set(positions) <= set(computed)
                assert each.aborted or set(range(each.prompt - 1, len(each.tokens) - 1)) <= set(positions)
            else:
                assert positions == computed, name
        _near(those, [references[each.id][name].flatten(1).float()[each.positions.get(name, [])] for each in those], read, name, dtype, found)
        if name == deepest:
            parts = read.split([len(each.positions[name]) for each in those])
            of_all = [(each.tokens, references[each.id][name].float(), each.positions[name], rows) for each, rows in zip(those, parts, strict=True)]
            found.alike += assert_only_its_own(of_all, deepest, dtype)


def _references(alone: Alone, those: Sequence[_Request], only: set[str] | None) -> Iterator[tuple[_Request, dict[str, torch.Tensor]]]:
    return zip(those, alone.run_all([request.tokens for request in those], only), strict=True)


def _books(ranges: Sequence[dict[str, Any]], deepest: str) -> tuple[dict[str, list[int]], Counter[str]]:
    """Positions that were captured, by site; and rows of the deepest one by outcome."""
    captured: dict[str, set[int]] = defaultdict(set)
    outcomes: Counter[str] = Counter()
    for entry in ranges:
        if entry["outcome"] == "captured":
            captured[entry["site"]].update(range(entry["first"], entry["first"] + entry["count"] * entry["stride"], entry["stride"]))
        if entry["site"] == deepest:
            outcomes[f"{entry['outcome']}({entry['level'] if entry['outcome'] == 'captured' else entry['reason']})"] += entry["count"]
    captured[deepest] |= set()
    return {site: sorted(positions) for site, positions in captured.items()}, outcomes


def _rows(client: Client, site: str, those: Sequence[_Request]) -> torch.Tensor:
    """Rows of a site that were captured of requests, one request's after another's."""
    pieces: dict[str, list[torch.Tensor]] = {request.id: [] for request in those}
    asked = [request.id for request in those if request.positions.get(site)]
    after = "" if asked else None
    width = 1
    while after is not None:
        page = client.tensor("/rows", {"request": asked, "site": site, "partial": True, "after": after or None})
        flat = page.tensor.flatten(1).float()
        width = flat.shape[1]
        for (key, _), part in zip(page.whose, flat.split([rows for _, rows in page.whose]), strict=True):
            pieces[key].append(part)
        after = page.next or None
    read = {key: torch.cat(parts) if parts else torch.empty(0, width) for key, parts in pieces.items()}
    for request in those:
        assert len(read[request.id]) == len(request.positions.get(site, [])), f"{request.id} {site}: {len(read[request.id])} rows are there"
    return torch.cat([read[request.id] for request in those]) if those else torch.empty(0, width)


def _near(those: Sequence[_Request], expected: Sequence[torch.Tensor], got: torch.Tensor, name: str, dtype: str, found: Found) -> None:
    """No value differs by more than the dtype lets it, of the largest in its request's rows."""
    if len(got) == 0:
        return
    wanted = torch.cat(list(expected))
    owner = torch.repeat_interleave(torch.arange(len(those)), torch.tensor([len(rows) for rows in expected]))
    largest = torch.zeros(len(those)).scatter_reduce(0, owner, wanted.abs().amax(1), "amax")
    off = torch.zeros(len(those)).scatter_reduce(0, owner, (got - wanted).abs().amax(1), "amax") / largest.clamp(min=1e-30)
    worst = int(off.argmax())
    assert off[worst] < TOLERANCE[dtype], f"{those[worst].id} {name}: {off[worst]:.2e} off"  # which nan is not
    found.worst = max(found.worst, float(off[worst]))
    found.rows += len(got)


def balanced(store: Path) -> dict[str, Any]:
    """The books of a store, whose outcomes sum to its rows."""
    books = dmi.open(store).coverage()
    assert sum(rows for reasons in books["outcomes"].values() for rows in reasons.values()) == books["rows"], books
    assert set(books["outcomes"]) <= {"captured", "cached", "rejected", "not_computed"}, books["outcomes"]
    return books


def assert_only_its_own(of_all: Sequence[tuple[list[int], torch.Tensor, list[int], torch.Tensor]], site: str, dtype: str) -> int:
    """No row is nearer to another's: of another request, or another position, unless it has the same tokens up to there. Returns how many rows are so much like
    another's that the dtype does not tell them apart: after one token repeated, say, over whose equal values attention averages. What a product of float32 says is
    nearer than its own, float64 has to confirm: the product's rounding is larger than the distance of what is alike."""
    owners = [tokens[: position + 1] for tokens, reference, _, _ in of_all for position in range(len(reference))]
    everything = torch.cat([reference for _, reference, _, _ in of_all]) if of_all else torch.zeros(0, 1)
    middle = everything.mean(0)
    centred = everything - middle
    half = centred.square().sum(1) / 2
    alike = 0
    for tokens, reference, positions, got in of_all:
        nearest = torch.addmm(half, got - middle, centred.T, beta=-1).argmax(1).tolist() if len(got) else []
        unsure = [index for index, near in enumerate(nearest) if owners[near] != tokens[: positions[index] + 1]]
        if unsure:
            exactly = torch.cdist(got[unsure].double(), everything.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1).tolist()
            nearest = [exactly[unsure.index(index)] if index in unsure else near for index, near in enumerate(nearest)]
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
