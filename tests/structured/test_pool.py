"""Grammars in real processes: a hostile grammar affects no other, and a killed process is replaced."""

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

from shoal.errors import UNPROCESSABLE
from shoal.launch.hub import BUNDLED
from shoal.structured.limits import DEFAULT_LIMITS, GrammarLimits
from shoal.structured.pool import GrammarPool
from shoal.text.grammar_host import grammar_pool
from shoal.wire.grammars import GrammarAsk, Verdict
from support.processes import children

pytestmark = pytest.mark.slow

EOS = (1,)
SIZE = 640
A, B = 70, 71
DEADLINE_S = 60.0
PLAIN = LLMatcher.grammar_from_regex("ab*")

of_schema: Callable[[str], str] = LLMatcher.grammar_from_json_schema


class PoolClient:
    """A pool and its verdicts by sequence."""

    def __init__(self, limits: GrammarLimits = DEFAULT_LIMITS, folder: Path = BUNDLED) -> None:
        self.pool: GrammarPool = grammar_pool(folder, EOS, SIZE, limits=limits)
        self.verdicts: dict[int, Verdict] = {}

    def wait_for(self, *seqs: int) -> list[Verdict]:
        deadline = time.monotonic() + DEADLINE_S
        while not set(seqs) <= set(self.verdicts):
            assert time.monotonic() < deadline, f"no verdict has come within {DEADLINE_S:g} s"
            self.poll(0.1)
        return [self.verdicts.pop(seq) for seq in seqs]

    def poll(self, seconds: float) -> None:
        """Let the pool work. The verdicts that come meanwhile are kept for `wait_for`."""
        self.verdicts |= {verdict.seq: verdict for verdict in self.pool.poll(seconds)}

    def verdict(self, seq: int, grammar: str) -> Verdict:
        self.pool.follow(seq, grammar)
        [found] = self.wait_for(seq)
        return found

    def wait_for_end(self, pid: int) -> None:
        """Wait until a process that this pool started has ended."""
        deadline = time.monotonic() + DEADLINE_S
        while pid in self.processes():
            assert time.monotonic() < deadline, f"process {pid} is still running"
            self.poll(0.05)

    def processes(self) -> list[int]:
        """Return the process ids of the host and its children."""
        found = [pid for pid in children(os.getpid()) if b"grammar_host" in command(pid)]
        return found + [pid for host in found for pid in children(host)]

    def wait_for_at_most(self, count: int) -> None:
        """Wait until at most `count` grammar processes are left. The others need a moment to end."""
        deadline = time.monotonic() + DEADLINE_S
        while len(self.grammar_processes()) > count:
            assert time.monotonic() < deadline, self.grammar_processes()
            self.poll(0.01)

    def grammar_processes(self) -> list[int]:
        return [pid for pid in self.processes() if pid not in children(os.getpid())]


def command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.fixture
def client() -> Iterator[PoolClient]:
    client = PoolClient()
    yield client
    client.pool.close()
    assert client.processes() == []


def chain(rules: int) -> str:
    return "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(rules)) + f'r{rules}: "x"\n'


def references(count: int) -> str:
    defs = ",".join(f'"a{i}":{{"$ref":"#/$defs/a{i + 1}"}}' for i in range(count))
    return f'{{"$ref":"#/$defs/a0","$defs":{{{defs},"a{count}":{{"type":"integer"}}}}}}'


HOSTILE = {
    "a constant that crashes the library": of_schema('{"const":-9223372036854775808}'),
    "a bound that crashes the library": of_schema('{"type":"integer","minimum":-9223372036854775808}'),
    "a long chain of rules": LLMatcher.grammar_from_lark(chain(5000)),
    "a long chain of references": of_schema(references(5000)),
    "a schema that compiles forever": of_schema('{"type":"integer","multipleOf":9999991}'),
    "too large": LLMatcher.grammar_from_regex("a" * (1 << 20)),
}


def refusal(verdict: Verdict) -> str:
    assert verdict.refusal is not None
    return verdict.refusal.message


def test_hostile_grammars_do_not_affect_another_output() -> None:
    """All hostile grammars come at once, and an output with a harmless grammar still gets its verdicts."""
    client = PoolClient(replace(DEFAULT_LIMITS, compile_cpu_s=1))
    try:
        client.verdict(1, PLAIN)
        for seq, grammar in enumerate(HOSTILE.values(), 100):
            client.pool.follow(seq, grammar)
        client.pool.ask([GrammarAsk(1, (A,))])
        [found] = client.wait_for(1)
        assert (found.refusal, found.problem, found.num_tokens) == (None, "", 1)
        for verdict in client.wait_for(*range(100, 100 + len(HOSTILE))):
            assert verdict.refusal is not None
            assert (verdict.refusal.param, verdict.refusal.code) == ("structured_outputs", UNPROCESSABLE)
            assert verdict.refusal.message.startswith("structured_outputs ")
            assert "\n" not in verdict.refusal.message
        client.pool.ask([GrammarAsk(1, (B, EOS[0]), masked=False)])
        [found] = client.wait_for(1)
        assert (found.refusal, found.ended, found.num_tokens) == (None, (True,), 3)
    finally:
        client.pool.close()


def test_a_grammar_that_was_refused_before_starts_no_process(client: PoolClient) -> None:
    first = client.verdict(1, HOSTILE["a constant that crashes the library"])
    before = client.processes()
    assert client.verdict(2, HOSTILE["a constant that crashes the library"]).refusal == first.refusal
    assert client.processes() == before


@pytest.mark.parametrize(
    ("limits", "grammar", "reason"),
    [
        (
            replace(DEFAULT_LIMITS, compile_cpu_s=1),
            HOSTILE["a schema that compiles forever"],
            "more than 1 s of processor",
        ),
        (
            replace(DEFAULT_LIMITS, compile_s=0.3),
            HOSTILE["a schema that compiles forever"],
            "more than 0.3 s to compile",
        ),
        (replace(DEFAULT_LIMITS, memory_mib=64), of_schema('{"type":"integer","multipleOf":1000003}'), "64 MiB of mem"),
    ],
)
def test_each_limit_is_enforced_and_named_in_the_reason(limits: GrammarLimits, grammar: str, reason: str) -> None:
    client = PoolClient(limits)
    try:
        assert reason in refusal(client.verdict(1, grammar))
        assert client.verdict(2, PLAIN).refusal is None
    finally:
        client.pool.close()


def test_outputs_with_the_same_grammar_share_a_process(client: PoolClient) -> None:
    for seq in range(5):
        assert client.verdict(seq, PLAIN).masks == client.verdict(seq + 10, PLAIN).masks
    assert len(client.grammar_processes()) == 1


def test_a_compilation_without_waiting_outputs_is_stopped(client: PoolClient) -> None:
    client.verdict(1, PLAIN)
    known = client.grammar_processes()
    client.pool.follow(2, HOSTILE["a schema that compiles forever"])
    deadline = time.monotonic() + DEADLINE_S
    while len(client.grammar_processes()) == len(known):
        assert time.monotonic() < deadline
        client.poll(0.01)
    [compiling] = set(client.grammar_processes()) - set(known)
    client.pool.forget([2])
    client.wait_for_end(compiling)
    assert client.grammar_processes() == known
    assert not client.pool.pending


def test_grammars_wait_while_the_maximum_of_processes_runs() -> None:
    client = PoolClient(replace(DEFAULT_LIMITS, compiling=1, live=2, idle=1))
    try:
        grammars = [LLMatcher.grammar_from_regex(f"a{{{i}}}") for i in range(1, 7)]
        for seq, grammar in enumerate(grammars):
            client.pool.follow(seq, grammar)
        for seq in range(len(grammars)):  # the next grammar gets a process when an earlier one is forgotten
            [found] = client.wait_for(seq)
            assert found.refusal is None
            client.wait_for_at_most(2)
            client.pool.forget([seq])
    finally:
        client.pool.close()


def test_an_output_can_be_followed_again_after_its_process_was_killed(client: PoolClient) -> None:
    client.verdict(1, PLAIN)
    [pid] = client.grammar_processes()
    os.kill(pid, signal.SIGKILL)
    [found] = client.wait_for(1)
    assert (found.lost, found.refusal) == ("its process was killed by signal 9", None)
    client.pool.follow(1, PLAIN, (A, B))
    [again] = client.wait_for(1)
    assert (again.lost, again.num_tokens, again.ended) == ("", 2, (False,))


def test_the_host_is_started_again_after_it_was_killed(client: PoolClient) -> None:
    client.verdict(1, PLAIN)
    [host] = set(client.processes()) - set(client.grammar_processes())
    os.kill(host, signal.SIGKILL)
    [found] = client.wait_for(1)
    assert "killed by SIGKILL" in found.lost
    assert client.verdict(2, PLAIN).refusal is None


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_model_without_a_usable_tokenizer_refuses_every_grammar(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    client = PoolClient(folder=tmp_path)
    try:
        assert "tokenizer" in refusal(client.verdict(1, PLAIN))
    finally:
        client.pool.close()


def test_an_output_that_breaks_its_grammar_is_refused(client: PoolClient) -> None:
    client.pool.follow(1, PLAIN, (A, A))
    [found] = client.wait_for(1)
    assert f"token {A} was drawn" in refusal(found)


def test_a_verdict_covers_each_valid_draft(client: PoolClient) -> None:
    client.verdict(1, LLMatcher.grammar_from_regex("ab"))
    client.pool.ask([GrammarAsk(1, (), drafts=(A, B, A))])
    [found] = client.wait_for(1)
    assert found.drafts == (A, B)
    assert found.ended == (False, False, True)
    assert len(found.masks) == 3 * client.pool.words * 4


def test_grammar_processes_use_all_cores_even_if_a_bound_thread_starts_them() -> None:
    """The thread of an engine may be bound to the core on which a rank computes."""
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
