"""A host that runs ranks for engines elsewhere (`--node-rank 1` and above)."""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from shoal.config.engine_options import EngineOptions
from shoal.errors import ConfigError, EngineError, ShoalError
from shoal.executors.node_agent import NodeAgent
from shoal.launch.credentials import log_protection
from shoal.launch.deployment import Deployment, NodeGroup
from shoal.launch.early_failure import report_refusal, told_to_other_hosts
from shoal.launch.headless import introduce_host
from shoal.launch.host_network import warn_of_kernel_ports
from shoal.launch.measured_links import PairMeasurement
from shoal.launch.open_model import read_options, refuse_manual_place
from shoal.log import get_logger
from shoal.process.stop_event import SignalEvent, StopEvent
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.connecting import RefusedUnknown, connect
from shoal.wire.base import encode
from shoal.wire.hosts import HostReport
from shoal.wire.nodes import AwaitPairs, Dismissal, LeaderToNode, MeasurePairs, NodeToLeader, leader_to_node
from shoal.wire.rendezvous import NODES_DOOR, Alive

log = get_logger("node")

_CHECK_S = 1.0  # how often processes are checked, as they send nothing when they were stopped
_CLOSE_S = 5.0
_RECONNECT_S = 60.0  # how long one attempt to reach the next leader takes, and so how often the log mentions it


def run(model: str | None, given: Mapping[str, Any], *, online: bool) -> int:
    """Run the ranks of this host for a leader until it dismisses this node, or a signal arrives.

    A leader that serves may come back, so this node waits for the next one without a deadline.

    Args:
        model, given: as for `open_model`.
        online: the leader serves.

    Returns:
        The exit code: 0 if the work is done, or a signal has ended this node.

    Raises:
        UserError: the leader cannot be reached or refuses this node, or cannot work with these options.
        EngineError: the leader has failed; or it has gone, and does not serve.
    """
    with told_to_other_hosts(given):
        options, given = read_options(model, given, online=online)
        refuse_manual_place(options)
        group = Deployment.of(options).nodes
        assert group is not None
        warn_of_kernel_ports(options)
        report, agreement = introduce_host(options, given, group.address.host)
    with SignalEvent() as signals:
        node = Node(group, options, report, agreement, signals)
        try:
            node.join()
            node.obey_leaders(online=online)
        finally:
            node.close()
    return 0


class Node:
    """A node, from its first connection to a leader to its end."""

    def __init__(
        self,
        group: NodeGroup,
        options: EngineOptions,
        report: HostReport,
        agreement: Mapping[str, str],
        stop: StopEvent,
    ) -> None:
        self._group = group
        self._options = options
        self._report = report
        self._agreement = agreement
        self._stop = stop
        self._leader: Channel | None = None
        self._agent: NodeAgent | None = None
        self._pairs = PairMeasurement()

    def obey_leaders(self, *, online: bool) -> None:
        """Obey leaders until this node is dismissed or stopped. Arguments and errors are those of `run`."""
        while self.serve():
            if not online:
                raise EngineError(f"the leader at {self._group.address} has gone before the work was done")
            log.warning("the leader at %s has gone: waiting for the next one", self._group.address)
            self.join(returning=True)

    def join(self, *, returning: bool = False) -> None:
        """Connect to the leader. Return without a connection if this node must stop.

        Args:
            returning: there was a leader before, so its address is right: wait without a deadline.

        Raises:
            ConfigError: the leader cannot be reached in time, or refuses this node.
        """
        log_protection(self._group.credentials, self._group.address.host)
        deadline = time.monotonic() + self._options.parallel.start_timeout
        while not self._stop.arrived:
            patience = _RECONNECT_S if returning else deadline - time.monotonic()
            try:
                self._leader = connect(
                    self._group.address,
                    self._group.credentials,
                    room=NODES_DOOR,
                    rank=self._group.rank,
                    size=self._group.size,
                    agreement=self._agreement,
                    report=encode(self._report),
                    timeout=patience,
                    returning=returning,
                    cancelled=lambda: self._stop.arrived,
                )
            except EngineError:
                if not returning:
                    return
            except RefusedUnknown as error:
                report_refusal(self._group, error)
                raise
            else:
                log.info(
                    "node %d of %d is with its leader at %s", self._group.rank, self._group.size, self._group.address
                )
                return

    def serve(self) -> bool:
        """Obey the leader. Return True if its connection has ended, False if this node must end.

        Raises:
            UserError, EngineError: the leader has failed, with its reason.
        """
        while self._leader is not None and not self._stop.arrived:
            sources: list[Any] = [self._stop, self._leader, *(self._agent.channels if self._agent else ())]
            at_hand = self._leader.has_frame or (self._agent is not None and self._agent.has_frame)
            readable = wait(sources, 0 if at_hand else _CHECK_S)
            if self._agent is not None and not self._agent.tick(readable):
                self._end_ranks()
            if self._leader in readable or self._leader.has_frame:
                try:
                    for frame in self._leader.receive():
                        if not self._obey(leader_to_node.decode(frame)):
                            return False
                except ChannelClosed:
                    self.close()
                    return True
        return False

    def _obey(self, message: LeaderToNode) -> bool:
        if isinstance(message, Alive):
            return True
        if isinstance(message, Dismissal):
            self._end_ranks()
            if message.why:
                raise ConfigError(message.why) if message.user_error else EngineError(message.why)
            log.info("the leader has ended: the work is done")
            return False
        if isinstance(message, AwaitPairs):
            self._answer(self._pairs.listen(message))
            return True
        if isinstance(message, MeasurePairs):
            self._answer(self._pairs.measure(message))
            return True
        self._end_ranks()
        try:
            self._agent = NodeAgent(message, self._group.credentials)
        except ShoalError as error:  # the engine has ended meanwhile; the leader will call again
            log.warning("%s", error)
        else:
            log.info("with the engine of replica %d at %s", message.replica, message.address)
        return True

    def _answer(self, message: NodeToLeader) -> None:
        if self._leader is not None:
            with suppress(ChannelClosed):  # the leader has gone, which the next wait shows
                self._leader.send(encode(message))

    def _end_ranks(self) -> None:
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def close(self) -> None:
        """End all ranks and connections. Idempotent, never raises."""
        self._end_ranks()
        self._pairs.close()
        if self._leader is not None:
            self._leader.close()
            self._leader = None


class BackgroundNode:
    """A node on a thread of its own, in a program that also makes calls."""

    def __init__(
        self, group: NodeGroup, options: EngineOptions, report: HostReport, agreement: Mapping[str, str]
    ) -> None:
        """Start nothing yet. Arguments are those of `Node`."""
        self._stack = ExitStack()
        self._stop = self._stack.enter_context(StopEvent())
        self._node = Node(group, options, report, agreement, self._stop)
        self._thread = threading.Thread(target=self._run, daemon=True, name="shoal-node")
        self._failed: Callable[[ShoalError], object] = lambda _: None
        self._closed = False

    def start(self, failed: Callable[[ShoalError], object]) -> None:
        """Run the node. `failed` is called on its thread if it fails, or if its leader has gone."""
        self._failed = failed
        self._thread.start()

    def _run(self) -> None:
        try:
            self._node.join()
            self._node.obey_leaders(online=False)
        except ShoalError as error:
            self._failed(error)
        finally:
            self._node.close()

    def close(self) -> None:
        """End the node and its ranks. Idempotent, never raises."""
        if self._closed:
            return
        self._closed = True
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_CLOSE_S)
        self._stack.close()
