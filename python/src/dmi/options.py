"""What a request says itself about its captures: keys that begin with `dmi_`, wherever its server takes them: `SamplingParams.extra_args` of vLLM,
arguments of `generate`, `generate_batch` and `add_request` of an attached Hugging Face model, an OpenAI client's `extra_body`.

    dmi_capture="off"                    nothing of it is captured
    dmi_sites="blocks.5.* logits"        these sites alone, as in a policy's `hooks`
    dmi_positions="prompt[-1]"           these positions alone, as in a policy's `tokens`
    dmi_tags="trial eu"                  tags to find it by, and for the policy's rules
    dmi_reference=1                      its response says where its captures are

Values are a text, or a list of texts. Options narrow what the operator's policy gives; nothing widens it. What cannot be meant never fails a request:
nothing of it is captured then, as its client did not want everything, and the log and the request's label `dmi.error` say why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

PREFIX = "dmi_"
CAPTURE, SITES, POSITIONS, TAGS, REFERENCE = (PREFIX + name for name in ("capture", "sites", "positions", "tags", "reference"))
ALL = (CAPTURE, SITES, POSITIONS, TAGS, REFERENCE)
MOST_BYTES = 4096
"""Of a label or tag: the engine's bound."""
MOST_TAGS = 64


@dataclass(frozen=True)
class Options:
    """`labels` are those that the engine's policy reads (policy/choice.go)."""

    labels: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    reference: bool = False
    wrong: str = ""
    """Why nothing of the request is captured, though its client did not say so."""

    @property
    def chosen(self) -> bool:
        """Some of its rows are not wanted."""
        return bool(self.labels)


NONE = Options()
"""Of most requests. Not to be modified, as none is."""


@dataclass(frozen=True)
class Asked:
    """A request that a server is about to hand to a Hugging Face model, in the same context."""

    name: str
    given: Mapping[str, Any]


asking: ContextVar[Asked | None] = ContextVar("dmi_asking", default=None)


class Prompt(list[int]):
    """Token ids of a prompt with options of its request, for `generate_batch` and `add_request` of an attached model:

        model.generate_batch([dmi.Prompt(ids, dmi_positions="prompt[-1]"), other_ids])
    """

    def __init__(self, ids: Iterable[int], **options: Any) -> None:
        unknown = sorted(set(options) - set(ALL))
        if unknown:
            raise TypeError(f"Prompt({unknown[0]}=...) is no option; there are {', '.join(ALL)}")
        super().__init__(ids)
        self.options = options


def given_in(values: Any) -> dict[str, Any]:
    """Those of a mapping's items that are options, good ones or not."""
    if not isinstance(values, Mapping):
        return {}
    return {key: value for key, value in values.items() if isinstance(key, str) and key.startswith(PREFIX)}


def options_of(extra: Any) -> Options:
    """Of what a request says beside its prompt: a mapping, or whatever else there is instead."""
    given = given_in(extra) if extra else None
    if not given:
        return NONE
    try:
        return _read(given)
    except ValueError as error:
        reference = bool(given.get(REFERENCE))
        return Options({"dmi.capture": "off", "dmi.error": str(error)[:MOST_BYTES // 4]}, reference=reference, wrong=str(error))


def _read(given: Mapping[str, Any]) -> Options:
    unknown = sorted(set(given) - set(ALL))
    if unknown:
        raise ValueError(f"{unknown[0]!r:.80} is no option; there are {', '.join(ALL)}")
    labels: dict[str, str] = {}
    capture = given.get(CAPTURE, "on")
    if capture not in ("on", "off"):
        raise ValueError(f"{CAPTURE}={capture!r:.80}: give 'off', or leave it out")
    if capture == "off":
        labels["dmi.capture"] = "off"
    for key in (SITES, POSITIONS):
        if key in given:
            text = " ".join(_texts(key, given[key]))
            if not text or len(text.encode()) > MOST_BYTES:
                raise ValueError(f"{key}={given[key]!r:.80}: give 1 to {MOST_BYTES} bytes, or leave it out")
            labels["dmi." + key.removeprefix(PREFIX)] = text
    tags = _texts(TAGS, given.get(TAGS, ()))
    if len(tags) > MOST_TAGS or any(len(tag.encode()) > MOST_BYTES for tag in tags):
        raise ValueError(f"{TAGS}: {len(tags)} tags: at most {MOST_TAGS} are possible, of {MOST_BYTES} bytes each")
    return Options(labels, tags, bool(given.get(REFERENCE)))


def _texts(key: str, value: Any) -> list[str]:
    """Words: of a text, those between blanks and commas."""
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(words, (list, tuple)) or not all(isinstance(word, str) and word for word in words):
        raise ValueError(f"{key}={value!r:.80}: give a text or a list of texts")
    return list(words)
