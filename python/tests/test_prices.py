"""What a policy says that its rules cost, against what they then did cost: bytes a second, within 30 %, of prompts and generated tokens that come at an even pace."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch

import dmi
from sessions import llama, prompts, until

POLICY = """
default: stats
rules:
- {name: prompts, hooks: resid_post, phase: prefill, level: full}
- {name: every fourth, hooks: resid_post, tokens: "generated[::4]", level: int8}
- {name: nothing, hooks: hook_embed, level: "off"}
"""
LEVELS = {"prompts": ("full", 64 * 4), "every fourth": ("int8", 4 + 64), "default": ("stats", 32)}  # a row of 64 float32


def test_rules_cost_what_they_are_said_to(tmp_path: Path) -> None:
    model = llama()
    with dmi.attach(model, ["blocks.*.hook_resid_post", "hook_embed"], store=tmp_path / "s") as session:
        session.policy.set(POLICY)
        done = threading.Event()
        failure: list[BaseException] = []

        def serve() -> None:
            try:
                begun, steps = time.monotonic(), 0
                with torch.no_grad():
                    while not done.is_set():
                        out = model(prompts(2, 6), use_cache=True)
                        for _ in range(9):
                            out = model(prompts(2, 1), use_cache=True, past_key_values=out.past_key_values)
                            steps += 1
                            done.wait(max(0, begun + steps * 0.02 - time.monotonic()))  # whatever a step takes
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            until(lambda: all(rule["bytes_per_s"] for rule in session.policy.get()["rules"] if rule["name"] != "nothing"))
            time.sleep(2.5)  # what was measured before there was anything to measure is over

            def captured() -> dict[str, int]:
                session.flush()
                return dict(session.coverage()["outcomes"]["captured"])

            begun, before, said, samples = time.monotonic(), captured(), dict.fromkeys(LEVELS, 0.0), 0
            by_site = dict.fromkeys(LEVELS, 0.0)
            while time.monotonic() - begun < 8 or samples < 12:
                for rule in session.policy.get()["rules"]:
                    if rule["name"] in said:
                        said[rule["name"]] += rule["bytes_per_s"]
                    else:
                        assert (rule["name"], rule["bytes_per_s"]) == ("nothing", 0)
                request = session.requests[-3]  # not of the last two, whose rows the engine may not have: how long a prompt is they tell
                for site in ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"):
                    for position, rule in ((0, "prompts"), (6, "every fourth"), (7, "default")):
                        (verdict,) = session.policy.explain(request, site, position=position)
                        assert verdict["rule"] == rule
                        by_site[rule] += verdict["bytes_per_s"]
                samples += 1
                time.sleep(0.25)
            after, took = captured(), time.monotonic() - begun
        finally:
            done.set()
            thread.join()
        assert not failure, failure
        for name, (level, row) in LEVELS.items():
            cost = (after[level] - before[level]) * row / took
            print(f"{name}: {cost:.0f} B/s, said to be {said[name] / samples:.0f}, by explain {by_site[name] / samples:.0f} of both sites")
            assert 0.7 * cost < said[name] / samples < 1.3 * cost, (name, cost, said[name] / samples)
            assert 0.7 * cost < by_site[name] / samples < 1.3 * cost, (name, cost, by_site[name] / samples)
