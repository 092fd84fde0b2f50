"""What the tools of docs/inspect.md should find, computed anew in float64 from Hugging Face's own outputs, with NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().to(torch.float64).numpy()


def near(got: float | None, want: float, relative: float = 1e-9, absolute: float = 1e-12) -> bool:
    """Null stands for what is not a finite number."""
    if not math.isfinite(want):
        return got is None
    return got is not None and abs(got - want) <= relative * abs(want) + absolute


def distribution(rows: Sequence[np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Figures of the finite elements of rows, [rows, ...] each."""
    flat = np.concatenate([r.reshape(-1) for r in rows])
    finite = flat[np.isfinite(flat)]
    norms = np.concatenate([np.sqrt(np.where(np.isfinite(r), r, 0.0).reshape(len(r), -1).__pow__(2).sum(1)) for r in rows])
    out: dict[str, Any] = {
        "rows": sum(len(r) for r in rows), "count": flat.size, "nonfinite": int((~np.isfinite(flat)).sum()), "nan": int(np.isnan(flat).sum()),
        "zeros": int((finite == 0).sum()), "norm": norms.mean(), "norm_max": norms.max(),
    }  # fmt: skip
    figures = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max, "rms": lambda a: np.sqrt(np.mean(a * a)), "absmax": lambda a: np.max(np.abs(a))}
    out |= {name: figure(finite) if finite.size else math.nan for name, figure in figures.items()}
    for name, q in {"p01": 0.01, "p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99}.items():
        out[name] = np.quantile(finite, q, method="lower") if finite.size else math.nan
    out["finite"] = finite
    return out


def counts(edges: Sequence[float], values: np.ndarray[Any, Any]) -> list[int]:
    """How many values are between edges: magnitudes from the inner edge, included, to the outer, excluded."""
    found = []
    for a, b in zip(edges[:-1], edges[1:], strict=True):
        if a == b == 0:
            inside = values == 0
        elif a < 0 < b:
            inside = (values > a) & (values < b)
        else:
            inside = (values >= a) & (values < b) if a > 0 else (values > a) & (values <= b)
        found.append(int(inside.sum()))
    return found


def head_scores(patterns: Sequence[np.ndarray[Any, Any]], tokens: Sequence[Sequence[int]]) -> dict[str, np.ndarray[Any, Any]]:
    """Mean attention to the keys of each kind, per head. patterns: [heads, query, key] of each sequence."""
    sums: dict[str, list[list[float]]] = {name: [[] for _ in range(patterns[0].shape[0])] for name in ("previous", "induction", "duplicate", "first")}
    for pattern, ids in zip(patterns, tokens, strict=True):
        for head, weights in enumerate(pattern):
            for i in range(1, weights.shape[0]):
                same = [j for j in range(i) if ids[j] == ids[i]]
                after = [j + 1 for j in same if j + 1 < i]
                one = {"previous": weights[i, i - 1], "first": weights[i, 0]}
                if same:
                    one["duplicate"] = weights[i, same].sum()
                if after:
                    one["induction"] = weights[i, after].sum()
                if np.isfinite(sum(one.values())):
                    for name, score in one.items():
                        sums[name][head].append(float(score))
    return {name: np.array([np.mean(s) if s else math.nan for s in heads]) for name, heads in sums.items()}


KINDS = {"previous": "previous-token", "induction": "induction", "duplicate": "duplicate-token", "first": "first-token-sink"}


def kind_of(scores: dict[str, float], threshold: float = 0.4) -> str:
    best = max((name for name in KINDS if not math.isnan(scores[name])), key=lambda name: scores[name])
    return KINDS[best] if scores[best] >= threshold else "other"


def attended(attentions: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Mean weights over layers and heads, [query, key], of patterns [heads, query, key]."""
    return np.concatenate(list(attentions)).mean(0)


def standing_out(rows: np.ndarray[Any, Any], threshold: float, share: float, tolerance: float) -> dict[int, str]:
    """Kinds of the dimensions of [rows, dim] that stand out."""
    finite = np.isfinite(rows)
    magnitude = np.abs(np.where(finite, rows, np.nan))
    typical = np.nanmedian(magnitude)
    found = {}
    for dim in range(rows.shape[1]):
        own = magnitude[finite[:, dim], dim]
        if own.size == 0:
            continue
        if own.max() > 100 and own.max() > 1000 * typical:
            found[dim] = "massive"
        elif (own >= threshold).sum() / len(rows) >= share:
            found[dim] = "outlier"
        elif own.max() <= tolerance:
            found[dim] = "dead"
    return found


def cosine(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    """Mean cosine of rows; rows without one are left out."""
    with np.errstate(all="ignore"):
        cosines = (x * y).sum(1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))
    cosines = cosines[np.isfinite(cosines)]
    return float(cosines.mean()) if cosines.size else math.nan


def cka(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> float:
    """Linear CKA in its feature form (Kornblith et al. 2019)."""
    if len(x) == 0:
        return math.nan
    x, y = x - x.mean(0), y - y.mean(0)
    return float((np.linalg.norm(x.T @ y) ** 2) / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def difference(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], tolerance: float) -> dict[str, Any]:
    """How two rows differ."""
    both = np.isfinite(x) & np.isfinite(y)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    out: dict[str, Any] = {"mismatched": int((~both & ~same).sum())}
    a, b = x[both], y[both]
    gap = float(np.linalg.norm(a - b))
    out["relative"] = math.nan if a.size == 0 else 0.0 if gap == 0 else gap / float(np.linalg.norm(a))
    out["max_abs"] = float(np.abs(a - b).max()) if a.size else math.nan
    out["differ"] = int(out["relative"] > tolerance or out["mismatched"] > 0)
    return out


def lens_logits(row: np.ndarray[Any, Any], norm: Any, matrix: np.ndarray[Any, Any], *, less_one: bool, cap: float | None) -> np.ndarray[Any, Any]:
    """Logits of one row of the residual stream. norm is the model's module, matrix its unembedding; less_one: the norm keeps its weight less one."""
    if isinstance(norm, torch.nn.LayerNorm):
        row = (row - row.mean()) / np.sqrt(row.var() + norm.eps) * array(norm.weight) + array(norm.bias)
    else:
        epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
        weight = array(norm.weight)
        if less_one:  # these models add the one in float32, and so does what is saved
            weight = (weight.astype(np.float32) + np.float32(1)).astype(np.float64)
        row = row / np.sqrt((row * row).mean() + epsilon) * weight
    logits = matrix @ row
    return cap * np.tanh(logits / cap) if cap else logits
