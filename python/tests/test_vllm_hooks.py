"""Hooks on vLLM's modules, on a model that is put together as vLLM's are and writes over whatever vLLM's may: what waits for its group is what a plain hook's
clone has, eagerly and compiled, in as many calls of the op as the arrangement says."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.custom_graph_pass import CustomGraphPass

from dmi import native
from dmi.hook import LAUNCH_TENSORS
from dmi.rows import SPANS
from dmi.sites import LOGITS, TOKENS
from dmi.vllm import hooks as placed
from dmi.vllm.hooks import WAITING_BYTES, Arrangement, Hooks
from dmi.vllm.sites import plan
from observed import fresh_seed
from ringreader import RingReader

D, HEADS, D_HEAD, D_MLP, WORDS, LAYERS = 8, 2, 4, 12, 32, 3
TOKENS_AT_MOST = 64


@torch.library.custom_op("dmi_tests::add_norm", mutates_args=["x", "other"])
def add_norm(x: Tensor, other: Tensor) -> None:
    """As vLLM's kernel: the sum into `other`, what is normed into `x`."""
    other += x
    x.copy_(other * torch.rsqrt(other.pow(2).mean(-1, keepdim=True) + 1e-5))


@add_norm.register_fake
def _(x: Tensor, other: Tensor) -> None: ...


@torch.library.custom_op("dmi_tests::rotate", mutates_args=["q", "k"])
def rotate(positions: Tensor, q: Tensor, k: Tensor) -> None:
    for x in (q, k):
        x.mul_(torch.cos(positions.float())[:, None])


@rotate.register_fake
def _(positions: Tensor, q: Tensor, k: Tensor) -> None: ...


class MadeInPlace(CustomGraphPass):
    """vLLM's FixFunctionalizationPass, which asks nobody who reads later what is written over."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.target is not auto_functionalized or node.args[0].namespace != "dmi_tests":
                continue
            operation, written = node.args[0], [argument.name for argument in node.args[0]._schema.arguments if argument.is_write]
            with graph.inserting_before(node):
                graph.call_function(operation, kwargs=node.kwargs)
            for user in list(node.users):
                user.replace_all_uses_with(node.kwargs[written[user.args[1] - 1]])
                graph.erase_node(user)
            graph.erase_node(node)

    def uuid(self) -> str:
        return "in place"


class Norm(nn.Module):
    variance_epsilon = 1e-5

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        torch.ops.dmi_tests.add_norm(x, residual)
        return x, residual


class Projection(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class Kernel(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q * k.mean(-1, keepdim=True) + v


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj, self.attn, self.o_proj = Projection(D, 3 * HEADS * D_HEAD, bias=False), Kernel(), Projection(HEADS * D_HEAD, D, bias=False)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([HEADS * D_HEAD] * 3, dim=-1)
        torch.ops.dmi_tests.rotate(positions, q, k)
        return self.o_proj(self.attn(q, k, v))[0]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = Projection(D, 2 * D_MLP, bias=False), Projection(D_MLP, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.gate_up_proj(x)
        return self.down_proj(torch.nn.functional.silu(x[..., :D_MLP]) * x[..., D_MLP:])[0]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp = Norm(), Attention(), Norm(), Mlp()

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.layers, self.norm = nn.Embedding(WORDS, D), nn.ModuleList(Block() for _ in range(LAYERS)), Norm()

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        hidden, residual = self.embed_tokens(ids), None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return self.norm(hidden, residual)[0]


class Logits(nn.Module):
    def forward(self, head: nn.Module, hidden: Tensor) -> Tensor:
        return head(hidden)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.lm_head, self.logits_processor = Backbone(), nn.Linear(D, WORDS, bias=False), Logits()
        self.config = SimpleNamespace(model_type="llama", num_attention_heads=HEADS, num_key_value_heads=HEADS, hidden_size=D, head_dim=D_HEAD,
                                      intermediate_size=D_MLP, vocab_size=WORDS)  # fmt: skip


class Observed:
    """The model with hooks in place, and a page of an engine."""

    def __init__(self, hooks: list[str], careful: bool = False, most: int = WAITING_BYTES) -> None:
        torch.manual_seed(fresh_seed())
        self.model = Model()
        self.plan = plan(self.model, hooks)
        self.ring = native.Ring(mode="complete")
        self.reader = RingReader(self.ring)
        numbers = [self.ring.add_site(site.name, layer=site.layer, space=site.space, roles=site.roles) for site in self.plan.sites]
        self.arrangement = Arrangement(self.model, self.plan, TOKENS_AT_MOST, most=most, careful=careful)
        self.hooks = Hooks(self.model, self.arrangement, self.ring.tensor, numbers)
        self.forward: Any = self.model.model
        self.steps = 0
        self.calls = 0

    def compile(self, in_place: bool = False) -> None:
        """As vLLM does: as a whole, for any number of tokens, without guards; and on a GPU with passes of its own."""
        torch._dynamo.reset()
        options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False for _ in guards]}
        if in_place:
            options |= {"post_grad_custom_post_pass": MadeInPlace(), "enable_auto_functionalized_v2": False}
        self.forward = torch.compile(self.model.model, fullgraph=True, dynamic=True, options=options)
        self.run(words(3))

    @torch.no_grad()
    def run(self, ids: Tensor) -> int:
        """A step of one request, whose number is returned. `calls`: of the op."""
        number, count = self.steps, len(ids)
        self.steps += 1
        spans = np.zeros(2, SPANS)
        spans["request"], spans["count"], spans["prompt"], spans["space"] = number, count, count, (TOKENS, LOGITS)
        assert self.ring.open_step(number, spans.tobytes(), width=(0, 0, 0), packed=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            hidden = self.forward(ids, torch.arange(count))
            self.model.logits_processor(self.model.lm_head, hidden)
        self.calls = sum(event.count for event in profile.key_averages() if event.key == "dmi::capture")
        self.ring.close_step(number)
        self.reader.drain()
        return number

    @torch.no_grad()
    def expected(self, ids: Tensor) -> dict[str, Tensor]:
        """By clones that are made where each site is, eagerly."""
        seen: dict[str, Tensor] = {}
        handles = []

        def keep(site: Any) -> Any:
            def hook(module: Any, args: Any, kwargs: Any, output: Any = None) -> None:
                tap = site.tap
                if tap.which == "residual":
                    pair = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()] if tap.side == "in" else output
                    pair = [pair] if isinstance(pair, Tensor) else pair
                    value = pair[0].clone() if len(pair) == 1 or pair[1] is None else pair[0] + pair[1]
                elif tap.side == "in":
                    value = args[tap.which or 0].clone()
                else:
                    value = (output[tap.which or 0] if isinstance(output, tuple) else output).clone()
                seen[site.name] = value if tap.transform is None else tap.transform(value)

            return hook

        for site in self.plan.sites:
            module = self.model.get_submodule(site.tap.path)
            place = module.register_forward_pre_hook if site.tap.side == "in" else module.register_forward_hook
            handles.append(place(keep(site), with_kwargs=True))
        hidden = self.model.model(ids, torch.arange(len(ids), device=ids.device))
        self.model.logits_processor(self.model.lm_head, hidden)
        for handle in handles:
            handle.remove()
        return seen

    def check(self, ids: Tensor) -> None:
        number, calls = self.run(ids), self.calls
        expected = self.expected(ids)
        assert expected.keys() == {site.name for site in self.plan.sites}
        for name, value in expected.items():
            got = self.reader.tensor(name, number)
            torch.testing.assert_close(got.reshape(value.shape), value, msg=lambda message, name=name: f"{name}: {message}")
        assert calls == self.arrangement.calls

    def close(self) -> None:
        self.hooks.remove()
        self.ring.close()


EVERYTHING = ["**", "model.layers.1:out.1", "model.layers.0.self_attn.attn:in.0"]


@pytest.fixture
def everything() -> Iterator[Observed]:
    found = Observed(EVERYTHING)
    yield found
    found.close()


def words(count: int) -> Tensor:
    return torch.tensor([random.randrange(WORDS) for _ in range(count)])


WAYS = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


@pytest.mark.parametrize("how", ["eager", "compiled", "compiled, in place"])
def test_what_waits_is_what_it_was(how: str) -> None:
    """Embeddings, attention and MLP outputs, queries and keys are written over before the group ends; what users declare is taken at once."""
    in_place = how.endswith("in place")
    observed = Observed(EVERYTHING, careful=in_place)
    if how != "eager":
        observed.compile(in_place)
    for count in (5, 1, 17):
        observed.check(words(count))
    assert observed.arrangement.calls == 1 + 2 + 1  # a group, two points of users, logits
    observed.close()


@WAYS
def test_groups_end_at_their_bounds(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """A few tensors, or a few bytes: what is taken in one place stays together."""
    monkeypatch.setattr(placed, "LAUNCH_TENSORS", 20)
    few = Observed(["**"])
    monkeypatch.setattr(placed, "LAUNCH_TENSORS", LAUNCH_TENSORS)
    little = Observed(["**"], most=300 * TOKENS_AT_MOST)
    for observed, tensors, size in ((few, 20, 1 << 30), (little, LAUNCH_TENSORS, 300)):
        groups: list[list[int]] = [[]]
        for place in observed.arrangement.places:
            if place.begins:
                groups.append([])
            groups[-1] += [observed.plan.sites[index].bytes_per_token or 0 for index, _, how in place.taps if how != placed.AT_ONCE]
        assert len(groups) > 3 and all(len(group) <= tensors for group in groups)
        assert all(sum(one) + sum(next_one) <= size for one, next_one in itertools.pairwise(groups)), groups  # one waits while one is held
        assert observed.arrangement.calls == len(groups) + 1
        if compiled:
            observed.compile()
        observed.check(words(9))
        observed.close()


@pytest.mark.parametrize("how", ["eager", "compiled", "compiled, in place"])
def test_what_is_held_is_what_it_was(how: str) -> None:
    """A group's tensors, all of them, up to the next call of the op for a group: a capture on a branch may read them until then."""
    in_place = how.endswith("in place")
    observed = Observed(EVERYTHING, careful=in_place, most=200 * TOKENS_AT_MOST)
    kept: list[tuple[Tensor, Tensor]] = []
    seen: list[int] = []

    def capture(ring: Tensor, tensors: list[Tensor], sites: list[int], held: int = 0, beside: bool = False) -> None:
        assert len(tensors) == len(sites) + held
        if not beside and held == 0:  # a user's point, or logits
            return
        assert held == len(kept)
        for tensor, (was, copy) in zip(tensors[len(sites) :], kept, strict=True):
            assert tensor.data_ptr() == was.data_ptr()
            torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)
        seen.append(held)
        kept[:] = [(tensor.detach(), tensor.clone()) for tensor in tensors[: len(sites)]] if beside else []

    library = torch.library.Library("dmi", "IMPL")
    library.impl("capture", capture, "CPU")
    try:
        if how != "eager":
            observed.compile(in_place)
        for count in (5, 1, 17):
            seen.clear()
            observed.run(words(count))
            assert not kept and len(seen) == observed.arrangement.calls - 2 - 1 and len(seen) > 3 and all(seen[1:]), seen
    finally:
        library._destroy()
        observed.close()


def test_calls_of_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of decision 0010, of Qwen3-4B's shape: by the tokens of a step, with 512 MiB for what waits and with an H200's share."""
    for name, value in {"D": 2560, "HEADS": 32, "D_HEAD": 128, "D_MLP": 9728, "WORDS": 151_936, "LAYERS": 36}.items():
        monkeypatch.setitem(globals(), name, value)
    with torch.device("meta"):
        model = Model().to(torch.bfloat16)
    model.config.num_key_value_heads = 8
    few, all_sites = (plan(model, hooks) for hooks in (["blocks.*.hook_resid_post", "ln_final.hook_out", "logits"], ["**"]))
    calls = [[Arrangement(model, which, tokens, most=most).calls for most in (WAITING_BYTES, (140 << 30) // placed.WAITING_SHARE) for tokens in (2048, 8192, 16384)]
             for which in (few, all_sites)]  # fmt: skip
    assert (len(few.sites), len(all_sites.sites)) == (38, 726)
    assert calls == [[3, 8, 14, 2, 2, 3], [45, 182, 327, 7, 20, 41]]


def test_one_call_for_a_residual_stream() -> None:
    observed = Observed(["blocks.*.hook_resid_post", "ln_final.hook_out", "logits"])
    observed.check(words(4))
    assert observed.arrangement.calls == 2
    observed.close()
    alone = Observed(["logits"])  # nothing waits
    alone.check(words(4))
    assert alone.arrangement.calls == 1
    alone.close()


def test_nothing_of_an_aborted_forward_is_left(everything: Observed, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = words(6)

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("out of memory, say")

    with monkeypatch.context() as broken:
        broken.setattr(everything.model.model.layers[1].mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            everything.run(ids)
    assert len(everything.hooks._waiting) > 0, "nothing waited: nothing is tested"
    everything.ring.close_step(0, aborted=True)
    everything.hooks.clear()  # as Observer.close does
    everything.check(ids)


def test_sums_are_made_once(everything: Observed) -> None:
    """A block's output and what the next one is given are one tensor, though a forward before ended there."""
    waited: dict[int, Tensor] = {}
    everything.model.model.norm.register_forward_pre_hook(lambda module, args: waited.update({site: tensor for tensor, site in everything.hooks._waiting}))
    everything.check(words(3))
    everything.check(words(3))
    sites = {site.name: waited[index] for index, site in enumerate(everything.plan.sites) if index in waited}
    for layer in range(1, LAYERS):
        assert sites[f"blocks.{layer - 1}.hook_resid_post"] is sites[f"blocks.{layer}.hook_resid_pre"]
        assert sites[f"blocks.{layer}.hook_resid_mid"] is not sites[f"blocks.{layer}.hook_resid_pre"]
