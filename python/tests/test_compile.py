"""Captures under torch.compile: all there, bit for bit, whether hooks or compilation came first; no graph breaks.
Inductor has its own file. A run of the tests takes Llama and four of the other families; with DMI_TEST_FULL=1, as in `make soak`, all of them."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn

from observed import DEVICE, FAMILIES, fresh_seed, model_of, observed
from reference import Clones, check, expected

pytestmark = pytest.mark.newest

SHARE = FAMILIES if os.environ.get("DMI_TEST_FULL") else ("llama", *random.Random(os.environ.get("DMI_TEST_SEED")).sample(FAMILIES[1:], 4))

WAYS: dict[str, Callable[..., Any]] = {
    "torch.compile(model)": lambda model, **k: torch.compile(model, **k),
    "model.compile()": lambda model, **k: model.compile(**k) or model,
    "model.forward": lambda model, **k: setattr(model, "forward", torch.compile(model.forward, **k)) or model,
    "model.__call__": lambda model, **k: torch.compile(model.__call__, **k),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


COMPLETE = "aot_eager" if DEVICE.type == "cpu" else "inductor"
"""A backend with all that comes before code is generated. On a GPU it is refused (see test_a_copy_of_the_rings_tensor_is_refused): it copies what operations change."""


def backend(family: str) -> str:
    """Dynamo's part differs by family, what comes after does not."""
    return COMPLETE if family == "llama" else "eager"


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def breaks() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["graph_break"])


@pytest.mark.parametrize(
    ("family", "way"),
    [(family, "torch.compile(model)") for family in SHARE] + [("llama", way) for way in list(WAYS)[1:]],
)
def test_compiled(family: str, way: str) -> None:
    fresh_seed()
    model = model_of(family)
    ids = torch.randint(3, 128, (2, 9))
    with observed(model, ["**"]) as session, Clones(model) as clones, torch.no_grad():
        compiled = WAYS[way](model, fullgraph=True, backend=backend(family))
        torch._dynamo.reset()
        compiled(ids, use_cache=False)
        clones.clear()
        output = compiled(torch.randint(3, 128, (2, 9)), use_cache=False).logits
        session.check_books()
        assert len(session.reader.steps) == 2 and not breaks()
        check(session, expected(family, model, clones, output), [2, 3])


@pytest.mark.parametrize("way", WAYS)
def test_compiled_before_attaching_and_after_detaching(way: str) -> None:
    fresh_seed()
    model = model_of("llama")
    ids = torch.randint(3, 128, (2, 9))
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        compiled = WAYS[way](model, fullgraph=True, backend=COMPLETE)
        assert torch.allclose(compiled(ids, use_cache=False).logits, plain, atol=1e-5)
        assert graphs() == 1
        with observed(model, ["**"]) as session:
            compiled(ids, use_cache=False)
            session.check_books()
            assert len(session.reader.steps) == 1 and len(session.reader.steps[0].fired) == len(session.names)
        offered = session.ring is not None and model.model.layers[0]._forward_hooks
        assert not offered
        torch._dynamo.utils.counters.clear()
        assert torch.allclose(compiled(ids, use_cache=False).logits, plain, atol=1e-5)
        assert graphs() == 1, "what was compiled with hooks went on after detaching"
        with observed(model, ["blocks.1.hook_resid_post"]) as session:  # another set of hooks
            compiled(ids, use_cache=False)
            session.check_books()
            assert len(session.reader.steps[0].fired) == 1


@pytest.mark.parametrize("way", list(WAYS)[:2])
def test_wrapper_made_before_and_model_given(way: str) -> None:
    """Attaching to the wrapper is attaching to the model."""
    fresh_seed()
    model = model_of("llama")
    wrapper = WAYS[way](model, backend=COMPLETE)
    with observed(wrapper, ["logits"]) as session, torch.no_grad():
        wrapper(torch.randint(3, 128, (1, 4)), use_cache=False)
        session.check_books()
        assert session.tensor("unembed.hook_out", 0).shape == (4, 128)


def test_layers_compiled_one_by_one_share_their_graphs() -> None:
    fresh_seed()
    counts = []
    for layers in (4, 12):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = model_of("llama", num_hidden_layers=layers)
        ids = torch.randint(3, 128, (2, 9))
        with torch.no_grad():
            # A copy, because Hugging Face's own hooks for this stay, and Dynamo cannot trace them.
            states = copy.deepcopy(model)(ids, use_cache=False, output_hidden_states=True).hidden_states
        with observed(model, ["blocks.**", "logits"]) as session, torch.no_grad():
            for layer in model.model.layers:
                layer.compile(fullgraph=True, backend=COMPLETE)
            model(ids, use_cache=False)
            session.check_books()
            for n in range(layers - 1):
                assert torch.allclose(session.tensor(f"blocks.{n}.hook_resid_post", 1), states[n + 1][1], atol=1e-4)
        assert not breaks()
        counts.append(graphs())
    assert counts[0] == counts[1], f"graphs grow with layers: {counts}"


def test_layers_compiled_one_by_one_take_any_length() -> None:
    fresh_seed()
    model = model_of("llama")
    with torch.no_grad():
        states = copy.deepcopy(model)(
            torch.arange(3, 20)[None], use_cache=False, output_hidden_states=True
        ).hidden_states
    with observed(model, ["blocks.**"]) as session, torch.no_grad():
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend=COMPLETE)
        for length in range(5, 18):
            model(torch.arange(3, 3 + length)[None], use_cache=False)
        session.check_books()
        assert torch.allclose(session.tensor("blocks.0.hook_resid_post", 12), states[1][0], atol=1e-4)
    assert not breaks()


def test_a_point_of_the_users_in_layers_compiled_one_by_one() -> None:
    import dmi.hook

    class Layer(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.point = dmi.hook.HookPoint(f"point{n}")

        def forward(self, x: Tensor) -> Tensor:
            return self.point(torch.relu(self.linear(x))) + x

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(n) for n in range(12))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    fresh_seed()
    model = Stack()
    seen: list[Tensor] = []
    x = torch.randn(2, 5, 8)
    handles = [
        layer.linear.register_forward_hook(lambda m, a, o: seen.append(o.relu().detach())) for layer in model.layers
    ]
    model(x)
    for handle in handles:
        handle.remove()
    with observed(model, ["point*"]) as session, torch.no_grad():
        for layer in model.layers:
            layer.compile(fullgraph=True, backend=COMPLETE)
        model(x)
        session.check_books()
        for n in range(12):
            for request in range(2):
                assert torch.allclose(session.tensor(f"point{n}", request), seen[n][request], atol=1e-6)
        assert not breaks() and graphs() <= 3


def test_inside_a_function_of_the_users_captures_are_counted_as_outside() -> None:
    fresh_seed()
    model = model_of("llama")
    ids = torch.randint(3, 128, (2, 9))

    @torch.compile(fullgraph=True, backend=COMPLETE)
    def best(ids: Tensor) -> Tensor:
        return model(ids, use_cache=False).logits.argmax(-1)

    with observed(model, ["blocks.*.hook_resid_post"]) as session, torch.no_grad():
        best(ids)
        assert session.instrumentation.outside() == 2
        with session.instrumentation.step(torch.ones(2, 9, dtype=torch.long)) as requests:
            best(ids)
        assert session.instrumentation.outside() == 2
        reference = model(ids, use_cache=False, output_hidden_states=True)
        for row, request in enumerate(requests):
            # Another program, which may round differently where code is generated.
            assert torch.allclose(session.tensor("blocks.0.hook_resid_post", request), reference.hidden_states[1][row], rtol=0, atol=0 if COMPLETE == "aot_eager" else 1e-4)


@pytest.mark.parametrize("family", SHARE)
def test_generate_with_a_static_cache_compiled(family: str) -> None:
    """generate's own compiled call: first run unobserved, then observed, then not."""
    from transformers import CompileConfig

    fresh_seed()
    model = model_of(family)
    ids = torch.randint(3, 128, (2, 6))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    config = CompileConfig(fullgraph=True, mode=None, backend=backend(family))
    config._compile_all_devices = True
    options = dict(
        attention_mask=mask, max_new_tokens=6, cache_implementation="static", compile_config=config, do_sample=False
    )
    with torch.no_grad():
        plain = model.generate(ids, **options)
        unobserved = graphs()
        assert unobserved >= 1
        compiled_call = model._compiled_call
        with observed(model, ["**"]) as session:
            output = model.generate(ids, **options)
            session.check_books()
            assert not breaks() and graphs() - unobserved <= unobserved + ("logits" in session.names)
            assert torch.equal(output, plain)
            captured = {name: [session.tensor(name, r) for r in range(2)] for name in session.names}
            tokens = [session.requests.tokens[r] for r in range(2)]
        assert model._compiled_call is compiled_call
        assert torch.equal(model.generate(ids, **options), plain)
        with observed(model, ["**"]) as alone:
            for r in range(2):
                model(torch.tensor([tokens[r][:-1]]), use_cache=False)
            for name in alone.names:
                for r in range(2):
                    got, want = captured[name][r], alone.tensor(name, r)
                    if name in ("unembed.hook_out", "logits"):
                        want = want[want.shape[0] - got.shape[0] :]
                    assert got.shape == want.shape, name
                    masked = (got < -1e30) & (want < -1e30)
                    if got.is_floating_point():
                        assert torch.allclose(got[~masked], want[~masked], atol=5e-4), name
