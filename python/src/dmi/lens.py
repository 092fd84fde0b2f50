"""A model's final norm and unembedding, saved once beside what was captured: what a logit lens needs. docs/format/models.md is the file's form."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import secrets
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmi.client import DTYPES
from dmi.errors import EngineError, NotCapturedError
from dmi.families import Mapping
from dmi.hook import HookError

FORMAT = "dmi-lens-1"
FOLDER = "models"
PIECE_BYTES = 64 << 20
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Unembedding:
    """What a model makes of its residual stream's last rows: `unembedding(x)` gives logits [..., vocabulary] of rows [..., d_model], in x's
    precision, float32 at least, on x's device."""

    def __init__(self, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
        self.tensors = tensors
        """`norm.weight` and `norm.bias`, where there are any, `unembed.weight` and maybe `unembed.bias`."""
        self.facts = facts
        """`norm` ("rms" or "layer"), `epsilon`, maybe `logit_cap`."""
        self._ready: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        key = (x.device, x.dtype)
        if key not in self._ready:  # one copy: whoever asks in bulk asks again
            self._ready = {key: {name: tensor.to(device=x.device, dtype=x.dtype) for name, tensor in self.tensors.items()}}
        weights = self._ready[key]
        if self.facts["norm"] == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + float(self.facts["epsilon"]))
        if "norm.weight" in weights:
            x = x * weights["norm.weight"]
        if "norm.bias" in weights:
            x = x + weights["norm.bias"]
        logits = nn.functional.linear(x, weights["unembed.weight"], weights.get("unembed.bias"))
        cap = float(self.facts.get("logit_cap") or 0)
        return torch.tanh(logits / cap) * cap if cap else logits


def of_model(model: nn.Module, mapping: Mapping | None) -> Unembedding:
    """A model's own. Raises HookError where it is not a norm and a matrix that we know how to read."""
    who = type(model).__name__
    if mapping is None or mapping.norm is None or mapping.unembed is None:
        raise HookError(f"save the unembedding of {who}: it is not known where that model keeps its final norm and unembedding; give attach a mapping=")
    root = next((path for path in mapping.backbone if _has(model, path, mapping.blocks)), None)
    if root is None or not _has(model, root, mapping.norm) or not _has(model, mapping.unembed):
        raise HookError(f"save the unembedding of {who}: it has no {mapping.norm} or no {mapping.unembed}")
    norm = model.get_submodule(".".join(filter(None, (root, mapping.norm))))
    matrix: Any = model.get_submodule(mapping.unembed)
    weight = getattr(matrix, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise HookError(f"save the unembedding of {who}: {mapping.unembed} is a {type(matrix).__name__} without a plain matrix of weights")
    epsilon = next((getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name)), 1e-5)
    facts = {"format": FORMAT, "norm": "layer" if isinstance(norm, nn.LayerNorm) else "rms", "epsilon": repr(float(epsilon))}
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if mapping.logit_cap is not None and getattr(config, mapping.logit_cap, None):
        facts["logit_cap"] = repr(float(getattr(config, mapping.logit_cap)))
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    tensors = {name: value.to(wide) for name, value in _norm_weights(norm, weight.shape[1], wide, who).items()}
    if isinstance(getattr(matrix, "bias", None), Tensor):
        tensors["unembed.bias"] = matrix.bias.detach().to(wide)
    tensors["unembed.weight"] = weight.detach()
    return Unembedding(tensors, facts)


def _norm_weights(norm: Any, width: int, wide: torch.dtype, who: str) -> dict[str, Tensor]:
    """What a norm multiplies with and adds. Some models keep a weight less one: what the norm makes of ones tells."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is None:
        return {}
    found = {"norm.weight": weight.detach().to(wide)}
    if bias is not None:
        found["norm.bias"] = bias.detach().to(wide)
    if isinstance(norm, nn.LayerNorm):
        return found
    with torch.no_grad():
        made = norm.forward(torch.ones(width, dtype=wide, device=weight.device))  # not by a call, which would run hooks
    for name, candidate in (("as it is", found["norm.weight"]), ("less one", found["norm.weight"] + 1)):
        if torch.allclose(made, candidate, rtol=1e-3, atol=1e-4):
            return found if name == "as it is" else {**found, "norm.weight": candidate}
    raise HookError(f"save the unembedding of {who}: its final norm, a {type(norm).__name__}, is neither a LayerNorm nor an RMSNorm")


def _has(model: nn.Module, *path: str) -> bool:
    try:
        model.get_submodule(".".join(filter(None, path)))
    except AttributeError:
        return False
    return True


# ------------------------------------------------------------------ the file
def save(found: Unembedding, store: Path, session: str, vocabulary: list[str] | None = None) -> Path:
    """Write it under its own hash, unless it is there already, and say that it is this session's; with it what each token is written as, where that is known."""
    folder = store / FOLDER
    try:
        if not store.is_dir():
            raise OSError("there is no such folder on this machine")
        folder.mkdir(mode=0o700, exist_ok=True)
        path = _under_its_hash(folder, ".safetensors", lambda: _bytes(found))
        names = {"lens": path.name}
        if vocabulary is not None:
            text = memoryview(json.dumps(vocabulary).encode() + b"\n")
            names["vocabulary"] = _under_its_hash(folder, ".json", lambda: iter([text])).name
        _write(folder / f"{session}.json", iter([memoryview(json.dumps(names).encode() + b"\n")]))
    except OSError as error:
        raise EngineError(f"save the unembedding in {folder}: {error}; it is written by the model's own process, which has to see the store's folder") from error
    return path


def _under_its_hash(folder: Path, kind: str, pieces: Callable[[], Iterator[memoryview]]) -> Path:
    digest = hashlib.sha256()
    for piece in pieces():
        digest.update(piece)
    path = folder / f"{digest.hexdigest()}{kind}"
    if not path.exists():
        _write(path, pieces())
    return path


def _bytes(found: Unembedding) -> Iterator[memoryview]:
    header: dict[str, Any] = {"__metadata__": found.facts}
    at = 0
    for name, tensor in found.tensors.items():
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for tensor in found.tensors.values():
        flat = tensor.reshape(-1)
        step = max(1, PIECE_BYTES // tensor.element_size())
        for i in range(0, flat.numel(), step):
            piece = flat[i : i + step].cpu().contiguous()
            yield memoryview((ctypes.c_char * piece.nbytes).from_address(piece.data_ptr())).cast("B")


def _write(path: Path, pieces: Iterator[memoryview]) -> None:
    """A file that appears under its name only when it is whole and durable."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load(store: Path, session: str) -> Unembedding:
    """What a session saved. Raises NotCapturedError."""
    folder = store / FOLDER
    try:
        name = str(json.loads((folder / f"{session}.json").read_text())["lens"])
        if not (name.endswith(".safetensors") and len(name) == 76 and set(name[:64]) <= set(string.hexdigits)):
            raise ValueError(f"{name!r} is no file of weights")
        path = folder / name
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotCapturedError(f"unembedding of session {session}: {error}; attach with lens=True, or ask a live session's inspect.lens(), which saves it") from error
    facts = header.pop("__metadata__")
    if facts.get("format") != FORMAT:
        raise NotCapturedError(f"unembedding of session {session}: format {facts.get('format')!r} is not what this version reads")
    whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)[8 + length :]
    if (8 + length) % 8:
        whole = whole.clone()
    tensors = {
        name: whole[entry["data_offsets"][0] : entry["data_offsets"][1]].view(DTYPES[entry["dtype"]]).view(entry["shape"])
        for name, entry in header.items()
    }
    return Unembedding(tensors, facts)
