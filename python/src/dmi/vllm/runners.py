"""Where vLLM's model runners call us. There are two; which of them serves a model depends on the version, the model and the platform.

Each puts a batch together, runs the model over it, computes logits and samples. The first does all but the sampling in `execute_model`, the second
computes logits in `sample_tokens`. Dummy runs, of warm-ups, profiling and graph capture, come by none of the places that open a step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from dmi.vllm.batches import Batch

Tell = Callable[..., Any]
"""`tell(what, *arguments)`: calls the observer's method, if there is one; never raises."""


def second(runner: Any) -> bool:
    """Whether it is the second model runner, vLLM's V2."""
    return not hasattr(runner, "_model_forward") and hasattr(runner, "prepare_inputs")


def known(runner: Any) -> bool:
    """Whether it is one of the two."""
    names = ("load_model", "execute_model", "sample_tokens", *(("prepare_inputs", "sample") if second(runner) else ("_model_forward", "input_batch")))
    return all(hasattr(runner, name) for name in names)


def wrap(runner: Any, loaded: Callable[[], None], tell: Tell) -> None:
    """Have a runner tell of its model, when that is loaded, and of its steps."""

    def after_load(load: Any, *args: Any, **kwargs: Any) -> Any:
        result = load(*args, **kwargs)
        loaded()
        return result

    _replace(runner, "load_model", after_load)
    _replace(runner, "sample_tokens", functools.partial(_sample_tokens, tell))
    if second(runner):
        _wrap_second(runner, tell)
    else:
        _wrap_first(runner, tell)


def _replace(thing: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(thing, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(thing, name, wrapped)


def _wrap_first(runner: Any, tell: Tell) -> None:
    scheduled: list[Any] = []

    def execute(original: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        scheduled[:] = [output]
        tell("scheduled", output)
        aborted = True
        try:
            result = original(output, *args, **kwargs)
            aborted = False
            return result
        finally:
            tell("close", aborted=aborted)

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        tell("open", functools.partial(_first_batch, runner, scheduled[0]))
        result = original(*args, **kwargs)
        tell("launched")
        return result

    _replace(runner, "execute_model", execute)
    _replace(runner, "_model_forward", forward)


def _first_batch(runner: Any, output: Any) -> Batch:
    ids = list(runner.input_batch.req_ids)
    counts = [output.num_scheduled_tokens[key] for key in ids]
    guesses = output.scheduled_spec_decode_tokens
    return Batch(ids, counts, runner.input_batch.num_computed_tokens_cpu[: len(ids)], [len(guesses.get(key, ())) for key in ids] if guesses else ())


def _wrap_second(runner: Any, tell: Tell) -> None:
    def execute(original: Any, output: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dummy_run"):
            return original(output, *args, **kwargs)
        tell("scheduled", output)
        try:
            result = original(output, *args, **kwargs)
        except BaseException:
            tell("close", aborted=True)
            raise
        tell("launched")
        if getattr(runner, "is_pooling_model", False):  # whose rows have no logits
            tell("close", aborted=False)
        return result

    def prepare(original: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(*args, **kwargs)
        tell("open", functools.partial(_second_batch, batch))
        return batch

    def sample(original: Any, *args: Any, **kwargs: Any) -> Any:
        aborted = True
        try:
            result = original(*args, **kwargs)
            aborted = False
            return result
        finally:
            tell("close", aborted=aborted)

    _replace(runner, "execute_model", execute)
    _replace(runner, "prepare_inputs", prepare)
    _replace(runner, "sample", sample)


def _second_batch(batch: Any) -> Batch:
    n = len(batch.req_ids)
    guesses = batch.num_draft_tokens_per_req
    return Batch(list(batch.req_ids), batch.num_scheduled_tokens[:n], batch.num_computed_tokens_np[:n], () if guesses is None else guesses[:n])


def _sample_tokens(tell: Tell, original: Any, *args: Any, **kwargs: Any) -> Any:
    """What was sampled comes with the output: at once, or where that is asked for its values, in another thread perhaps."""
    output = original(*args, **kwargs)
    asked = tell("asked")
    if asked is None or output is None:
        return output
    if hasattr(output, "get_output"):
        get = output.get_output
        told: list[bool] = []

        @functools.wraps(get)
        def get_output() -> Any:
            values = get()
            if not told:
                told.append(True)
                _sampled(tell, asked, values)
            return values

        output.get_output = get_output
    else:
        _sampled(tell, asked, output)
    return output


def _sampled(tell: Tell, asked: Any, output: Any) -> None:
    ids, tokens = getattr(output, "req_ids", None), getattr(output, "sampled_token_ids", None)
    if ids and tokens:
        tell("sampled", asked, list(ids), tokens)
