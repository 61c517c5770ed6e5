"""The bodies of requests, as the server's description shows them.

Fields that may have several forms are described here and read by whoever uses them, so that what is said of a wrong one
fits what was meant. Names and meanings are those of OpenAI's API reference and of vLLM's additions to it.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, WithJsonSchema

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


def _whole(value: Any) -> Any:
    """JSON's 5.0 is an integer too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_whole)]

RequestId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:+=@-]{1,128}$")]


def _at_most(count: int) -> BeforeValidator:
    """Refuses what is longer before any of it is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > count:
            raise ValueError(f"may have {count} entries, and has {len(value)}")
        return value

    return BeforeValidator(check)


_MOST_IDS = 1 << 20  # no vocabulary is larger
_MOST_TEXTS = 1 << 12  # or tools
_FIRST_ERROR = Field(fail_fast=True)
Ids = Annotated[list[Annotated[Integer, Field(ge=0)]], _FIRST_ERROR, _at_most(_MOST_IDS)]
Texts = Annotated[list[Annotated[str, Field(min_length=1)]], _FIRST_ERROR, _at_most(_MOST_TEXTS)]


def _biases(value: Any) -> Any:
    """The first wrong one alone: a message for each would be as many as there are."""
    if not isinstance(value, dict):
        return value
    for token, bias in value.items():
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"must map token ids to numbers in [-100, 100], got {shown(bias)} for {shown(token)}")
    return value


MOST_OUTPUTS = 2048  # of a request; making them takes the time of all others
MOST_REPLICAS = 1 << 31
_LEAST_INT64, _MOST_INT64 = -(1 << 63), (1 << 63) - 1


class Body(BaseModel):
    """Fields that are not described are taken, so that whoever reads the others can say which one it can't obey."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"additionalProperties": False})

    _size: int = PrivateAttr(default=0)

    def set_size(self, size: int) -> None:
        self._size = size

    @property
    def size(self) -> int:
        """The number of bytes of the body, and so a measure of the work with it."""
        return self._size

    def given(self) -> dict[str, Any]:
        """What the client wrote, as it wrote it."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(Body):
    """Sampling parameters that all endpoints take."""

    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Integer, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: Integer | None = None
    min_tokens: Annotated[Integer, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop: Stop = None
    stop_token_ids: Ids | None = None
    bad_words: Texts | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_biases), _at_most(_MOST_IDS)]
        | None
    ) = None
    allowed_token_ids: Annotated[Ids, Field(min_length=1)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: Object = None
    guided_json: Schema = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], _FIRST_ERROR] | None = None
    guided_grammar: str | None = None
    priority: Annotated[Integer, Field(ge=_LEAST_INT64, le=_MOST_INT64)] | None = None
    data_parallel_rank: Annotated[Integer, Field(ge=0, lt=MOST_REPLICAS)] | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    request_id: RequestId | None = None
    user: str | None = None  # this one, and those below, have no effect
    metadata: Anything = None
    store: Anything = None
    service_tier: Anything = None
    safety_identifier: Anything = None
    prompt_cache_key: Anything = None


class GenerationFields(SamplingFields):
    """... and that completions and chats share."""

    n: Annotated[Integer, Field(ge=1, le=MOST_OUTPUTS)] | None = None
    prompt_logprobs: Annotated[Integer, Field(ge=-1)] | None = None
    response_format: Object = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: Annotated[Integer, Field(ge=-1)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None


class CompletionBody(GenerationFields):
    prompt: Prompts
    max_tokens: Annotated[Integer, Field(ge=0)] | None = None
    logprobs: Annotated[Integer, Field(ge=-1)] | None = None
    echo: bool | None = None
    best_of: Annotated[Integer, Field(ge=1)] | None = None


class TemplateFields(Body):
    """What goes to the chat template."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: Object = None
    reasoning_effort: str | None = None


class ChatBody(GenerationFields, TemplateFields):
    messages: Messages
    max_tokens: Annotated[Integer, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Integer, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Integer, Field(ge=-1)] | None = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None


class ResponsesBody(SamplingFields):
    input: Annotated[Any, _any_of(_TEXT, _list_of(_OBJECT, minItems=1))]
    instructions: str | None = None
    max_output_tokens: Annotated[Integer, Field(ge=1)] | None = None
    text: Object = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[str, str], _at_most(_MOST_TEXTS)] | None = None
    truncation: str | None = None
    top_logprobs: Annotated[Integer, Field(ge=0)] | None = None
    include: Annotated[list[str], _at_most(_MOST_TEXTS)] | None = None
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


# --- answers, for the description ----------------------------------------------------------------------------------


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int] | None = None


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class CompletionAnswer(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatChoice(BaseModel):
    index: int
    message: dict[str, Any]
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatAnswer(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class ResponsesAnswer(BaseModel):
    id: str
    object: str
    created_at: float
    status: str
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class InputItems(BaseModel):
    object: str
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    id: str
    object: str
    deleted: bool


class Model(BaseModel):
    id: str
    object: str
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: str
    data: list[Model]


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    prompt: str
