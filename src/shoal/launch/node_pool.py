"""The nodes that have come to the process that leads, and wait there until an engine needs them."""

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from shoal.errors import ConfigError, EngineError
from shoal.launch.deployment import NodeGroup
from shoal.log import get_logger
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.rendezvous import describe_difference
from shoal.wire.base import WireError, encode
from shoal.wire.hosts import HostReport, host_report_decoder
from shoal.wire.nodes import Dismissal, EngineCall, LeaderToNode, NodeToLeader, node_to_leader
from shoal.wire.rendezvous import Alive, Hello, JoinRefused

log = get_logger("nodes")

_SLICE_S = 0.5  # how often a wait checks whether it was cancelled
_REPORT_S = 10.0  # how often the log says which nodes are missing
_FLUSH_S = 1.0
_ANSWER_SLICE_S = 0.05  # how often answers are looked for, which another thread may have received
_MOST_ANSWERS = 8  # of a node, which answers every message once
_ADVICE = "run the same command on each host with its own --node-rank; each must be able to reach this address"
_PROBE_S = 2.0  # for how long a sign of life of a host counts
_CALL_S = 60.0  # how long a node may try to connect to the engine that calls it


@dataclass(frozen=True, slots=True)
class WaitingNode:
    """A node that has come, and the connection on which it waits for calls."""

    number: int
    host: str
    pid: int
    address: str  # of its host
    report: HostReport
    channel: Channel
    answers: deque[bytes] = field(default_factory=lambda: deque(maxlen=_MOST_ANSWERS))  # that nobody has read yet

    @property
    def name(self) -> str:
        return f"node {self.number} ({self.host}, process {self.pid})"

    def is_gone(self) -> bool:
        """Return whether it has ended or lost its connection. What it has sent meanwhile is kept in `answers`."""
        try:
            if wait([self.channel], 0) or self.channel.has_frame:
                self.answers.extend(self.channel.receive())
        except ChannelClosed:
            return True
        return False


class NodePool:
    """The nodes of a deployment, as the leader has them; and the door through which they come.

    The thread of the rendezvous calls `objection` and `enter`; other methods may be called from any thread.
    """

    def __init__(self, group: NodeGroup, agreement: Mapping[str, str]) -> None:
        """Have no nodes yet. `agreement`: what a node must have in common with this host."""
        self.address = str(group.address)  # where the nodes come, for messages
        self._group = group
        self._agreement = agreement
        self._name = f"node 0 ({socket.gethostname()})"
        self._nodes: dict[int, WaitingNode] = {}
        self._reports: dict[int, HostReport] = {}  # of nodes that are about to enter
        self._replaced: dict[int, int] = {}  # rank of a node -> number that it has now; for those that spares replace
        self._refused = ""  # why an awaited node was refused; "": none was
        self._ever_complete = False  # True: all nodes have been here at the same time
        self._probed_at: dict[int, float] = {}  # number of a node -> when its host was asked for a sign of life
        self._changed = threading.Condition()

    # --- the door ------------------------------------------------------------------------------------------------

    def objection(self, hello: Hello) -> JoinRefused | None:
        if hello.failure:
            return self._refuse(hello, hello.failure)
        if hello.size != self._group.size:
            return self._refuse(
                hello,
                f"it expects {hello.size} nodes, but {self._name} expects {self._group.size}: give all hosts the same "
                "--nnodes",
            )
        last = self._group.size + self._group.spares - 1
        if not 0 < hello.rank <= last and (hello.rank < 1 or self._group.leader_has_ranks):
            return self._refuse(hello, f"{self._name} awaits nodes 1 to {last}: see --node-rank")
        present = self._nodes.get(self._number_of(hello))
        if present is not None and not present.is_gone():
            why = f"{present.name} is here already: give every host a --node-rank of its own"
            return self._refuse(hello, why) if self._is_reachable(present) else JoinRefused(why, again=True)
        why = describe_difference(hello.agreement, self._agreement, self._name)
        if not why:
            try:
                self._reports[hello.rank] = host_report_decoder.decode(hello.report)
            except WireError as error:
                why = f"its report cannot be read: {error}"
        return self._refuse(hello, why) if why else None

    def _is_reachable(self, node: WaitingNode) -> bool:
        """Return whether the host of a node is known to answer. It is asked here, so the next call may know.

        A node may have lost its connection without this process having noticed yet.
        """
        now = time.monotonic()
        if now - self._probed_at.get(node.number, float("-inf")) < _PROBE_S:
            return node.channel.is_acknowledged
        self._probed_at[node.number] = now
        with suppress(ChannelClosed):
            node.channel.send(encode(Alive()))
        return False

    def _refuse(self, hello: Hello, why: str) -> JoinRefused:
        """Refuse a node. Before all have been here, this ends the deployment, so that all hosts show the mistake."""
        with self._changed:
            self._refused = f"node {hello.rank} ({hello.host}, process {hello.pid}) cannot join: {why}"
            log.warning("%s", self._refused)
            self._changed.notify_all()
        return JoinRefused(why)

    def _number_of(self, hello: Hello) -> int:
        """Return the number of a node that comes: its own, or that of the spare node that has taken its place."""
        return self._replaced.get(hello.rank, hello.rank)

    def enter(self, hello: Hello, channel: Channel) -> None:
        report, number = self._reports.pop(hello.rank), self._number_of(hello)
        node = WaitingNode(number, hello.host, hello.pid, report.address or channel.peer_address, report, channel)
        log.info("%s has come from %s", node.name, node.address)
        with self._changed:
            if former := self._nodes.get(number):
                former.channel.close()
            self._nodes[number] = node
            self._ever_complete |= self._nodes.keys() >= set(range(1, self._group.size))
            self._changed.notify_all()

    # --- what the leader does with them --------------------------------------------------------------------------

    def gather(
        self,
        numbers: Iterable[int],
        timeout: float,
        cancelled: Callable[[], bool] = lambda: False,
        advice: Callable[[], str] = lambda: _ADVICE,
    ) -> dict[int, WaitingNode]:
        """Return nodes by number, as soon as all of them are here.

        Args:
            cancelled: is asked twice a second whether to give up. It may raise an error of its own.
            advice: returns what could be done about missing nodes, for messages.

        Raises:
            ConfigError: not all have come within `timeout` seconds; or a node was refused or has reported that it
                cannot join, and all have never been here.
            EngineError: `cancelled` returned True.
        """
        wanted = list(numbers)
        begun = last_report = time.monotonic()
        with self._changed:
            while missing := self._missing(wanted):
                now = time.monotonic()
                if cancelled():
                    raise EngineError("the wait for nodes was cancelled")
                if self._refused and not self._ever_complete:
                    raise ConfigError(self._refused)
                if now - begun > timeout:
                    raise ConfigError(f"{self._describe(missing)} did not come within {timeout:g} s: {advice()}")
                if now - last_report >= _REPORT_S:
                    last_report = now
                    limit = "" if timeout == float("inf") else f" of {timeout:g}"
                    log.info("waiting for %s, %.0f s%s: %s", self._describe(missing), now - begun, limit, advice())
                self._changed.wait(_SLICE_S)
            return {number: self._nodes[number] for number in wanted}

    def _missing(self, wanted: Iterable[int]) -> list[int]:
        for number, node in list(self._nodes.items()):
            if node.is_gone():
                log.warning("%s has gone", node.name)
                node.channel.close()
                del self._nodes[number]
        missing = [number for number in wanted if number not in self._nodes]
        return [number for number in missing if not self._take_spare_for(number)]

    def _take_spare_for(self, number: int) -> bool:
        """Put a spare node in the place of one that was here and is gone. Return whether there is a spare node."""
        first_spare = self._group.size
        spare = next((n for n in range(first_spare, first_spare + self._group.spares) if n in self._nodes), None)
        if spare is None or not self._ever_complete:
            return False
        node = self._nodes.pop(spare)
        log.warning("%s takes the place of node %d", node.name, number)
        self._nodes[number] = replace(node, number=number)
        # The spare node may have to come again, and so may the node that it replaces: they have changed places.
        numbers = self._replaced
        owners = {now: rank for rank, now in numbers.items()}
        numbers[owners.get(number, number)], numbers[owners.get(spare, spare)] = spare, number
        return True

    def _describe(self, missing: Iterable[int]) -> str:
        names = ", ".join(map(str, missing))
        return f"node {names} at {self.address}"

    def call(self, numbers: Iterable[int], replica: int, address: str, start: str) -> None:
        """Have the nodes of a replica connect to its engine.

        Args:
            replica: the number of the replica.
            address, start: what the engine has said in its `NodesAwaited`.
        """
        wanted = list(numbers)
        with self._changed:
            for place, number in enumerate(wanted):
                if number not in self._nodes:  # this host, or a node that is gone: the engine will report it
                    continue
                call = EngineCall(address, replica, place, len(wanted), start, _CALL_S)
                with suppress(ChannelClosed):
                    self._nodes[number].channel.send(encode(call))

    def ask(self, messages: Mapping[int, LeaderToNode], timeout: float) -> dict[int, NodeToLeader]:
        """Send a message to each of these nodes, by number, and return the answers of those that answer in time."""
        with self._changed:
            awaited = {number: self._nodes[number] for number in messages if number in self._nodes}
            for number, node in awaited.items():
                node.answers.clear()
                with suppress(ChannelClosed):
                    node.channel.send(encode(messages[number]))
        found: dict[int, NodeToLeader] = {}
        deadline = time.monotonic() + timeout
        while awaited and (left := deadline - time.monotonic()) > 0:
            wait([node.channel for node in awaited.values()], min(left, _ANSWER_SLICE_S))
            with self._changed:
                for number, node in list(awaited.items()):
                    gone = node.is_gone()
                    if node.answers:
                        found[number] = node_to_leader.decode(node.answers.popleft())
                    if gone or number in found:
                        del awaited[number]
        return found

    def dismiss(self, why: str = "", *, user_error: bool = False) -> None:
        """End all nodes. `why`: the reason, if the work is not done."""
        with self._changed:
            for node in self._nodes.values():
                with suppress(ChannelClosed):
                    node.channel.send(encode(Dismissal(why, user_error)))
                    node.channel.flush(_FLUSH_S)
                node.channel.close()
            self._nodes = {}

    def close(self) -> None:
        """End the connections. Nodes look for the next leader, if they serve."""
        with self._changed:
            for node in self._nodes.values():
                node.channel.close()
            self._nodes = {}
