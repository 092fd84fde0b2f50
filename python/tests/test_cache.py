"""Reading: parts, levels of completeness, batches, dtypes, pages; against plain hooks on the same model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dmi
from sessions import llama, plainly, prompts

pytestmark = pytest.mark.newest
SITES = ["blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern", "blocks.*.attn.hook_q", "logits", "tokens"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A batch of two that was generated, and plain hooks' view of it."""
    model = llama()
    with dmi.attach(model, SITES, store=tmp_path_factory.mktemp("store")) as session:
        with plainly(model.model.layers[1]) as residual, plainly(model.model.layers[0].self_attn) as _, torch.no_grad():
            output = model.generate(prompts(), max_new_tokens=6, do_sample=False)
        with torch.no_grad():
            attentions = model(output[:, :-1], output_attentions=True, use_cache=False).attentions
        session.requests.batch([0, 1])  # the generation is what is looked at, not the reference
        yield {"session": session, "residual": torch.cat(residual, 1), "attentions": attentions, "output": output}


def test_parts(recorded: dict[str, Any]) -> None:
    session, want = recorded["session"], recorded["residual"]
    cache = session.cache()
    name = "blocks.1.hook_resid_post"
    for tokens, part in ((slice(4, 9), want[:, 4:9]), (slice(-3, None), want[:, -3:]), (slice(None, 2), want[:, :2]), (5, want[:, 5:6]),
                         (-1, want[:, -1:]), (range(2, 4), want[:, 2:4])):  # fmt: skip
        assert torch.equal(cache.get(name, tokens=tokens), part), tokens
    assert torch.equal(cache.get(name, steps=slice(1, None)), want[:, 7:]), "after the prompt's forward"
    assert torch.equal(cache.get(name, steps=0), want[:, :7])
    pattern = recorded["attentions"][0]
    got = cache.get("blocks.0.attn.hook_pattern", heads=[3, 0], tokens=slice(4, 9))
    assert got.shape == (2, 2, 5, 9)
    assert torch.allclose(got, pattern[:, [3, 0], 4:9, :9], atol=1e-5)
    assert torch.allclose(session.cache(request=session.requests[1])["attn.hook_pattern", 0], pattern[1], atol=1e-5)
    assert cache.get(name, dtype=torch.float64).dtype == torch.float64
    assert cache.get(name, device="cpu").device.type == "cpu"
    with pytest.raises(ValueError, match="no step"):
        cache.get(name, tokens=slice(0, 8, 2))
    with pytest.raises(ValueError, match="head"):
        cache.get(name, heads=[0])
    with pytest.raises(ValueError, match="9"):
        cache.get("blocks.0.attn.hook_pattern", heads=[9])


def test_names(recorded: dict[str, Any]) -> None:
    cache = recorded["session"].cache()
    names = cache.keys()
    assert len(cache) == len(names) == 8
    assert list(cache) == names
    for key in ("blocks.0.hook_resid_post", ("resid_post", 1), ("hook_q", 0), "logits", "unembed.hook_out", "tokens", ("resid_post", -1)):
        assert key in cache, key
        cache[key]  # type: ignore[index]
    for key in ("blocks.7.hook_resid_post", ("resid_post", 7), "resid_pots", "resid_post", "blocks.*.hook_resid_post", 3, ""):
        assert key not in cache, key
    with pytest.raises(dmi.NotCapturedError, match="blocks.0.hook_resid_post"):
        cache["blocks.0.hook_resid_pots"]
    with pytest.raises(ValueError, match="ambiguous"):
        cache["resid_post"]
    with pytest.raises(TypeError, match="string"):
        cache[3]  # type: ignore[index]
    sizes = {name: tensor.shape[0] for name, tensor in cache.items() if name != "unembed.hook_out"}
    assert set(sizes) == set(names) - {"unembed.hook_out"}
    assert set(sizes.values()) == {2}
    assert "2 requests, 8 sites, 12 positions" in repr(cache)


def test_logits_of_what_the_model_computed(recorded: dict[str, Any]) -> None:
    cache = recorded["session"].cache()
    logits = cache["logits"]
    assert logits.shape == (2, 6, 128)
    assert torch.equal(logits.argmax(-1), recorded["output"][:, 7:])
    assert cache.positions_of("logits").tolist() == list(range(6, 12))
    outcomes = cache.coverage("logits")["outcomes"]
    assert outcomes == {"captured": {"full": 12}, "not_computed": {"engine": 12}}
    # Of a range too, those that there are, and which they are is told; where there are none, nothing looks like an answer.
    assert torch.equal(cache.get("logits", tokens=slice(4, 8)), logits[:, :2])
    assert cache.positions_of("logits", tokens=slice(4, 8)).tolist() == [6, 7]
    with pytest.raises(dmi.IncompleteError, match="computed none of the rows"):
        cache.get("logits", tokens=slice(0, 6))


def test_pages(recorded: dict[str, Any]) -> None:
    session, want = recorded["session"], recorded["residual"]
    for rows in (1, 5, 12, 65536):
        pages = list(session.cache().iter(("resid_post", 1), rows=rows))
        assert all(len(page) <= rows for page in pages)
        assert torch.equal(torch.cat(pages), want.flatten(0, 1))
    assert torch.equal(torch.cat(list(session.cache(request=session.requests[1]).iter("blocks.1.hook_resid_post", rows=7))), want[1])
    with pytest.raises(ValueError, match="rows=0"):
        next(session.cache().iter("tokens", rows=0))
    with pytest.raises(ValueError):
        next(session.cache().iter("blocks.0.attn.hook_pattern"))


def test_statistics(recorded: dict[str, Any]) -> None:
    session, want = recorded["session"], recorded["residual"].double()
    cache = session.cache()
    for row in cache.stats(("resid_post", 1)):
        values = want[session.requests.index(row["request"]), row["position"]]
        assert row["l2"] == pytest.approx(float(values.norm()), rel=1e-9)
        assert row["mean"] == pytest.approx(float(values.mean()), rel=1e-6, abs=1e-9)
        assert row["absmax"] == float(values.abs().max())
    assert len(cache.stats("blocks.*.hook_resid_post")) == 2 * 12 * 2
    (one,) = session.cache(request=session.requests[0]).stats(("resid_post", 1), per="request")
    assert one["rms"] == pytest.approx(float(want[0].pow(2).mean().sqrt()), rel=1e-9)
    pattern = recorded["attentions"][1][0]
    keys = session.cache(request=session.requests[0]).top_keys(("attn.hook_pattern", 1), heads=2, query=-1, k=3)
    top = pattern[2, -1].topk(3)
    assert [key["position"] for key in keys[0]["keys"]] == top.indices.tolist()
    assert [key["weight"] for key in keys[0]["keys"]] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_ragged_batches_name_a_request(tmp_path: Path) -> None:
    model = llama()
    ids, mask = prompts(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    with plainly(model.model.layers[0]) as seen, dmi.attach(model, ["blocks.0.hook_resid_post", "logits"], store=tmp_path / "s") as session:
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
        cache = session.cache()
        with pytest.raises(dmi.RaggedError, match=f"{session.requests[0]}.*name one"):
            cache["resid_post", 0]
        with pytest.raises(dmi.RaggedError, match="positions"):
            cache["logits"]  # as many rows, but at other positions
        with pytest.raises(dmi.RaggedError):
            cache.positions  # noqa: B018
        assert "different lengths" in repr(cache)
        want = torch.cat(seen, 1)
        assert torch.equal(session.cache(request=session.requests[0])["resid_post", 0], want[0, 2:])
        assert torch.equal(session.cache(request=session.requests[1])["resid_post", 0], want[1])
        assert cache.get(("resid_post", 0), tokens=slice(0, 3)).shape == (2, 3, 64), "what all have can be read together"


def test_nothing_partial_unasked(tmp_path: Path) -> None:
    """A forward that raises half-way leaves the later sites' rows dropped(aborted)."""
    model = llama()
    with torch.no_grad(), dmi.attach(model, "blocks.*.hook_resid_post", store=tmp_path / "s") as session:
        first = model(prompts(1, 4), use_cache=True)
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(prompts(1, 2), past_key_values=first.past_key_values)
        handle.remove()
        cache = session.cache(request=session.requests[0])
        assert cache["resid_post", 0].shape == (6, 64)
        with pytest.raises(dmi.IncompleteError) as caught:
            cache["resid_post", 1]
        assert caught.value.coverage is not None
        assert caught.value.coverage["outcomes"] == {"captured": {"full": 4}, "dropped": {"aborted": 2}}
        assert cache.get(("resid_post", 1), partial=True).shape == (4, 64)
        assert cache.positions_of(("resid_post", 1)).tolist() == [0, 1, 2, 3]
        assert cache.get(("resid_post", 1), tokens=slice(0, 4)).shape == (4, 64), "what is all there may be read"
        with pytest.raises(dmi.IncompleteError):
            list(cache.iter(("resid_post", 1)))
        assert not cache.coverage(("resid_post", 1))["complete"]


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.uint8, torch.bool],
)
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point = dmi.HookPoint("here")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.point(x)

    model = Model()
    values = (torch.randn(2, 5, 6) * 3).to(dtype)
    with dmi.attach(model, "here", store=tmp_path / "s") as session:
        model(values)
        got = session.cache()["here"]
    assert got.dtype == dtype
    assert torch.equal(got.view(torch.uint8), values.view(torch.uint8))
