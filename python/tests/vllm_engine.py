"""A vLLM engine in a process of its own, driven step by step: what a test wants of it comes as JSON, and so does what became of it.

    python vllm_engine.py job.json result.json

A job: `engine`, arguments of `vllm.LLM`; `requests`, each `id, prompt, max_tokens`, the step at which it arrives, and maybe the one at which it is
aborted, `extra`, arguments of its own, and `logprobs`, of its prompt; `cache`, whether vLLM's compile cache is to work, which the CPU build breaks by lacking one function;
`in_place`, whether norms and rotary embeddings write over what they are given, as vLLM's kernels for GPUs do."""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that its scheduler can be watched from here
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")


def mend_cache() -> None:
    """Loading what was compiled ends, on the CPU, in a call that this build's functions do not have."""
    import torch

    load = torch.compiler.load_compiled_function

    def loaded(*args: Any, **kwargs: Any) -> Any:
        function = load(*args, **kwargs)
        compiled = function._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda config: None
        return function

    torch.compiler.load_compiled_function = loaded


def write_in_place(engine: dict[str, Any]) -> None:
    """The CPU build has no norm that does. An operation that nobody can look into, offered as vLLM's own is; rotary embeddings are in place where they are custom."""
    import torch
    from vllm import ir

    fused: Any = ir.ops.fused_add_rms_norm
    native = fused.impls["native"].impl_fn

    def written(x: torch.Tensor, x_residual: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
        out, total = native(x, x_residual, weight, epsilon)
        x.copy_(out)
        x_residual.copy_(total)

    library = torch.library.Library("dmi_tests", "FRAGMENT")
    library.define("fused_add_rms_norm(Tensor(a!) x, Tensor(b!) x_residual, Tensor weight, float epsilon) -> ()")
    library.impl("fused_add_rms_norm", written, "CompositeExplicitAutograd")
    torch.library.register_fake("dmi_tests::fused_add_rms_norm", lambda *arguments: None, lib=library)

    def in_place(x: Any, x_residual: Any, weight: Any, epsilon: float, variance_size: int | None = None) -> Any:
        torch.ops.dmi_tests.fused_add_rms_norm(x, x_residual, weight, epsilon)
        return x, x_residual

    in_place.__signature__ = inspect.signature(native)  # type: ignore[attr-defined]
    fused.register_impl("in_place", inplace=True)(in_place)
    write_in_place.library = library  # type: ignore[attr-defined]
    engine["kernel_config"] = {"ir_op_priority": {"fused_add_rms_norm": ["in_place", "native"]}}
    engine["compilation_config"] = {**engine.get("compilation_config", {}), "custom_ops": ["+rotary_embedding"]}


def calls_of(step: Any) -> tuple[Any, dict[str, int]]:
    """Of our operations, in a step."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = step()
    return result, {event.key: event.count for event in profile.key_averages() if event.key.startswith(("dmi::", "dmi_tests::"))}


def runner_of(worker: Any) -> str:
    return type(worker.model_runner).__module__


def main(job: dict[str, Any]) -> dict[str, Any]:
    if job.get("cache"):
        mend_cache()
    if job.get("in_place"):
        write_in_place(job["engine"])
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter

    llm = LLM(skip_tokenizer_init=True, **job["engine"])
    engine: Any = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    preempted: list[str] = []
    preempt = scheduler._preempt_request

    def watched(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = watched
    guesses = {"drafted": 0, "accepted": 0}
    tell = scheduler.make_spec_decoding_stats
    told = inspect.signature(tell)

    def counted(*args: Any, **kwargs: Any) -> Any:
        given = told.bind(*args, **kwargs).arguments
        guesses["drafted"] += given["num_draft_tokens"]
        guesses["accepted"] += given["num_accepted_tokens"]
        return tell(*args, **kwargs)

    scheduler.make_spec_decoding_stats = counted
    waiting = sorted(job["requests"], key=lambda request: request["arrive"])
    aborts = sorted((request["abort"], request["id"]) for request in waiting if request.get("abort") is not None)
    tokens: dict[str, list[int]] = {}
    cached: dict[str, int] = {}
    references: dict[str, Any] = {}
    calls: dict[str, int] = {}
    step, begun = 0, time.monotonic()
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0]["arrive"] <= step:
            request = waiting.pop(0)
            parameters = SamplingParams(max_tokens=request["max_tokens"], temperature=0, detokenize=False, ignore_eos=True,
                                        extra_args=request.get("extra"), prompt_logprobs=request.get("logprobs"))  # fmt: skip
            engine.add_request(request["id"], {"prompt_token_ids": request["prompt"]}, parameters)
        while aborts and aborts[0][0] <= step:
            engine.abort_request([aborts.pop(0)[1]])
        outputs, calls = calls_of(engine.step) if step == 2 else (engine.step(), calls)
        for output in outputs:
            tokens[output.request_id] = list(output.outputs[0].token_ids)
            if output.kv_transfer_params:
                references[output.request_id] = output.kv_transfer_params.get("dmi")
            cached[output.request_id] = max(cached.get(output.request_id, 0), output.num_cached_tokens or 0)
        step += 1
        if step % 1000 == 0:
            print(f"step {step}: {len(tokens)} of {len(job['requests'])} requests have begun", flush=True)
    observed = "dmi" in job["engine"].get("additional_config", {}) or "DMI_HOOKS" in os.environ
    result = {"tokens": tokens, "cached": cached, "references": references, "preempted": len(preempted), "steps": step, "seconds": time.monotonic() - begun, **guesses, "calls": calls,
              "runner": str(llm.collective_rpc(runner_of)[0]), "loaded": getattr(compilation_counter, "num_aot_artifacts_loaded", 0),
              "asynchronous": bool(engine.vllm_config.scheduler_config.async_scheduling), "compiled": str(engine.vllm_config.compilation_config.mode),
              "graphs": str(engine.vllm_config.compilation_config.cudagraph_mode)}
    if observed:
        result["flushed"] = llm.collective_rpc("dmi_flush")[0]
        result["status"], *result["others"] = llm.collective_rpc("dmi_status")
    engine.engine_core.shutdown()
    return result


def one_after_the_other(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Importing vLLM takes longer than a tiny model does."""
    results = []
    for number, job in enumerate(jobs):
        if number:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        print(f"== engine {number}", flush=True)
        results.append(main(job))
    return results


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(one_after_the_other(json.loads(Path(sys.argv[1]).read_text()))))
