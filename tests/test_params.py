"""What users pass in: values out of range or of the wrong type name themselves and their range."""

import dataclasses
import math
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import RequestError
from shoal.parameter_forms import Number
from shoal.params import SAMPLING_TABLE, BeamSearchParams, SamplingParams, StructuredOutputsParams
from shoal.values import decimal_number, whole_number
from support.fakes import steady

HUGE = 10**5000  # too long for Python to print, and larger than every float
NAN, INF = math.nan, math.inf
NO_NUMBERS: list[Any] = ["1", b"1", None, True, [], {}, (1,), 1j, object()]

# name -> what its error says of its range; values that are numbers and outside of it; some at its ends.
NUMBERS: dict[str, tuple[str, list[Any], list[Any]]] = {
    "n": ("in [1, 16384]", [0, -1, 16385, HUGE], [1]),
    "temperature": ("at least 0", [-0.1, -1, NAN, INF, -INF, HUGE, -HUGE], [0, 0.0, 1e300, 2]),
    "top_p": ("in (0, 1]", [0, -0.1, 1.1, NAN, INF, HUGE], [1, 1e-300]),
    "top_k": ("at least 1, or 0 or -1", [-2, -HUGE], [-1, 0, 1, HUGE]),
    "min_p": ("in [0, 1]", [-0.1, 1.1, NAN, HUGE], [0, 1]),
    "presence_penalty": ("in [-2, 2]", [-2.1, 2.1, NAN, INF, HUGE], [-2, 2]),
    "frequency_penalty": ("in [-2, 2]", [-2.1, 2.1, NAN, INF, HUGE], [-2, 2]),
    "repetition_penalty": ("above 0", [0, -1, NAN, INF, HUGE], [1e-300, 1e300]),
    "seed": ("of any size", [], [-1, 0, -(2**70), HUGE]),
    "max_tokens": ("at least 1", [0, -1], [1, HUGE]),
    "min_tokens": ("at least 0", [-1], [0, 16]),
    "logprobs": ("at least 0, or -1", [-2, -HUGE], [-1, 0, HUGE]),
    "prompt_logprobs": ("at least 0, or -1", [-2, -HUGE], [-1, 0, HUGE]),
    "truncate_prompt_tokens": ("at least 1, or -1", [-2, 0, -HUGE], [-1, 1, HUGE]),
}
INTEGERS = {
    *("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens"),
}
OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens"}
SWITCHES = [
    *("ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
    "include_stop_str_in_output",
]
UNSUPPORTED = ["logits_processors", "thinking_token_budget"]
LISTS = ["stop", "stop_token_ids", "bad_words", "logit_bias", "allowed_token_ids"]


def refuses(make: Callable[..., object], says: str, **values: Any) -> str:
    with pytest.raises(RequestError) as caught:
        make(**values)
    text = str(caught.value)
    assert says in text
    assert "\n" not in text
    assert len(text) < 600
    return text


def test_every_parameter_is_in_one_of_the_lists() -> None:
    names = {f.name for f in dataclasses.fields(SamplingParams)}
    assert names == {*NUMBERS, *SWITCHES, *LISTS, *UNSUPPORTED, "structured_outputs", "extra_args"}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_name_it(name: str) -> None:
    says, outside, inside = NUMBERS[name]
    wrong = [value for value in NO_NUMBERS if value is not None or name not in OPTIONAL]
    for value in outside + wrong + ([1.5, 1.0] if name in INTEGERS else []):
        text = refuses(SamplingParams, says, **{name: value})
        assert text.startswith(f"{name} must be ")
    for value in inside:
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", sorted(set(NUMBERS) - INTEGERS))
def test_whole_numbers_become_what_messages_can_carry(name: str) -> None:
    """msgpack knows integers of 64 bits only."""
    large = 10**300 if name in ("temperature", "repetition_penalty") else 1
    values: dict[str, Any] = {name: large}
    value = getattr(SamplingParams(**values), name)
    assert (type(value), value) == (float, float(large))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(value)) == value


def test_an_error_shows_the_value_as_far_as_it_is_short() -> None:
    assert refuses(SamplingParams, "", top_p=1.5).endswith("got 1.5")
    assert refuses(SamplingParams, "", top_p="x" * 10_000).endswith("x...")
    assert "too long to be shown" in refuses(SamplingParams, "", temperature=HUGE)


@pytest.mark.parametrize("name", sorted(OPTIONAL))
def test_none_stands_for_no_value(name: str) -> None:
    values: dict[str, Any] = {name: None}
    assert getattr(SamplingParams(**values), name) is None


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", [None, 0, 1, "true", []])
def test_switches_are_true_or_false(name: str, value: Any) -> None:
    refuses(SamplingParams, f"{name} must be true or false", **{name: value})


@pytest.mark.parametrize("name", ["stop", "bad_words"])
@pytest.mark.parametrize(
    "value",
    [0, False, 7, b"a", [b"a"], [1], [""], ["a", ""], [None], {"a"}, {"a": 1}, {}, object()],
    ids=lambda value: type(value).__name__,
)
def test_lists_of_texts(name: str, value: Any) -> None:
    refuses(SamplingParams, f"{name} must be a list of texts", **{name: value})


def test_a_bad_word_is_no_list_of_letters() -> None:
    refuses(SamplingParams, "bad_words must be a list of texts", bad_words="word")


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
@pytest.mark.parametrize(
    "value", [0, False, 7, "12", b"12", {1}, {1: 2}, ["1"], [1.0], [True], [None], [-1], [2**31], [HUGE]], ids=type
)
def test_lists_of_token_ids(name: str, value: Any) -> None:
    refuses(SamplingParams, f"{name} must be a list of token ids", **{name: value})


def test_allowed_token_ids_allow_something() -> None:
    refuses(SamplingParams, "allowed_token_ids must hold at least one id", allowed_token_ids=[])


@pytest.mark.parametrize(
    "value", [0, "1", [], [(1, 1.0)], {"a": 1}, {-1: 1}, {"-1": 1}, {True: 1}, {1.5: 1}, {HUGE: 1}]
)
def test_logit_bias_maps_token_ids(value: Any) -> None:
    refuses(SamplingParams, "logit_bias must map token ids", logit_bias=value)


@pytest.mark.parametrize("value", [100.1, -101, NAN, INF, "1", None, True, HUGE], ids=type)
def test_logit_bias_is_limited(value: Any) -> None:
    refuses(SamplingParams, "logit_bias of token 7 must be", logit_bias={7: value})


def test_lists_are_kept_in_one_form() -> None:
    bias: dict[Any, float] = {"5": 1, 6: -100}
    given = SamplingParams(
        stop="a", bad_words=["b", "c"], stop_token_ids=range(2), allowed_token_ids=[4], logit_bias=bias
    )
    assert given.stop == ("a",)
    assert given.bad_words == ("b", "c")
    assert given.stop_token_ids == (0, 1)
    assert given.allowed_token_ids == (4,)
    assert given.logit_bias == {5: 1.0, 6: -100.0}
    none = SamplingParams(stop=None, bad_words=None, stop_token_ids=None)
    assert (none.stop, none.bad_words, none.stop_token_ids) == ((), (), ())
    empty = SamplingParams(stop=[], bad_words=[], stop_token_ids=[], logit_bias={})
    assert (empty.stop, empty.bad_words, empty.stop_token_ids, empty.logit_bias) == ((), (), (), {})
    assert dataclasses.replace(given) == given


def test_values_of_ones_own_are_kept_as_they_are() -> None:
    given = {"tenant": "a", "weights": [1, 2]}
    params = SamplingParams(extra_args=given)
    assert params.extra_args == given
    assert params.extra_args is not given
    assert SamplingParams.from_dict({"extra_args": given}).extra_args == given
    wrong_ones: list[Any] = [[], "a", 5, {1: 2}]
    for wrong in wrong_ones:
        refuses(SamplingParams, "extra_args must be an object of names and values", extra_args=wrong)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_shoal_lacks_is_refused_with_a_way_out(name: str) -> None:
    for value in (len, [len], 5, 0, "x"):
        text = refuses(SamplingParams, f"{name} is not supported: ", **{name: value})
        assert "max_tokens" in text or "logit_bias" in text
    empty_ones: list[Any] = [None, [], ()]
    for empty in empty_ones:
        nothing: dict[str, Any] = {name: empty}
        assert SamplingParams(**nothing) == SamplingParams()


def test_every_row_says_what_the_parameter_does() -> None:
    for name, row in SAMPLING_TABLE.items():
        assert (row.name, row.default) == (name, SamplingParams.__dataclass_fields__[name].default)
        assert len(row.help) > 10
        assert row.help[0].islower()
        assert str(row.form) in row.description
    numbers = {name for name, row in SAMPLING_TABLE.items() if isinstance(row.form, Number)}
    assert numbers == set(NUMBERS)


def test_a_seed_of_minus_one_is_none() -> None:
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(seed=-2).seed == -2


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"min_tokens": 17}, "min_tokens must be at most max_tokens, 16, got 17"),
        ({"min_tokens": HUGE}, "min_tokens must be at most max_tokens, 16, got a number"),
        ({"n": 2, "temperature": 0}, "n must be 1 where temperature is 0, got 2"),
        ({"stop": "a", "detokenize": False}, "stop takes texts, which detokenize=False does not make"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs must be StructuredOutputsParams"),
    ],
)
def test_values_that_do_not_go_together(values: dict[str, Any], says: str) -> None:
    refuses(SamplingParams, says, **values)


def test_values_that_do() -> None:
    assert SamplingParams(min_tokens=16).min_tokens == 16
    assert SamplingParams(min_tokens=10**6, max_tokens=None).max_tokens is None
    assert SamplingParams(detokenize=False, stop=[]).stop == ()
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=0.1, n=3).greedy


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.just(10**400)
    | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2) | st.integers(), inner, max_size=2),
    max_leaves=4,
)


@steady
@given(st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(SamplingParams)]), anything, max_size=3))
def test_nothing_raises_anything_but_a_request_error(values: dict[str, Any]) -> None:
    for make in (SamplingParams, lambda **given: SamplingParams.from_dict(given)):
        try:
            make(**values)
        except RequestError:
            continue


# --- from JSON ---------------------------------------------------------------------------------------------------


def test_parameters_as_json_has_them() -> None:
    found = SamplingParams.from_dict(
        {"logit_bias": {"7": 2}, "stop": ["x"], "structured_outputs": {"choice": ["a", "b"]}, "max_tokens": None}
    )
    assert found.logit_bias == {7: 2.0}
    assert found.structured_outputs == StructuredOutputsParams(choice=("a", "b"))
    assert found.max_tokens is None


def test_what_is_not_named_is_as_in_the_defaults() -> None:
    base = SamplingParams(temperature=0.5, top_k=7, max_tokens=9)
    found = SamplingParams.from_dict({"top_k": 3}, base)
    assert found == dataclasses.replace(base, top_k=3)
    assert SamplingParams.from_dict({}, base) == base
    assert SamplingParams.from_dict({}) == SamplingParams()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temprature": 1}, "unknown sampling parameter 'temprature'; did you mean temperature?"),
        ({"zzz": 1}, "unknown sampling parameter 'zzz'; known are allowed_token_ids, bad_words, "),
        ({7: 1}, "unknown sampling parameter 7"),
        ({None: 1}, "unknown sampling parameter None"),
        ({"structured_outputs": {"chioce": ["a"]}}, "'chioce'; did you mean choice?"),
        ({"structured_outputs": {}}, "structured_outputs takes exactly one of"),
        ({"structured_outputs": [1]}, "structured_outputs must be StructuredOutputsParams, got [1]"),
        ({"n": 2.0}, "n must be an integer in [1, 16384]"),
        ({"min_tokens": 20}, "min_tokens must be at most max_tokens, 16"),
        (None, "sampling parameters must be an object"),
        ([["n", 1]], "sampling parameters must be an object"),
        ("n", "sampling parameters must be an object"),
    ],
)
def test_what_json_may_hold_by_mistake(values: Any, says: str) -> None:
    refuses(SamplingParams.from_dict, says, values=values)


# --- structured outputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [{"json": "{}"}, {"json": {}}, {"regex": "a"}, {"choice": ["a"]}, {"grammar": "start: A"}, {"json_object": True}],
)
def test_one_kind_of_output(values: dict[str, Any]) -> None:
    StructuredOutputsParams(**values)
    StructuredOutputsParams(**{"json_object": False, **values})
    other = {"regex": "b"} if "regex" not in values else {"grammar": "b"}
    refuses(StructuredOutputsParams, f"takes exactly one of {ALL_KINDS}, got ", **values, **other)


ALL_KINDS = "json, regex, choice, grammar, json_object"


def test_no_kind_of_output() -> None:
    refuses(StructuredOutputsParams, f"takes exactly one of {ALL_KINDS}, got none")
    refuses(StructuredOutputsParams, "got none", json_object=False)


NO_SCHEMAS: list[Any] = [0, 1, True, [], b"{}"]
NO_SWITCHES: list[Any] = [0, 1, "true", {}]
NO_CHOICES: list[Any] = [0, True, "abc", b"a", {"a"}, [1], [""], ["a", None]]
KINDS_OF_THE_WRONG_TYPE: list[tuple[str, Any, str]] = [
    *(("json", value, "must be a JSON schema") for value in NO_SCHEMAS),
    *(("regex", value, "must be a string") for value in (0, True, b"a", ["a"])),
    *(("grammar", value, "must be a string") for value in (0, True, b"a", ["a"])),
    *(("choice", value, "must be a list of texts") for value in NO_CHOICES),
    *(("json_object", value, "must be true or false") for value in NO_SWITCHES),
]


@pytest.mark.parametrize(("name", "value", "says"), KINDS_OF_THE_WRONG_TYPE)
def test_kinds_of_the_wrong_type(name: str, value: Any, says: str) -> None:
    refuses(StructuredOutputsParams, f"structured_outputs.{name} {says}", **{name: value})


def test_a_schema_may_be_any_mapping() -> None:
    schema: Mapping[str, Any] = types.MappingProxyType({"type": "object"})
    assert StructuredOutputsParams(json=schema).json == schema


# --- beam search -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("beam_width", [0, 1025, 1.5, "2", None, True, HUGE], "in [1, 1024]"),
        ("max_tokens", [0, -1, 1.5, "2", None, True], "at least 1"),
        ("temperature", [-0.1, NAN, INF, "1", None, True, HUGE], "at least 0"),
        ("length_penalty", [NAN, INF, 50.1, -51, "1", None, True, HUGE], "in [-50, 50]"),
        ("ignore_eos", [None, 0, "true"], "true or false"),
    ],
)
def test_beam_search(name: str, wrong: list[Any], says: str) -> None:
    for value in wrong:
        text = refuses(BeamSearchParams, says, **{"beam_width": 2, "max_tokens": 3, name: value})
        assert re.match(f"{name} must be ", text)


def test_numbers_of_beam_search_become_floats() -> None:
    found = BeamSearchParams(beam_width=2, max_tokens=3, temperature=10**300, length_penalty=2)
    assert (type(found.temperature), type(found.length_penalty)) == (float, float)
    assert (type(found.beam_width), type(found.max_tokens)) == (int, int)


@pytest.mark.parametrize("key", ["1_0", " 5", "5 ", "+5", "-5", "05", "-0", "1e1", "5.0", "٣", "", "nan", "9" * 5000])
def test_token_ids_that_only_python_reads_are_refused(key: str) -> None:
    with pytest.raises(RequestError, match="logit_bias must map token ids"):
        SamplingParams(logit_bias={key: 1.0})  # type: ignore[dict-item]
    assert SamplingParams(logit_bias={"50": 1.0, 7: 2}).logit_bias == {50: 1.0, 7: 2.0}  # type: ignore[dict-item]


@pytest.mark.parametrize("text", ["1_0", " 5", "5\n", "٣", "²", "1e1", "0x10", "nan", "inf", "", "9" * 5000, "--5"])
def test_texts_that_write_no_whole_number(text: str) -> None:
    assert whole_number(text) is None


@pytest.mark.parametrize(
    "text", ["1_0.5", " .5", "٣.5", "nan", "inf", "-Infinity", "1e999", "", ".", "1e", "e5", "0x1p4"]
)
def test_texts_that_write_no_number(text: str) -> None:
    assert decimal_number(text) is None


def test_texts_that_write_numbers() -> None:
    assert [whole_number(text) for text in ("0", "+5", "-12", "007")] == [0, 5, -12, 7]
    assert [whole_number(text, canonical=True) for text in ("0", "+5", "-12", "007")] == [0, None, -12, None]
    assert [decimal_number(text) for text in ("5", ".5", "5.", "-1e-3", "+2.5E2")] == [5.0, 0.5, 5.0, -0.001, 250.0]


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
def test_token_ids_are_kept_once_in_their_order(name: str) -> None:
    assert getattr(SamplingParams.from_dict({name: [7, 5, 7, 6, 5] * 1000}), name) == (7, 5, 6)


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_texts_are_kept_once_in_their_order(name: str) -> None:
    assert getattr(SamplingParams.from_dict({name: ["b", "a", "b"] * 1000}), name) == ("b", "a")
