"""TransformerLens 4's driver protocol, served by DMI: code that was written for its bridge runs on an unmodified, live model.

    import dmi.transformer_lens
    bridge = dmi.transformer_lens.boot(model, tokenizer)        # where it said TransformerBridge.boot_transformers(name)
    logits, cache = bridge.run_with_cache("The capital of France is")

Import it by name: it needs TransformerLens, which `import dmi` does not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory  # type: ignore[import-not-found]
from transformer_lens.model_bridge.driver_protocol import ForwardResult, to_torch  # type: ignore[import-not-found]
from transformer_lens.model_bridge.remote_bridge import RemoteBridge  # type: ignore[import-not-found]
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf, configure_tokenizer  # type: ignore[import-not-found]
from transformer_lens.model_bridge.sources._hf_format import determine_architecture_from_hf_config  # type: ignore[import-not-found]

from dmi import instrument
from dmi.attaching import attach
from dmi.session import Session

_ROUTING = ("mlp.gate.hook_out", "mlp.hook_expert_indices", "mlp.hook_expert_weights")
"""Their rows have a batch and a position here, and TransformerLens's have one dimension for both."""


class Driver:
    """A model under DMI as TransformerLens's bridge drives it. What a call asks for is captured by a session, attached for as long as calls ask for the same.

    It reads and changes nothing: interventions, gradients and weights are refused; the model is at hand for those. Batches of equal length, without pads.
    """

    provides_sequence_logits = True
    _supported_features: frozenset[str] = frozenset()

    def __init__(self, model: nn.Module, config: Any, tokenizer: Any, *, store: str | None = None) -> None:
        """`config` is the bridge's. `store`: a folder that keeps what is captured; without one it goes with the driver."""
        self.model = model
        self.bridge_config = config
        self.architecture = str(config.architecture)
        self.tokenizer = tokenizer
        plan = instrument.plan(model, ["**"])
        self._sites = {name: site.name for site in plan.sites for name in (*site.aliases, site.name) if not site.name.endswith(_ROUTING)}
        self.supported_hook_points = frozenset(self._sites)
        refused = {refusal.name for refusal in plan.skipped} | {site.name for site in plan.sites if site.name.endswith(_ROUTING)}
        self.non_fireable_hook_points = frozenset(refused) - self.supported_hook_points
        self._store = store
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._session: Session | None = None
        self._wanted: frozenset[str] = frozenset()
        self._closed = False

    def forward(
        self,
        input_ids: Any = None,
        *,
        capture: tuple[str, ...] = (),
        intervene: Mapping[str, Any] | None = None,
        max_new_tokens: int = 1,
        return_logits: bool = True,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> Any:
        """One forward of the model; `capture` names what `ForwardResult.captured` gives, [batch, ...] on the CPU. ValueError for names that are no
        hook points here, NotImplementedError for what only a driver that changes models could do."""
        if self._closed:
            raise RuntimeError("dmi.transformer_lens.Driver: it is closed; boot another")
        if intervene:
            raise NotImplementedError(f"intervene on {', '.join(intervene)}: DMI observes, and changes nothing; use a forward hook on the model, or TransformerBridge")
        if max_new_tokens != 1:
            raise NotImplementedError(f"max_new_tokens={max_new_tokens}: a bridge's forward is one forward; call model.generate under dmi.attach for more")
        if input_ids is None:
            raise ValueError("forward: give input_ids, [batch, tokens]")
        unknown = [name for name in capture if name not in self._sites]
        if unknown:
            raise ValueError(f"capture {', '.join(unknown)}: this model gives no such hook point; supported_hook_points lists what it gives")
        device = next(iter(self.model.parameters())).device
        ids = to_torch(input_ids).to(device)
        ids = ids.unsqueeze(0) if ids.ndim == 1 else ids
        if attention_mask is not None:
            attention_mask = to_torch(attention_mask).to(device)
            if not bool((attention_mask != 0).all()):
                raise NotImplementedError("attention_mask with pads: rows of pads are not captured, so there is no [batch, tokens] to give; run the requests one by one")
        kwargs.pop("output_attentions", None)  # the bridge asks so that eager attention has weights; it does, and transformers would leave hooks behind
        session = self._observing(frozenset(self._sites[name] for name in capture))
        with torch.no_grad():
            output = self.model(input_ids=ids, attention_mask=attention_mask, **kwargs)
        captured: dict[str, Tensor] = {}
        if session is not None:
            cache = session.cache()
            captured = {name: cache[self._sites[name]] for name in capture}
        return ForwardResult(logits=output.logits if return_logits else None, captured=captured, raw_output=output)

    def _observing(self, wanted: frozenset[str]) -> Session | None:
        if wanted != self._wanted:
            self._leave()
            if wanted:
                if self._store is None and self._folder is None:
                    self._folder = tempfile.TemporaryDirectory(prefix="dmi-bridge-")
                store = self._store if self._folder is None else str(Path(self._folder.name) / "store")
                self._session = attach(self.model, sorted(wanted), store=store)
            self._wanted = wanted
        return self._session

    def _leave(self) -> None:
        session, self._session, self._wanted = self._session, None, frozenset()
        if session is not None:
            session.detach()

    def close(self) -> None:
        """Detaches the model, which is as it was; what had no store of its own goes. Twice is no harm."""
        self._closed = True
        self._leave()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def supports(self, feature: str) -> bool:
        """None of the protocol's features: there are no gradients, weights or callbacks here."""
        return feature in self._supported_features


def boot(model: nn.Module | str, tokenizer: Any = None, *, store: str | None = None) -> Any:
    """A TransformerLens bridge over a Hugging Face model, or over one that is loaded by name as `boot_transformers` would: float32, eager attention.

    `store`: a folder that keeps what is captured. `close()` the bridge, or use it in a `with`. Raises HookError for a family that DMI does not know."""
    if isinstance(model, str):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model) if tokenizer is None else tokenizer
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    assert isinstance(model, nn.Module)
    config: Any = model.config
    name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
    architecture = determine_architecture_from_hf_config(config)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(
        build_bridge_config_from_hf(config, architecture, name, next(iter(model.parameters())).dtype)
    )
    if tokenizer is not None:
        tokenizer = configure_tokenizer(tokenizer, adapter.cfg)
    return RemoteBridge(adapter=adapter, tokenizer=tokenizer, driver=Driver(model, adapter.cfg, tokenizer, store=store))
