"""A model after its sessions is the model before: every attribute of every module the same object, every dict and list with the same members, the library's registry too."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dmi
from observed import FAMILIES, fresh_seed, model_of, observed
from sessions import llama, prompts, quiet

pytestmark = pytest.mark.newest


def everything(model: nn.Module) -> dict[str, Any]:
    """Attributes by path, the members of containers among them; and what is the library's, which all models share."""
    found: dict[str, Any] = {}
    owners: list[tuple[str, Any]] = list(model.named_modules())
    owners += [(f"{path}.config", module.config) for path, module in model.named_modules() if hasattr(module, "config")]
    owners += [("generation_config", model.generation_config), ("class", type(model))] if hasattr(model, "generation_config") else []
    for path, owner in owners:
        for name, value in vars(owner).items():
            found[f"{path}/{name}"] = value
            if isinstance(value, dict):
                found.update({f"{path}/{name}[{key!r}]": member for key, member in value.items()})
            elif isinstance(value, (list, tuple)):
                found.update({f"{path}/{name}[{i}]": member for i, member in enumerate(value)})
    for name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        found[f"registry/{name}"] = ALL_ATTENTION_FUNCTIONS[name]
    return found


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert after.keys() == before.keys(), after.keys() ^ before.keys()
    changed = [name for name, value in before.items() if after[name] is not value and after[name] != value]
    assert not changed, changed


@pytest.mark.parametrize("family", FAMILIES)
def test_after_all_sites_of_a_family(family: str) -> None:
    fresh_seed()
    model = model_of(family)
    ids = prompts()
    with torch.no_grad():
        plain = model.generate(ids, max_new_tokens=2, do_sample=False)
        before = everything(model)
        with observed(model, ["**"]):
            assert everything(model).keys() != before.keys()
            assert torch.equal(model.generate(ids, max_new_tokens=2, do_sample=False), plain)
        same(before, everything(model))
        assert torch.equal(model.generate(ids, max_new_tokens=2, do_sample=False), plain)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[::2], ids=str)
def test_sessions_that_end_in_any_order(order: tuple[int, ...], tmp_path: Path) -> None:
    model = llama()
    before = everything(model)
    sessions = [dmi.attach(model, hooks, store=tmp_path / "s") for hooks in ("blocks.*.attn.hook_pattern", "**.hook_rot_k", ["tokens", "logits"])]
    for index in order:
        model.generate(prompts(), max_new_tokens=2, do_sample=False)
        sessions[index].detach()
    same(before, everything(model))


@pytest.mark.parametrize("where", ["body", "forward", "attach", "generate"])
def test_after_an_exception(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = llama(), prompts()
    failing = {"forward": model.model.layers[1].mlp, "generate": model.lm_head}.get(where)
    handle = failing.register_forward_pre_hook(lambda *_: 1 / 0) if failing is not None else None
    before = everything(model)
    if where == "attach":  # half of the hooks are in place
        monkeypatch.setattr("dmi.huggingface.Steps.install", lambda _: 1 / 0)
    with quiet(), pytest.raises(ZeroDivisionError), dmi.attach(model, "**", store=tmp_path / "s"):
        if where == "body":
            raise ZeroDivisionError
        if where == "forward":
            model(ids)
        model.generate(ids, max_new_tokens=2)
    same(before, everything(model))
    if handle is not None:
        handle.remove()
