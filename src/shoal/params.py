"""The arguments that users pass in: prompts, and parameters of sampling. Free of torch."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from shoal.errors import RequestError
from shoal.parameter_forms import AnyObject, Biases, Number, Switch, Texts, TokenIds, UnsupportedParameter
from shoal.sampling_table import NOT_RESPONSES, SamplingParameter, parameter, table_of
from shoal.values import shown


class PromptDict(TypedDict, total=False):
    """A prompt: either of the first two. Only prompts with the same `cache_salt` share cached prefixes."""

    prompt: str
    prompt_token_ids: Sequence[int]
    cache_salt: str


Prompt = str | PromptDict
Message = Mapping[str, Any]  # of a chat: `role`, `content`, and whatever else the chat template reads


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form that an output must have: exactly one of these fields, and `strict` beside a JSON schema.

    Raises:
        RequestError: none or several are given, or one has the wrong type. Whether it can be obeyed is found out with
            the model's tokenizer, when the request is made.
    """

    json: str | Mapping[str, Any] | None = None  # a JSON schema
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None  # Lark, in the dialect of llguidance
    json_object: bool | None = None  # True: any JSON object
    strict: bool = False  # True: refuse a JSON schema with a keyword that can't be obeyed; False: ignore the keyword

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "strict"}
        given = [name for name, value in values.items() if value is not None and value is not False]
        if len(given) != 1:
            raise RequestError.about(
                "structured_outputs", f"takes exactly one of {', '.join(values)}, got {', '.join(given) or 'none'}"
            )
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise _structured_error(name, f"must be a string, got {shown(value)}")
        if self.json is not None and not isinstance(self.json, str | Mapping):
            raise _structured_error("json", f"must be a JSON schema, got {shown(self.json)}")
        if self.choice is not None:
            texts = Texts().read("structured_outputs", self.choice, "structured_outputs.choice")
            object.__setattr__(self, "choice", texts)
        if self.json_object is not None and not isinstance(self.json_object, bool):
            raise _structured_error("json_object", f"must be true or false, got {shown(self.json_object)}")
        if not isinstance(self.strict, bool):
            raise _structured_error("strict", f"must be true or false, got {shown(self.strict)}")


def _structured_error(kind: str, problem: str) -> RequestError:
    return RequestError.about("structured_outputs", problem, subject=f"structured_outputs.{kind}")


@dataclass(frozen=True, slots=True)
class _StructuredOutputs:
    """The form of `structured_outputs`."""

    def read(self, name: str, value: object) -> StructuredOutputsParams | None:
        if value is not None and not isinstance(value, StructuredOutputsParams):
            raise RequestError.about(name, f"must be StructuredOutputsParams, got {shown(value)}")
        return value

    def __str__(self) -> str:
        return "an object with one of json, regex, choice, grammar and json_object"


_COUNT_OR_ALL = Number(0, integer=True, also=(-1,), optional=True, note="or -1 for the whole vocabulary")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The parameters by which tokens are chosen and reported. Names and meanings follow vLLM.

    Logits are changed in this order: the structured output's mask, `allowed_token_ids`, `bad_words` and `min_tokens`,
    `logit_bias`, the penalties; then temperature, `min_p`, `top_k` and `top_p`. Reported log-probabilities are those of
    the model, before all of it.

    Raises:
        RequestError: a value is out of its range or has the wrong type; the message names the parameter and the range.
    """

    n: int = parameter(1, Number(1, 1 << 14, integer=True), "number of outputs for each prompt", http=NOT_RESPONSES)
    temperature: float = parameter(
        1.0,
        Number(0, note="where 0 is greedy"),
        "divide the logits by this before a token is drawn: a higher value gives more varied text",
    )
    top_p: float = parameter(
        1.0,
        Number(0, 1, above_low=True, note="where 1 keeps every token"),
        "draw only from the likeliest tokens that together have this probability",
    )
    top_k: int = parameter(
        0,
        Number(1, integer=True, also=(0, -1), note="or 0 or -1 for all tokens"),
        "draw only from this many of the likeliest tokens",
    )
    min_p: float = parameter(
        0.0,
        Number(0, 1, note="where 0 keeps every token"),
        "never draw a token with less than this share of the likeliest token's probability",
    )
    presence_penalty: float = parameter(
        0.0, Number(-2, 2), "subtract this from the logit of each token that the output already has"
    )
    frequency_penalty: float = parameter(
        0.0, Number(-2, 2), "subtract this from the logit of each token, times the number of times the output has it"
    )
    repetition_penalty: float = parameter(
        1.0,
        Number(0, above_low=True, note="where 1 changes nothing"),
        "divide the positive logits of tokens of the prompt and the output by this, and multiply the negative ones",
    )
    seed: int | None = parameter(
        None,
        Number(integer=True, optional=True, note="or -1 or None for one that the engine chooses"),
        "seed of the draws: the same seed gives the same text",
        flag="sample-seed",  # --seed is the engine's
    )
    max_tokens: int | None = parameter(
        16,
        Number(1, integer=True, optional=True, note="or None for as many as the model's length allows"),
        "most tokens that an output may have",
        http={"completions": "max_tokens", "chat": "max_completion_tokens", "responses": "max_output_tokens"},
    )
    min_tokens: int = parameter(0, Number(0, integer=True), "an output with fewer tokens than this is not ended")
    ignore_eos: bool = parameter(False, Switch(), "continue after an end-of-text token")
    stop: str | Sequence[str] | None = parameter(None, Texts(single=True), "texts that end the output")
    stop_token_ids: Sequence[int] | None = parameter((), TokenIds(), "tokens that end the output")
    bad_words: Sequence[str] | None = parameter((), Texts(), "texts that the output must not contain")
    logprobs: int | None = parameter(
        None,
        _COUNT_OR_ALL,
        "report the log-probability of each token, and those of this many of the likeliest tokens in its place",
        http={"completions": "logprobs", "chat": "top_logprobs", "responses": "top_logprobs"},
    )
    prompt_logprobs: int | None = parameter(
        None,
        _COUNT_OR_ALL,
        "report the log-probability of each token of the prompt, and those of this many of the likeliest tokens in its "
        "place",
        http=NOT_RESPONSES,
    )
    logit_bias: Mapping[int, float] | None = parameter(
        None, Biases(Number(-100, 100)), "numbers to add to the logits of some tokens"
    )
    allowed_token_ids: Sequence[int] | None = parameter(
        None, TokenIds(optional=True), "draw no other tokens than these"
    )
    structured_outputs: StructuredOutputsParams | None = parameter(  # noqa: RUF009 - this is a field
        None, _StructuredOutputs(), "what the output must look like"
    )
    detokenize: bool = parameter(True, Switch(), "turn the tokens of the output into text", http=())
    skip_special_tokens: bool = parameter(True, Switch(), "leave special tokens out of the text")
    spaces_between_special_tokens: bool = parameter(
        True,
        Switch(),
        "keep the spaces that some tokenizers put between special tokens; of effect without skip_special_tokens",
    )
    include_stop_str_in_output: bool = parameter(
        False, Switch(), "keep the stop text that ended the output in its text"
    )
    truncate_prompt_tokens: int | None = parameter(
        None,
        Number(1, integer=True, also=(-1,), optional=True, note="or -1 for as many as the model takes"),
        "cut a longer prompt to this many of its last tokens",
        http=NOT_RESPONSES,
    )
    extra_args: Mapping[str, Any] | None = parameter(
        None,
        AnyObject(),
        "values of your own, kept with the parameters; Shoal itself reads none of them",
        flag=None,
        http=(),
    )
    logits_processors: None = parameter(
        None,
        UnsupportedParameter(
            "tokens are drawn in other processes, which do not run functions of the caller; use logit_bias, "
            "allowed_token_ids, bad_words, the penalties or structured_outputs"
        ),
        "functions that change logits",
        flag=None,
    )
    thinking_token_budget: None = parameter(
        None,
        UnsupportedParameter(
            "Shoal does not know where the reasoning of a model ends; limit the whole output with max_tokens, or ask "
            "the model for less by its chat template (reasoning_effort, chat_template_kwargs)"
        ),
        "most tokens of the model's reasoning",
        flag=None,
    )

    def __post_init__(self) -> None:
        for name, row in SAMPLING_TABLE.items():
            self._set(name, row.form.read(name, getattr(self, name)))
        if self.seed == -1:
            self._set("seed", None)
        self._check_together()

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            most = shown(self.max_tokens)
            raise RequestError.about("min_tokens", f"must be at most max_tokens, {most}, got {shown(self.min_tokens)}")
        if self.n > 1 and self.temperature == 0:
            why = f"must be 1 where temperature is 0, got {self.n}: greedy outputs are all the same"
            raise RequestError.about("n", why)
        if self.stop and not self.detokenize:
            raise RequestError.about("stop", "takes texts, which detokenize=False does not make: use stop_token_ids")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], defaults: "SamplingParams | None" = None) -> "SamplingParams":
        """Return the parameters that values from JSON give.

        `structured_outputs` is an object there, and the keys of `logit_bias` are texts.

        Args:
            defaults: the values of all other parameters.

        Raises:
            RequestError: a name is unknown, or a value is out of its range or has the wrong type.
        """
        _check_names(values, set(SAMPLING_TABLE), "sampling parameter")
        given = dict(values)
        structured = given.get("structured_outputs")
        if isinstance(structured, Mapping):
            names = {f.name for f in dataclasses.fields(StructuredOutputsParams)}
            _check_names(structured, names, "kind of structured_outputs", "structured_outputs")
            given["structured_outputs"] = StructuredOutputsParams(**structured)
        return dataclasses.replace(defaults or cls(), **given)


SAMPLING_TABLE: dict[str, SamplingParameter] = table_of(SamplingParams)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """Beam search: the likeliest continuations, not drawn ones. Names follow vLLM.

    Raises:
        RequestError: a value is out of its range.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0  # scales the logits that beams are scored by; 0 has the effect of 1
    length_penalty: float = 1.0  # a beam's score is its log-probability over its length to this power

    def __post_init__(self) -> None:
        forms = {
            "beam_width": Number(1, 1024, integer=True),
            "max_tokens": Number(1, integer=True),
            "ignore_eos": SAMPLING_TABLE["ignore_eos"].form,
            "temperature": SAMPLING_TABLE["temperature"].form,
            "length_penalty": Number(-50, 50),  # so that the power of a length of a million is a float
        }
        for name, form in forms.items():
            object.__setattr__(self, name, form.read(name, getattr(self, name)))


def _check_names(values: object, known: set[str], what: str, param: str | None = None) -> None:
    """Refuse names that are not known. `param`: what they are parts of; None: each is a parameter itself."""
    if not isinstance(values, Mapping):
        raise RequestError(f"{what}s must be an object of names and values, got {shown(values)}", param)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise RequestError(f"unknown {what} {shown(name)}; {hint}", param or str(name))
