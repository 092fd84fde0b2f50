"""Requests and rows of `generate` and of plain forwards: every captured row equals that of the sequence run alone."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from dmi.hook import HookError
from observed import FAMILIES, Observed, fresh_seed, model_of, observed

pytestmark = pytest.mark.newest

SITES = ["blocks.*.hook_resid_post", "blocks.**.hook_rot_k", "blocks.**.hook_pattern", "tokens", "unembed.hook_out"]
WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "uncached": {"use_cache": False},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "chunked": {"prefill_chunk_size": 3},
    "beams": {"num_beams": 3},
    "beams-uncached": {"num_beams": 3, "use_cache": False},
    "beams-static": {"num_beams": 2, "num_return_sequences": 2, "cache_implementation": "static"},
}


def sites(family: str) -> list[str]:
    return [site for site in SITES if not (family == "gpt2" and "rot" in site)]


def prompts() -> tuple[Tensor, Tensor]:
    """Three prompts of different lengths, padded on the left."""
    ids = torch.randint(12, 128, (3, 7))
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 3, 1)):
        ids[row, :pads], mask[row, :pads] = 0, 0
    return ids, mask


def alone(model: Any, tokens: list[int], names: list[str]) -> dict[str, Tensor]:
    """The same rows when the sequence is run by itself, in one uncached forward."""
    with observed(model, names) as session:
        with torch.no_grad():
            model(torch.tensor([tokens]), use_cache=False)
        session.check_books()
        return {name: session.tensor(name, 0) for name in session.names}


def check(session: Observed, request: int, reference: dict[str, Tensor]) -> None:
    for name, want in reference.items():
        if (
            name == "unembed.hook_out"
        ):  # generate computes those of the last token of a prompt, or of each of its chunks
            session.reader.drain()
            parts = session.requests.paths.get(request, [(request, 0, len(want))])
            rows = {
                p: session.reader.rows[name][r][p]
                for r, a, n in parts
                for p in range(a, a + n)
                if p in session.reader.rows[name][r]
            }
            assert max(rows) == len(want) - 1
            got, want = torch.stack([rows[p] for p in sorted(rows)]).to(want.device), want[sorted(rows)]
        else:
            got = session.tensor(name, request)
        assert got.shape == want.shape, name
        assert torch.allclose(got, want, atol=2e-4), f"{name}: differs by {(got - want).abs().max()}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family: str, way: str) -> None:
    fresh_seed()
    model = model_of(family)
    model.generation_config.eos_token_id = list(range(3, 12))  # some rows end before others
    ids, mask = prompts()
    copies = WAYS[way].get("num_return_sequences", 1)
    with observed(model, sites(family)) as session:
        with torch.no_grad():
            output = model.generate(ids, attention_mask=mask, max_new_tokens=9, **WAYS[way])
        assert isinstance(output, Tensor)
        session.check_books()
        requests = session.requests.visible
        assert session.requests.latest == requests and len(requests) == len(output) == 3 * copies
        for i, request in enumerate(requests):
            prompt = ids[i // copies][mask[i // copies] == 1].tolist()
            told = session.requests.tokens[request]
            assert told is not None and told[: len(prompt)] == prompt
            new = output[i, 7:].tolist()
            assert told[len(prompt) :] == new[: len(told) - len(prompt)]
            assert len(set(new[len(told) - len(prompt) :])) <= 1, "more than padding was left out"
            assert session.tensor("tokens", request).tolist() == told[:-1]
            check(session, request, alone(model, told[:-1], sites(family)))


def test_beams_follow_their_indices_into_the_returned_sequences() -> None:
    """Logits captured along the path are those that gave the sequence its score."""
    fresh_seed()
    model = model_of("llama")
    ids, mask = prompts()
    with observed(model, ["logits"]) as session:
        with torch.no_grad():
            output = model.generate(
                ids, attention_mask=mask, max_new_tokens=6, num_beams=4, num_return_sequences=3, length_penalty=0.0,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        for i, request in enumerate(session.requests.visible):
            logits = session.tensor("unembed.hook_out", request).log_softmax(-1)
            new = output.sequences[i, 7:]
            score = logits[-len(new) :].gather(1, new[:, None]).sum()
            assert torch.allclose(score, output.sequences_scores[i], atol=1e-4)


def test_stop_strings_and_custom_criteria_end_rows() -> None:
    fresh_seed()
    model = model_of("llama")
    ids, mask = prompts()

    def second_row_after_three(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor([False, input_ids.shape[1] >= 10, False])

    model.generation_config.eos_token_id = 2
    with observed(model, ["tokens"]) as session:
        with torch.no_grad():
            model.generate(ids, attention_mask=mask, max_new_tokens=8, stopping_criteria=[second_row_after_three])
        session.check_books()
        new = session.requests.tokens[1][4:]
        assert len(new) == 3 or (len(new) < 3 and new[-1] == 2)  # a random model may come to the end sooner
        assert session.tensor("tokens", 1).shape[0] == 4 + len(new) - 1


def test_embeddings_instead_of_ids() -> None:
    fresh_seed()
    model = model_of("llama")
    ids = torch.randint(3, 128, (2, 5))
    embeddings = model.model.embed_tokens(ids).detach()
    with observed(model, ["blocks.0.hook_resid_post", "tokens", "hook_embed"]) as session:
        with torch.no_grad():
            model.generate(inputs_embeds=embeddings, max_new_tokens=4)
        session.check_books()
        assert torch.equal(session.tensor("hook_embed", 1)[:5], embeddings[1])
        assert session.requests.tokens[1] is None
        assert session.tensor("blocks.0.hook_resid_post", 1).shape[0] == 8
        assert sorted(session.reader.rows["tokens"][1]) == [5, 6, 7]  # only those that went in as ids
        reference = alone(model, ids[1].tolist(), ["blocks.0.hook_resid_post"])
        assert torch.allclose(
            session.tensor("blocks.0.hook_resid_post", 1)[:5], reference["blocks.0.hook_resid_post"], atol=1e-5
        )


def test_guidance_runs_the_model_aside() -> None:
    """Forwards of a logits processor are requests of their own, hidden; generate's go on undisturbed."""
    fresh_seed()
    model = model_of("llama")
    ids, mask = torch.randint(3, 128, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    with observed(model, ["tokens"]) as session:
        with torch.no_grad():
            output = model.generate(ids, attention_mask=mask, max_new_tokens=3, guidance_scale=1.5)
        session.check_books()
        assert session.requests.visible == session.requests.latest == [0, 1] and session.requests.hidden
        assert torch.equal(session.tensor("tokens", 1), output[1, :-1])


def test_generating_on_from_a_cache() -> None:
    from transformers import DynamicCache

    fresh_seed()
    model = model_of("llama")
    ids = torch.randint(3, 128, (1, 6))
    cache = DynamicCache(config=model.config)
    with observed(model, ["blocks.1.hook_resid_post"]) as session:
        with torch.no_grad():
            first = model.generate(ids, past_key_values=cache, max_new_tokens=3)
            second = model.generate(torch.cat([first, ids], dim=1), past_key_values=cache, max_new_tokens=2)
        session.check_books()
        assert sorted(session.reader.rows["blocks.1.hook_resid_post"][0]) == list(range(8))
        assert sorted(session.reader.rows["blocks.1.hook_resid_post"][1]) == list(range(8, 16))
        reference = alone(model, second[0, :-1].tolist(), ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"]
        assert torch.allclose(session.tensor("blocks.1.hook_resid_post", 1), reference[8:], atol=1e-4)


def test_what_cannot_be_attributed_is_refused() -> None:
    fresh_seed()
    model = model_of("llama")
    ids = torch.randint(3, 128, (1, 6))
    with observed(model, ["tokens"]) as session:
        with pytest.raises(HookError, match="assisted generation"):
            model.generate(ids, assistant_model=model_of("llama"))
        with pytest.raises(HookError, match="prompt lookup"):
            model.generate(ids, prompt_lookup_num_tokens=2)
        with pytest.raises(HookError, match="call generate_batch"):
            model.generate(ids, cache_implementation="paged")
        with pytest.raises(HookError, match="several sequences into one row"):
            model(ids, cu_seq_lens_q=torch.tensor([0, 3, 6]))
        causal = torch.ones(1, 1, 6, 6).tril().bool()
        for mask, what in ((causal, "a tensor of 4 dimensions"), ({"full_attention": causal}, "a dict")):
            with pytest.raises(HookError, match=f"attention_mask is {what}.*session.step"):
                model(ids, attention_mask=mask)
        assert not session.requests.visible  # what is refused begins nothing
        with torch.no_grad():
            model.generate(ids, max_new_tokens=2)
        session.check_books()


def test_an_exception_aborts_the_step_and_the_generation() -> None:
    fresh_seed()
    model = model_of("llama")
    ids = torch.randint(3, 128, (2, 6))
    calls = 0

    def fail(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise ValueError("planted")

    with observed(model, ["**"]) as session:
        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with torch.no_grad():
            with pytest.raises(ValueError, match="planted"):
                model.generate(ids, max_new_tokens=5)
            handle.remove()
            assert session.requests.ended == {0: "error", 1: "error"}
            model.generate(ids, max_new_tokens=2)
        session.reader.drain()
        assert [step.aborted for step in session.reader.steps] == [False, False, True, False, False]
        last = session.reader.steps[-1]
        assert len(last.fired) == last.sites  # nothing of the aborted forward leaked into the next
        assert session.tensor("blocks.1.hook_resid_post", 3).shape[0] == 7


# ------------------------------------------------------------------ plain forwards
def test_plain_forwards_go_on_with_their_cache() -> None:
    fresh_seed()
    model = model_of("qwen3")
    ids, mask = prompts()
    more = torch.randint(12, 128, (3, 2))
    full = torch.cat([mask, torch.ones_like(more)], dim=1)
    with observed(model, sites("qwen3")) as session:
        with torch.no_grad():
            places = (full.cumsum(-1) - 1).clamp(min=0)
            cache = model(ids, attention_mask=mask, position_ids=places[:, :7]).past_key_values
            model(more, attention_mask=full, position_ids=places[:, 7:], past_key_values=cache)
            assert session.requests.visible == [0, 1, 2] and not session.requests.ended
            model(ids, attention_mask=mask, use_cache=False)
            assert session.requests.visible == list(range(6)) and set(session.requests.ended) == {3, 4, 5}
        assert session.requests.latest == [3, 4, 5]
        session.check_books()
        for row in range(3):
            tokens = [*ids[row][mask[row] == 1].tolist(), *more[row].tolist()]
            check(session, row, alone(model, tokens, sites("qwen3")))
        session.instrumentation.settle()
        assert session.requests.tokens[1] == [*ids[1][mask[1] == 1].tolist(), *more[1].tolist()]
        del cache
        gc.collect()
        session.instrumentation.settle()
        assert set(session.requests.ended) >= set(range(6))


def test_right_padding_and_holes() -> None:
    fresh_seed()
    model = model_of("llama")
    ids = torch.randint(3, 128, (3, 8))
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1, 1, 0, 0, 1, 1, 1, 0]])
    names = ["blocks.0.hook_resid_post", "tokens", "unembed.hook_out"]
    with observed(model, names) as session:
        with torch.no_grad():
            output = model(ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
        session.check_books()
        for row in range(3):
            keep = mask[row] == 1
            assert torch.equal(session.tensor("tokens", row), ids[row][keep])
            assert torch.equal(session.tensor("blocks.0.hook_resid_post", row), output.hidden_states[1][row][keep])
            assert torch.equal(session.tensor("unembed.hook_out", row), output.logits[row][keep])
    with (
        observed(model, ["**.hook_pattern"]),
        pytest.raises(HookError, match="pads between its tokens"),
        torch.no_grad(),
    ):
        model(ids, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0, 1, 5, 3]), torch.tensor([-1])], ids=str)
def test_logits_that_were_asked_for(keep: Any) -> None:
    fresh_seed()
    model = model_of("llama")
    ids = torch.randint(3, 128, (2, 8))
    mask = torch.tensor([[1] * 8, [0] * 2 + [1] * 6])
    with observed(model, ["logits"]) as session:
        with torch.no_grad():
            output = model(ids, attention_mask=mask, logits_to_keep=keep)
        session.check_books()
        columns = list(range(8))[-keep:] if isinstance(keep, int) else [int(i) % 8 for i in keep]
        for row, pads in enumerate((0, 2)):
            want = {c - pads: output.logits[row, i] for i, c in enumerate(columns) if c >= pads}
            got = session.reader.rows["unembed.hook_out"][row]
            assert set(got) == set(want)
            assert all(torch.equal(got[position], want[position]) for position in want)


def test_a_cropped_cache_makes_another_attempt() -> None:
    fresh_seed()
    model = model_of("llama")
    ids = torch.randint(3, 128, (1, 8))
    other = torch.randint(3, 128, (1, 3))
    with observed(model, ["tokens", "blocks.1.hook_resid_post"]) as session:
        with torch.no_grad():
            cache = model(ids).past_key_values
            cache.crop(-3)
            model(other, past_key_values=cache)
        session.check_books()
        tokens = torch.cat([ids[0, :5], other[0]])
        assert torch.equal(session.tensor("tokens", 0), tokens)
        reference = alone(model, tokens.tolist(), ["blocks.1.hook_resid_post"])
        check(session, 0, reference)
        del cache
