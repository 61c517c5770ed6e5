"""The bodies of requests, with the schemas that the server's description shows.

Sampling parameters have their ranges and descriptions from `SAMPLING_TABLE`. A field that may have several forms is
only described here; the code that reads it checks it, and can say best what is wrong with it. The other names and
meanings are those of OpenAI's API reference and of vLLM's additions to it.
"""

import dataclasses
import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, WithJsonSchema

from shoal.parameter_forms import Biases, Number
from shoal.params import SAMPLING_TABLE
from shoal.values import shown

_INTEGER = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}
_OBJECT = {"type": "object"}
_NULL = {"type": "null"}
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "minLength": 1},
        "content": {
            "anyOf": [
                _TEXT,
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": _TEXT},
                        "required": ["type", "text"],
                    },
                },
                _NULL,
            ]
        },
        "tool_calls": {"type": "array", "items": _OBJECT},
        "tool_call_id": _TEXT,
    },
    "required": ["role"],
}


def _list_of(items: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


def _any_of(*forms: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(forms)})


# --- forms that are only described -----------------------------------------------------------------------------------

Prompts = Annotated[
    Any,
    _any_of(
        _TEXT,
        _list_of(_TEXT, minItems=1),
        _list_of(_INTEGER, minItems=1),
        _list_of(_list_of(_INTEGER, minItems=1), minItems=1),
    ),
]
Messages = Annotated[Any, WithJsonSchema(_list_of(_MESSAGE, minItems=1))]
Tools = Annotated[Any, _any_of(_list_of(_OBJECT), _NULL)]
ToolChoice = Annotated[Any, _any_of({"enum": ["none", "auto", "required"]}, _OBJECT, _NULL)]
Object = Annotated[Any, _any_of(_OBJECT, _NULL)]
Stop = Annotated[Any, _any_of(_TEXT, _list_of({"type": "string", "minLength": 1}), _NULL)]
Schema = Annotated[Any, _any_of(_OBJECT, _TEXT, _NULL)]
Anything = Annotated[Any, WithJsonSchema({})]

# --- forms that are checked ------------------------------------------------------------------------------------------


def _whole(value: Any) -> Any:
    """Return a number such as 5.0, which is an integer in JSON, as an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)  # behind the range: pydantic describes only a range that is next to its `int`
RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:+=@-]{1,128}$")]
FIRST_ERROR = Field(fail_fast=True)  # stop at the first error: a list may have as many as it has items


def _at_most(count: int) -> BeforeValidator:
    """Refuse a longer list or object before any of its items is checked."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > count:
            raise ValueError(f"may have {count} entries, and has {len(value)}")
        return value

    return BeforeValidator(check)


_MAX_IDS = 1 << 20  # more than any vocabulary has
_MAX_TEXTS = 1 << 12  # texts or tools
Ids = Annotated[list[Annotated[int, Field(ge=0), WHOLE]], FIRST_ERROR, _at_most(_MAX_IDS)]
Texts = Annotated[list[Annotated[str, Field(min_length=1)]], FIRST_ERROR, _at_most(_MAX_TEXTS)]


def limits(name: str, *, least: int | None = None, most: int | None = None) -> Any:
    """Return the range of a sampling parameter for pydantic.

    Args:
        least: another smallest value, where the endpoint gives it a meaning.
        most: a largest value of the endpoint.
    """
    form = SAMPLING_TABLE[name].form
    assert isinstance(form, Number)
    low = form.least if least is None else least
    high = form.high if most is None else most
    bounds: dict[str, Any] = {} if form.integer else {"allow_inf_nan": False}
    if math.isfinite(low):
        bounds["gt" if form.above_low else "ge"] = int(low) if form.integer else low
    if math.isfinite(high):
        bounds["le"] = int(high) if form.integer else high
    return Field(**bounds)


def described(name: str, *, most: int | None = None) -> Any:
    """Return the default of a sampling parameter's field, with the description of the parameter.

    Args:
        most: as for `limits`.
    """
    row = SAMPLING_TABLE[name]
    if most is not None:
        assert isinstance(row.form, Number)
        row = dataclasses.replace(row, form=dataclasses.replace(row.form, high=most))
    return Field(default=None, description=row.description)


def _bias_limits() -> Number:
    form = SAMPLING_TABLE["logit_bias"].form
    assert isinstance(form, Biases)
    return form.numbers


_BIAS = _bias_limits()


def _check_biases(value: Any) -> Any:
    """Refuse biases at the first wrong one: pydantic would make a message for each."""
    if not isinstance(value, dict):
        return value
    for token, bias in value.items():
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not _BIAS.low <= bias <= _BIAS.high:
            raise ValueError(f"must map token ids to numbers {_BIAS}, got {shown(bias)} for {shown(token)}")
    return value


LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=_BIAS.low, le=_BIAS.high)]], BeforeValidator(_check_biases), _at_most(_MAX_IDS)
]
MAX_OUTPUTS = 2048  # of a request; while they begin, other requests are delayed
MAX_REPLICAS = 1 << 31
_MIN_INT64, _MAX_INT64 = -(1 << 63), (1 << 63) - 1

# --- bodies ----------------------------------------------------------------------------------------------------------


class Body(BaseModel):
    """A body. Unknown fields are accepted here, so that the code that reads it can name what it does not support."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"additionalProperties": False})

    _size: int = PrivateAttr(default=0)

    def set_size(self, size: int) -> None:
        self._size = size

    @property
    def size(self) -> int:
        """The number of bytes of the body, and so a measure of the work with it."""
        return self._size

    def given(self) -> dict[str, Any]:
        """Return the fields that the client wrote."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(Body):
    """The fields of all requests that generate text."""

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, limits("temperature")] | None = described("temperature")
    top_p: Annotated[float, limits("top_p")] | None = described("top_p")
    top_k: Annotated[int, limits("top_k"), WHOLE] | None = described("top_k")
    min_p: Annotated[float, limits("min_p")] | None = described("min_p")
    presence_penalty: Annotated[float, limits("presence_penalty")] | None = described("presence_penalty")
    frequency_penalty: Annotated[float, limits("frequency_penalty")] | None = described("frequency_penalty")
    repetition_penalty: Annotated[float, limits("repetition_penalty")] | None = described("repetition_penalty")
    seed: Annotated[int, WHOLE] | None = described("seed")
    min_tokens: Annotated[int, limits("min_tokens"), WHOLE] | None = described("min_tokens")
    ignore_eos: bool | None = described("ignore_eos")
    stop: Stop = described("stop")
    stop_token_ids: Ids | None = described("stop_token_ids")
    bad_words: Texts | None = described("bad_words")
    logit_bias: LogitBias | None = described("logit_bias")
    allowed_token_ids: Annotated[Ids, Field(min_length=1)] | None = described("allowed_token_ids")
    skip_special_tokens: bool | None = described("skip_special_tokens")
    spaces_between_special_tokens: bool | None = described("spaces_between_special_tokens")
    include_stop_str_in_output: bool | None = described("include_stop_str_in_output")
    structured_outputs: Object = described("structured_outputs")
    guided_json: Schema = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], FIRST_ERROR] | None = None
    guided_grammar: str | None = None
    priority: Annotated[int, Field(ge=_MIN_INT64, le=_MAX_INT64), WHOLE] | None = None
    data_parallel_rank: Annotated[int, Field(ge=0, lt=MAX_REPLICAS), WHOLE] | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    request_id: RequestId | None = None
    user: str | None = None  # this field and those below have no effect
    metadata: Anything = None
    store: Anything = None
    service_tier: Anything = None
    safety_identifier: Anything = None
    prompt_cache_key: Anything = None


class GenerationFields(SamplingFields):
    """The fields that completions and chats share."""

    n: Annotated[int, limits("n", most=MAX_OUTPUTS), WHOLE] | None = described("n", most=MAX_OUTPUTS)
    prompt_logprobs: Annotated[int, limits("prompt_logprobs"), WHOLE] | None = described("prompt_logprobs")
    response_format: Object = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: Annotated[int, limits("truncate_prompt_tokens"), WHOLE] | None = described(
        "truncate_prompt_tokens"
    )
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None


class CompletionBody(GenerationFields):
    prompt: Prompts
    max_tokens: Annotated[int, limits("max_tokens", least=0), WHOLE] | None = described("max_tokens")
    logprobs: Annotated[int, limits("logprobs"), WHOLE] | None = described("logprobs")
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1), WHOLE] | None = None


class TemplateFields(Body):
    """The fields that are for the chat template."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: Object = None
    reasoning_effort: str | None = None


class ChatBody(GenerationFields, TemplateFields):
    messages: Messages
    max_tokens: Annotated[int, limits("max_tokens"), WHOLE] | None = described("max_tokens")
    max_completion_tokens: Annotated[int, limits("max_tokens"), WHOLE] | None = described("max_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, limits("logprobs"), WHOLE] | None = described("logprobs")
    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None


class ResponsesBody(SamplingFields):
    input: Annotated[Any, _any_of(_TEXT, _list_of(_OBJECT, minItems=1))]
    instructions: str | None = None
    max_output_tokens: Annotated[int, limits("max_tokens"), WHOLE] | None = described("max_tokens")
    text: Object = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, str], _at_most(_MAX_TEXTS)] | None = None
    truncation: str | None = None
    top_logprobs: Annotated[int, limits("logprobs", least=0), WHOLE] | None = described("logprobs")
    include: Annotated[list[str], _at_most(_MAX_TEXTS)] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    reasoning: Object = None


class TokenizeBody(TemplateFields):
    """A `prompt`, or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Any, _any_of(_list_of(_MESSAGE, minItems=1), _NULL)] = None
    tools: Tools = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Ids
