"""Process groups: formed anew after a rank was replaced, and over a store that has addresses of an earlier start."""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest
import torch

from shoal.comm.base import Communicator
from shoal.errors import CommAborted
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.credentials import Credentials
from shoal.wire.plan import Layout, ReplicaPlace, Timeouts
from shoal.wire.ranks import RankSetup
from shoal.worker.process_groups import ProcessGroups
from support.plans import bare_plan, bare_rank
from support.plans import setup_of as first_message


def setup_of(rank: int, address: str, meeting: int) -> RankSetup:
    place = ReplicaPlace(rank, 2, rendezvous=address, meeting=meeting)
    timeouts = Timeouts(20.0, 20.0, 20.0)
    return first_message(bare_plan(place=place, layout=Layout(replica=rank, replicas=2), timeouts=timeouts))


def test_groups_of_a_second_start_ignore_the_addresses_of_the_first() -> None:
    with Rendezvous(credentials=Credentials("key")) as found, ThreadPoolExecutor(2) as pool:

        def run(rank: int, meeting: int) -> list[float]:
            with closing(ProcessGroups(-1)) as groups:
                groups.credentials = Credentials("key")
                comm = groups(setup_of(rank, found.address, meeting), "ep", [0, 1])
                summed: list[float] = comm.all_reduce(torch.full((2,), float(rank + 1))).tolist()
                if rank == 0:
                    comm.abort()
                return summed

        for meeting in range(2):
            assert list(pool.map(run, range(2), [meeting] * 2)) == [[3.0, 3.0]] * 2


@contextmanager
def shared_file() -> Iterator[int]:
    file = os.memfd_create("store")
    try:
        yield file
    finally:
        os.close(file)


def in_pair(rank: int, incarnation: int, timeout: float = 60.0) -> RankSetup:
    plan = bare_plan(bare_rank(0), bare_rank(1), timeouts=Timeouts(timeout, timeout, timeout))
    return first_message(plan, rank, incarnation)


def connect(groups: ProcessGroups, setup: RankSetup) -> Communicator:
    return groups(setup, "tp", [0, 1])


@pytest.mark.parametrize("wait", ["recv", "all_reduce"])
def test_a_newcomer_takes_the_place_of_a_rank_that_others_wait_for(wait: str) -> None:
    """The communicator of the survivor stays the same. Nothing ends its wait but the abort."""
    with shared_file() as file, ThreadPoolExecutor(2) as pool:
        survivor, dead, newcomer = (ProcessGroups(file) for _ in range(3))
        ends = list(pool.map(connect, (survivor, dead), (in_pair(0, 5), in_pair(1, 5))))
        if wait == "recv":
            waiting = pool.submit(ends[0].recv, torch.zeros(3), 1)
        else:
            waiting = pool.submit(ends[0].all_reduce, torch.zeros(3))
        while not ends[0].progress.operation:
            threading.Event().wait(0.001)
        begun = time.monotonic()
        survivor.abort_before(6)
        with pytest.raises(CommAborted):
            waiting.result(20)
        assert time.monotonic() - begun < 5
        again = list(pool.map(connect, (survivor, newcomer), (in_pair(0, 6), in_pair(1, 6))))
        assert again[0] is ends[0]
        sums = pool.map(lambda comm: comm.all_reduce(torch.ones(2)).tolist(), again)
        assert list(sums) == [[2.0, 2.0]] * 2


def test_a_rank_that_connects_leaves_a_rank_that_does_not_come() -> None:
    with shared_file() as file, ThreadPoolExecutor(2) as pool:
        survivor, late = ProcessGroups(file), ProcessGroups(file)
        waiting = pool.submit(connect, survivor, in_pair(0, 1))
        threading.Event().wait(0.05)
        survivor.abort_before(3)
        with pytest.raises(CommAborted):
            waiting.result(20)
        with pytest.raises(CommAborted):
            connect(survivor, in_pair(0, 2))  # it is obsolete already
        ends = list(pool.map(connect, (survivor, late), (in_pair(0, 3), in_pair(1, 3))))
        assert [comm.size for comm in ends] == [2, 2]
