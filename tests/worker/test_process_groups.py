"""Groups over a rendezvous: those of a second engine find each other where the first one's addresses still lie."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import torch

from shoal.transport.rendezvous import Rendezvous
from shoal.wire.ranks import RankSetup
from shoal.worker.process_groups import ProcessGroups


def setup_of(rank: int, address: str, meeting: int) -> RankSetup:
    given: dict[str, Any] = dict.fromkeys(RankSetup.__struct_fields__, 0)
    changed = {"world_size": 1, "dp_rank": rank, "dp_size": 2, "device": "cpu", "comm_timeout_s": 20.0}
    changed |= {"group_store": address, "group_key": "key", "address": "127.0.0.1", "meeting": meeting}
    return RankSetup(**{**given, **changed})


def test_one_engine_after_the_other_at_one_rendezvous() -> None:
    with Rendezvous(key="key") as found, ThreadPoolExecutor(2) as pool:

        def run(rank: int, meeting: int) -> list[float]:
            with closing(ProcessGroups(-1, 1)) as groups:
                comm = groups(setup_of(rank, found.address, meeting), "ep", [0, 1])
                summed: list[float] = comm.all_reduce(torch.full((2,), float(rank + 1))).tolist()
                if rank == 0:
                    comm.abort()
                return summed

        for meeting in range(2):
            assert list(pool.map(run, range(2), [meeting] * 2)) == [[3.0, 3.0]] * 2
