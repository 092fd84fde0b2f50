"""torch.compile's caches on disk, which later processes share, know hooks: whichever set of them a model had when a cache was filled, another process captures its own,
all of it and nothing else, and its outputs are what they were."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.newest,
    pytest.mark.skipif(not (os.environ.get("DMI_TEST_FULL") or os.environ.get("DMI_TEST_DEVICE")), reason="five processes that compile take minutes: DMI_TEST_FULL=1, as in make soak"),
]
HERE = Path(__file__).parent


def run(patterns: list[str]) -> None:
    """One process: a model of the same weights, compiled, with hooks at `patterns`, or none. Prints what came of it."""
    import torch
    import torch._dynamo.utils

    from observed import DEVICE, model_of, observed

    torch.manual_seed(5)
    model = model_of("llama", num_hidden_layers=2)
    ids = torch.randint(3, 128, (2, 9))
    said: dict[str, object] = {}
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, mode=os.environ["MODE"])
        if patterns:
            with observed(model, patterns) as session:
                for _ in range(3):
                    torch.compiler.cudagraph_mark_step_begin()
                    out = compiled(ids, use_cache=False).logits
                session.check_books()
                said["fired"] = sorted({session.reader.name(site) for step in session.reader.steps for site in step.fired})
                said["steps"] = len(session.reader.steps)
                said["right"] = all(torch.equal(session.tensor("unembed.hook_out", 2 * step + row), out[row]) for step in (1, 2) for row in range(2)) if "logits" in patterns else True
        else:
            out = compiled(ids, use_cache=False).logits
    counters = torch._dynamo.utils.counters
    said["hits"] = counters["inductor"]["fxgraph_cache_hit"]
    said["misses"] = counters["inductor"]["fxgraph_cache_miss"]
    said["sum"] = float(out.double().sum())
    said["device"] = str(DEVICE)
    print(json.dumps(said))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_other_hooks_and_the_same_cache(tmp_path: Path, mode: str) -> None:
    def process(*patterns: str) -> dict[str, object]:
        done = subprocess.run([sys.executable, __file__, *patterns], capture_output=True, text=True, timeout=900, check=False,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MODE": mode, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"})  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(json.loads(done.stdout.splitlines()[-1]))

    plain = process()
    one = process("blocks.0.hook_resid_post", "logits")
    other = process("blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "logits")
    again = process("blocks.0.hook_resid_post", "logits")
    without = process()
    assert (one["fired"], one["steps"], one["right"]) == (["blocks.0.hook_resid_post", "unembed.hook_out"], 3, True)
    assert (other["fired"], other["steps"], other["right"]) == (["blocks.1.hook_mlp_out", "blocks.1.hook_resid_post", "unembed.hook_out"], 3, True)
    assert (again["fired"], again["steps"], again["right"]) == (one["fired"], 3, True)
    for got in (one, other, again, without):
        assert abs(float(str(got["sum"])) - float(str(plain["sum"]))) < 1e-3 * max(1.0, abs(float(str(plain["sum"]))))
    assert without["sum"] == plain["sum"]
    # It is the cache that was tried: what was there before was found.
    assert int(str(without["hits"])) >= 1 and int(str(without["misses"])) == 0
    assert int(str(again["hits"])) >= 1 and int(str(again["misses"])) == 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    run(sys.argv[1:])
