"""Lockstep between engines that are processes, on one host or on several: they tell each other at a rendezvous."""

from collections.abc import Mapping

from shoal import addresses
from shoal.addresses import Address
from shoal.errors import ConfigError, EngineError
from shoal.transport.member import RoomMember
from shoal.wire.plan import ReplicaPlace

_ROOM = "replicas"
_LAUNCHED = "launched"
_ADDRESS = "address"


class RendezvousLockstep:
    """One replica's end. Something to `wait` for: it is readable when the others have advanced or one has gone."""

    backlog = False

    def __init__(self, place: ReplicaPlace, agreement: Mapping[str, str], *, timeout: float) -> None:
        """Waits for the other replicas.

        Raises:
            ConfigError: not all have come within `timeout` seconds, or one differs in what all must have alike.
            EngineError: where they meet has gone; or this replica was there before, and not all are back in time.
            ConfigError: their ranks could not reach each other at the addresses that they have here.
        """
        self._member = RoomMember(
            Address.parse(place.rendezvous),
            place.key,
            room=f"{_ROOM} {place.meeting}",
            rank=place.rank,
            size=place.size,
            agreement=agreement,
            timeout=timeout,
            returning=place.returning,
        )
        self._launched = 0
        try:
            self._compare_addresses(place, timeout)
        except BaseException:
            self._member.close()
            raise

    def _compare_addresses(self, place: ReplicaPlace, timeout: float) -> None:
        """Ranks will tell each other the address by which their host came here."""
        self._member.post(_ADDRESS, self.host_address.encode())
        told = {rank: self._member.await_post(_ADDRESS, rank, timeout=timeout).decode() for rank in self._others}
        told[place.rank] = self.host_address
        of_loopback = [rank for rank, each in told.items() if addresses.is_local(each)]
        if of_loopback and len(of_loopback) < len(told):
            first = min(of_loopback)
            raise ConfigError(
                f"replica {first} has come to the rendezvous by {told[first]}, a loopback address at which others, on "
                "other hosts, can't reach its ranks: give all of them one address of the first host that others reach, "
                "the first host too"
            )
        scoped = [rank for rank, each in told.items() if "%" in each]
        if scoped:
            raise ConfigError(
                f"replica {scoped[0]} has come to the rendezvous by {told[scoped[0]]}, a link-local address, whose end "
                "behind the % means nothing on other hosts: give all of them an address without one"
            )
        if len({":" in each for each in told.values()}) > 1:
            shown = ", ".join(f"replica {rank}: {each}" for rank, each in sorted(told.items()))
            raise ConfigError(
                f"some replicas have come to the rendezvous by IPv4 and some by IPv6 ({shown}), and their ranks could "
                "not reach each other: give all of them the same address instead of a name"
            )

    @property
    def _others(self) -> list[int]:
        return [rank for rank in range(self._member.size) if rank != self._member.rank]

    @property
    def host_address(self) -> str:
        """Of this host, as the other replicas reach it."""
        return self._member.host_address

    @property
    def rank(self) -> int:
        return self._member.rank

    @property
    def formation(self) -> int:
        """What tells these replicas' meeting from all others at the rendezvous."""
        return self._member.formation

    def launched(self, count: int) -> None:
        self._launched = count
        self._member.post(_LAUNCHED, str(count).encode())

    def due(self) -> int:
        failures = self._member.failures()
        if failures:
            who = "; ".join(why.replace("rank", "replica", 1) for _, why in sorted(failures.items()))
            raise EngineError(f"another replica has failed, and this one can't go on without it: {who}")
        launched = {rank: int(count) for rank, count in self._member.latest(_LAUNCHED).items()}
        self._check_gone(launched)
        return max(launched.values(), default=0)

    def _check_gone(self, launched: Mapping[int, int]) -> None:
        """Whoever has left rightly is missed when there is a step in which its ranks took no part."""
        for rank in self._member.gone():
            name = self._member.members[rank].replace("rank", "replica", 1)
            if launched.get(rank, 0) < self._launched:
                raise EngineError(f"{name} ended while this one has work")
            if launched.get(rank, 0) < max(launched.values(), default=0):
                raise EngineError(f"{name} ended while another one has work")

    def gone(self) -> list[int]:
        """Return the replicas that have left."""
        return self._member.gone()

    def fileno(self) -> int:
        return self._member.fileno()

    def clear(self) -> None:
        """Not readable until something new comes."""
        self._member.clear()

    def close(self, why: str = "") -> None:
        """`why`: the failure that the others are told of."""
        self._member.close(why)
