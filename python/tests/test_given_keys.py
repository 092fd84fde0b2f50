"""Rotated keys are taken where a module gives them to its cache: they are what rotary embeddings gave, whatever the cache keeps of them, and the cache is left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dmi.families import Mapping
from observed import Observed, fresh_seed, model_of, observed
from reference import Clones

pytestmark = pytest.mark.newest

KEYS = ["blocks.*.attn.hook_rot_k"]
STEPS = (9, 1, 3, 1)
"""Tokens of each forward: a prompt beyond the sliding window of 8, single tokens, and several at once."""


def dynamic(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def static(model: Any) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=sum(STEPS))


def both(model: Any) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))


@contextlib.contextmanager
def as_it_was(cache: Any) -> Iterator[None]:
    """No attribute of a cache, or of those in it, comes, goes or becomes another, but for what a forward makes of its layers."""
    parts = [cache, *(part for part in vars(cache).values() if hasattr(part, "update") and hasattr(part, "layers"))]
    before = [dict(vars(part)) for part in parts]
    yield
    for part, had in zip(parts, before, strict=True):
        assert vars(part).keys() == had.keys()
        assert all(vars(part)[name] is value for name, value in had.items())


def run(model: Any, cache: Any, sessions: list[Observed], cut: tuple[int, ...] = STEPS, **options: Any) -> None:
    """Forwards over a cache; every session has the keys that plain hooks saw, bit for bit."""
    want: list[list[Tensor]] = [[] for _ in range(model.config.num_hidden_layers)]
    with torch.no_grad(), Clones(model) as clones:
        for tokens in cut:
            clones.clear()
            with as_it_was(cache):
                model(torch.randint(3, 128, (2, tokens)), past_key_values=cache, **options)
            for layer, (_, keys) in zip(want, clones.rotated, strict=True):
                layer.append(keys)
    for session in sessions:
        session.check_books()
        requests = session.requests.latest
        for n, parts in enumerate(want):
            for row, request in enumerate(requests):
                whole = session.tensor(f"blocks.{n}.attn.hook_rot_k", request)
                assert torch.equal(whole[-sum(cut) :], torch.cat(parts, 1)[row]), (n, row)


@pytest.mark.parametrize("kind", [dynamic, static])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "gpt_neox"])
def test_of_every_kind_of_cache(family: str, kind: Callable[[Any], Any]) -> None:
    fresh_seed()
    model = model_of(family, "sdpa" if family == "llama" else "eager")
    with observed(model, KEYS) as session:
        run(model, kind(model), [session])


def test_two_sessions_on_one_model() -> None:
    fresh_seed()
    model = model_of("gemma2")
    cache = dynamic(model)
    with observed(model, ["blocks.*.attn.hook_rot_q"]), observed(model, KEYS) as second:
        with observed(model, KEYS) as third:
            run(model, cache, [second, third])
        run(model, cache, [second], (1, 2))  # on, with one session less


def test_a_cache_of_encoder_and_decoder() -> None:
    """The decoder of BART, alone: its attention gives its keys to one of the two caches in the one that the model is given."""
    from transformers import AutoModelForCausalLM, BartConfig

    fresh_seed()
    config = BartConfig(d_model=32, decoder_layers=2, decoder_attention_heads=2, encoder_attention_heads=2, decoder_ffn_dim=48, vocab_size=128, max_position_embeddings=64,
                        is_decoder=True, is_encoder_decoder=False, attn_implementation="eager", pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    mapping = Mapping("bart", backbone=("model.decoder",), norm=None, ln1=None, ln2=None, mid=None, qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                      o="self_attn.out_proj", gate=None, up=None, down="fc2")  # fmt: skip
    cache = both(model)
    with observed(model, [*KEYS, "blocks.*.attn.hook_k"], mapping=mapping) as session, torch.no_grad():
        for tokens in STEPS:
            with as_it_was(cache):
                model(torch.randint(3, 128, (2, tokens)), past_key_values=cache)
        session.check_books()
        for n in range(2):
            for request in range(2):
                keys = session.tensor(f"blocks.{n}.attn.hook_rot_k", request)
                assert torch.equal(keys, cache.self_attention_cache.layers[n].keys[request].transpose(0, 1))
                assert torch.equal(keys, session.tensor(f"blocks.{n}.attn.hook_k", request)), "nothing rotates them"


@pytest.mark.parametrize("sessions", [1, 2])
def test_an_exception_before_the_keys_are_given(sessions: int) -> None:
    fresh_seed()
    model = model_of("gemma3")
    cache = dynamic(model)

    def fail(module: Any, args: Any) -> None:
        raise ValueError("planted")

    with contextlib.ExitStack() as stack:
        attached = [stack.enter_context(observed(model, KEYS)) for _ in range(sessions)]
        run(model, cache, attached)
        for by_hand in (False, True):
            handle = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(fail)  # between our hook and the cache
            with as_it_was(cache), pytest.raises(ValueError, match="planted"), torch.no_grad(), contextlib.ExitStack() as steps:
                if by_hand:
                    for session in attached:
                        steps.enter_context(session.instrumentation.step(torch.ones(2, 1, dtype=torch.long)))
                model(torch.randint(3, 128, (2, 1)), past_key_values=cache)
            handle.remove()


def test_an_exception_where_no_step_is_open() -> None:
    """A part of the model, called alone: nothing closes a step there, so the next forward takes over what it left."""
    fresh_seed()
    model = model_of("llama")
    cache, attention, hidden = dynamic(model), model.model.layers[1].self_attn, torch.randn(2, 1, 64)
    with observed(model, KEYS) as session, torch.no_grad():
        run(model, cache, [session])
        handle = attention.q_proj.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attention(hidden, position_embeddings=model.model.rotary_emb(hidden, torch.tensor([[0]])), attention_mask=None, past_key_values=cache)
        handle.remove()
        model(torch.randint(3, 128, (2, 1)), past_key_values=cache)
        assert "update" not in vars(cache)
        session.check_books()
        assert session.tensor("blocks.1.attn.hook_rot_k", 1).shape[0] == sum(STEPS) + 1


def test_an_update_of_the_objects_own_is_kept() -> None:
    fresh_seed()
    model = model_of("llama")
    cache, calls = dynamic(model), []

    def update(keys: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(keys.shape[2])
        return type(cache).update(cache, keys, *args, **kwargs)

    cache.update = update
    with observed(model, KEYS) as session:
        run(model, cache, [session])
    assert cache.update is update
    assert calls == [tokens for tokens in STEPS for _ in range(2)]
