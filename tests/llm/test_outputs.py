"""Outputs of a prompt, made from an engine's updates."""

from collections.abc import Sequence
from typing import Any

import pytest

from shoal.llm.outputs import Completion, PromptOutputs, describe_logprobs
from shoal.outputs import CompletionOutput, Logprob
from shoal.params import SamplingParams
from shoal.text.prompts import Job
from shoal.wire.engine import Finish, SeqUpdate
from shoal.wire.ranks import PromptLogprobs, TokenLogprobs
from support.letters import Letters

EOS = 2
STOP, LENGTH, ABORT = Finish.STOP, Finish.LENGTH, Finish.ABORT


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def update(tokens: Sequence[int], finish: Finish | None = None, **other: Any) -> SeqUpdate:
    return SeqUpdate(1, tuple(tokens), finish=finish, **other)


def job(params: SamplingParams, prompt: str = "p") -> Job:
    return Job(4, prompt, ids(prompt), params)


def completion(*, letters: bool = True, **params: Any) -> Completion:
    given = SamplingParams(max_tokens=100, **params)
    stop_ids = {*(given.stop_token_ids or ()), EOS}
    return Completion(job(given), 0, Letters() if letters else None, stop_ids)


def result(completion: Completion, *updates: SeqUpdate) -> CompletionOutput:
    for each in updates:
        assert not completion.take(each), "the output ended before its last update"
    return completion.output()


def entry(chosen: float, rank: int = 1, ids: tuple[int, ...] = (), values: tuple[float, ...] = ()) -> TokenLogprobs:
    return TokenLogprobs(chosen, rank, ids, values)


def test_the_text_is_decoded_from_the_tokens() -> None:
    found = result(completion(), update(ids("ab")), update(ids("c"), LENGTH))
    assert found == CompletionOutput(0, "abc", ids("abc"), "length")


@pytest.mark.parametrize(
    ("params", "last", "text", "reason"),
    [
        ({}, EOS, "ab", None),
        ({"include_stop_str_in_output": True}, EOS, "ab", None),
        ({"skip_special_tokens": False}, EOS, "ab", None),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, EOS, "ab<2>", None),
        ({"stop_token_ids": [ord("x")]}, ord("x"), "ab", ord("x")),
        ({"stop_token_ids": [ord("x"), EOS]}, EOS, "ab", EOS),
        ({"stop_token_ids": [ord("x")], "include_stop_str_in_output": True}, ord("x"), "abx", ord("x")),
    ],
)
def test_the_token_that_ends_an_output_is_not_in_its_text(
    params: dict[str, Any], last: int, text: str, reason: int | None
) -> None:
    found = result(completion(**params), update(ids("ab")), update((last,), STOP))
    assert (found.text, found.stop_reason, found.finish_reason) == (text, reason, "stop")
    assert found.token_ids == (*ids("ab"), last)


def test_a_stop_token_that_did_not_end_the_output_is_in_its_text() -> None:
    """The engine goes on after a stop token before min_tokens, and at the maximum length there is no stop."""
    found = result(completion(stop_token_ids=[ord("x")]), update(ids("axb")), update(ids("c"), LENGTH))
    assert (found.text, found.stop_reason) == ("axbc", None)


def test_an_end_without_a_stop_token_hides_no_token() -> None:
    """A complete grammar ends an output after its last token, which belongs to the text."""
    found = result(completion(), update(ids("{}"), STOP))
    assert (found.text, found.finish_reason, found.stop_reason) == ("{}", "stop", None)


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_text_cuts_tokens_and_logprobs(include: bool) -> None:
    of = completion(stop=["cd", "zz"], include_stop_str_in_output=include, logprobs=0)
    assert not of.take(update(ids("abc"), logprobs=(entry(-1.0), entry(-2.0), entry(-3.0))))
    assert of.take(update(ids("def"), logprobs=(entry(-4.0), entry(-5.0), entry(-6.0))))
    found = of.output()
    assert found.text == ("abcd" if include else "ab")
    assert found.token_ids == ids("abcd")
    assert (found.finish_reason, found.stop_reason) == ("stop", "cd")
    assert found.logprobs is not None
    assert [list(each) for each in found.logprobs] == [[token] for token in ids("abcd")]
    assert found.cumulative_logprob == -10.0


@pytest.mark.parametrize("finish", [STOP, LENGTH, ABORT])
def test_a_stop_text_in_the_last_update_is_the_finish_reason(finish: Finish) -> None:
    of = completion(stop="b")
    assert of.take(update((*ids("abc"), EOS), finish))
    found = of.output()
    assert (found.text, found.token_ids, found.finish_reason, found.stop_reason) == ("a", ids("ab"), "stop", "b")


def test_a_stop_text_does_not_count_before_min_tokens() -> None:
    of = completion(stop="b", min_tokens=3)
    assert not of.take(update(ids("abab")[:3]))
    assert of.take(update(ids("b")))
    assert of.output().text == "aba"


def test_outputs_have_no_text_without_a_tokenizer_or_on_request() -> None:
    for of in (completion(detokenize=False), completion(letters=False)):
        found = result(of, update(ids("ab")), update((EOS,), STOP))
        assert (found.text, found.token_ids, found.finish_reason) == ("", (*ids("ab"), EOS), "stop")


def test_an_output_that_never_ended_counts_as_aborted() -> None:
    found = completion().output()
    assert (found.text, found.token_ids, found.finish_reason) == ("", (), "abort")


def test_logprobs_are_returned_only_on_request() -> None:
    found = result(completion(), update(ids("a"), LENGTH))
    assert (found.logprobs, found.cumulative_logprob) == (None, None)


def test_logprobs_name_the_chosen_and_the_likeliest_tokens() -> None:
    found = describe_logprobs(Letters(), ord("c"), entry(-3.0, 7, ids("ab"), (-0.5, -1.5)))
    assert found == {ord("c"): Logprob(-3.0, 7, "c"), ord("a"): Logprob(-0.5, 1, "a"), ord("b"): Logprob(-1.5, 2, "b")}
    assert next(iter(found)) == ord("c")


def test_the_chosen_token_appears_once_with_its_own_rank() -> None:
    """Equally likely tokens have the same rank, because a rank counts only the tokens that are likelier."""
    found = describe_logprobs(None, 5, entry(-1.0, 1, (4, 5), (-1.0, -1.0)))
    assert found == {5: Logprob(-1.0, 1), 4: Logprob(-1.0, 1)}


# --- all outputs of a prompt --------------------------------------------------------------------------------------


def prompt_outputs(prompt: str = "pqr", count: int = 1, **params: Any) -> PromptOutputs:
    given = SamplingParams(max_tokens=100, **params)
    of = job(given, prompt)
    return PromptOutputs(of, [Completion(of, i, Letters(), {EOS}) for i in range(count)], count)


def test_outputs_of_a_prompt_are_in_order() -> None:
    of = prompt_outputs(count=2, n=2)
    assert not of.take(1, update(ids("b"), LENGTH, cached_tokens=7))
    assert not of.take(0, update(ids("a"), LENGTH, cached_tokens=2))
    found = of.output()
    assert [(each.index, each.text) for each in found.outputs] == [(0, "a"), (1, "b")]
    assert (found.request_id, found.prompt, found.prompt_token_ids) == ("4", "pqr", ids("pqr"))
    assert found.num_cached_tokens == 2, "the cached tokens of the first output, as later outputs reuse its blocks"
    assert (found.error, found.prompt_logprobs) == (None, None)


def test_cached_tokens_are_known_after_a_stop_text() -> None:
    of = prompt_outputs(stop="b")
    assert of.take(0, update(ids("ab"), cached_tokens=3))
    assert of.output().num_cached_tokens == 3


def test_the_first_error_is_reported() -> None:
    of = prompt_outputs(count=2, n=2)
    of.take(0, update((), ABORT, error="first"))
    of.take(1, update((), ABORT, error="second"))
    found = of.output()
    assert found.error == "first"
    assert [each.finish_reason for each in found.outputs] == ["abort", "abort"]


def test_prompt_logprobs_of_several_chunks_are_put_together() -> None:
    """A chunk may come twice, because a preempted request starts again."""
    of = prompt_outputs(prompt_logprobs=1)
    entries = [entry(-1.0, 2, ids("x"), (-0.1,)), entry(-2.0, 3, ids("y"), (-0.2,))]
    of.take(0, update((), prompt_logprobs=PromptLogprobs(1, tuple(entries[:1]))))
    of.take(0, update((), prompt_logprobs=PromptLogprobs(1, tuple(entries[:1]))))
    of.take(0, update(ids("a"), LENGTH, prompt_logprobs=PromptLogprobs(2, tuple(entries[1:]))))
    found = of.output()
    assert found.prompt_logprobs == (
        None,
        {ord("q"): Logprob(-1.0, 2, "q"), ord("x"): Logprob(-0.1, 1, "x")},
        {ord("r"): Logprob(-2.0, 3, "r"), ord("y"): Logprob(-0.2, 1, "y")},
    )


def test_missing_prompt_logprobs_are_none() -> None:
    of = prompt_outputs(prompt_logprobs=0)
    of.take(0, update((), ABORT))
    assert of.output().prompt_logprobs == (None, None, None)
