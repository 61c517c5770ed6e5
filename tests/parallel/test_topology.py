"""Tests of the grid of ranks and its groups."""

import math
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from shoal.comm.base import Communicator
from shoal.comm.local import LocalComm
from shoal.comm.threads import ThreadComm, ThreadGroup
from shoal.parallel.mesh import Mesh, make_mesh
from shoal.parallel.topology import Topology
from support.fakes import on_threads, steady

TOPOLOGIES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(
    lambda sizes: Topology(tuple((f"axis{i}", size) for i, size in enumerate(sizes)))
)


@steady
@given(TOPOLOGIES)
def test_ranks_and_coordinates_are_one_to_one(topology: Topology) -> None:
    sizes = dict(topology.axes)
    assert topology.world_size == math.prod(sizes.values())
    coords = [topology.coord(rank) for rank in range(topology.world_size)]
    assert [topology.rank(coord) for coord in coords] == list(range(topology.world_size))
    assert len({tuple(sorted(coord.items())) for coord in coords}) == topology.world_size
    assert all(0 <= index < sizes[name] for coord in coords for name, index in coord.items())


@steady
@given(TOPOLOGIES)
def test_the_groups_of_an_axis_cut_the_world(topology: Topology) -> None:
    for name, size in topology.axes:
        groups = {topology.group(name, rank) for rank in range(topology.world_size)}
        assert sorted(rank for group in groups for rank in group) == list(range(topology.world_size))
        for group in groups:
            assert len(group) == size == topology.size(name)
            assert [topology.coord(rank)[name] for rank in group] == list(range(size))
            others = [{**topology.coord(rank), name: 0} for rank in group]
            assert all(other == others[0] for other in others)


def test_neighbours_differ_in_the_last_axis() -> None:
    topology = Topology((("pp", 2), ("tp", 3)))
    assert topology.coord(4) == {"pp": 1, "tp": 1}
    assert topology.group("tp", 4) == (3, 4, 5)
    assert topology.group("pp", 4) == (1, 4)
    assert Topology.of(tp=3).axes == (("dp", 1), ("pp", 1), ("tp", 3))


def test_a_mesh_connects_groups_and_leaves_single_ranks_alone() -> None:
    assert isinstance(make_mesh(Topology.of(), 0, lambda *_: ThreadComm(ThreadGroup(1, 1), 0)).tp.comm, LocalComm)
    group = ThreadGroup(3, 5)
    asked = on_threads(
        3, lambda rank: make_mesh(Topology.of(tp=3), rank, lambda _, ranks: ThreadComm(group, ranks.index(rank)))
    )
    assert [(mesh.tp.rank, mesh.tp.size, mesh.tp.comm.rank) for mesh in asked] == [(r, 3, r) for r in range(3)]


def test_the_ends_of_a_pipeline_have_a_group_of_their_own() -> None:
    groups: dict[tuple[str, tuple[int, ...]], ThreadGroup] = {}

    def mesh_of(rank: int) -> Mesh:
        def connect(axis: str, ranks: Sequence[int]) -> Communicator:
            group = groups.setdefault((axis, tuple(ranks)), ThreadGroup(len(ranks), 5))
            return ThreadComm(group, ranks.index(rank))

        return make_mesh(Topology.of(pp=3, tp=2), rank, connect)

    meshes = [mesh_of(rank) for rank in range(6)]
    assert {ranks for axis, ranks in groups if axis == "token_return"} == {(0, 4), (1, 5)}
    assert [(mesh.token_return.rank, mesh.token_return.size) for mesh in meshes] == [
        (0, 2),
        (0, 2),
        (0, 1),
        (0, 1),
        (1, 2),
        (1, 2),
    ]
    assert [len(mesh.axes) for mesh in meshes] == [3, 3, 2, 2, 3, 3]
