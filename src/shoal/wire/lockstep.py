"""Messages between the engines of replicas in lockstep."""

import msgspec

from shoal.wire.base import Wire


class LockstepJoin(Wire, frozen=True):
    """The first message of a replica to the others. The largest incarnation is the first one of all."""

    incarnation: int
    address: str  # of its host, as it has joined


class LockstepState(Wire, frozen=True):
    """The progress of a replica, sent to the other replicas in lockstep. Each message replaces the one before."""

    incarnation: int  # of its steps, and of the groups that its ranks form with those of the other replicas
    formed: bool = True  # False: its ranks are not ready yet, because they form their groups anew
    steps: int = 0  # launched in this incarnation
    awake: bool = True  # False: its ranks lack a part of their memory while they form their groups
    why: str = ""  # the deaths of ranks of this replica for which it has begun this incarnation; "": it follows others


lockstep_join: msgspec.msgpack.Decoder[LockstepJoin] = msgspec.msgpack.Decoder(LockstepJoin)

lockstep_state: msgspec.msgpack.Decoder[LockstepState] = msgspec.msgpack.Decoder(LockstepState)
