"""Patterns, refusals, estimates, and that attaching leaves nothing behind."""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dmi
from dmi import _abi, instrument, native
from dmi.families import Mapping
from dmi.hook import HookError, HookPoint
from observed import FAMILIES, Ledger, fresh_seed, model_of, observed


@pytest.fixture(scope="module")
def llama() -> Any:
    return model_of("llama")


def names(model: nn.Module, *patterns: str, **options: Any) -> list[str]:
    return [site.name for site in instrument.plan(model, patterns, **options).sites]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("blocks.1.hook_resid_post", ["blocks.1.hook_resid_post"]),
        ("blocks.*.hook_resid_post", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]),
        ("blocks.[1-9].hook_resid_mid", ["blocks.1.hook_resid_mid"]),
        ("blocks.0.hook_*", ["blocks.0.hook_resid_pre", "blocks.0.hook_attn_out", "blocks.0.hook_resid_mid",
                             "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post"]),
        ("**.hook_q", ["blocks.0.attn.hook_q", "blocks.1.attn.hook_q"]),
        ("logits", ["unembed.hook_out"]),
        ("blocks.0.hook_out", ["blocks.0.hook_resid_post"]),
        ("blocks.0.attn.q.hook_out", ["blocks.0.attn.hook_q"]),
        ("blocks.0.mlp.in.hook_out", ["blocks.0.mlp.hook_pre_linear"]),
        ("blocks.*.mlp.out.hook_in", ["blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"]),
        ("model.layers.1", ["blocks.1.hook_resid_post"]),
        ("model.layers.1.mlp", ["blocks.1.hook_mlp_out"]),
        ("lm_head", ["unembed.hook_out"]),
        ("model.layers.0.self_attn.q_proj", ["model.layers.0.self_attn.q_proj"]),
        ("model.layers.0.mlp:in", ["model.layers.0.mlp:in"]),
        ("model.layers.*.self_attn:out.0", ["model.layers.0.self_attn:out.0", "model.layers.1.self_attn:out.0"]),
        ("model.layers.*.mlp.act_fn", ["model.layers.0.mlp.act_fn", "model.layers.1.mlp.act_fn"]),
    ],
)  # fmt: skip
def test_patterns(llama: Any, pattern: str, expected: list[str]) -> None:
    assert names(llama, pattern) == expected


def test_sites_come_in_the_order_of_the_model_and_once(llama: Any) -> None:
    assert names(llama, "logits", "blocks.*.hook_resid_post", "blocks.1.hook_resid_post", "tokens") == [
        "tokens", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "unembed.hook_out",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "patterns", "message"),
    [
        ("llama", [], "name at least one"),
        ("llama", [""], "is empty"),
        ("llama", ["blocks.0.hook_resid_pots"], "close: .*blocks.0.hook_resid_post"),
        ("llama", ["blocks.7.hook_resid_post"], "matches nothing.*close: "),
        ("llama", ["blocks.*.attn.hook_quux"], "matches nothing in LlamaForCausalLM"),
        ("gpt_neox", ["blocks.0.hook_resid_mid"], "in parallel.*nearest: blocks.0.hook_resid_pre"),
        ("gpt2", ["blocks.0.attn.hook_rot_q"], "no rotary embedding; nearest: blocks.0.attn.hook_q"),
        ("gpt2", ["**.hook_pre_linear"], "no such projection"),
        ("mixtral", ["blocks.0.mlp.hook_post"], "mixture of experts.*nearest: blocks.0.mlp.gate.hook_out"),
        ("olmo2", ["blocks.0.ln1.hook_out"], "nearest: blocks.0.ln1_post.hook_out"),
    ],
)
def test_refusals(family: str, patterns: list[str], message: str) -> None:
    with pytest.raises(HookError, match=f"(?s){message}"):
        instrument.plan(model_of(family), patterns)


NORMS = ("hook_scale", "hook_normalized", "hook_out")
TABLE = [
    "tokens", "hook_embed", "hook_pos_embed", "unembed.hook_out", "logits", *(f"ln_final.{hook}" for hook in NORMS),
    *(f"blocks.N.hook_{hook}" for hook in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")),
    *(f"blocks.N.attn.hook_{hook}" for hook in ("out", "q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z")),
    *(f"blocks.N.mlp.{hook}" for hook in ("hook_out", "hook_pre", "hook_pre_linear", "hook_post", "gate.hook_out", "hook_router_logits", "hook_expert_indices", "hook_router_choices")),
    *(f"blocks.N.{ln}.{hook}" for ln in ("ln1", "ln2", "ln1_post", "ln2_post") for hook in NORMS),
]  # fmt: skip
"""Every name of docs/sites.md's table, and the routers' classic ones."""


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_of_the_table_is_given_or_refused_with_a_way_out(family: str, implementation: str) -> None:
    model = model_of(family, implementation)
    reported = {refusal.name for refusal in instrument.plan(model, ["**"]).skipped}
    given = set(names(model, "**"))
    refused = 0
    for name in (name.replace("N", str(layer)) for layer in range(2) for name in TABLE):
        try:
            (site,) = names(model, name)
            assert site in given and name not in reported
        except HookError as error:
            told = re.match(r"cannot capture (\S+): .+; nearest: (.+)", str(error))
            assert told is not None, error
            assert told[1] in reported, f"{name}: a glob is silent about {told[1]}"
            assert told[1] not in given
            nearest = re.findall(r"[\w.]*hook_\w+", told[2])
            assert nearest or "attn_implementation" in told[2]
            for other in nearest:
                assert set(names(model, other)) <= given, f"{error}: not to be had either"
            refused += 1
    assert refused > 0


def test_what_only_other_families_have_is_reported_and_not_warned_of(llama: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", dmi.CaptureWarning)
        with dmi.attach(llama, "hook_*", store=tmp_path) as session:
            assert session.sites == ["hook_embed"] and [line.split(":")[0] for line in session.skipped] == ["hook_pos_embed"]
    with pytest.raises(HookError, match="rotates queries and keys"):
        instrument.plan(llama, ["hook_pos_*"])


def test_run_with_cache_tells_what_a_model_cannot_give() -> None:
    model = model_of("llama", "sdpa")
    ids = torch.randint(3, 128, (1, 4))
    with torch.no_grad():
        with pytest.warns(dmi.CaptureWarning, match="blocks.0.attn.hook_pattern: .*'sdpa' never materialises"):
            dmi.run_with_cache(model, ids, names_filter=lambda name: name.endswith(("hook_pattern", "hook_z")))
        with pytest.raises(HookError, match="it cannot give blocks.0.attn.hook_pattern: .*eager"):
            dmi.run_with_cache(model, ids, names_filter=lambda name: name.endswith("hook_pattern"))


def test_attention_that_is_never_materialised_is_refused_by_name_and_skipped_by_glob() -> None:
    model = model_of("llama", "sdpa")
    with pytest.raises(
        HookError, match="'sdpa' never materialises it; nearest: load the model with attn_implementation=\"eager\""
    ):
        instrument.plan(model, ["blocks.0.attn.hook_pattern"])
    plan = instrument.plan(model, ["blocks.0.attn.**"])
    assert {refusal.name for refusal in plan.skipped} == {
        "blocks.0.attn.hook_pattern",
        "blocks.0.attn.hook_attn_scores",
    }
    assert "blocks.0.attn.hook_rot_q" in [site.name for site in plan.sites]
    upcast = model_of("gpt2", reorder_and_upcast_attn=True)
    with pytest.raises(HookError, match="computes attention by itself"):
        instrument.plan(upcast, ["blocks.0.attn.hook_pattern"])


def test_parallel_blocks_skip_mid_in_a_glob() -> None:
    plan = instrument.plan(model_of("gpt_neox"), ["blocks.*.hook_resid_*"])
    assert [r.name for r in plan.skipped] == ["blocks.0.hook_resid_mid", "blocks.1.hook_resid_mid"]
    serial = model_of("gpt_neox", use_parallel_residual=False)
    assert "blocks.0.hook_resid_mid" in names(serial, "blocks.*.hook_resid_*")
    ids = torch.randint(3, 128, (1, 5))
    with observed(serial, ["blocks.0.**"]) as session, torch.no_grad():
        serial(ids, use_cache=False)
        mid = session.tensor("blocks.0.hook_resid_pre", 0) + session.tensor("blocks.0.hook_attn_out", 0)
        assert torch.equal(session.tensor("blocks.0.hook_resid_mid", 0), mid)


def test_encoder_decoder_models_are_refused() -> None:
    import transformers

    config = transformers.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, vocab_size=64)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(HookError, match="encoder-decoder"):
        instrument.plan(model, ["logits"], mapping=Mapping("t5"))


def test_budget_names_the_largest_pattern(llama: Any) -> None:
    plan = instrument.plan(llama, ["blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern"])
    assert plan.estimated_bytes(10) == 2 * 10 * 64 * 4 + 2 * 10 * 10 * 4 * 4 // 2
    with pytest.raises(HookError, match=r"over the budget of 1.0 MiB; 'blocks.\*.attn.hook_pattern' alone"):
        instrument.plan(llama, ["blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern"], budget_bytes=1 << 20)


@pytest.mark.parametrize("tokens", [4, 9])
def test_estimates_are_what_is_captured(tokens: int) -> None:
    fresh_seed()
    model = model_of("llama")
    with observed(
        model, ["blocks.*.hook_*", "blocks.**.hook_pre", "blocks.**.hook_v", "logits", "tokens", "ln_final.*"]
    ) as session:
        with torch.no_grad():
            model(torch.randint(3, 128, (1, tokens)))
        assert session.ring.counters()["captured_bytes"] == session.plan.estimated_bytes(tokens)


# ------------------------------------------------------------------ points and mappings
class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mixer = nn.Linear(16, 16)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.middle = HookPoint("middle")
        self.pair = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))
        pair = self.pair((x, self.up(self.norm(x)).relu()))
        return x + self.down(self.middle(pair[1]))


class Model(nn.Module):
    """Nothing of Hugging Face's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.stack = nn.ModuleList([Block()])
        self.inner = HookPoint(rows=2)
        self.unembedding = nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.stack:
            x = block(x)
        self.inner(ids)
        return self.unembedding(x)


def test_points_paths_and_elements_of_tuples() -> None:
    fresh_seed()
    model = Model()
    seen: dict[str, Tensor] = {}
    model.stack[0].down.register_forward_pre_hook(lambda m, a: seen.update(middle=a[0].clone()))
    model.stack[0].mixer.register_forward_hook(lambda m, a, o: seen.update(mixer=o.clone()))
    model.stack[0].pair.register_forward_hook(lambda m, a, o: seen.update(pair=o[0].clone()))
    ids = torch.randint(0, 32, (2, 5))
    with observed(model, ["middle", "inner", "stack.0.mixer", "stack.0.pair:out.0", "stack.*.down:in"]) as session:
        with torch.no_grad():
            model(ids)
        session.check_books()
        for request in range(2):
            assert torch.equal(session.tensor("inner", request), ids[request])
            assert torch.equal(session.tensor("middle", request), seen["middle"][request])
            assert torch.equal(session.tensor("stack.0.down:in", request), seen["middle"][request])
            assert torch.equal(session.tensor("stack.0.mixer", request), seen["mixer"][request])
            assert torch.equal(session.tensor("stack.0.pair:out.0", request), seen["pair"][request])
    assert model(ids).shape == (2, 5, 32)


def test_two_points_of_one_name() -> None:
    model = nn.Sequential(HookPoint("a"), HookPoint("a"))
    with pytest.raises(HookError, match="two HookPoints are called 'a'"):
        instrument.plan(model, ["a"])


def test_a_mapping_for_another_model() -> None:
    fresh_seed()
    model = Model()
    mapping = Mapping(
        "mine", backbone=("",), embed="embedding", blocks="stack", norm=None, unembed="unembedding",
        ln1=None, ln2=None, attn="mixer",
        qkv=None, o=None, rotary=False, mid=None, mlp="down", gate="up", up=None, down="down",
    )  # fmt: skip
    ids = torch.randint(0, 32, (2, 5))
    seen: list[Tensor] = []
    model.stack[0].register_forward_hook(lambda m, a, o: seen.append(o.clone()))
    with observed(model, ["blocks.0.hook_resid_post", "logits", "blocks.0.mlp.hook_post"], mapping=mapping) as session:
        with torch.no_grad():
            output = model(ids)
        session.check_books()
        assert torch.equal(session.tensor("blocks.0.hook_resid_post", 1), seen[0][1])
        assert torch.equal(session.tensor("unembed.hook_out", 1), output[1])
        assert session.tensor("blocks.0.mlp.hook_post", 1).shape == (5, 24)
    with pytest.raises(HookError, match="does not call the library's registered attention functions"):
        instrument.plan(model, ["**.hook_pattern"], mapping=mapping)
    with pytest.raises(HookError, match="expects the blocks at 'model.layers'"):
        instrument.plan(model, ["logits"], mapping=Mapping("wrong"))


def test_a_bare_backbone() -> None:
    fresh_seed()
    model = model_of("llama").model
    ids = torch.randint(3, 128, (2, 5))
    with observed(model, ["blocks.1.hook_resid_post", "ln_final.hook_out"]) as session:
        with torch.no_grad():
            output = model(ids)
        session.check_books()
        assert torch.equal(session.tensor("ln_final.hook_out", 1), output.last_hidden_state[1])
    with pytest.raises(HookError, match="no unembedding"):
        instrument.plan(model, ["logits"])


# ------------------------------------------------------------------ steps by hand, threads, cleaning up
def test_steps_by_hand() -> None:
    fresh_seed()
    model = Model()
    packed = torch.randn(7, 16)
    with observed(model, ["stack.0.mixer"]) as session, torch.no_grad():
        first = model.stack[0].mixer(packed)
        assert session.instrumentation.outside() == 1
        with session.instrumentation.step([3, 4]) as requests:
            model.stack[0].mixer(packed)
        with session.instrumentation.step([1, 1], requests=requests):
            model.stack[0].mixer(packed[:2])
        with pytest.raises(HookError, match="numbers that an earlier"), session.instrumentation.step(2, requests=[99]):
            pass
        with pytest.raises(HookError, match="give the number of rows"), session.instrumentation.step([]):
            pass
        session.reader.drain()
        second = model.stack[0].mixer(packed[:2])
        assert torch.equal(session.tensor("stack.0.mixer", requests[0]), torch.cat([first[:3], second[:1]]))
        assert torch.equal(session.tensor("stack.0.mixer", requests[1]), torch.cat([first[3:], second[1:]]))


def test_steps_by_hand_go_on_in_any_order() -> None:
    """Decoding, prompts, batches by turns and masks that change in place: the rows of every step have the positions that follow from the steps before."""
    chance = random.Random(fresh_seed())
    with torch.inference_mode():
        frozen = torch.ones(2, 1, dtype=torch.int64)  # does not say when it changes
    masks = [torch.ones(2, 1, dtype=torch.int64), torch.ones(3, 1, dtype=torch.int64), torch.tensor([[0, 1], [1, 1]]), frozen]
    shapes: list[Any] = [1, 4, [1, 1], [2, 3], *masks]
    known: dict[int, int] = {}  # request -> its rows so far
    batches: dict[int, list[list[int]]] = {}  # size -> the requests of batches of it
    want = []
    with observed(Model(), ["stack.0.mixer"]) as session:
        rows, requests = shapes[0], None
        for _ in range(300):
            if chance.random() < 0.2:
                rows, requests = chance.choice(shapes), None
            elif isinstance(rows, Tensor) and chance.random() < 0.1:
                with torch.inference_mode(rows.is_inference()):
                    rows[chance.randrange(len(rows)), 0] ^= 1
            packed = not isinstance(rows, Tensor)
            counts = ([rows] if isinstance(rows, int) else rows) if packed else rows.sum(1).tolist()
            if requests is None or chance.random() < 0.1:
                requests = chance.choice([*batches.get(len(counts), []), None])
            with contextlib.suppress(KeyError), session.instrumentation.step(rows, requests=requests) as requests:
                if chance.random() < 0.1:
                    raise KeyError  # an aborted step has its positions all the same
            batches.setdefault(len(counts), []).append(requests)
            assert session.requests.latest == requests
            step = []
            for request, count in zip(requests, counts, strict=True):
                position = known.get(request, 0)
                decoded = position > 0 and (count if packed else rows.shape[1]) == 1
                step += [(request, position, _abi.Phase.DECODE if decoded else _abi.Phase.PREFILL)] if count else []
                known[request] = position + count
            want.append(step)
            session.drain()
        got = [[(s.request, s.position, s.phase) for s in step.spans if s.space == _abi.Space.TOKENS] for step in session.reader.steps]
    assert got == want


def test_the_model_may_be_called_within_a_step_by_hand() -> None:
    fresh_seed()
    model = model_of("llama")
    ids = torch.randint(3, 128, (2, 5))
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    with observed(model, ["tokens"]) as session, torch.no_grad():
        with session.instrumentation.step(mask):
            model(ids)
        session.check_books()
        assert len(session.reader.steps) == 1
        assert torch.equal(session.tensor("tokens", 0), ids[0, 1:])


def test_forwards_of_several_threads_take_turns() -> None:
    seed = fresh_seed()
    model = model_of("llama")
    errors: list[BaseException] = []
    outputs: dict[int, tuple[Tensor, Tensor]] = {}
    with observed(model, ["blocks.*.hook_resid_post", "tokens"]) as session:

        def work(number: int) -> None:
            try:
                ids = torch.randint(3, 128, (1, 4 + number), generator=torch.Generator().manual_seed(seed + number))
                with torch.no_grad():
                    for _ in range(10):
                        states = model(ids, use_cache=False, output_hidden_states=True).hidden_states
                outputs[number] = (ids[0], states[1][0])
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        session.check_books()
        assert len(session.reader.steps) == 30
        by_length = {len(ids): (ids, state) for ids, state in outputs.values()}
        for request in session.requests.visible:
            tokens = session.tensor("tokens", request)
            ids, state = by_length[len(tokens)]
            assert torch.equal(tokens, ids)
            assert torch.equal(session.tensor("blocks.0.hook_resid_post", request), state)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching could have changed."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
             "_forward_hooks_always_called", "_backward_hooks")  # fmt: skip
    state: dict[str, Any] = {}
    for path, module in model.named_modules():
        state[path] = {k: dict(v) if k in hooks else id(v) for k, v in module.__dict__.items()}
        state[path]["class"] = (type(module), dict(type(module).__dict__))
    return state


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_detaching_leaves_nothing(family: str) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = model_of(family)
    before, functions = snapshot(model), dict(ALL_ATTENTION_FUNCTIONS)
    with observed(model, ["**"]), torch.no_grad():
        model.generate(torch.randint(3, 128, (1, 4)), max_new_tokens=2)
        assert snapshot(model) != before
    assert snapshot(model) == before and dict(ALL_ATTENTION_FUNCTIONS) == functions
    with pytest.raises(RuntimeError, match="planted"), observed(model, ["**"]):
        raise RuntimeError("planted")
    assert snapshot(model) == before and dict(ALL_ATTENTION_FUNCTIONS) == functions


def test_failing_to_install_leaves_nothing(llama: Any) -> None:
    before = snapshot(llama)
    ring = native.Ring(mode="best-effort", payload_mib=1, staging_mib=1)
    plan = instrument.plan(llama, ["blocks.*.hook_resid_post"])
    with pytest.raises(KeyError):
        instrument.install(llama, plan, ring, {"blocks.0.hook_resid_post": 0}, Ledger())
    assert snapshot(llama) == before
    ring.close()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_sessions_on_one_model(order: tuple[int, int]) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from observed import Observed

    fresh_seed()
    model = model_of("llama")
    before, functions = snapshot(model), dict(ALL_ATTENTION_FUNCTIONS)
    sessions = [
        Observed(model, ["blocks.*.attn.hook_pattern"]),
        Observed(model, ["blocks.*.attn.hook_attn_scores", "tokens"]),
    ]
    ids = torch.randint(3, 128, (1, 6))
    with torch.no_grad():
        model.generate(ids, max_new_tokens=3)
        for session in sessions:
            session.check_books()
        scores, weights = (
            sessions[i].tensor(f"blocks.1.attn.{name}", 0) for i, name in ((1, "hook_attn_scores"), (0, "hook_pattern"))
        )
        assert torch.equal(scores.softmax(-1), weights) or torch.allclose(scores.softmax(-1), weights, atol=1e-6)
        sessions[order[0]].instrumentation.remove()
        model.generate(ids, max_new_tokens=3)
        sessions[order[1]].check_books()
        assert sessions[order[1]].requests.visible == [0, 1] and sessions[order[0]].requests.visible == [0]
        sessions[order[1]].instrumentation.remove()
    assert snapshot(model) == before and dict(ALL_ATTENTION_FUNCTIONS) == functions
    for session in sessions:
        session.ring.close()


def test_changing_the_attention_implementation_while_attached() -> None:
    model = model_of("llama")
    with observed(model, ["blocks.0.attn.hook_pattern"]), torch.no_grad():
        model.set_attn_implementation("sdpa")
        with pytest.raises(HookError, match="changed from 'eager' to 'sdpa' while attached"):
            model(torch.randint(3, 128, (1, 4)))
        model.set_attn_implementation("eager")


def test_importing_does_not_import_transformers() -> None:
    code = "import sys, dmi.instrument; assert 'transformers' not in sys.modules and 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
