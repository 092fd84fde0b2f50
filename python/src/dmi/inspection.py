"""`store.inspect` and `session.inspect`: the engine's tools that find structure, each a list of dictionaries. docs/inspect.md has formulas and sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dmi import lens as lenses
from dmi.cache import Key, Range, _key, _range
from dmi.client import Client
from dmi.errors import NotCapturedError
from dmi.terminal import progress, size

Requests = str | Sequence[str] | None
Rows = list[dict[str, Any]]


class Inspector:
    """Asks the engine, which streams over what was captured: nothing is loaded here but the answer.

    Each tool is about `request` (an id, or several), `run` or `session`. Without any: of a session, all of it; of a store, the run of its latest request.
    """

    def __init__(self, client: Callable[[], Client], session: str | None = None) -> None:
        self._client = client
        self._session = session

    def _ask(self, tool: str, request: Requests, run: str | None, session: str | None, **arguments: Any) -> Rows:
        client = self._client()
        if request is None and run is None and session is None:
            session = self._session
            if session is None:
                latest = client.get("/requests", {"latest": 1})["items"]
                if not latest:
                    raise NotCapturedError(f"inspect.{tool}: the store has no requests yet; attach a model and run it")
                run = latest[0]["run"]
        return _found(client, tool, {"request": request, "run": run, "session": session, **arguments})

    def stats(self, site: Key | None = None, *, tokens: Range = None, per: str = "site", request: Requests = None, run: str | None = None,
              session: str | None = None) -> Rows:  # fmt: skip
        """Distributions, per "site" or "request": `request, site, layer, rows, missing, count, nonfinite, nan, zeros, mean, std, rms, min, max, absmax,
        p01 ... p99, norm, norm_max, growth, histogram: {edges, counts}`. `site` may be a glob; without it, every site."""
        name, layer = _key(site) if site is not None else (None, None)
        return self._ask("stats", request, run, session, site=name, layer=layer, tokens=_range("tokens", tokens), per=per)

    def heads(self, site: Key | None = None, *, period: int | None = None, threshold: float | None = None, request: Requests = None, run: str | None = None,
              session: str | None = None) -> Rows:  # fmt: skip
        """The kind of each attention head: `layer, head, kind, score, previous_token, induction, duplicate_token, first_token_sink, queries, repeats,
        nonfinite, missing, site`. Needs attention patterns of prompts that repeat themselves: `session.inspect.repeated_tokens()` runs such. Which tokens
        repeat is found from their ids, or said by `period`."""
        name, layer = _key(site) if site is not None else (None, None)
        return self._ask("heads", request, run, session, site=name, layer=layer, period=period, threshold=threshold)

    def tokens(self, site: Key | None = None, *, tokens: Range = None, k: int = 3, tokenizer: Any = None, request: Requests = None, run: str | None = None,
               session: str | None = None) -> Rows:  # fmt: skip
        """Every token: `request, position, token` (id), `norms: [{site, layer, l2}]` (of `site`, by default the residual after each layer),
        `attends: [{position, token, weight}]` (the k it attends to most), `received`. With a `tokenizer`, also its `text`."""
        name, layer = _key(site) if site is not None else (None, None)
        rows = self._ask("tokens", request, run, session, site=name, layer=layer, tokens=_range("tokens", tokens), k=k)
        if tokenizer is not None:
            for row in rows:
                row["text"] = None if row["token"] is None else str(tokenizer.decode([row["token"]]))
        return rows

    def outliers(self, site: Key | None = None, *, threshold: float | None = None, share: float | None = None, tolerance: float | None = None, request: Requests = None,
                 run: str | None = None, session: str | None = None) -> Rows:  # fmt: skip
        """Dimensions that stand out: `site, layer, dim, kind` ("massive", "outlier", "dead"), `rows, mean, std, rms, absmax, share, ratio, nonfinite, missing`."""
        name, layer = _key(site) if site is not None else (None, None)
        return self._ask("outliers", request, run, session, site=name, layer=layer, threshold=threshold, share=share, tolerance=tolerance)

    def router(self, *, layer: int | None = None, request: Requests = None, run: str | None = None, session: str | None = None) -> Rows:
        """How the experts of a mixture share the tokens: `layer, expert, tokens, share, load, probability, balance, missing`."""
        return self._ask("router", request, run, session, layer=layer)

    def similarity(self, site: Key | None = None, *, tokens: Range = None, sample: int | None = None, request: Requests = None, run: str | None = None,
                   session: str | None = None) -> Rows:  # fmt: skip
        """How alike sites are, each with each (by default the residual after each layer): `site_a, site_b, layer_a, layer_b, cosine, cka, rows, sampled,
        nonfinite`. CKA is of `sample` rows, 512 by default."""
        name, layer = _key(site) if site is not None else (None, None)
        return self._ask("similarity", request, run, session, site=name, layer=layer, tokens=_range("tokens", tokens), sample=sample)

    def compare(self, a: str, b: str, site: Key | None = None, *, tokens: Range = None, per: str = "site", tolerance: float | None = None) -> Rows:
        """Where two requests part, or the requests of two runs, in pairs: `a, b, site, layer, position, rows, differ, first, max_abs, relative, cosine,
        mismatched, missing, missing_a, missing_b`, per "site" or per "row"."""
        name, layer = _key(site) if site is not None else (None, None)
        return _found(self._client(), "compare", {"a": a, "b": b, "site": name, "layer": layer, "tokens": _range("tokens", tokens), "per": per, "tolerance": tolerance})

    def lens(self, site: Key | None = None, *, tokens: Range = None, k: int = 5, tokenizer: Any = None, request: Requests = None, run: str | None = None,
             session: str | None = None) -> Rows:  # fmt: skip
        """What the model would predict if it stopped there (by default after each layer): `request, site, layer, position, top: [{token, logit,
        probability, text}], entropy, next` (the token that really followed), `next_text, next_rank, next_probability`. Needs the model's unembedding
        beside the captures: `attach(..., lens=True)`; a live session saves it when asked. Texts are None unless `attach` had a `tokenizer`, or one is
        given here. In bulk: `unembedding()`."""
        name, layer = _key(site) if site is not None else (None, None)
        rows = self._ask("lens", request, run, session, site=name, layer=layer, tokens=_range("tokens", tokens), k=k)
        if tokenizer is not None:
            for row in rows:
                row["next_text"] = None if row["next"] is None else str(tokenizer.decode([row["next"]]))
                for candidate in row["top"]:
                    candidate["text"] = str(tokenizer.decode([candidate["token"]]))
        return rows

    def unembedding(self, session: str | None = None) -> lenses.Unembedding:
        """The final norm and unembedding of a session's model (of a store: the latest session's that saved one), to apply to any rows of its residual
        stream with torch: `unembedding(cache["resid_post", 5])` gives logits."""
        client = self._client()
        store = Path(client.get("/status")["store"]["path"])
        session = session or self._session
        if session is None:
            known = [info["id"] for info in client.list("/sessions")]
            session = next((one for one in reversed(known) if (store / lenses.FOLDER / f"{one}.json").exists()), known[-1] if known else "none")
        return lenses.load(store, session)


def _found(client: Client, tool: str, arguments: dict[str, Any]) -> Rows:
    """What a tool finds; where it takes more than a second, how far it is is said on the way."""
    far: dict[str, Any] = {}
    with progress(f"inspect.{tool}", stage=lambda: f"{far['stage']} {100 * far['share']:.0f} % ({size(far['bytes'])})" if far else ""):
        return client.found(f"/inspect/{tool}", arguments, far.update)


class SessionInspector(Inspector):
    """Also runs the attached model on inputs that tell its parts apart."""

    def __init__(self, client: Callable[[], Client], session: str, run: Callable[[torch.Tensor, dict[str, str]], Any], config: Callable[[], Any],
                 save_lens: Callable[[], None]) -> None:  # fmt: skip
        super().__init__(client, session)
        self._save_lens = save_lens
        self._run = run
        self._config = config

    def _ask(self, tool: str, request: Requests, run: str | None, session: str | None, **arguments: Any) -> Rows:
        if tool == "lens":
            self._save_lens()
        return super()._ask(tool, request, run, session, **arguments)

    def unembedding(self, session: str | None = None) -> lenses.Unembedding:
        if session is None:
            self._save_lens()
        return super().unembedding(session)

    def repeated_tokens(self, length: int = 50, *, repeats: int = 2, batch: int = 4, seed: int = 0) -> Any:
        """Run the model on random tokens, all different, that come `repeats` times over, after a token that begins the text where the model has one:
        the input on which induction and duplicate-token heads show. Returns the `Run` of it, labelled so: `inspect.heads(run=run.id)`."""
        config = self._config()
        vocabulary = int(getattr(config, "vocab_size", 0))
        special = {i for name in ("bos_token_id", "eos_token_id", "pad_token_id") for i in _ids(getattr(config, name, None))}
        plain = torch.tensor([i for i in range(vocabulary) if i not in special], device="cpu")
        if length < 2 or repeats < 2 or batch < 1 or length > len(plain):
            raise ValueError(f"repeated_tokens: {batch} x {repeats} x {length} tokens; give length 2 to {len(plain)} (the vocabulary), repeats 2 and batch 1 or more")
        generator = torch.Generator(device="cpu").manual_seed(seed)
        rows = [plain[torch.randperm(len(plain), generator=generator, device="cpu")[:length]].repeat(repeats) for _ in range(batch)]
        ids = torch.stack(rows)
        begins = _ids(getattr(config, "bos_token_id", None))
        if begins:
            ids = torch.cat([torch.full((batch, 1), begins[0], device="cpu"), ids], dim=1)
        return self._run(ids, {"probe": "repeated-random-tokens", "period": str(length), "seed": str(seed)})


def _ids(given: Any) -> list[int]:
    """Token ids as configurations write them: none, one or several."""
    if given is None:
        return []
    return [int(i) for i in given] if isinstance(given, Sequence) else [int(given)]
