"""Processes that make the same calls, over real connections on the loopback: one leads, the others follow."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shoal.addresses import Address
from shoal.errors import ConfigError, EngineError, QueueFull, RankFailed, ReplicasFailed, RequestError
from shoal.launch.followed_engine import FollowedEngine
from shoal.launch.followers import Followers, NoFollowers
from shoal.launch.shared_calls import Call
from shoal.llm.lazy_sequence import LazySequence
from shoal.outputs import (
    BeamSearchOutput,
    BeamSearchSequence,
    CompletionOutput,
    Logprob,
    RequestOutput,
)
from shoal.params import SamplingParams
from shoal.transport.rendezvous import Door, Rendezvous
from shoal.wire.calls import FOLLOWERS_DOOR
from shoal.wire.credentials import NO_CREDENTIALS
from shoal.wire.engine import EngineStats

AGREEMENT = {"wire version": "7"}
STATS = EngineStats(*range(17))


class Group:
    """A process that leads, and any number of followers."""

    def __init__(self, size: int = 2, door: Door | None = None) -> None:
        self.size = size
        self.leader = Followers(size, AGREEMENT)
        self.rendezvous = Rendezvous(doors={FOLLOWERS_DOOR: door or self.leader})
        self.followers: list[FollowedEngine] = []

    def follow(self, rank: int = 1, size: int | None = None, agreement: dict[str, str] = AGREEMENT) -> FollowedEngine:
        found = FollowedEngine(
            Address.parse(self.rendezvous.address),
            NO_CREDENTIALS,
            rank=rank,
            size=size or self.size,
            agreement=agreement,
            timeout=30,
        )
        self.followers.append(found)
        return found

    def start(self) -> list[FollowedEngine]:
        """Start all followers, and tell them that the engine is ready."""
        with ThreadPoolExecutor(self.size) as pool:
            coming = [pool.submit(self.follow, rank) for rank in range(1, self.size)]
            self.leader.await_all(30)
            self.leader.tell_ready(STATS)
            return [each.result(30) for each in coming]

    def close(self) -> None:
        for each in self.followers:
            each.close()
        self.leader.close()
        self.rendezvous.close()


@pytest.fixture
def group() -> Iterator[Group]:
    found = Group()
    yield found
    found.close()


def generate(prompts: Any = ("a", "b"), **params: Any) -> Call:
    return Call("generate", {"prompts": prompts, "sampling_params": SamplingParams(**params)})


def _returning(result: Any) -> Callable[[], Any]:
    return lambda: result


def never() -> Any:
    raise AssertionError("a follower computes nothing")


OUTPUT = RequestOutput(
    "0",
    "a",
    (5, 6),
    (CompletionOutput(0, "text", (7,), "length", -1.5, [{7: Logprob(-1.5, 1, "t", b"t")}], text_offsets=(0,)),),
    prompt_logprobs=[None, {6: Logprob(-0.5)}],
)


def test_all_followers_get_the_results_of_the_leader() -> None:
    group = Group(3)
    try:
        followers = group.start()
        assert [each.stats() for each in followers] == [STATS, STATS]
        beams = [BeamSearchOutput((BeamSearchSequence((1, 2), "x", -0.5, "stop"),))]
        for result in ([OUTPUT, OUTPUT], [], beams, None):
            assert group.leader.make(generate(), _returning(result)) == result
            assert [each.make(generate(), never) for each in followers] == [result, result]
    finally:
        group.close()


def test_log_probabilities_that_are_made_when_they_are_read(group: Group) -> None:
    logprobs = LazySequence(2, lambda place: {place: Logprob(-1.0)})
    output = RequestOutput("0", None, (1,), (CompletionOutput(0, "", (2,), "stop", logprobs=logprobs),))
    (follower,) = group.start()
    group.leader.make(generate(), lambda: [output])
    (found,) = follower.make(generate(), never)
    assert found.outputs[0].logprobs == [{0: Logprob(-1.0)}, {1: Logprob(-1.0)}]


def test_results_wait_for_a_follower_that_is_late(group: Group) -> None:
    (follower,) = group.start()
    for i in range(3):
        group.leader.make(generate([str(i)]), _returning([OUTPUT] * i))
    assert [len(follower.make(generate([str(i)]), never)) for i in range(3)] == [0, 1, 2]


def _raise(error: BaseException) -> Callable[[], Any]:
    def run() -> Any:
        raise error

    return run


@pytest.mark.parametrize(
    "error",
    [
        RequestError("top_k must be ...", "top_k", "a code"),
        RankFailed("rank 1 died"),
        QueueFull("full"),
        ConfigError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_of_the_leader_are_raised_by_the_followers(group: Group, error: Exception) -> None:
    (follower,) = group.start()
    with pytest.raises(type(error)):
        group.leader.make(generate(), _raise(error))
    with pytest.raises(type(error)) as caught:
        follower.make(generate(), never)
    assert str(caught.value) == str(error)
    assert [getattr(caught.value, name, None) for name in ("param", "code")] == [
        getattr(error, name, None) for name in ("param", "code")
    ]


def test_outputs_that_had_finished_before_a_failure(group: Group) -> None:
    error = ReplicasFailed("all are gone")
    error.outputs = {3: OUTPUT}
    (follower,) = group.start()
    with pytest.raises(ReplicasFailed):
        group.leader.make(generate(), _raise(error))
    with pytest.raises(ReplicasFailed) as caught:
        follower.make(generate(), never)
    assert caught.value.outputs == {3: OUTPUT}


def test_an_interrupt_of_the_leader_reaches_the_followers(group: Group) -> None:
    (follower,) = group.start()
    with pytest.raises(KeyboardInterrupt):
        group.leader.make(generate(), _raise(KeyboardInterrupt()))
    with pytest.raises(EngineError, match="rank 0 was interrupted by KeyboardInterrupt"):
        follower.make(generate(), never)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            Call("chat", {"messages": [{}]}),
            "call 1 of rank 1 is chat with 1 message, but that of rank 0 is generate with 2 prompts: all processes "
            "must make the same calls in the same order",
        ),
        (generate(["a"]), "is generate with 1 prompt, but that of rank 0 is generate with 2 prompts: "),
        (generate(["a", "c"]), "but that of rank 0 is generate with 2 prompts with other arguments: "),
        (generate(top_k=5), "but that of rank 0 is generate with 2 prompts with other arguments: "),
    ],
    ids=["name", "number", "prompts", "parameters"],
)
def test_other_calls_than_those_of_the_leader(group: Group, other: Call, message: str) -> None:
    (follower,) = group.start()
    group.leader.make(generate(), lambda: [OUTPUT])
    with pytest.raises(ConfigError) as caught:
        follower.make(other, never)
    assert message in str(caught.value)


def test_a_call_that_the_leader_never_makes(group: Group) -> None:
    (follower,) = group.start()
    group.leader.close()
    with pytest.raises(EngineError, match=r"rank 1, call 1 \(generate with 2 prompts\): rank 0 has ended, or has"):
        follower.make(generate(), never)


def test_the_leader_goes_on_without_a_follower_that_has_ended(group: Group) -> None:
    (follower,) = group.start()
    follower.close()
    for _ in range(3):
        assert group.leader.make(generate(), lambda: [OUTPUT]) == [OUTPUT]


def test_followers_learn_why_there_is_no_engine(group: Group) -> None:
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(group.follow)
        group.leader.await_all(30)
        group.leader.dismiss(ConfigError("the model is too large"))
        with pytest.raises(ConfigError, match=r"^the model is too large$"):
            coming.result(30)


def test_a_follower_that_does_not_come(group: Group) -> None:
    with pytest.raises(ConfigError, match=r"rank 1 of 2 has not come within 0.1 s: every process of the program must"):
        group.leader.await_all(0.1)


@pytest.mark.parametrize(
    ("rank", "size", "agreement", "message"),
    [
        (2, 2, AGREEMENT, "has no follower 2 of 2, but 1 to 1"),
        (1, 3, AGREEMENT, "has no follower 1 of 3, but 1 to 1"),
        (1, 2, {"wire version": "8"}, r"its wire version is 8, that of rank 0 \(.*\) is 7"),
    ],
    ids=["rank", "size", "agreement"],
)
def test_a_follower_that_does_not_fit(
    group: Group, rank: int, size: int, agreement: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        group.follow(rank, size, agreement)


def test_two_followers_with_one_number(group: Group) -> None:
    group.start()
    with pytest.raises(ConfigError, match="rank 1 is here already"):
        group.follow()


def test_a_command_has_no_followers() -> None:
    group = Group(door=NoFollowers())
    try:
        with pytest.raises(ConfigError, match="a command of Shoal leads there, not a program with an LLM"):
            group.follow()
    finally:
        group.close()
