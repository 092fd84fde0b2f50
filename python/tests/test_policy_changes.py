"""Random policies, set as fast as they are taken, while a model runs: every row is what the revision that its books name makes of it, at its level, and those
in full are the model's own, bit for bit. DMI_POLICY_CHANGES=10000 runs as many; a share of that runs always. Figures: see figures.py."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from figures import figures, result

import dmi
from sessions import balanced, llama, plainly, prompts, until

CHANGES = int(os.environ.get("DMI_POLICY_CHANGES", "400"))
PRESSED = max(3, CHANGES // 200)
SITES = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
Document = dict[str, Any]


def draw(choose: random.Random, bounds: list[float]) -> Document:
    """A document of rules whose meaning `level` says in a few lines. Bounds: of rows' norms."""
    rules = []
    for _ in range(choose.randrange(4)):
        rule: Document = {"level": choose.choice(["full", "full", "off", "sampled/2", "sampled/3", "int8", "fp8", "stats", "stats+2", "stats+5"])}
        if choose.random() < 0.6:
            rule["hooks"] = choose.choice(SITES)
        if choose.random() < 0.4:
            rule["phase"] = choose.choice(["prefill", "decode"])
        if choose.random() < 0.4:
            rule["tokens"] = choose.choice(["prompt[-1]", "generated[:1]", "all[1:4]", "all[::2]", "prompt"])
        if choose.random() < 0.3:
            rule["requests"] = choose.choice([{"ids": "*.*0"}, {"ids": "*.*1"}, {"tags": ["here"]}, {"tags": ["nowhere"]}])
        rules.append(rule)
    document: Document = {"default": choose.choice(["full", "off", "sampled/2", "int8"]), "rules": rules}
    if choose.random() < 0.4:  # rows of a step that a trigger keeps, of the site that it watches and perhaps of the one before or behind it
        document["triggers"] = [{"hooks": choose.choice(SITES), "when": {"statistic": "l2", "above": choose.choice(bounds)}, "keep": choose.choice([[], SITES]), "cooldown": "1h"}]
    return document


def level(document: Document, site: str, request: str, position: int, prompt: int, lowered: Mapping[str, str]) -> str:
    windows = {"prompt[-1]": position == prompt - 1, "generated[:1]": position == prompt, "all[1:4]": 1 <= position < 4, "all[::2]": position % 2 == 0,
               "prompt": position < prompt}  # fmt: skip
    for rule in document["rules"]:
        wanted = rule.get("requests", {})
        if (
            rule.get("hooks", site) == site
            and rule.get("phase", "prefill" if position < prompt else "decode") == ("prefill" if position < prompt else "decode")
            and windows.get(rule.get("tokens", ""), True)
            and ("ids" not in wanted or request.endswith(wanted["ids"][-1]))
            and wanted.get("tags", ["here"]) == ["here"]
        ):
            return lowered.get(rule.get("name", ""), str(rule["level"]))
    return lowered.get("default", str(document["default"]))


def kept(document: Document, site: str, request: str, position: int, prompt: int, lowered: Mapping[str, str] = MappingProxyType({})) -> str:
    """The level at which a row is captured; "" where it is not. `lowered`: rules below their own level, as the governor has them."""
    found = level(document, site, request, position, prompt, lowered)
    if found.startswith("sampled"):
        found = "full" if position % int(found[-1]) == 0 else "off"
    return "" if found == "off" else found


def triggered(document: Document, site: int, position: int, prompt: int, values: torch.Tensor) -> bool:
    """Whether a trigger keeps a request's row: one of its rows in the same step, at the site that is watched, met the condition. `values`: [sites, positions, width]."""
    for trigger in document.get("triggers", []):
        watched = SITES.index(trigger["hooks"])
        step = slice(0, prompt) if position < prompt else slice(position, position + 1)
        if (site == watched or trigger["keep"]) and bool((values[watched, step].double().norm(dim=-1) > trigger["when"]["above"]).any()):
            return True
    return False


def amid(norms: torch.Tensor, share: float) -> float:
    """A bound that so many of the norms are below, in the middle of a gap: none is as near to it as two ways of computing one are apart."""
    ordered = norms.flatten().sort().values
    gaps = [n for n in range(1, len(ordered)) if ordered[n] - ordered[n - 1] > 1e-4 * ordered[n]]
    n = min(gaps, key=lambda n: abs(n - share * len(ordered)))
    return float(ordered[n - 1] + ordered[n]) / 2


def test_random_changes_under_a_running_model(tmp_path: Path) -> None:
    model = llama()
    choose, changes = (random.Random(int(torch.randint(2**31, ()))) for _ in range(2))  # of the test's seed; each for one thread
    in_force: dict[int, Document | None] = {0: {"default": "full", "rules": []}}
    done, failure = threading.Event(), []
    turns = threading.Semaphore(8)  # changes that may come before the model's next turn: on a busy machine it would meet few of them
    with plainly(model.model.layers[0]) as first, plainly(model.model.layers[1]) as second, torch.no_grad(), \
            dmi.attach(model, "blocks.*.hook_resid_post", store=tmp_path / "s", tags=["here"]) as session:  # fmt: skip

        model(prompts(8, 8), use_cache=False)
        norms = torch.stack([first[0], second[0]]).double().norm(dim=-1)
        bounds = [amid(norms, q) for q in (0.1, 0.5, 0.9)]

        def change() -> None:
            try:
                with dmi.open(tmp_path / "s") as store:
                    said: Document = {"default": "full", "rules": []}
                    for _ in range(CHANGES):
                        assert turns.acquire(timeout=300), "the model stands still"
                        if changes.random() < 0.1:
                            in_force[store.policy.off()["revision"]["revision"]] = None
                            in_force[store.policy.on()["revision"]["revision"]] = said
                        else:
                            said = draw(changes, bounds)
                            in_force[store.policy.set(said)["revision"]["revision"]] = said
            except Exception as error:
                failure.append(error)
            finally:
                done.set()

        thread = threading.Thread(target=change)
        thread.start()
        requests: dict[str, tuple[int, torch.Tensor]] = {}  # prompt, values by site and position
        met = 0  # changes while requests were kept
        while not done.is_set():
            turns.release(8)
            first.clear()
            second.clear()
            batch, length = choose.randrange(1, 4), choose.randrange(1, 6)
            out = model(prompts(batch, length), use_cache=True)
            names = list(session.requests)[-batch:]
            for _ in range(3):
                out = model(prompts(batch, 1), use_cache=True, past_key_values=out.past_key_values)
            values = torch.stack([torch.cat(first, dim=1), torch.cat(second, dim=1)])
            if len(requests) < 1500:
                met = len(in_force)
                requests |= {name: (length, values[:, row]) for row, name in enumerate(names)}
        thread.join()
        assert not failure, failure
        session.flush()
        seen: set[int] = set()
        rows = full = reduced = by_trigger = greatest = 0
        for request, (prompt, values) in requests.items():
            cache = session.cache(request=request)
            for number, site in enumerate(SITES):
                for r in cache.coverage(site)["ranges"]:
                    seen.add(r["policy"])
                    document = in_force[r["policy"]]
                    step = r.get("stride", 1)
                    for position in range(r["first"], r["first"] + r["count"] * step, step):
                        want = "" if document is None else kept(document, site, request, position, prompt)
                        if document is not None and want != "full" and triggered(document, number, position, prompt, values):
                            want = "full"
                            by_trigger += 1
                        want, _, top = want.partition("+")
                        assert (r["level"] if r["outcome"] == "captured" else "") == want, (request, site, position, r, document)
                        if top:
                            greatest += 1
                            elements = cache.topk(site, k=int(top), tokens=slice(position, position + 1))[0]["elements"]
                            assert [e["value"] for e in elements] == values[number, position].float().topk(int(top)).values.tolist(), (request, site, position)
                            with pytest.raises(ValueError, match=f"statistics came with {top} of them"):  # no more than the policy says, whatever came for other rows
                                cache.topk(site, k=int(top) + 1, tokens=slice(position, position + 1))
                        rows += 1
                        reduced += want not in ("", "full")
                        if want == "full":
                            full += 1
                            assert torch.equal(cache.get(site, tokens=slice(position, position + 1))[0], values[number, position]), (request, site, position)
        assert rows == sum(2 * values.shape[1] for _, values in requests.values())
        assert balanced(session.coverage())
        assert len(seen) > min(len(requests), met) / 20 and 0 < full < rows and reduced > 0 and (by_trigger > 0 or rows < 1000) and (greatest > 0 or rows < 1000)
        figures("policy_changes", f"DMI_POLICY_CHANGES={CHANGES} python -m pytest python/tests/test_policy_changes.py -k random_changes", [
            result.row("changes while the model ran", CHANGES, "times", goal=">= 10000", met=CHANGES >= 10000),
            result.row("rows held against the revision that their books name", rows, "rows"),
            result.row("of these not what that revision makes of them, or in full and not the model's own bits", 0, "rows", goal="0", met=True),
            result.row("in full", full, "rows"), result.row("in full for a trigger", by_trigger, "rows"), result.row("at lower levels", reduced, "rows"),
            result.row("revisions that rows met", len(seen), "times"), result.row("requests", len(requests), "times"),
        ])  # fmt: skip
        print(f"{CHANGES} changes; {len(seen)} revisions met {rows} rows of {len(requests)} requests, of which {full} were captured in full, {by_trigger} of them for a trigger, and {reduced} at lower levels, {greatest} of those with their greatest elements")
        until(lambda: session.policy.get()["revision"]["revision"] == max(in_force))


def repeated(model: Any, ids: torch.Tensor, seen: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A forward of the same tensor of ids again and again, that gives what hooks saw: called, or, on a GPU, replayed from a graph that is recorded here."""

    def call() -> torch.Tensor:
        seen.clear()
        model(ids, use_cache=False)
        return torch.stack(seen)

    if ids.device.type == "cpu":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return values

    return replay


def test_each_change_is_in_force_at_the_next_step(tmp_path: Path) -> None:
    """A change and a step in turns: what a step captures is what the change before it says. On a GPU the steps are replays of graphs that were recorded before all changes."""
    model = llama(implementation="sdpa")  # the mask of the other kind cannot be recorded
    choose = random.Random(int(torch.randint(2**31, ())))
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out).detach().clone()))
    batch, length = 3, 4
    rows = {n: torch.ones(batch, n, dtype=torch.int64, device="cpu") for n in (length, 1)}
    with torch.no_grad(), dmi.attach(model, "blocks.*.hook_resid_post", store=tmp_path / "s", tags=["here"]) as session, dmi.open(tmp_path / "s") as store:
        ids = {n: prompts(batch, n) for n in rows}
        with session.step(rows=rows[length]):
            bound = amid(repeated(model, ids[length], seen)().double().norm(dim=-1), 0.5)
        steps = {n: repeated(model, ids[n], seen) for n in rows}
        requests: dict[str, tuple[list[int], list[torch.Tensor]]] = {}  # revision in force, values, by step
        in_force: dict[int, Document] = {}
        numbers, names, kept_steps = None, list[str](), 0
        for change in range(CHANGES):
            said = draw(choose, [bound])
            revision = store.policy.set(said)["revision"]["revision"]
            in_force[revision] = said
            if change % 3 == 0:
                numbers = None
            tokens = length if numbers is None else 1
            ids[tokens].copy_(prompts(batch, tokens))
            begins = numbers is None
            with session.step(rows=rows[tokens], requests=numbers) as numbers:
                values = steps[tokens]()
            if begins:
                names = list(session.requests)[-batch:]
                kept_steps = 3 if choose.random() < 0.15 else 0
            if kept_steps:
                kept_steps -= 1
                for row, name in enumerate(names):
                    revisions, parts = requests.setdefault(name, ([], []))
                    revisions += [revision] * tokens
                    parts.append(values[:, row].cpu())
        session.flush()
        outcomes: dict[str, int] = {}
        for request, (revisions, parts) in requests.items():
            of, cache = torch.cat(parts, dim=1), session.cache(request=request)
            for number, site in enumerate(SITES):
                positions = []
                for r in cache.coverage(site)["ranges"]:
                    step = r.get("stride", 1)
                    for position in range(r["first"], r["first"] + r["count"] * step, step):
                        positions.append(position)
                        assert r["policy"] == revisions[position], (request, site, position, r)
                        document = in_force[r["policy"]]
                        want = kept(document, site, request, position, length)
                        if want != "full" and triggered(document, number, position, length, of):
                            want = "full"
                        want = want.partition("+")[0]
                        assert (r["level"] if r["outcome"] == "captured" else "") == want, (request, site, position, r, document)
                        outcomes[want] = outcomes.get(want, 0) + 1
                        if want == "full":
                            assert torch.equal(cache.get(site, tokens=slice(position, position + 1))[0], of[number, position]), (request, site, position)
                        elif want in ("int8", "fp8"):
                            assert near(cache.get(site, tokens=slice(position, position + 1), level="any")[0], of[number, position], want), (request, site, position)
                assert sorted(positions) == list(range(len(revisions))), (request, site)
        assert balanced(session.coverage())
        assert set(outcomes) >= {"full", ""} and (len(outcomes) > 3 or CHANGES < 400)
        looked = sum(outcomes.values())
        figures("policy_next_step", f"DMI_POLICY_CHANGES={CHANGES} python -m pytest python/tests/test_policy_changes.py -k next_step", [
            result.row("changes, each before one step" + (", a replay of a graph recorded before all of them" if ids[length].is_cuda else ""), CHANGES, "times", goal=">= 10000", met=CHANGES >= 10000),
            result.row("rows held against the change before their step", looked, "rows"),
            result.row("of these under another revision, or not what it makes of them", 0, "rows", goal="0", met=True),
            *(result.row(f"at level {name or 'off'}", n, "rows") for name, n in sorted(outcomes.items())),
        ])  # fmt: skip
        print(f"{CHANGES} changes, {len(requests)} requests held against what each says: rows by level {outcomes}")


LADDER = ["full", "fp8", "sampled/3", "stats", "off"]


def draw_pressed(choose: random.Random, bounds: list[float], number: int, demand: float) -> Document:
    """A document whose budget the traffic's demand in bytes a second exceeds by far, with rows that triggers keep. Rules that may be lowered share all rows out, so that each has some to give."""
    rules: list[Document] = []
    for site in SITES:
        for phase in choose.choice([["prefill", "decode"], [None]]):
            own = choose.randrange(4)
            rule: Document = {"hooks": site, "level": LADDER[own], "priority": choose.randrange(3), "degrade": [rung for rung in LADDER[own + 1 : -1] if choose.random() < 0.6]}
            rule["degrade"] += ["off"] if not rule["degrade"] or choose.random() < 0.8 else []
            rules.append(rule | ({"phase": phase} if phase else {}))
    choose.shuffle(rules)
    if choose.random() < 0.6:  # before them one that nothing lowers
        rules.insert(0, {"level": choose.choice(["full", "int8", "stats+2", "off"]), "degrade": [], **choose.choice([{"requests": {"ids": "*.*0"}}, {"tokens": "prompt[-1]"}, {"tokens": "all[1:4]"}])})
    for n, rule in enumerate(rules):
        rule["name"] = f"{number}.{n}"
    kept_of = choose.choice([[], SITES])
    trigger = {"hooks": choose.choice(SITES), "when": {"statistic": "l2", "above": choose.choice(bounds)}, "keep": kept_of, "cooldown": "1h"}
    return {"default": "off", "rules": rules, "triggers": [trigger], "budgets": {"disk_bytes_per_s": round(demand / choose.choice([50, 200]))}}


def in_order(document: Document, lowered: Mapping[str, str]) -> bool:
    """No rule is lowered before all of a lower priority are at the end of their ladders."""
    rules = [rule for rule in document["rules"] if rule["degrade"]]
    return all(
        lowered.get(below["name"]) == below["degrade"][-1]
        for above in rules if above["name"] in lowered
        for below in rules if below["priority"] < above["priority"]
    )  # fmt: skip


def near(got: torch.Tensor, want: torch.Tensor, how: str) -> bool:
    """As near as docs/format/policy.md says."""
    most, apart = float(want.abs().max()), (got.double() - want.double()).abs()
    if how == "int8":
        return bool((apart <= most / 126 * 0.5001).all())
    return bool((apart <= (want.double().abs() / 16).clamp(min=most / 416 / 1024) * 1.0001).all())


def test_what_triggers_keep_while_overload_lowers_rules(tmp_path: Path) -> None:
    """Both at once: budgets that the traffic exceeds, and triggers that keep rows of a step. Every row is what the revision of its books, with what that had lowered, makes of it; rules go down in
    the order of their priorities; and with the traffic gone all are back."""
    model = llama()
    choose = random.Random(int(torch.randint(2**31, ())))
    requests: dict[str, tuple[int, torch.Tensor]] = {}
    documents, under = list[Document](), list[str]()  # requests while rules were lowered
    since: dict[int, Document] = {}  # by the revision that brought it in
    with plainly(model.model.layers[0]) as first, plainly(model.model.layers[1]) as second, torch.no_grad(), \
            dmi.attach(model, "blocks.*.hook_resid_post", store=tmp_path / "s", mode="best-effort") as session:  # fmt: skip

        def forward() -> None:
            first.clear()
            second.clear()
            batch, length = choose.randrange(1, 4), choose.randrange(1, 6)
            out = model(prompts(batch, length), use_cache=True)
            names = list(session.requests)[-batch:]
            for _ in range(3):
                out = model(prompts(batch, 1), use_cache=True, past_key_values=out.past_key_values)
            values = torch.stack([torch.cat(first, dim=1), torch.cat(second, dim=1)])
            requests.update({name: (length, values[:, row]) for row, name in enumerate(names)})

        def lowered() -> dict[str, str]:
            return dict(session.policy.get()["revision"]["lowered"])

        model(prompts(8, 8), use_cache=False)
        bounds = [amid(torch.stack([first[0], second[0]]).double().norm(dim=-1), q) for q in (0.7, 0.95)]
        ends = time.monotonic() + 300
        while not (demand := session.policy.get()["rules"][-1]["bytes_per_s"]):  # what all of it costs in full
            assert time.monotonic() < ends
            forward()
        requests.clear()
        for number in range(PRESSED):
            documents.append(draw_pressed(choose, bounds, number, demand))
            since[session.policy.set(documents[-1])["revision"]["revision"]] = documents[-1]
            ends = time.monotonic() + 300
            while not lowered():
                assert time.monotonic() < ends, f"the governor lowers nothing of {documents[-1]}"
                forward()
            held = len(requests)
            for _ in range(25):
                forward()
            under += list(requests)[held:]
            until(lambda: lowered() == {})  # nothing comes any more: nobody starves
            forward()
        session.flush()
        revisions = {r["revision"]: r for r in session.policy.revisions()}
        document_of = {number: since[revision["document"]] for number, revision in revisions.items() if revision["document"] in since}
        for number, revision in revisions.items():
            assert in_order(document_of[number], revision["lowered"]), (revision, document_of[number])
        books = session.coverage()
        dropped = sum(books["outcomes"].get("dropped", {}).values())  # by a ring that a busy machine's engine did not empty in time: then these rows are on the books, and of no level
        seen: dict[tuple[str, bool], int] = {}
        others = [name for name in requests if name not in set(under)]
        for request in under + choose.sample(others, min(len(others), 200)):
            prompt, values = requests[request]
            cache = session.cache(request=request)
            try:
                ranges = {site: cache.coverage(site)["ranges"] for site in SITES}
            except dmi.NotCapturedError:
                assert dropped, request
                continue
            for index, site in enumerate(SITES):
                for r in ranges[site]:
                    if r["outcome"] == "dropped":
                        assert dropped, (request, r)
                        continue
                    document, down = document_of[r["policy"]], revisions[r["policy"]]["lowered"]
                    step = r.get("stride", 1)
                    for position in range(r["first"], r["first"] + r["count"] * step, step):
                        want = kept(document, site, request, position, prompt, down)
                        by_trigger = want != "full" and triggered(document, index, position, prompt, values)
                        want, _, _ = ("full" if by_trigger else want).partition("+")
                        assert (r["level"] if r["outcome"] == "captured" else "") == want, (request, site, position, r, document, down)
                        seen[(want, bool(down))] = seen.get((want, bool(down)), 0) + 1
                        seen[("by trigger", bool(down))] = seen.get(("by trigger", bool(down)), 0) + by_trigger
                        one, row = slice(position, position + 1), values[index, position]
                        if want == "full":
                            assert torch.equal(cache.get(site, tokens=one)[0], row), (request, site, position)
                        else:
                            with pytest.raises(dmi.IncompleteError):
                                cache.get(site, tokens=one)
                        if want in ("int8", "fp8"):
                            assert near(cache.get(site, tokens=one, level="any")[0], row, want), (request, site, position)
        print(f"{len(documents)} documents, {len(revisions)} revisions, {len(requests)} requests; rows by level, and whether something was lowered: {seen}")
    assert balanced(books)
    assert seen[("by trigger", True)] > 0 and sum(n for (how, down), n in seen.items() if down and how in ("fp8", "stats", "")) > 0
