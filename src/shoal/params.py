"""What a user passes in: prompts, and how tokens are chosen. Free of torch."""

import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from shoal.errors import RequestError
from shoal.values import shown, whole_number


class PromptDict(TypedDict, total=False):
    """Either of the first two. Only prompts with the same `cache_salt` share cached prefixes."""

    prompt: str
    prompt_token_ids: Sequence[int]
    cache_salt: str


Prompt = str | PromptDict
Message = Mapping[str, Any]  # of a chat: `role`, `content`, and whatever else the model's template reads


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What an output must look like; exactly one of them, and `strict` beside a schema.

    Raises:
        RequestError: none or several are given, or one has the wrong type. Whether it can be obeyed is found out with
            the model's tokenizer, when the request is made.
    """

    json: str | Mapping[str, Any] | None = None  # a JSON schema
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None  # Lark, in the dialect of llguidance
    json_object: bool | None = None  # True: any JSON object
    strict: bool = False  # refuse a JSON schema with a keyword that can't be obeyed; otherwise it goes without that

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
                raise _structured_error(name, f"must be a text, got {shown(value)}")
        if self.json is not None and not isinstance(self.json, str | Mapping):
            raise _structured_error("json", f"must be a JSON schema, got {shown(self.json)}")
        if self.choice is not None:
            object.__setattr__(self, "choice", _texts("structured_outputs", self.choice, "structured_outputs.choice"))
        if self.json_object is not None and not isinstance(self.json_object, bool):
            raise _structured_error("json_object", f"must be true or false, got {shown(self.json_object)}")
        if not isinstance(self.strict, bool):
            raise _structured_error("strict", f"must be true or false, got {shown(self.strict)}")


_LARGEST = sys.float_info.max


@dataclass(frozen=True, slots=True)
class _Range:
    """What a number may be. `also` are values outside of it with a meaning of their own."""

    low: float = -math.inf
    high: float = math.inf
    integer: bool = False
    above_low: bool = False  # the low end itself is not in it
    also: tuple[int, ...] = ()
    note: str = ""

    def read(self, name: str, value: object, subject: str | None = None) -> float:
        """The value in the range's own type: as an integer, 10^30 fits into a float and into no message.

        Args:
            subject: what the value is called in an error, if it is a part of the parameter `name`.

        Raises:
            RequestError: it is outside of the range, or no number.
        """
        kind = "an integer" if self.integer else "a finite number"
        wanted = int if self.integer else int | float
        # An integer may be larger than every finite number, and too long to be printed.
        if isinstance(value, bool) or not isinstance(value, wanted) or not (self.integer or abs(value) <= _LARGEST):
            raise RequestError.about(name, f"must be {kind} {self}, got {shown(value)}", subject=subject)
        inside = (value > self.low if self.above_low else value >= self.low) and value <= self.high
        if not inside and value not in self.also:
            raise RequestError.about(name, f"must be {self}, got {shown(value)}", subject=subject)
        return value if self.integer else float(value)

    def __str__(self) -> str:
        if math.isfinite(self.high):
            text = f"in {'(' if self.above_low else '['}{self.low:g}, {self.high:g}]"
        elif math.isfinite(self.low):
            text = f"above {self.low:g}" if self.above_low else f"at least {self.low:g}"
        else:
            text = "of any size"
        return text + (f", {self.note}" if self.note else "")


_RANGES = {
    "n": _Range(1, 1 << 14, integer=True),
    "temperature": _Range(0, note="where 0 is greedy"),
    "top_p": _Range(0, 1, above_low=True, note="where 1 keeps every token"),
    "top_k": _Range(1, integer=True, also=(0, -1), note="or 0 or -1 for all tokens"),
    "min_p": _Range(0, 1, note="where 0 keeps every token"),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
    "repetition_penalty": _Range(0, above_low=True, note="where 1 changes nothing"),
    "seed": _Range(integer=True, note="or -1 or None for the engine's own"),
    "max_tokens": _Range(1, integer=True, note="or None for as many as the model's length allows"),
    "min_tokens": _Range(0, integer=True),
    "logprobs": _Range(0, integer=True, also=(-1,), note="or -1 for the whole vocabulary"),
    "prompt_logprobs": _Range(0, integer=True, also=(-1,), note="or -1 for the whole vocabulary"),
    "truncate_prompt_tokens": _Range(1, integer=True, also=(-1,), note="or -1 for as many as the model takes"),
}
_OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens"}
_SWITCHES = ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output")
_LARGEST_BIAS = 100.0
_TOKEN_IDS = 1 << 31  # no vocabulary is larger


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and what to report. Names and meanings follow vLLM.

    Logits are changed in this order: the structured output's mask, `allowed_token_ids`, `bad_words` and `min_tokens`,
    `logit_bias`, the penalties; then temperature, `min_p`, `top_k` and `top_p`. Reported log-probabilities are those of
    the model, before all of it.

    Raises:
        RequestError: a value is out of its range or has the wrong type; the message names the parameter and the range.
    """

    n: int = 1  # outputs for each prompt
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest one
    presence_penalty: float = 0.0  # taken from the logit of each token that the output has
    frequency_penalty: float = 0.0  # ... as often as it has it
    repetition_penalty: float = (
        1.0  # divides the positive logits of tokens in prompt or output, multiplies negative ones
    )
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0  # before so many, nothing ends the output
    ignore_eos: bool = False
    stop: str | Sequence[str] | None = None  # texts that end the output
    stop_token_ids: Sequence[int] | None = ()
    bad_words: Sequence[str] | None = ()  # texts that must not be said
    logprobs: int | None = None  # how many of the likeliest tokens to report beside the chosen one
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None  # token id -> what is added to its logit, within [-100, 100]
    allowed_token_ids: Sequence[int] | None = None  # no others are drawn
    structured_outputs: StructuredOutputsParams | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True  # leave them out of the text
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None  # a longer prompt is cut to its last so many tokens

    def __post_init__(self) -> None:
        for name, allowed in _RANGES.items():
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                self._set(name, allowed.read(name, value))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise RequestError.about(name, f"must be true or false, got {shown(getattr(self, name))}")
        self._set("seed", None if self.seed == -1 else self.seed)
        self._set("stop", _texts("stop", [self.stop] if isinstance(self.stop, str) else self.stop))
        self._set("bad_words", _texts("bad_words", self.bad_words))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise RequestError.about("allowed_token_ids", "must hold at least one id, or be None for all")
        if self.logit_bias is not None:
            self._set("logit_bias", _bias(self.logit_bias))
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
        if self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise RequestError.about(
                "structured_outputs", f"must be StructuredOutputsParams, got {shown(self.structured_outputs)}"
            )

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], defaults: "SamplingParams | None" = None) -> "SamplingParams":
        """As JSON has them: `structured_outputs` as an object, the keys of `logit_bias` as texts.

        Raises:
            RequestError: an unknown name, the nearest known one being named, or whatever the values themselves raise.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        _check_names(values, known, "sampling parameter")
        given = dict(values)
        structured = given.get("structured_outputs")
        if isinstance(structured, Mapping):
            names = {f.name for f in dataclasses.fields(StructuredOutputsParams)}
            _check_names(structured, names, "kind of structured_outputs", "structured_outputs")
            given["structured_outputs"] = StructuredOutputsParams(**structured)
        return dataclasses.replace(defaults or cls(), **given)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """Beam search: the likeliest continuations, not drawn ones. Names follow vLLM.

    Raises:
        RequestError: a value is out of its range.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0  # scales the logits that beams are scored by; 0 as 1
    length_penalty: float = 1.0  # a beam's score is its log-probability over its length to this power, within [-50, 50]

    def __post_init__(self) -> None:
        ranges = {
            "beam_width": _Range(1, 1024, integer=True),
            "max_tokens": _Range(1, integer=True),
            "temperature": _RANGES["temperature"],
            "length_penalty": _Range(-50, 50),  # lengths of a million to this power are numbers
        }
        for name, allowed in ranges.items():
            object.__setattr__(self, name, allowed.read(name, getattr(self, name)))
        if not isinstance(self.ignore_eos, bool):
            raise RequestError.about("ignore_eos", f"must be true or false, got {shown(self.ignore_eos)}")


def _check_names(values: object, known: set[str], what: str, param: str | None = None) -> None:
    """Refuse names that are not known. `param`: what they are parts of; None: each is a parameter itself."""
    if not isinstance(values, Mapping):
        raise RequestError(f"{what}s must be an object of names and values, got {shown(values)}", param)
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise RequestError(f"unknown {what} {shown(name)}; {hint}", param or str(name))


def _structured_error(kind: str, problem: str) -> RequestError:
    return RequestError.about("structured_outputs", problem, subject=f"structured_outputs.{kind}")


def _texts(name: str, values: object, subject: str | None = None) -> tuple[str, ...]:
    """Each once, in the order given."""
    if values is None:
        return ()
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise RequestError.about(name, f"must be a list of texts, got {shown(values)}", subject=subject)
    for value in values:
        if not isinstance(value, str) or not value:
            why = f"must be a list of texts that are not empty, got {shown(value)}"
            raise RequestError.about(name, why, subject=subject)
    return tuple(dict.fromkeys(values))


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _TOKEN_IDS


def _token_ids(name: str, values: object) -> tuple[int, ...]:
    """Each once, in the order given."""
    if values is None:
        return ()
    if isinstance(values, str | bytes) or not isinstance(values, Sequence):
        raise RequestError.about(name, f"must be a list of token ids, got {shown(values)}")
    for value in values:
        if not _is_token_id(value):
            raise RequestError.about(name, f"must be a list of token ids, integers in [0, 2^31), got {shown(value)}")
    return tuple(dict.fromkeys(values))


def _bias(values: object) -> dict[int, float]:
    if not isinstance(values, Mapping):
        raise RequestError.about("logit_bias", f"must map token ids to numbers, got {shown(values)}")
    found: dict[int, float] = {}
    for key, value in values.items():
        token = whole_number(key, canonical=True) if isinstance(key, str) else key
        if not _is_token_id(token):
            raise RequestError.about(
                "logit_bias", f"must map token ids, integers in [0, 2^31), to numbers, got the key {shown(key)}"
            )
        assert isinstance(token, int)
        found[token] = _Range(-_LARGEST_BIAS, _LARGEST_BIAS).read("logit_bias", value, f"logit_bias of token {token}")
    return found
