"""A host that fails before it has met the others tells them why, so that they do not wait for it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shoal.addresses import Address, reserve_port
from shoal.errors import ConfigError
from shoal.launch.deployment import NodeGroup
from shoal.launch.early_failure import told_to_other_hosts
from shoal.launch.node_pool import NodePool
from shoal.transport.connecting import connect
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.credentials import NO_CREDENTIALS
from shoal.wire.rendezvous import NODES_DOOR

pytestmark = pytest.mark.slow  # waits for connections


@pytest.fixture
def port() -> Iterator[int]:
    with reserve_port("127.0.0.1") as reserved:
        yield reserved.getsockname()[1]


def fail(port: int, rank: int, error: BaseException) -> None:
    """Fail as a host whose other options may be wrong, too."""
    given: dict[str, Any] = {"nnodes": 3, "node_rank": rank, "master_addr": "127.0.0.1", "master_port": port}
    with told_to_other_hosts({**given, "block_size": "seven"}):
        raise error


@pytest.mark.parametrize(
    ("error", "told"),
    [(ConfigError("no model in /x"), "no model in /x"), (KeyboardInterrupt(), "it was interrupted")],
    ids=["mistake", "Ctrl-C"],
)
def test_the_leader_learns_why_a_node_fails(port: int, error: BaseException, told: str) -> None:
    pool = NodePool(NodeGroup(3, 0, 1, Address("127.0.0.1", port), NO_CREDENTIALS), {})
    with Rendezvous("127.0.0.1", port, doors={NODES_DOOR: pool}):
        with pytest.raises(type(error)):
            fail(port, 2, error)
        with pytest.raises(ConfigError, match=rf"node 2 \(.*\) cannot join: {told}"):
            pool.gather([1, 2], 30)


def test_nodes_learn_why_the_leader_fails(port: int) -> None:
    def come(rank: int) -> str:
        address = Address("127.0.0.1", port)
        with pytest.raises(ConfigError) as caught:
            connect(address, NO_CREDENTIALS, room=NODES_DOOR, rank=rank, size=3, timeout=60)
        return str(caught.value)

    with ThreadPoolExecutor(2) as nodes:
        found = nodes.map(come, (1, 2))
        with pytest.raises(ConfigError, match="no model in /x"):
            fail(port, 0, ConfigError("no model in /x"))
        assert all("cannot lead: no model in /x" in each for each in found)


def test_a_host_without_others_fails_at_once() -> None:
    with pytest.raises(ConfigError, match="no model"), told_to_other_hosts({"node_rank": 1}):
        raise ConfigError("no model")
