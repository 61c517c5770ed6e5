"""Messages about nodes: the hosts, other than the engine's, that run ranks of a replica.

A node comes to the process that leads, and waits there. When an engine needs it, the leader sends an EngineCall, and
the node connects to the engine. It starts the ranks that the engine asks for, and passes frames on in both directions.
"""

import msgspec

from shoal.wire.base import Ids, Stop, Wire
from shoal.wire.ranks import FromRank, Preparation
from shoal.wire.rendezvous import Alive
from shoal.wire.topology import HostPair, PairAddress

# The name of the door of an engine, and the key in the agreement there.
ENGINE_DOOR = "nodes of an engine"
ENGINE_START = "start of the engine"


class EngineCall(Wire, frozen=True):
    """An order of the leader to a node to connect to an engine, and to leave the one that it was connected to."""

    address: str  # host:port at which the engine awaits its nodes
    replica: int  # the number of the replica
    number: int  # of the node among those of the replica
    size: int  # how many nodes the replica has
    start: str  # marks this start of the engine
    within_s: float  # how long the node may try


class Dismissal(Wire, frozen=True):
    """The last message of a leader to its nodes, which then end."""

    why: str = ""  # "": the work is done
    user_error: bool = False  # True: the user can correct `why`


class RankEnvironment(Wire, frozen=True):
    """The facts from which a host makes the environment variables of its processes for ranks."""

    address: str = ""  # of the host, as other hosts reach it; "": there are no others
    # Environment variables that the processes get, unless they are set on the host.
    variables: dict[str, str] = msgspec.field(default_factory=dict)


class AwaitPairs(Wire, frozen=True):
    """An order of the leader to a node to listen for the others, which will measure their connections to it."""

    address: str  # of the node's host, as the others reach it


class PairsAwaited(Wire, frozen=True):
    """The answer of a node that listens."""

    place: PairAddress


class MeasurePairs(Wire, frozen=True):
    """An order of the leader to a node to measure its connections to others, which get it at the same time."""

    rank: int  # of the node among those that measure
    places: dict[int, PairAddress]  # where they listen, by rank
    within_s: float  # the longest time for all of them


class PairsMeasured(Wire, frozen=True):
    """The measurements of a node between itself and the nodes with lower ranks."""

    pairs: tuple[HostPair, ...] = ()
    error: str = ""  # why it cannot measure


class StartRank(Wire, frozen=True):
    """An order of an engine to start the process of a rank, which replaces the one that the rank has."""

    rank: int
    cores: Ids  # the CPU cores to which the process is bound; (): it is not bound
    preparation: Preparation  # of the fork server, if the host has none that is ready
    environment: RankEnvironment
    receiver: str = ""  # the name of the engine's `ChannelReceiver`, for a node on the same host; "": there is none


class KeepSpares(Wire, frozen=True):
    """An order of an engine to keep a warm spare, until the next StartRank: a fork server that has loaded everything.

    It comes when the ranks can compute.
    """

    count: int  # 0: none is kept


class ForRank(Wire, frozen=True):
    """An encoded message for one rank of the node."""

    rank: int
    frame: bytes


class ForAllRanks(Wire, frozen=True):
    """An encoded message for each rank of the node."""

    frame: bytes


class RankStarted(Wire, frozen=True):
    """A note that the process of a rank was started: the answer to StartRank, unless it is RankEnded."""

    rank: int
    pid: int
    handed_over: bool  # the engine has the channel to the process, so frames do not go through the node


class RankEnded(Wire, frozen=True):
    """A note that the process of a rank has ended, or could not be started."""

    rank: int
    why: str  # the rest of a sentence that begins with the rank: "was killed by SIGKILL"
    started: bool  # False: this answers StartRank


class RankSuspended(Wire, frozen=True):
    """A note that the process of a rank is stopped, by SIGSTOP or a debugger."""

    rank: int


ToNode = StartRank | KeepSpares | ForRank | ForAllRanks | Stop

FromNode = FromRank | RankStarted | RankEnded | RankSuspended

LeaderToNode = EngineCall | AwaitPairs | MeasurePairs | Dismissal | Alive

NodeToLeader = PairsAwaited | PairsMeasured

to_node: msgspec.msgpack.Decoder[ToNode] = msgspec.msgpack.Decoder(ToNode)

from_node: msgspec.msgpack.Decoder[FromNode] = msgspec.msgpack.Decoder(FromNode)

leader_to_node: msgspec.msgpack.Decoder[LeaderToNode] = msgspec.msgpack.Decoder(LeaderToNode)

node_to_leader: msgspec.msgpack.Decoder[NodeToLeader] = msgspec.msgpack.Decoder(NodeToLeader)
