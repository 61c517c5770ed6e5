"""The nodes that come to a leader, over real connections on the loopback."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from shoal.addresses import Address
from shoal.errors import ConfigError, EngineError
from shoal.launch.deployment import NodeGroup
from shoal.launch.node_pool import NodePool
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.connecting import connect, report_failure
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.base import encode
from shoal.wire.credentials import NO_CREDENTIALS
from shoal.wire.hosts import HostReport
from shoal.wire.nodes import Dismissal, EngineCall, LeaderToNode, leader_to_node
from shoal.wire.plan import ModelFiles
from shoal.wire.rendezvous import NODES_DOOR
from support.plans import facts

AGREEMENT = {"wire version": "7"}
REPORT = HostReport(facts(), ModelFiles("/model"), "/model", {})


class Meeting:
    """A leader's pool of two nodes besides itself, behind a rendezvous."""

    def __init__(self, spares: int = 0) -> None:
        self.nodes: list[Channel] = []
        group = NodeGroup(3, 0, 1, Address("127.0.0.1", 29501), NO_CREDENTIALS, spares=spares)
        self.pool = NodePool(group, AGREEMENT)
        self.rendezvous = Rendezvous(doors={NODES_DOOR: self.pool}, reopen_rooms=True)

    def come(self, rank: int, size: int = 3, agreement: dict[str, str] = AGREEMENT, timeout: float = 30) -> Channel:
        node = connect(
            Address.parse(self.rendezvous.address),
            NO_CREDENTIALS,
            room=NODES_DOOR,
            rank=rank,
            size=size,
            agreement=agreement,
            report=encode(REPORT),
            timeout=timeout,
        )
        self.nodes.append(node)
        return node


@pytest.fixture
def meeting(request: pytest.FixtureRequest) -> Iterator[Meeting]:
    """Yield a meeting. The parameter is the number of spare nodes."""
    found = Meeting(getattr(request, "param", 0))
    yield found
    found.pool.close()
    found.rendezvous.close()
    for node in found.nodes:
        node.close()


def receive(node: Channel) -> LeaderToNode:
    assert wait([node], 30)
    (frame,) = node.receive()
    return leader_to_node.decode(frame)


def test_the_leader_gathers_nodes_that_come_in_any_order(meeting: Meeting) -> None:
    with ThreadPoolExecutor(1) as pool:
        gathered = pool.submit(meeting.pool.gather, [1, 2], 30)
        meeting.come(2)
        meeting.come(1)
        found = gathered.result(30)
    assert [(number, node.address, node.report.files.folder) for number, node in found.items()] == [
        (1, "127.0.0.1", "/model"),
        (2, "127.0.0.1", "/model"),
    ]


def test_called_nodes_get_their_numbers_in_the_replica(meeting: Meeting) -> None:
    nodes = [meeting.come(1), meeting.come(2)]
    meeting.pool.gather([1, 2], 30)
    meeting.pool.call([0, 1, 2], 0, "10.0.0.1:4000", "start 7")
    calls = [receive(node) for node in nodes]
    assert [(call.address, call.number, call.size, call.start) for call in calls if isinstance(call, EngineCall)] == [
        ("10.0.0.1:4000", 1, 3, "start 7"),
        ("10.0.0.1:4000", 2, 3, "start 7"),
    ]


def test_a_node_that_ends_is_missed_and_another_may_take_its_place(meeting: Meeting) -> None:
    meeting.come(1).close()
    with pytest.raises(ConfigError, match=r"node 1 at 127.0.0.1:29501 did not come within 0.1 s: run the same"):
        meeting.pool.gather([1], 0.1)
    meeting.come(1)
    assert list(meeting.pool.gather([1], 30)) == [1]


@pytest.mark.parametrize(
    ("rank", "size", "message"),
    [
        (3, 4, "it expects 4 nodes, but node 0 .* expects 3: give all hosts the same --nnodes"),
        (1, 2, "it expects 2 nodes, but node 0 .* expects 3"),
        (0, 3, "awaits nodes 1 to 2: see --node-rank"),
        (3, 3, "awaits nodes 1 to 2: see --node-rank"),
    ],
)
def test_a_node_that_is_not_awaited_is_refused_and_ends_the_wait_of_the_leader(
    meeting: Meeting, rank: int, size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        meeting.come(rank, size)
    with pytest.raises(ConfigError, match=rf"node {rank} \(.*\) cannot join: .*{message}"):
        meeting.pool.gather([1, 2], 30)


def test_two_hosts_with_one_node_rank(meeting: Meeting) -> None:
    """The host of the first one answers, so its connection has not ended unnoticed."""
    with ThreadPoolExecutor(1) as pool:
        gathered = pool.submit(meeting.pool.gather, [1, 2], 600)
        meeting.come(1)
        why = r"node 1 \(.*\) is here already: give every host a --node-rank of its own"
        with pytest.raises(ConfigError, match=why):
            meeting.come(1, timeout=600)
        with pytest.raises(ConfigError, match=rf"node 1 \(.*\) cannot join: {why}"):
            gathered.result(30)


def test_a_node_that_differs_ends_the_wait_of_the_leader_before_all_were_there(meeting: Meeting) -> None:
    with ThreadPoolExecutor(1) as pool:
        gathered = pool.submit(meeting.pool.gather, [1, 2], 600)
        with pytest.raises(ConfigError, match=r"its wire version is 8, that of node 0 .* is 7"):
            meeting.come(1, agreement={"wire version": "8"})
        with pytest.raises(ConfigError, match=r"node 1 \(.*\) cannot join: its wire version is 8, that of node 0"):
            gathered.result(30)


def test_a_node_that_reports_why_it_cannot_join_ends_the_wait_of_the_leader(meeting: Meeting) -> None:
    where = Address.parse(meeting.rendezvous.address)
    with ThreadPoolExecutor(1) as pool:
        gathered = pool.submit(meeting.pool.gather, [1, 2], 600)
        meeting.come(1)
        assert report_failure(where, NO_CREDENTIALS, room=NODES_DOOR, rank=2, size=3, why="no model in /x", timeout=30)
        with pytest.raises(ConfigError, match=r"node 2 \(.*\) cannot join: no model in /x"):
            gathered.result(30)


def test_a_node_that_cannot_join_does_no_harm_once_all_were_there(meeting: Meeting) -> None:
    meeting.come(1)
    meeting.come(2).close()
    with pytest.raises(ConfigError, match="its wire version is 8"):
        meeting.come(2, agreement={"wire version": "8"})
    meeting.come(2)
    assert list(meeting.pool.gather([1, 2], 30)) == [1, 2]


def test_a_wait_can_be_cancelled(meeting: Meeting) -> None:
    cancelled = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        gathered = pool.submit(meeting.pool.gather, [1], 600, cancelled.is_set)
        cancelled.set()
        with pytest.raises(EngineError, match="cancelled"):
            gathered.result(30)


def test_dismissed_nodes_learn_the_reason(meeting: Meeting) -> None:
    node = meeting.come(1)
    meeting.pool.gather([1], 30)
    meeting.pool.dismiss("the model is too large", user_error=True)
    assert receive(node) == Dismissal("the model is too large", user_error=True)
    assert wait([node], 30)
    with pytest.raises(ChannelClosed):
        node.receive()


# --- spare nodes -------------------------------------------------------------------------------------------------


def call_replica(meeting: Meeting, first: Channel, second: Channel) -> None:
    """Check that the replica has these two nodes, in this order."""
    meeting.pool.gather([1, 2], 30)
    meeting.pool.call([1, 2], 0, "10.0.0.1:4000", "start")
    calls = [receive(first), receive(second)]
    assert [call.number for call in calls if isinstance(call, EngineCall)] == [0, 1]


@pytest.mark.parametrize("meeting", [1], indirect=True)
def test_a_spare_node_takes_the_place_of_one_that_is_gone(meeting: Meeting) -> None:
    first, second, spare = meeting.come(1), meeting.come(2), meeting.come(3)
    call_replica(meeting, first, second)
    second.close()
    call_replica(meeting, first, spare)


@pytest.mark.parametrize("meeting", [1], indirect=True)
def test_a_node_that_was_replaced_comes_back_as_the_spare_node(meeting: Meeting) -> None:
    first, second, spare = meeting.come(1), meeting.come(2), meeting.come(3)
    call_replica(meeting, first, second)
    second.close()
    call_replica(meeting, first, spare)
    back = meeting.come(2)
    call_replica(meeting, first, spare)
    first.close()
    call_replica(meeting, back, spare)
    spare.close()
    again = meeting.come(3)
    call_replica(meeting, back, again)


@pytest.mark.parametrize("meeting", [1], indirect=True)
def test_a_spare_node_does_not_hide_a_host_that_was_never_started(meeting: Meeting) -> None:
    meeting.come(1)
    meeting.come(3)
    with pytest.raises(ConfigError, match=r"node 2 at 127.0.0.1:29501 did not come within"):
        meeting.pool.gather([1, 2], 0.1)
