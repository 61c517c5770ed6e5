"""Lockstep between engine processes, on one host or several, which exchange their counts at a rendezvous."""

import time
from collections.abc import Mapping

from shoal import addresses, env
from shoal.addresses import Address
from shoal.engine.lockstep.member import SharedProgress, progress
from shoal.errors import ConfigError, EngineError
from shoal.transport.room_member import RoomMember
from shoal.wire.base import encode
from shoal.wire.lockstep import LockstepJoin, LockstepState, lockstep_join, lockstep_state
from shoal.wire.plan import ReplicaPlace

_ROOM = "replicas"
_JOIN = "join"  # the topic of a LockstepJoin
_STATE = "state"  # ... of a LockstepState


class RendezvousLockstep(SharedProgress):
    """A `LockstepMember` for an engine in a process of its own."""

    backlog = False

    def __init__(self, place: ReplicaPlace, agreement: Mapping[str, str], *, timeout: float) -> None:
        """Join the other replicas, and wait until all have joined.

        Raises:
            ConfigError: not all replicas have joined within `timeout` seconds; or one differs in its agreement; or
                their ranks could not reach each other at the addresses by which their hosts have joined.
            EngineError: the rendezvous has gone; or this replica is returning, and not all others have returned within
                `timeout` seconds.
        """
        self._member = RoomMember(
            Address.parse(place.rendezvous),
            place.credentials,
            room=f"{_ROOM} {place.meeting}",
            rank=place.rank,
            size=place.size,
            agreement=agreement,
            timeout=timeout,
            returning=place.returning,
        )
        try:
            joins = self._exchange_joins(timeout)
            self._compare_addresses({rank: join.address for rank, join in joins.items()})
        except BaseException:
            self._member.close()
            raise
        super().__init__(max(join.incarnation for join in joins.values()))
        self._beginning = LockstepState(self.incarnation)  # the state of replicas that have told none yet

    def _exchange_joins(self, timeout: float) -> dict[int, LockstepJoin]:
        """Tell the other replicas how this one has joined, and return the same of all."""
        own = LockstepJoin(time.time_ns(), self.host_address)
        self._member.post(_JOIN, encode(own))
        found = {self.rank: own}
        for rank in range(self._member.size):
            if rank != self.rank:
                found[rank] = lockstep_join.decode(self._member.await_post(_JOIN, rank, timeout=timeout))
        return found

    def _compare_addresses(self, found: Mapping[int, str]) -> None:
        """Check that ranks can reach each other at the addresses by which their hosts have joined."""
        loopback = [rank for rank, each in found.items() if addresses.is_local(each)]
        if loopback and len(loopback) < len(found):
            first = min(loopback)
            raise ConfigError(
                f"replica {first} has joined the rendezvous from {found[first]}, a loopback address at which replicas "
                "on other hosts cannot reach its ranks: give all replicas, those of the first host too, an address of "
                "the first host that the other hosts can reach"
            )
        scoped = [rank for rank, each in found.items() if "%" in each]
        if scoped:
            raise ConfigError(
                f"replica {scoped[0]} has joined the rendezvous from {found[scoped[0]]}, a link-local address, whose "
                "scope (the part after %) means nothing on other hosts: give all replicas an address without a scope"
            )
        if len({":" in each for each in found.values()}) > 1:
            shown = ", ".join(f"replica {rank}: {each}" for rank, each in sorted(found.items()))
            raise ConfigError(
                f"some replicas have joined the rendezvous over IPv4 and some over IPv6 ({shown}), so their ranks "
                "could not reach each other: give all replicas the same IP address instead of a host name"
            )

    @property
    def host_address(self) -> str:
        """The address of this host at which the other replicas reach it."""
        named = env.host_ip()
        return self._member.host_address if named is None else named[1]

    @property
    def rank(self) -> int:
        return self._member.rank

    @property
    def formation(self) -> int:
        """The number of this meeting of replicas at the rendezvous. Every meeting there has another one."""
        return self._member.formation

    def others(self) -> Mapping[int, LockstepState]:
        failures = self._member.failures()
        if failures:
            causes = "; ".join(why.replace("rank", "replica", 1) for _, why in sorted(failures.items()))
            raise EngineError(f"another replica has failed, and this one cannot go on without it: {causes}")
        told = self._member.latest(_STATE)
        states = {
            rank: lockstep_state.decode(told[rank]) if rank in told else self._beginning
            for rank in range(self._member.size)
            if rank != self.rank
        }
        self._check_gone(states)
        return states

    def _check_gone(self, states: Mapping[int, LockstepState]) -> None:
        """Check that no replica has left before a step or a reform in which its ranks had to take part.

        A replica may leave when all have launched the same steps.
        """
        for rank in self._member.gone():
            name = self._member.members[rank].replace("rank", "replica", 1)
            if progress(states[rank]) < progress(self._own):
                raise EngineError(f"{name} ended while this replica has work")
            if progress(states[rank]) < max(map(progress, states.values())):
                raise EngineError(f"{name} ended while another replica has work")

    def tell(self, state: LockstepState) -> None:
        self._member.post(_STATE, encode(state))

    def gone(self) -> list[int]:
        """Return the replicas that have left."""
        return self._member.gone()

    def fileno(self) -> int:
        return self._member.fileno()

    def clear(self) -> None:
        self._member.clear()

    def close(self, why: str = "") -> None:
        self._member.close(why)
