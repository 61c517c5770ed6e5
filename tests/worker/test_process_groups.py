"""Process groups over a rendezvous with a store that has addresses of an earlier start."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import torch

from shoal.transport.rendezvous import Rendezvous
from shoal.wire.plan import Layout, ReplicaPlace, Timeouts
from shoal.wire.ranks import RankSetup
from shoal.worker.process_groups import ProcessGroups
from support.plans import bare_plan
from support.plans import setup_of as first_message


def setup_of(rank: int, address: str, meeting: int) -> RankSetup:
    place = ReplicaPlace(rank, 2, rendezvous=address, key="key", meeting=meeting)
    timeouts = Timeouts(20.0, 20.0, 20.0)
    return first_message(bare_plan(place=place, layout=Layout(replica=rank, replicas=2), timeouts=timeouts))


def test_groups_of_a_second_start_ignore_the_addresses_of_the_first() -> None:
    with Rendezvous(key="key") as found, ThreadPoolExecutor(2) as pool:

        def run(rank: int, meeting: int) -> list[float]:
            with closing(ProcessGroups(-1)) as groups:
                comm = groups(setup_of(rank, found.address, meeting), "ep", [0, 1])
                summed: list[float] = comm.all_reduce(torch.full((2,), float(rank + 1))).tolist()
                if rank == 0:
                    comm.abort()
                return summed

        for meeting in range(2):
            assert list(pool.map(run, range(2), [meeting] * 2)) == [[3.0, 3.0]] * 2
