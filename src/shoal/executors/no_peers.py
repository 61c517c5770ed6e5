"""The peers of a replica whose ranks form no groups with those of other replicas."""


class NoPeers:
    """`Peers` without any replica."""

    all_awake = True

    def check(self) -> None: ...

    def formed(self) -> bool:
        return True
