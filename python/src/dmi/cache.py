"""What was captured of one request, or of a batch of requests: a mapping from site names to tensors, read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dmi.client import Client
from dmi.errors import NotCapturedError, RaggedError
from dmi.notebook import outcomes, table

Key = str | tuple[str, int]
"""A site: its name (`blocks.5.hook_resid_post`), an alias, the end of either (`resid_post`) where only one fits, or that with a layer."""
Range = slice | int | range | None


class Cache:
    """Captures of one request, or of requests of equal length, which then have a leading batch dimension.

    Tensors are on the CPU in the dtype they were captured in, shaped as docs/sites.md says: [tokens, ...], attention
    [n_heads, query, key]. They are read from the engine, or the store, at each access, and belong to the caller. Positions count
    the request's tokens from 0, pads not counted; `generate` gives prompt + new - 1 of them, because the last token is never fed back.
    """

    def __init__(self, client: Client, requests: Sequence[str], *, batch: bool, keep: Any = None) -> None:
        self._client = client
        self._requests = list(requests)
        self._batch = batch
        self._keep = keep
        self._sites: list[dict[str, Any]] | None = None

    # -------------------------------------------------------------- what there is
    @property
    def requests(self) -> list[str]:
        """Ids of the requests, in the order of the batch."""
        return list(self._requests)

    @property
    def sites(self) -> list[dict[str, Any]]:
        """What is known of each site: `name, aliases, layer, axes, dtype, row_shape, rows, bytes` (of the first request)."""
        if self._sites is None:
            self._sites = list(self._client.list("/sites", {"request": self._requests[0]}))
        return self._sites

    def keys(self) -> list[str]:
        """Canonical names, in the order in which the model computes them."""
        return [site["name"] for site in self.sites]

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, one at a time; sites of which nothing was captured raise IncompleteError when reached."""
        for name in self.keys():
            yield name, self[name]

    def values(self) -> Iterator[Tensor]:
        for name in self.keys():
            yield self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.sites)

    def __contains__(self, key: object) -> bool:
        """Whether `cache[key]` names one site."""
        try:
            name, layer = _key(key)
        except TypeError:
            return False
        if any(site["name"] == name and layer in (None, site["layer"]) for site in self.sites):
            return True
        if "*" in name or "?" in name:
            return False
        try:
            found = self._client.get("/sites", {"request": self._requests[0], "site": name, "layer": layer})
        except (NotCapturedError, ValueError):
            return False
        return len(found["items"]) == 1

    def __repr__(self) -> str:
        what = f"{len(self._requests)} requests" if len(self._requests) != 1 else f"request {self._requests[0]}"
        try:
            return f"Cache({what}, {len(self)} sites, {self._length()} positions)"
        except RaggedError:
            return f"Cache({what}, {len(self)} sites, of different lengths: name one)"
        except Exception as error:  # a repr that raises hides what it was asked about
            return f"Cache({what}; {error})"

    def _repr_html_(self) -> str:
        try:
            what = f"request {self._requests[0]}" if len(self._requests) == 1 else f"{len(self._requests)} requests"
            coverage = self.coverage()
            became = "; ".join(f"{rows:,} {outcome}({why})" if why else f"{rows:,} {outcome}" for outcome, why, rows in outcomes(coverage))
            lines = [(s["name"], s["dtype"], s["row_shape"], s["rows"], s["bytes"]) for s in self.sites]
            return table(f"Captures of {what}", {"rows": became or "none", "complete": coverage["complete"]}, ("site", "dtype", "row", "rows", "bytes"), lines)
        except Exception:  # a table that raises hides what it was asked about
            return table(repr(self), {}, (), ())

    # -------------------------------------------------------------- tensors
    def __getitem__(self, key: Key) -> Tensor:
        name, layer = _key(key)
        return self.get(name, layer=layer)

    def get(
        self,
        name: Key,
        *,
        layer: int | None = None,
        heads: Sequence[int] | int | None = None,
        tokens: Range = None,
        steps: Range = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        partial: bool = False,
        level: str | None = None,
    ) -> Tensor:
        """Part of a site. `heads`: in the order wanted. `tokens`: positions, a slice without a step (negative from the end) or one
        position; the axis stays. `steps`: the request's forwards, counted from 0. `level="any"`: quantised rows too, as float32 where there are any; `levels_of` tells which.

        Rows that the model never computed are no rows of a site: after `generate`, logits are of the last token of a prompt and those that follow, and
        `positions_of` tells which; a range that holds none of them raises. Raises NotCapturedError for a name that is not there, IncompleteError (with
        coverage) where rows that were asked for are missing, unless `partial`: then the rows that are there, whose positions `positions_of` tells. Batches of different lengths raise RaggedError.
        """
        name, layer = _key((name, layer) if isinstance(name, str) and layer is not None else name)
        arguments = {"site": name, "layer": layer, "heads": _heads(heads), "tokens": _range("tokens", tokens),
                     "steps": _range("steps", steps), "partial": partial or None, "level": level}  # fmt: skip
        if not self._batch:
            tensor = self._client.tensor("/tensor", {"request": self._requests[0], **arguments}).tensor
        elif len(self._requests) == 1:
            tensor = self._client.tensor("/tensor", {"request": self._requests[0], **arguments}).tensor.unsqueeze(0)
        else:
            tensor = self._stacked(name, arguments)
        if device is not None or dtype is not None:
            tensor = tensor.to(device=device, dtype=dtype)
        return tensor

    def _stacked(self, name: str, arguments: dict[str, Any]) -> Tensor:
        described = [self._client.describe("/tensor", {"request": request, **arguments}) for request in self._requests]
        first = described[0]
        if any(d.shape != first.shape or d.positions != first.positions or d.dtype != first.dtype for d in described):
            rows = ", ".join(f"{request}: {_positions(d.positions)}" for request, d in zip(self._requests, described, strict=True))
            raise RaggedError(f"read {name} of {len(described)} requests as one tensor: their rows differ (positions {rows}); "
                              "name one: cache(request=...)")  # fmt: skip
        out = torch.empty([len(described), *first.shape], dtype=first.dtype, device="cpu")
        flat = out.view(-1).view(torch.uint8) if out.numel() else out
        for index, request in enumerate(self._requests):
            part = flat[index * first.nbytes : (index + 1) * first.nbytes] if out.numel() else None
            self._client.tensor("/tensor", {"request": request, **arguments}, into=part)
        return out

    def positions_of(self, name: Key, *, tokens: Range = None, steps: Range = None) -> Tensor:
        """Positions of the rows that `get(..., partial=True)` returns, int64 [rows]; of one request, or of a batch with equal rows."""
        site, layer = _key(name)
        arguments = {"site": site, "layer": layer, "tokens": _range("tokens", tokens), "steps": _range("steps", steps), "partial": True}
        found = [self._client.describe("/tensor", {"request": request, **arguments}).positions for request in self._requests]
        if any(positions != found[0] for positions in found):
            raise RaggedError(f"positions of {site}: they differ between {', '.join(self._requests)}; name one: cache(request=...)")
        return torch.cat([torch.arange(a, b, device="cpu") for a, b in found[0]] or [torch.empty(0, dtype=torch.int64, device="cpu")])

    def levels_of(self, name: Key, *, tokens: Range = None, steps: Range = None, partial: bool = False) -> list[str]:
        """The level of each row that `get(..., level="any")` returns: full, fp8 or int8; of one request, or of a batch with equal rows."""
        site, layer = _key(name)
        arguments = {"site": site, "layer": layer, "tokens": _range("tokens", tokens), "steps": _range("steps", steps), "partial": partial or None, "level": "any"}
        found = [self._client.describe("/tensor", {"request": request, **arguments}).levels for request in self._requests]
        if any(levels != found[0] for levels in found):
            raise RaggedError(f"levels of {site}: they differ between {', '.join(self._requests)}; name one: cache(request=...)")
        return [level for level, rows in found[0] for _ in range(rows)]

    def iter(self, name: Key, rows: int = 65536, *, partial: bool = False) -> Iterator[Tensor]:
        """Rows of a site over the requests, one after another, at most `rows` at a time: [rows, row shape...]. Memory stays bounded.
        Sites whose row shape grows (attention) raise ValueError; missing rows IncompleteError, unless `partial`."""
        site, layer = _key(name)
        if rows < 1:
            raise ValueError(f"iterate over {site}: rows={rows}; give 1 or more")
        after = None
        while True:
            page = self._client.tensor("/rows", {"request": self._requests, "site": site, "layer": layer, "limit": rows, "after": after,
                                                 "partial": partial or None})  # fmt: skip
            if len(page.tensor):
                yield page.tensor
            after = page.next
            if not after:
                return

    # -------------------------------------------------------------- elsewhere
    def to_transformer_lens(self, model: Any = None) -> Any:
        """All of it as a `transformer_lens.ActivationCache`, which is in memory: tensors by canonical name, and by the other names of the same
        point. `model` is what its methods that need weights ask (a TransformerBridge of the same model, for `accumulated_resid(apply_ln=True)`,
        `logit_attrs` and the like). Without a batch dimension where this cache has none. Sites of which nothing was captured are left out.

        Raises ImportError without TransformerLens, IncompleteError where rows are missing, RaggedError for requests of different lengths."""
        try:
            from transformer_lens import ActivationCache  # type: ignore[import-not-found]
        except ImportError as error:
            raise ImportError(f"make an ActivationCache: TransformerLens cannot be imported ({error}); pip install 'transformer-lens>=4'") from error
        tensors: dict[str, Tensor] = {}
        for site in self.sites:
            if site["rows"] > 0:
                tensors[site["name"]] = self[site["name"]]
        for site in self.sites:
            for alias in site["aliases"]:
                if site["name"] in tensors:
                    tensors.setdefault(alias, tensors[site["name"]])
        return ActivationCache(tensors, model, has_batch_dim=self._batch)

    # -------------------------------------------------------------- what became of rows, and figures
    def coverage(self, name: Key | None = None) -> dict[str, Any]:
        """What became of every row: `rows`, `complete`, `outcomes` {outcome: {reason, or level where captured: rows}}, `repeated` (captured
        rows that their site gave again in the same step: the first is kept), and `ranges`, each
        `request, site, first, count, stride, outcome, reason, level, policy, attempt`. `name` may be a glob; without it, all sites."""
        site, layer = _key(name) if name is not None else (None, None)
        return dict(self._client.get("/coverage", {"request": self._requests, "site": site, "layer": layer}))

    def stats(self, name: Key | None = None, *, per: str = "row", tokens: Range = None) -> list[dict[str, Any]]:
        """Statistics that the engine computed: `request, site, layer, position, rows, mean, rms, min, max, absmax, l2, nonfinite, count, level`
        per "row", "request" or "site". `name` may be a glob. None where every element is non-finite."""
        site, layer = _key(name) if name is not None else (None, None)
        return list(self._client.get("/stats", {"request": self._requests, "site": site, "layer": layer, "per": per,
                                                "tokens": _range("tokens", tokens)})["items"])  # fmt: skip

    def topk(self, name: Key | None = None, *, k: int = 5, tokens: Range = None) -> list[dict[str, Any]]:
        """The k greatest finite elements of every row, the greatest first and of equal ones that of the lower index: `request, site, position, level,
        elements: [{index, value}]`. `name` may be a glob. Rows at level stats have as many as their policy said (`stats+K`): more is an error."""
        site, layer = _key(name) if name is not None else (None, None)
        return list(self._client.get("/topk", {"request": self._requests, "site": site, "layer": layer, "k": k, "tokens": _range("tokens", tokens)})["items"])

    def top_keys(self, name: Key, *, heads: Sequence[int] | int | None = None, query: int | None = None, k: int = 5) -> list[dict[str, Any]]:
        """The positions that each head of an attention pattern attends to most: `head, keys: [{position, token, weight}]`, largest
        first; for one query position, or averaged over all. Of one request."""
        site, layer = _key(name)
        return list(self._client.get("/topkeys", {"request": self._one("top_keys"), "site": site, "layer": layer, "heads": _heads(heads),
                                                  "query": query, "k": k})["items"])  # fmt: skip

    # -------------------------------------------------------------- the requests themselves
    def _one(self, what: str) -> str:
        if len(self._requests) != 1:
            raise RaggedError(f"{what} is about one request, and here are {len(self._requests)}: name one of {', '.join(self._requests)} with cache(request=...)")
        return self._requests[0]

    def _described(self) -> list[dict[str, Any]]:
        return [dict(self._client.get(f"/requests/{request}")) for request in self._requests]

    def _length(self) -> int:
        lengths = {info["id"]: int(info["positions"]) for info in self._described()}
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{request}: {length}" for request, length in lengths.items())
            raise RaggedError(f"the requests have different numbers of positions ({listed}): name one with cache(request=...)")
        return next(iter(lengths.values()))

    @property
    def positions(self) -> Tensor:
        """Positions that the model computed, int64 [tokens] or [batch, tokens]."""
        positions = torch.arange(self._length(), device="cpu")
        return positions.expand(len(self._requests), -1).clone() if self._batch else positions

    @property
    def tokens(self) -> Tensor:
        """Ids of prompt and generated tokens, int64 [tokens] or [batch, tokens], where the session kept them (`text="ids"` or "text");
        one more than positions after `generate`."""
        kept: dict[str, list[int]] = {}
        for info in self._described():
            if info.get("tokens") is None:
                raise NotCapturedError(f'tokens of request {info["id"]}: not kept; attach with text="ids" or "text", or capture the site "tokens"')
            kept[info["id"]] = info["tokens"]
        if len({len(ids) for ids in kept.values()}) > 1:
            lengths = ", ".join(f"{request}: {len(ids)}" for request, ids in kept.items())
            raise RaggedError(f"the requests have different numbers of tokens ({lengths}): name one with cache(request=...)")
        tokens = torch.tensor(list(kept.values()), dtype=torch.int64, device="cpu")
        return tokens if self._batch else tokens[0]

    @property
    def text(self) -> str | list[str]:
        """Text of prompt and generated tokens, where the session kept it (`text="text"`); a list for a batch."""
        texts = []
        for info in self._described():
            if not info.get("text"):
                raise NotCapturedError(f'text of request {info["id"]}: not kept; attach with text="text" and tokenizer=')
            texts.append(str(info["text"]))
        return texts if self._batch else texts[0]

    def close(self) -> None:
        """Let go of what the cache keeps alive: the temporary store of `run_with_cache`. Others need not be closed."""
        if hasattr(self._keep, "close"):
            self._keep.close()

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _key(key: object) -> tuple[str, int | None]:
    if isinstance(key, str) and key:
        return key, None
    if isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], str) and isinstance(key[1], int) and not isinstance(key[1], bool):
        return key[0], key[1]
    raise TypeError(f"a site is named by a string, or a string and a layer, not by {key!r}")


def _range(what: str, value: Range) -> str | None:
    """As the HTTP API writes it: a:b."""
    if value is None:
        return None
    if isinstance(value, int):
        return f"{value}:{value + 1 if value != -1 else ''}"
    if value.step not in (None, 1):
        raise ValueError(f"{what}={value!r}: ranges have no step here; take it from the tensor")
    return f"{'' if value.start is None else value.start}:{'' if value.stop is None else value.stop}"


def _heads(heads: Sequence[int] | int | None) -> str | None:
    if heads is None:
        return None
    return ",".join(str(int(head)) for head in ([heads] if isinstance(heads, int) else heads))


def _positions(spans: Sequence[tuple[int, int]]) -> str:
    return " and ".join(f"{a}…{b - 1}" for a, b in spans) or "none"
