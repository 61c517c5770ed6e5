"""Grammars in real processes: hostile ones end alone, and whoever is killed is replaced."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from llguidance import LLMatcher

from shoal.launch.hub import BUNDLED
from shoal.structured.limits import DEFAULT_LIMITS, GrammarLimits
from shoal.structured.pool import GrammarPool
from shoal.text.grammar_host import grammar_pool
from shoal.wire.grammars import GrammarAsk, Verdict
from support.processes import children

EOS = (1,)
SIZE = 640
A, B = 70, 71
DEADLINE_S = 60.0
PLAIN = LLMatcher.grammar_from_regex("ab*")

of_schema: Callable[[str], str] = LLMatcher.grammar_from_json_schema


class Asked:
    """A pool, and the verdicts that have come by sequence."""

    def __init__(self, limits: GrammarLimits = DEFAULT_LIMITS, folder: Path = BUNDLED) -> None:
        self.pool: GrammarPool = grammar_pool(folder, EOS, SIZE, limits=limits)
        self.came: dict[int, Verdict] = {}

    def wait_for(self, *seqs: int) -> list[Verdict]:
        deadline = time.monotonic() + DEADLINE_S
        while not set(seqs) <= set(self.came):
            assert time.monotonic() < deadline, "no verdict came"
            self.came |= {verdict.seq: verdict for verdict in self.pool.poll(0.1)}
        return [self.came.pop(seq) for seq in seqs]

    def verdict(self, seq: int, grammar: str) -> Verdict:
        self.pool.follow(seq, grammar)
        [found] = self.wait_for(seq)
        return found

    def settle(self, gone: int) -> None:
        """Until a process has ended that this pool has started."""
        deadline = time.monotonic() + DEADLINE_S
        while gone in self.processes():
            assert time.monotonic() < deadline, f"process {gone} goes on"
            self.pool.poll(0.05)

    def processes(self) -> list[int]:
        """The host and its children."""
        found = [pid for pid in children(os.getpid()) if b"grammar_host" in command(pid)]
        return found + [pid for host in found for pid in children(host)]

    def at_most(self, count: int) -> None:
        """No more processes follow grammars, once those that were told to end have done so."""
        deadline = time.monotonic() + DEADLINE_S
        while len(self.grammars()) > count:
            assert time.monotonic() < deadline, self.grammars()
            self.pool.poll(0.01)

    def grammars(self) -> list[int]:
        return [pid for pid in self.processes() if pid not in children(os.getpid())]


def command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.fixture
def asked() -> Iterator[Asked]:
    asked = Asked()
    yield asked
    asked.pool.close()
    assert asked.processes() == []


def chain(rules: int) -> str:
    return "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(rules)) + f'r{rules}: "x"\n'


def references(count: int) -> str:
    defs = ",".join(f'"a{i}":{{"$ref":"#/$defs/a{i + 1}"}}' for i in range(count))
    return f'{{"$ref":"#/$defs/a0","$defs":{{{defs},"a{count}":{{"type":"integer"}}}}}}'


HOSTILE = {
    "a number that ends the library": of_schema('{"const":-9223372036854775808}'),
    "a bound that does": of_schema('{"type":"integer","minimum":-9223372036854775808}'),
    "a long chain of rules": LLMatcher.grammar_from_lark(chain(5000)),
    "a long chain of references": of_schema(references(5000)),
    "a number that never ends": of_schema('{"type":"integer","multipleOf":9999991}'),
    "one that is too large": LLMatcher.grammar_from_regex("a" * (1 << 20)),
}


def test_a_hostile_grammar_ends_alone() -> None:
    """All at once, beside an output whose verdicts go on coming."""
    asked = Asked(replace(DEFAULT_LIMITS, compile_cpu_s=1))
    try:
        asked.verdict(1, PLAIN)
        for seq, grammar in enumerate(HOSTILE.values(), 100):
            asked.pool.follow(seq, grammar)
        asked.pool.ask([GrammarAsk(1, (A,))])
        [found] = asked.wait_for(1)
        assert (found.refused, found.problem, found.behind) == ("", "", 1)
        for verdict in asked.wait_for(*range(100, 100 + len(HOSTILE))):
            assert verdict.refused.startswith("structured_outputs ")
            assert "\n" not in verdict.refused
        asked.pool.ask([GrammarAsk(1, (B, EOS[0]), masked=False)])
        [found] = asked.wait_for(1)
        assert (found.refused, found.ended, found.behind) == ("", (True,), 3)
    finally:
        asked.pool.close()


def test_what_is_known_to_be_hostile_takes_nothing(asked: Asked) -> None:
    first = asked.verdict(1, HOSTILE["a number that ends the library"])
    before = asked.processes()
    assert asked.verdict(2, HOSTILE["a number that ends the library"]).refused == first.refused
    assert asked.processes() == before


@pytest.mark.parametrize(
    ("limits", "grammar", "reason"),
    [
        (replace(DEFAULT_LIMITS, compile_cpu_s=1), HOSTILE["a number that never ends"], "more than 1 s of processor"),
        (replace(DEFAULT_LIMITS, compile_s=0.3), HOSTILE["a number that never ends"], "more than 0.3 s to compile"),
        (replace(DEFAULT_LIMITS, memory_mib=64), of_schema('{"type":"integer","multipleOf":1000003}'), "64 MiB of mem"),
    ],
)
def test_each_limit_is_kept_and_told(limits: GrammarLimits, grammar: str, reason: str) -> None:
    asked = Asked(limits)
    try:
        assert reason in asked.verdict(1, grammar).refused
        assert asked.verdict(2, PLAIN).refused == ""
    finally:
        asked.pool.close()


def test_outputs_of_a_grammar_share_its_process(asked: Asked) -> None:
    for seq in range(5):
        assert asked.verdict(seq, PLAIN).masks == asked.verdict(seq + 10, PLAIN).masks
    assert len(asked.grammars()) == 1


def test_a_compilation_that_nobody_waits_for_ends(asked: Asked) -> None:
    asked.verdict(1, PLAIN)
    known = asked.grammars()
    asked.pool.follow(2, HOSTILE["a number that never ends"])
    deadline = time.monotonic() + DEADLINE_S
    while len(asked.grammars()) == len(known):
        assert time.monotonic() < deadline
        asked.pool.poll(0.01)
    [compiling] = set(asked.grammars()) - set(known)
    asked.pool.forget([2])
    asked.settle(compiling)
    assert asked.grammars() == known
    assert not asked.pool.pending


def test_grammars_wait_for_their_turn() -> None:
    asked = Asked(replace(DEFAULT_LIMITS, compiling=1, live=2, idle=1))
    try:
        grammars = [LLMatcher.grammar_from_regex(f"a{{{i}}}") for i in range(1, 7)]
        for seq, grammar in enumerate(grammars):
            asked.pool.follow(seq, grammar)
        for seq in range(len(grammars)):  # a new one starts when an old one is not needed any more
            [found] = asked.wait_for(seq)
            assert found.refused == ""
            asked.at_most(2)
            asked.pool.forget([seq])
    finally:
        asked.pool.close()


def test_who_follows_an_output_may_be_killed(asked: Asked) -> None:
    asked.verdict(1, PLAIN)
    [pid] = asked.grammars()
    os.kill(pid, signal.SIGKILL)
    [found] = asked.wait_for(1)
    assert (found.lost, found.refused) == ("its process was ended by signal 9", "")
    asked.pool.follow(1, PLAIN, (A, B))
    [again] = asked.wait_for(1)
    assert (again.lost, again.behind, again.ended) == ("", 2, (False,))


def test_the_host_may_be_killed(asked: Asked) -> None:
    asked.verdict(1, PLAIN)
    [host] = set(asked.processes()) - set(asked.grammars())
    os.kill(host, signal.SIGKILL)
    [found] = asked.wait_for(1)
    assert "killed by SIGKILL" in found.lost
    assert asked.verdict(2, PLAIN).refused == ""


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_model_without_a_tokenizer_refuses_all(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    asked = Asked(folder=tmp_path)
    try:
        assert "tokenizer" in asked.verdict(1, PLAIN).refused
    finally:
        asked.pool.close()


def test_an_output_that_its_grammar_does_not_allow_is_refused(asked: Asked) -> None:
    asked.pool.follow(1, PLAIN, (A, A))
    [found] = asked.wait_for(1)
    assert f"token {A} was drawn" in found.refused


def test_drafts_have_verdicts_of_their_own(asked: Asked) -> None:
    asked.verdict(1, LLMatcher.grammar_from_regex("ab"))
    asked.pool.ask([GrammarAsk(1, (), drafts=(A, B, A))])
    [found] = asked.wait_for(1)
    assert found.drafts == (A, B)
    assert found.ended == (False, False, True)
    assert len(found.masks) == 3 * asked.pool.words * 4


def test_processes_may_use_all_cores_whatever_thread_starts_them() -> None:
    """That of an engine may be bound to one, on which a rank computes."""
    cores = os.sched_getaffinity(0)
    pool = grammar_pool(BUNDLED, EOS, SIZE, sorted(cores))
    try:
        with ThreadPoolExecutor(1, initializer=lambda: os.sched_setaffinity(0, {min(cores)})) as bound:
            bound.submit(pool.follow, 1, PLAIN).result()
            deadline = time.monotonic() + DEADLINE_S
            while not pool.poll(0.1):
                assert time.monotonic() < deadline
        found = [pid for pid in children(os.getpid()) if b"grammar_host" in command(pid)]
        assert [os.sched_getaffinity(pid) for pid in found] == [cores]
    finally:
        pool.close()
