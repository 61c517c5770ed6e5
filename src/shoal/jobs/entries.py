"""One prompt of a big job, as a line of a file has it: not checked against any model yet."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from shoal.errors import RequestError
from shoal.params import Message, Prompt, SamplingParams

Endpoint = Literal["/v1/completions", "/v1/chat/completions"]
_IDS = ("custom_id", "id")
_KINDS = ("prompt", "prompt_token_ids", "messages")
_PROMPT_DIGITS = 10  # of a digest: as many hexadecimal digits are the prompt's,
_PARAMS_DIGITS = 6  # ... and as many the parameters'


@dataclass(frozen=True, slots=True)
class JobEntry:
    """Exactly one of `prompt`, `messages` and `error` is set."""

    index: int
    where: str  # for messages: the file and the line
    prompt: Prompt | None = None
    messages: Sequence[Message] | None = None
    error: str | None = None  # why the line can't be used
    sampling: Mapping[str, Any] = field(default_factory=dict)  # parameters of its own, by our names
    ids: Mapping[str, Any] = field(default_factory=dict)  # what is echoed in the output's line
    endpoint: Endpoint | None = None  # of the OpenAI batch format, which its output has too
    model: str | None = None  # as the request calls it
    cache_salt: str | None = None
    token_ids: bool = False  # of that format: show the prompt's and the output's
    by_id: bool = False  # ... and call tokens `token_id:17` in log-probabilities
    batch: bool = False  # is it a request of that format? One that can't be used may have no endpoint

    @property
    def text(self) -> str | None:
        return self.prompt if isinstance(self.prompt, str) else None

    @property
    def tokens(self) -> list[Any]:
        return list(self.prompt["prompt_token_ids"]) if isinstance(self.prompt, dict) else []


def digest(entry: JobEntry, params: SamplingParams, seed: int) -> str:
    """What tells a prompt and its parameters from others: 16 hexadecimal digits, the first 10 of them the prompt's.

    Parameters that are as the class has them do not count, so that new ones change no digest. `seed`, the job's, is one
    of the parameters of a prompt that draws by it; 0 is what the class has.
    """
    what = [entry.prompt, entry.messages, entry.ids, entry.endpoint]
    different = {
        f.name: getattr(params, f.name)
        for f in dataclasses.fields(SamplingParams)
        if getattr(params, f.name) not in (f.default, ())
    }
    if seed and draws_by_job(params):
        different["seed of the job"] = seed
    return _hash(what)[:_PROMPT_DIGITS] + _hash(different)[:_PARAMS_DIGITS]


def draws_by_job(params: SamplingParams) -> bool:
    """Does a prompt with these parameters draw tokens, and bring no seed for it?"""
    return params.seed is None and not params.greedy


def same_prompt(one: str, other: str) -> bool:
    """Do two digests differ in nothing but the parameters?"""
    return one[:_PROMPT_DIGITS] == other[:_PROMPT_DIGITS]


def _hash(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return dict(value) if isinstance(value, Mapping) else str(value)


def entry_of(index: int, where: str, line: object) -> JobEntry:
    """A line of our own format: `prompt`, `prompt_token_ids` or `messages`, and perhaps `sampling_params` and
    `cache_salt`.

    Other keys are left alone; `custom_id` and `id` are kept for the output.

    Raises:
        RequestError: it has none of them, several, or one of the wrong type.
    """
    if not isinstance(line, dict):
        raise RequestError(f"a line is a JSON object with {_or(_KINDS)}, not {type(line).__name__}")
    given = [name for name in _KINDS if line.get(name) is not None]
    if not given:
        raise RequestError(f"it has neither a text `prompt` nor a list `prompt_token_ids` nor `messages`{_has(line)}")
    if len(given) > 1:
        raise RequestError(f"it has {' and '.join(f'`{name}`' for name in given)}: give one of them")
    sampling = line.get("sampling_params")
    if sampling is not None and not isinstance(sampling, dict):
        raise RequestError("`sampling_params` must be a JSON object", "sampling_params")
    return JobEntry(
        index,
        where,
        prompt=None if "messages" in given else prompt_of(given[0], line[given[0]]),
        messages=messages_of(line["messages"]) if "messages" in given else None,
        sampling=sampling or {},
        ids=ids_of(line),
        cache_salt=line.get("cache_salt"),
    )


def refused(index: int, where: str, line: object, why: str) -> JobEntry:
    """The entry of a line that is JSON but can't be used: its answer has its ids all the same."""
    return JobEntry(index, where, error=why, ids=ids_of(line) if isinstance(line, dict) else {})


def prompt_of(kind: str, value: object) -> Prompt:
    """
    Raises:
        RequestError: a `prompt` that is no text, or `prompt_token_ids` that are no list.
    """
    if kind == "prompt":
        if not isinstance(value, str):
            why = f"`prompt` must be a text, got {_short(value)}; token ids go into `prompt_token_ids`"
            raise RequestError(why, "prompt")
        return value
    if not isinstance(value, list):
        raise RequestError(f"`prompt_token_ids` must be a list of integers, got {_short(value)}", "prompt_token_ids")
    return {"prompt_token_ids": value}


def messages_of(value: object) -> list[Message]:
    """
    Raises:
        RequestError: it is no list of objects.
    """
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        why = f"`messages` must be a list of objects with `role` and `content`, got {_short(value)}"
        raise RequestError(why, "messages")
    return value


def ids_of(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: line[name] for name in _IDS if isinstance(line.get(name), str | int)}


def _or(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:-1]) + f" or `{names[-1]}`"


def _has(line: Mapping[str, Any]) -> str:
    return f", only {_short(', '.join(map(str, line)))}" if line else ""


def _short(value: object, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
