"""Names, shapes and values are TransformerLens 4's, without compatibility mode. Runs where that library is
installed."""

from __future__ import annotations

import copy
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import dmi
from observed import FAMILIES, fresh_seed, model_of, observed

pytest.importorskip("transformer_lens", reason="TransformerLens 4 needs the newest torch: `make test-newest` has it")
pytestmark = pytest.mark.newest

OURS = {
    # Names that DMI gives and the bridge does not, in some families. docs/sites.md says so.
    "tokens": "embed.hook_in",
    "attn.hook_rot_q": None,
    "attn.hook_rot_k": None,
    "logits": None,
}
THEIRS = re.compile(
    r"mlp\.hook_(pre|post)$|mlp\.(gate\.)?hook_expert_weights$|attn\.hook_[qk]_normed$|attn\.[qk]_norm\.|rotary_emb\.|attn\.hook_(cos|sin)$|^pos_embed\.hook_in$"
)
"""Names that the bridge gives and DMI does not: a table of docs/sites.md says what there is instead."""


def bridge(model: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(128)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2", unk_token="t0"
    )
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        tokenizer.init_kwargs["name_or_path"] = directory
        return TransformerBridge.boot_transformers(directory, hf_model=model, tokenizer=tokenizer, device="cpu")


@pytest.mark.parametrize("pads", ["none", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_shapes_and_values(family: str, pads: str) -> None:
    fresh_seed()
    model = model_of(family)
    ids = torch.randint(3, 128, (2, 11))
    there = [slice(0, 11), {"none": slice(0, 11), "left": slice(3, 11), "right": slice(0, 8)}[pads]]  # of the batch's rows
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(there):
        mask[row, tokens] = 1
    # The bridge counts positions from the first token, as generate does. The forward of GPT-2 alone counts pads.
    padded = {} if pads == "none" else {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with observed(model, ["**"]) as session, torch.no_grad():
        model(ids, **padded)
        captured = {name: [session.tensor(name, request) for request in range(2)] for name in session.names}
        aliases = {site.name: site.aliases for site in session.plan.sites}
    with torch.no_grad():
        _, theirs = bridge(model).run_with_cache(ids, **{key: value for key, value in padded.items() if key == "attention_mask"})
    compared = 0
    for name, rows in captured.items():
        tail = name.split(".", 2)[2] if name.startswith("blocks.") else name
        their_name = OURS.get(tail, name) or name
        if their_name not in theirs:
            assert tail in OURS, f"{name} is no name of TransformerLens"
            continue
        batch = theirs[their_name]
        for alias in aliases[name]:
            if alias in theirs:
                other = theirs[alias].reshape(batch.shape)
                assert torch.allclose(other.float(), batch.float(), atol=1e-5), (
                    f"{alias} is not {name} to TransformerLens"
                )
        if batch.shape[0] == ids.numel():  # routers see one row dimension
            batch = batch.unflatten(0, ids.shape)
        for request, tokens in enumerate(there):
            got, want = rows[request], batch[request]
            want = want[:, tokens, tokens] if "hook_attn_scores" in name or "hook_pattern" in name else want[tokens]
            assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, TransformerLens has {tuple(want.shape)}"
            masked = (
                (got < -1e30) & (want < -1e30) if got.is_floating_point() else torch.zeros_like(got, dtype=torch.bool)
            )
            assert torch.allclose(got[~masked].float(), want[~masked].float(), atol=2e-4), f"{name} in {family}"
        compared += 1
    assert compared >= 30
    known = {*aliases, *(alias for of_one in aliases.values() for alias in of_one)}
    unknown = [name for name in theirs.keys() if name not in known and not THEIRS.search(name)]
    assert not unknown, f"docs/sites.md does not tell of TransformerLens's {unknown}"


@pytest.mark.parametrize(
    ("family", "path", "theirs"),
    [
        ("mixtral", "model.layers.{n}.mlp.gate:out.1", "mlp.hook_expert_weights"),
        ("qwen3", "model.layers.{n}.self_attn.q_norm", "attn.hook_q_normed"),
        ("qwen3", "model.layers.{n}.self_attn.k_norm", "attn.hook_k_normed"),
        ("olmo2", "model.layers.{n}.self_attn.q_norm", "attn.hook_q_normed"),
    ],
)
def test_other_places_by_module_path(family: str, path: str, theirs: str) -> None:
    """What docs/sites.md says of places that are no sites here."""
    fresh_seed()
    model = model_of(family)
    ids = torch.randint(3, 128, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    choices = ["**.hook_expert_indices"] if family == "mixtral" else []
    with observed(model, [path.format(n="*"), *choices]) as session, torch.no_grad():
        model(ids, attention_mask=mask)
        session.check_books()
        rows = [[session.tensor(path.format(n=n), request) for request in range(2)] for n in range(2)]
        chosen = [[session.tensor(f"blocks.{n}.mlp.hook_expert_indices", request) for request in range(2)] for n in range(2)] if choices else []
    with torch.no_grad():
        _, cache = bridge(model).run_with_cache(ids, attention_mask=mask)
    for n in range(2):
        batch = cache[f"blocks.{n}.{theirs}"]
        for request, tokens in enumerate((9, 7)):
            got = rows[n][request]
            if choices:
                want = batch.unflatten(0, ids.shape)[request, :tokens].gather(-1, chosen[n][request])
            else:  # heads come before tokens there, where they are apart
                want = batch[request].transpose(0, 1)[:tokens] if batch.ndim == 4 else batch[request, :tokens]
            assert got.shape == want.shape and torch.allclose(got, want, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_activation_cache(family: str, tmp_path: Path) -> None:
    """What TransformerLens's own methods make of a capture is what they make of its own cache."""
    fresh_seed()
    model = model_of(family)
    theirs = bridge(copy.deepcopy(model))  # it takes its model over
    ids = torch.randint(3, 128, (2, 9))
    with torch.no_grad():
        _, wanted = theirs.run_with_cache(ids)
    with dmi.attach(model, "**", store=tmp_path / "store") as session, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(ids)
        session.flush()
        cache = session.cache().to_transformer_lens(theirs)
        one = session.cache(request=session.requests[1]).to_transformer_lens()
    assert type(cache) is type(wanted) and cache.has_batch_dim and not one.has_batch_dim
    shared = [name for name in cache.keys() if name in wanted and cache[name].shape == wanted[name].shape]
    assert len(shared) >= 30
    for name in shared:
        got, want = cache[name].float(), wanted[name].float()
        finite = ~((got < -1e30) & (want < -1e30))
        assert torch.allclose(got[finite], want[finite], atol=2e-4), name
    for ask in (
        lambda c: c["resid_post", 1],
        lambda c: c.accumulated_resid(layer=-1),
        lambda c: c.accumulated_resid(layer=1, incl_mid=True, pos_slice=-1, return_labels=True)[0],
        lambda c: c.stack_activation("resid_pre"),
    ):
        assert torch.allclose(ask(cache), ask(wanted), atol=2e-4)
    (parts, names), (our_parts, our_names) = (c.decompose_resid(layer=-1, mode="all", return_labels=True) for c in (wanted, cache))
    assert our_names == names
    assert torch.allclose(our_parts, parts, atol=2e-4)
    assert torch.equal(one["blocks.1.hook_resid_post"], cache["blocks.1.hook_resid_post"][1])


def test_a_cache_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_lens", None)
    model = model_of("llama")
    with dmi.attach(model, "blocks.0.hook_resid_post", store=tmp_path / "store") as session, torch.no_grad():
        model(torch.randint(3, 128, (1, 4)))
        session.flush()
        with pytest.raises(ImportError, match="pip install 'transformer-lens"):
            session.cache().to_transformer_lens()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_the_bridges_code_runs_on_dmi(family: str) -> None:
    """The same lines, once on TransformerBridge and once on DMI: only what boots differs."""
    from transformer_lens.model_bridge.driver_protocol import Driver, validate_driver

    import dmi.transformer_lens as on_dmi

    fresh_seed()
    model = model_of(family)
    before = {name: [*module._forward_hooks, *module._forward_pre_hooks] for name, module in model.named_modules()}
    theirs = bridge(copy.deepcopy(model))
    ids = torch.randint(3, 128, (2, 9))

    def code(lens: Any) -> dict[str, Any]:
        seen: dict[str, torch.Tensor] = {}
        logits, cache = lens.run_with_cache(ids)
        _, some = lens.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_resid_post"))
        loss = lens.forward(ids, return_type="loss")
        lens.run_with_hooks(ids, fwd_hooks=[("blocks.1.hook_resid_post", lambda value, hook: seen.__setitem__("it", value.clone()))])
        return {"logits": logits, "cache": cache, "some": some, "loss": loss, "seen": seen, "text": lens.to_tokens("t5 t6")}

    with torch.no_grad():
        want = code(theirs)
    with on_dmi.boot(model, theirs.tokenizer) as mine:
        driver = mine._driver
        validate_driver(driver, after_bridge_construction=True)
        assert isinstance(driver, Driver) and not driver.supports("gradients")
        got = code(mine)
        with pytest.raises(NotImplementedError, match="DMI observes"):
            driver.forward(ids, intervene={"blocks.0.hook_resid_post": lambda value: value})
        with pytest.raises(NotImplementedError, match="one forward"):
            driver.forward(ids, max_new_tokens=2)
        with pytest.raises(NotImplementedError, match="pads"):
            driver.forward(ids, attention_mask=torch.tensor([[0] + [1] * 8, [1] * 9]))
        with pytest.raises(ValueError, match="no such hook point"):
            driver.forward(ids, capture=("blocks.9.hook_resid_post",))
    assert {name: [*module._forward_hooks, *module._forward_pre_hooks] for name, module in model.named_modules()} == before
    with pytest.raises(RuntimeError, match="closed"):
        driver.forward(ids)
    driver.close()
    assert torch.allclose(got["logits"], want["logits"], atol=2e-4) and torch.allclose(got["loss"], want["loss"], atol=2e-4)
    assert torch.equal(got["text"], want["text"])
    shared = [name for name in got["cache"].keys() if name in want["cache"]]
    assert len(shared) >= 30
    for name in shared:
        a, b = got["cache"][name], want["cache"][name]
        if name in ("hook_pos_embed", "pos_embed.hook_out"):
            continue
        assert a.shape == b.shape, name
        finite = ~((a.float() < -1e30) & (b.float() < -1e30))
        assert torch.allclose(a.float()[finite], b.float()[finite], atol=2e-4), name
    residuals = {name for name in want["some"].keys() if name.endswith("hook_resid_post")}
    assert residuals and residuals <= set(got["some"].keys())
    assert torch.allclose(got["seen"]["it"], want["seen"]["it"], atol=2e-4)
