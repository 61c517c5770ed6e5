"""Checking grammars before a request is sent."""

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest
from llguidance import LLMatcher

from shoal.errors import ClosedError, RequestError
from shoal.launch.hub import BUNDLED
from shoal.params import SamplingParams
from shoal.structured.pool import GrammarPool
from shoal.text.grammar_checker import GrammarChecker
from shoal.text.grammar_host import grammar_pool
from shoal.text.prompts import Job

PLAIN = LLMatcher.grammar_from_regex("ab*")
WRONG = LLMatcher.grammar_from_regex("[a")
ENDLESS = LLMatcher.grammar_from_json_schema('{"type":"integer","multipleOf":9999991}')
DEADLINE_S = 60.0


def make_pool() -> GrammarPool:
    return grammar_pool(BUNDLED, (1,), 640)


@pytest.fixture
def checker() -> Iterator[GrammarChecker]:
    checker = GrammarChecker(make_pool)
    yield checker
    checker.close()


@pytest.mark.slow
def test_a_valid_grammar_passes_and_an_invalid_one_is_refused(checker: GrammarChecker) -> None:
    checker.check(PLAIN)
    with pytest.raises(RequestError, match="unclosed character class"):
        checker.check(WRONG)


def test_no_process_is_started_before_the_first_grammar() -> None:
    def never() -> GrammarPool:
        raise AssertionError

    GrammarChecker(never).close()


@pytest.mark.slow
def test_a_slow_grammar_does_not_delay_others(checker: GrammarChecker) -> None:
    endless = checker.submit(ENDLESS)
    for count in range(20):
        checker.check(LLMatcher.grammar_from_regex(f"a{{{count}}}b"))
    assert not endless.done()
    assert endless.cancel()
    checker.check(PLAIN)


@pytest.mark.slow
def test_several_threads_may_check_grammars(checker: GrammarChecker) -> None:
    wrong: list[int] = []

    def ask(number: int) -> None:
        checker.check(LLMatcher.grammar_from_regex(f"a{{{number % 5}}}c"))
        try:
            checker.check(WRONG)
        except RequestError:
            wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert sorted(wrong) == list(range(20))


@pytest.mark.slow
def test_an_error_names_the_first_prompt_with_an_invalid_grammar(checker: GrammarChecker) -> None:
    jobs = [Job(i, "x", (1,), SamplingParams(), grammar=text) for i, text in enumerate(["", PLAIN, WRONG, WRONG])]
    with pytest.raises(RequestError, match="prompt 2: structured_outputs"):
        checker.check_jobs(jobs)
    checker.check_jobs(jobs[:2])


@pytest.mark.slow
def test_waiting_calls_end_with_an_error_when_the_checker_is_closed(checker: GrammarChecker) -> None:
    waiting, cancelled = checker.submit(ENDLESS), checker.submit(ENDLESS)
    cancelled.cancel()
    checker.close()
    with pytest.raises(ClosedError):
        waiting.result(DEADLINE_S)
    with pytest.raises(CancelledError):
        cancelled.result(0)
    with pytest.raises(ClosedError):
        checker.check(PLAIN)
