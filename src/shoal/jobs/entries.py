"""One prompt of a job, as a line of a prompts file gives it. It is not checked against any model yet."""

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
_PROMPT_DIGITS = 10  # hexadecimal digits of a digest that depend on the prompt
_PARAMS_DIGITS = 6  # ... and those that depend on the parameters


@dataclass(frozen=True, slots=True)
class JobEntry:
    """One prompt of a job. Exactly one of `prompt`, `messages` and `error` is set."""

    index: int
    where: str  # the file and the line, for error messages
    prompt: Prompt | None = None
    messages: Sequence[Message] | None = None
    error: str | None = None  # why the line can't be used
    sampling: Mapping[str, Any] = field(default_factory=dict)  # sampling parameters that the line sets
    ids: Mapping[str, Any] = field(default_factory=dict)  # `custom_id` and `id`, copied to the line of the output
    endpoint: Endpoint | None = None  # set if the line is a request in OpenAI's batch format; the answer is one too
    model: str | None = None  # the name in the request
    cache_salt: str | None = None
    return_token_ids: bool = False  # batch format: the answer has the token ids of prompt and output
    tokens_as_ids: bool = False  # batch format: tokens in log-probabilities are written as `token_id:17`
    is_batch_request: bool = False  # batch format; a request that can't be used may have no endpoint

    @property
    def text(self) -> str | None:
        return self.prompt if isinstance(self.prompt, str) else None

    @property
    def tokens(self) -> list[Any]:
        return list(self.prompt["prompt_token_ids"]) if isinstance(self.prompt, dict) else []


def digest(entry: JobEntry, params: SamplingParams, seed: int) -> str:
    """Return 16 hexadecimal digits that identify a prompt (the first 10) and its parameters (the others).

    Parameters with their default value do not count, so that new parameters change no digest. The job's `seed` counts
    as a parameter if the prompt uses it; 0 is its default.
    """
    identity = [entry.prompt, entry.messages, entry.ids, entry.endpoint]
    different = {
        f.name: getattr(params, f.name)
        for f in dataclasses.fields(SamplingParams)
        if getattr(params, f.name) not in (f.default, ())
    }
    if seed and uses_job_seed(params):
        different["seed of the job"] = seed
    return _hash(identity)[:_PROMPT_DIGITS] + _hash(different)[:_PARAMS_DIGITS]


def uses_job_seed(params: SamplingParams) -> bool:
    """Return whether a prompt with these parameters draws tokens at random and brings no seed."""
    return params.seed is None and not params.greedy


def same_prompt(one: str, other: str) -> bool:
    """Return whether two digests are of the same prompt, perhaps with other parameters."""
    return one[:_PROMPT_DIGITS] == other[:_PROMPT_DIGITS]


def _hash(value: object) -> str:
    text = json.dumps(value, sort_keys=True, default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _plain(value: object) -> object:
    """Return `value` as something that JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return dict(value) if isinstance(value, Mapping) else str(value)


def parse_line(index: int, where: str, line: object) -> JobEntry:
    """Return the entry of a line in our format.

    The line is a JSON object with `prompt`, `prompt_token_ids` or `messages`, and perhaps `sampling_params` and
    `cache_salt`. Other keys are ignored, except that `custom_id` and `id` are kept for the output.

    Raises:
        RequestError: the line has no prompt, several, or a value of the wrong type.
    """
    if not isinstance(line, dict):
        raise RequestError(f"a line must be a JSON object with {_or(_KINDS)}, not {type(line).__name__}")
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
        prompt=None if "messages" in given else parse_prompt(given[0], line[given[0]]),
        messages=parse_messages(line["messages"]) if "messages" in given else None,
        sampling=sampling or {},
        ids=find_ids(line),
        cache_salt=line.get("cache_salt"),
    )


def refused_entry(index: int, where: str, line: object, why: str) -> JobEntry:
    """Return the entry of a line that is JSON but can't be used. It keeps the ids of the line for its answer."""
    return JobEntry(index, where, error=why, ids=find_ids(line) if isinstance(line, dict) else {})


def parse_prompt(kind: str, value: object) -> Prompt:
    """Return the value of `prompt` or `prompt_token_ids` as a prompt.

    Raises:
        RequestError: `prompt` is not a text, or `prompt_token_ids` is not a list.
    """
    if kind == "prompt":
        if not isinstance(value, str):
            why = f"`prompt` must be a string, got {_short(value)}; token ids go into `prompt_token_ids`"
            raise RequestError(why, "prompt")
        return value
    if not isinstance(value, list):
        raise RequestError(f"`prompt_token_ids` must be a list of integers, got {_short(value)}", "prompt_token_ids")
    return {"prompt_token_ids": value}


def parse_messages(value: object) -> list[Message]:
    """Return the value of `messages`.

    Raises:
        RequestError: it is not a list of objects.
    """
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        why = f"`messages` must be a list of objects with `role` and `content`, got {_short(value)}"
        raise RequestError(why, "messages")
    return value


def find_ids(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: line[name] for name in _IDS if isinstance(line.get(name), str | int)}


def _or(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:-1]) + f" or `{names[-1]}`"


def _has(line: Mapping[str, Any]) -> str:
    return f", only {_short(', '.join(map(str, line)))}" if line else ""


def _short(value: object, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
