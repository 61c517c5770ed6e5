"""Tests of expert dispatch: every backend gives the same result as one rank with all experts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.comm.base import Communicator
from shoal.comm.threads import ThreadComm, ThreadGroup
from shoal.comm.torch_distributed import TorchComm, c10d
from shoal.config import engine_options
from shoal.parallel.all2all.backends import BACKENDS, make_dispatch
from shoal.parallel.all2all.choice import ExpertExchange, bytes_per_token, choose_backend
from shoal.parallel.dispatch import Routed
from shoal.parallel.expert_placement import place_experts
from shoal.parallel.mesh import Mesh, make_mesh
from shoal.parallel.partition import split
from shoal.parallel.topology import Topology
from support.fakes import on_threads, steady

HIDDEN = 6
Connect = Callable[[str, Sequence[int], int], Communicator]  # an axis, its ranks, and which of these asks


@dataclass(frozen=True)
class Layout:
    dp: int
    tp: int
    experts: int
    top_k: int
    strategy: str
    steps: tuple[tuple[int, ...], ...]  # tokens of each replica, step by step

    @property
    def ranks(self) -> int:
        return self.dp * self.tp

    @property
    def placement(self) -> tuple[tuple[int, ...], ...]:
        return place_experts(self.experts, self.ranks, "linear" if self.strategy == "linear" else "round_robin")


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    dp, tp = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (3, 1), (4, 1), (6, 1), (2, 2), (3, 2), (1, 3), (2, 3)]))
    experts = draw(st.sampled_from([1, 4, 5, 16]))
    step = st.tuples(*[st.integers(0, 9)] * dp)
    return Layout(
        dp,
        tp,
        experts,
        draw(st.integers(1, min(4, experts))),
        draw(st.sampled_from(["linear", "round_robin"])),
        tuple(draw(st.lists(step, min_size=1, max_size=3))),
    )


def threads() -> Connect:
    groups: dict[tuple[str, int], ThreadGroup] = {}

    def connect(axis: str, ranks: Sequence[int], rank: int) -> Communicator:
        return ThreadComm(groups.setdefault((axis, ranks[0]), ThreadGroup(len(ranks), 60)), ranks.index(rank))

    return connect


def gloo() -> Connect:
    store, cpu = c10d.HashStore(), torch.device("cpu")

    def connect(axis: str, ranks: Sequence[int], rank: int) -> Communicator:
        name = f"{axis}:{ranks[0]}"
        return TorchComm(store, name, ranks.index(rank), len(ranks), backend="gloo", timeout_s=60, device=cpu)

    return connect


@dataclass(frozen=True)
class Tokens:
    """The tokens of one replica in one step."""

    x: Tensor
    experts: Tensor
    weights: Tensor


def tokens(layout: Layout, count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, HIDDEN, generator=generator).to(dtype)
    experts = torch.rand(count, layout.experts, generator=generator).topk(layout.top_k).indices
    return Tokens(x, experts, torch.rand(count, layout.top_k, generator=generator))


def matrices(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(7))


def compute(held: Sequence[int], weights: Tensor, routed: Routed) -> Tensor:
    """Return the results of a rank's experts, computed row by row: a row's bits depend on nothing else."""
    out = torch.zeros(routed.x.shape, dtype=torch.float32)
    for row, (x, experts, shares) in enumerate(zip(routed.x.float(), routed.experts, routed.weights, strict=True)):
        for slot, share in zip(experts.tolist(), shares, strict=True):
            if slot >= 0:
                out[row] += share * (weights[held[slot]] @ x)
    return out.to(routed.x.dtype)


def reference(weights: Tensor, given_: Tokens) -> Tensor:
    """Return the weighted sum of each token's experts."""
    each = torch.einsum("nkij,nj->nki", weights[given_.experts], given_.x.float())
    return (given_.weights.unsqueeze(-1) * each).sum(1)


def step(mesh: Mesh, layout: Layout, backend: str, given_: Tokens, *, partial: bool = True) -> Tensor:
    """Compute two layers of one step on one rank."""
    held, weights = layout.placement[mesh.ep.rank], matrices(layout.experts)
    dispatch = make_dispatch(mesh, layout.placement, backend, torch.device("cpu"))
    dispatch.begin_step(len(given_.x))
    x = given_.x
    for _ in range(2):
        routed = dispatch.dispatch(x, given_.experts, given_.weights)
        part = x * (mesh.tp.rank + 1) if partial else None
        x = dispatch.combine(compute(held, weights, routed), part)
        assert x.dtype == given_.x.dtype
    return x


def run(layout: Layout, backend: str, connect: Connect, *, partial: bool = True) -> list[list[Tensor]]:
    """Return the results by step and rank."""
    topology = Topology.of(dp=layout.dp, tp=layout.tp)

    def rank(number: int) -> list[Tensor]:
        mesh = make_mesh(topology, number, lambda axis, ranks: connect(axis, ranks, number), expert_parallel=True)
        replica = number // layout.tp
        return [
            step(mesh, layout, backend, tokens(layout, counts[replica], 100 * i + replica), partial=partial)
            for i, counts in enumerate(layout.steps)
        ]

    return [list(each) for each in zip(*on_threads(layout.ranks, rank), strict=True)]


def check(layout: Layout, backend: str, connect: Connect) -> None:
    weights, partial_sum = matrices(layout.experts), layout.tp * (layout.tp + 1) / 2
    for i, (counts, found) in enumerate(zip(layout.steps, run(layout, backend, connect), strict=True)):
        for rank, result in enumerate(found):
            replica = rank // layout.tp
            given_ = tokens(layout, counts[replica], 100 * i + replica)
            expected = given_.x
            for _ in range(2):
                expected = reference(weights, Tokens(expected, given_.experts, given_.weights)) + partial_sum * expected
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(result, found[replica * layout.tp])  # the same bits on all of a replica's ranks


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(steady, max_examples=40)
@given(layout=layouts())
def test_every_layout_gives_the_result_of_one_rank(backend: str, layout: Layout) -> None:
    check(layout, backend, threads())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
@pytest.mark.parametrize(("dp", "tp", "experts"), [(3, 1, 16), (6, 1, 4), (2, 3, 4)])
def test_experts_need_not_divide_by_the_ranks(backend: str, strategy: str, dp: int, tp: int, experts: int) -> None:
    check(Layout(dp, tp, experts, 2, strategy, ((5, 0, 3, 1, 0, 2)[:dp], (0,) * dp)), backend, threads())


@pytest.mark.parametrize("backend", BACKENDS)
def test_over_gloo(backend: str) -> None:
    check(Layout(2, 2, 5, 2, "round_robin", ((3, 8), (0, 5), (0, 0), (1, 0))), backend, gloo())


def test_backends_agree_to_the_bit() -> None:
    """Both backends add the ranks' results in rank order."""
    layout = Layout(3, 2, 16, 4, "linear", ((7, 0, 9),))
    first, second = (run(layout, backend, threads(), partial=False)[0] for backend in BACKENDS)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("connect", [threads, gloo])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_in_any_batch(
    backend: str, connect: Callable[[], Connect], dtype: torch.dtype
) -> None:
    """The token is alone, or at several positions of a batch, beside replicas with more or fewer tokens."""
    layout = Layout(2, 2, 8, 4, "linear", ())
    topology, links = Topology.of(dp=2, tp=2), connect()
    one = tokens(layout, 1, 1, dtype)

    def rank(number: int) -> list[Tensor]:
        mesh = make_mesh(topology, number, lambda axis, ranks: links(axis, ranks, number), expert_parallel=True)
        found = []
        for before, after, theirs in [(0, 0, 0), (0, 6, 3), (5, 0, 12), (4, 4, 1)]:
            if number // 2:
                step(mesh, layout, backend, tokens(layout, theirs, theirs, dtype))
                continue
            others = [tokens(layout, count, count + 50, dtype) for count in (before, after)]
            parts = [(each.x, each.experts, each.weights) for each in (others[0], one, others[1])]
            x, experts, weights = (torch.cat(each) for each in zip(*parts, strict=True))
            found.append(step(mesh, layout, backend, Tokens(x, experts, weights))[before])
        return found

    alone, *others = on_threads(4, rank)[0]
    assert all(torch.equal(other, alone) for other in others)


@settings(steady, max_examples=25)
@given(layout=layouts())
def test_a_token_is_sent_once_to_each_rank_that_has_one_of_its_experts(layout: Layout) -> None:
    if layout.dp == 1:
        return
    topology, connect = Topology.of(dp=layout.dp, tp=layout.tp), threads()
    counts = layout.steps[0]
    owner = {expert: rank for rank, held in enumerate(layout.placement) for expert in held}

    def rank(number: int) -> tuple[int, int]:
        """Return the bytes sent to experts, and the bytes sent back."""
        mesh = make_mesh(topology, number, lambda axis, ranks: connect(axis, ranks, number), expert_parallel=True)
        dispatch = make_dispatch(mesh, layout.placement, "all_to_all", torch.device("cpu"))
        replica = number // layout.tp
        given_ = tokens(layout, counts[replica], replica)
        dispatch.begin_step(len(given_.x))
        routed = dispatch.dispatch(given_.x, given_.experts, given_.weights)
        progress = mesh.ep.comm.progress
        there = progress.read_total("all_to_all").sent_bytes - 8 * (layout.ranks - 1)  # counts go first
        dispatch.combine(routed.x, None)
        return there, progress.read_total("all_to_all").sent_bytes - there - 8 * (layout.ranks - 1)

    pairs = set()  # (token, from, to)
    for replica, count in enumerate(counts):
        experts = tokens(layout, count, replica).experts.tolist()
        for share, rows in enumerate(split(count, layout.tp)):
            here = replica * layout.tp + share
            pairs |= {(row, here, owner[expert]) for row in rows for expert in experts[row]}
    away = [(here, there) for _, here, there in pairs if here != there]
    row = 4 * HIDDEN
    for number, (there, back) in enumerate(on_threads(layout.ranks, rank)):
        assert there == sum(here == number for here, _ in away) * (row + 8 * layout.top_k)
        assert back == sum(to == number for _, to in away) * row


def test_a_token_on_a_rank_without_its_experts_arrives_once_for_all_of_them() -> None:
    layout = Layout(2, 1, 4, 2, "linear", ())
    connect = threads()

    def rank(number: int) -> tuple[list[list[int]], int]:
        mesh = make_mesh(
            Topology.of(dp=2), number, lambda axis, ranks: connect(axis, ranks, number), expert_parallel=True
        )
        dispatch = make_dispatch(mesh, layout.placement, "all_to_all", torch.device("cpu"))
        experts = torch.tensor([[2, 3], [3, 0]])[: 2 - 2 * number]  # rank 0 has experts 0 and 1, and both tokens
        dispatch.begin_step(len(experts))
        routed = dispatch.dispatch(torch.ones(len(experts), HIDDEN), experts, torch.ones(experts.shape))
        dispatch.combine(routed.x, None)
        return routed.experts.tolist(), len(routed.x)

    assert on_threads(2, rank) == [([[-1, 0]], 1), ([[0, 1], [1, -1]], 2)]


def test_the_flag_names_the_backends() -> None:
    assert set(get_args(engine_options.All2All)) == {"auto", *BACKENDS}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dp", "tp"), [(2, 1), (4, 1), (2, 2)])
def test_expected_bytes_match_the_bytes_sent(backend: str, dp: int, tp: int) -> None:
    """Many tokens are routed at random."""
    count = 600
    layout = Layout(dp, tp, 10, 3, "linear", ())
    topology, connect = Topology.of(dp=dp, tp=tp), threads()

    def rank(number: int) -> int:
        mesh = make_mesh(topology, number, lambda axis, ranks: connect(axis, ranks, number), expert_parallel=True)
        dispatch = make_dispatch(mesh, layout.placement, backend, torch.device("cpu"))
        given_ = tokens(layout, count, number // tp)
        dispatch.begin_step(count)
        before = sum(total.sent_bytes for axis in mesh.axes for total in axis.comm.progress.read_totals().values())
        routed = dispatch.dispatch(given_.x, given_.experts, given_.weights)
        dispatch.combine(routed.x, None)
        return (
            sum(total.sent_bytes for axis in mesh.axes for total in axis.comm.progress.read_totals().values()) - before
        )

    sent = sum(on_threads(layout.ranks, rank))
    exchange = ExpertExchange(tuple(len(held) for held in layout.placement), layout.top_k, HIDDEN, 4, tp)
    expected = bytes_per_token(exchange)[backend] * count * dp
    expected += (
        8 * layout.ranks * (layout.ranks - 1) if backend == "all_to_all" else 0
    )  # counts, sent before the tokens
    assert math.isclose(sent, expected, rel_tol=0.02 if backend == "all_to_all" else 0)


def test_auto_compares_bytes() -> None:
    """A token with 2 of 16 experts reaches few of eight ranks; one with 8 of 8 experts reaches all."""
    few, why = choose_backend(ExpertExchange((2,) * 8, 2, 1024, 2))
    assert few == "all_to_all"
    assert why == (
        "2 experts of a token are on 1.7 of 7 other ranks: 6.79 KiB a token and layer where they are needed, "
        "28.11 KiB everywhere"
    )
    assert choose_backend(ExpertExchange((4, 4), 8, 1024, 2))[0] == "allgather_reducescatter"


@pytest.mark.parametrize("experts", [1, 3, 8])
def test_all_to_all_never_sends_more(experts: int) -> None:
    for ranks in range(2, 9):
        for top_k in range(1, experts + 1):
            held = tuple(map(len, place_experts(experts, ranks, "linear")))
            exchange = ExpertExchange(held, top_k, 64, 4)
            assert exchange.remote_ranks <= min(top_k, ranks - 1)
            sent = bytes_per_token(exchange)
            assert sent["all_to_all"] <= sent["allgather_reducescatter"]
