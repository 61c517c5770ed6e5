"""The traffic between the hosts of a replica."""

from pathlib import Path

import pytest

from shoal.models.registry import read_spec
from shoal.planner.host_links import HostLinks, Link
from shoal.planner.host_traffic import HostTraffic, MeasuredStep, host_traffic
from shoal.planner.placement import ranks_across
from shoal.planner.traffic_advice import describe_traffic

SPEC = read_spec(Path(__file__).parent.parent.parent / "src" / "shoal" / "shapes" / "qwen3-0.6b")
STREAM = 1024 * 2  # bytes of the residual stream of a token, in bfloat16


def test_stages_send_the_residual_stream_once() -> None:
    assert host_traffic(SPEC, "bfloat16", 1, (14, 14), [(0,), (1,)]) == HostTraffic(STREAM, 1)
    assert host_traffic(SPEC, "float32", 2, (14, 14), [(0, 1), (2, 3)]) == HostTraffic(2 * 2 * STREAM, 1)
    assert host_traffic(SPEC, "bfloat16", 1, (7, 7, 7, 7), [(0, 1), (2, 3)]) == HostTraffic(STREAM, 1)


def test_tensor_parallel_groups_over_hosts_exchange_in_every_layer() -> None:
    reduces = 2 * 28 + 1
    assert host_traffic(SPEC, "bfloat16", 2, (28,), [(0,), (1,)]) == HostTraffic(reduces * 2 * STREAM, reduces)
    across = host_traffic(SPEC, "bfloat16", 2, (14, 14), ranks_across(2, 2, 2))
    assert across == HostTraffic(reduces * 2 * STREAM, reduces)  # the stages of one position are on one host


@pytest.mark.parametrize(
    ("tp", "stages", "placed", "advice"),
    [
        (2, (28,), [(0,), (1,)], "with --tensor-parallel-size 1 --pipeline-parallel-size 2 it would be 2.00 KiB per"),
        (
            4,
            (28,),
            [(0, 1), (2, 3)],
            "with --tensor-parallel-size 2 --pipeline-parallel-size 2 it would be 4.00 KiB per",
        ),
        (1, (14, 14), [(0,), (1,)], None),
        (3, (28,), [(0, 1), (2,)], None),  # three ranks are not divided by two hosts
    ],
)
def test_a_layout_with_less_traffic_is_named(
    tp: int, stages: tuple[int, ...], placed: list[tuple[int, ...]], advice: str | None
) -> None:
    reasons: list[str] = []
    warnings: list[str] = []
    describe_traffic(SPEC, "bfloat16", tp, stages, placed, reasons, warnings)
    assert reasons[0].startswith("between hosts: ")
    assert len(warnings) == (advice is not None)
    if advice is not None:
        assert advice in warnings[0]


@pytest.mark.parametrize(
    ("link", "reason", "advice"),
    [
        (
            Link(50e-6, 1e9),
            "about 6.17 ms for 1 token on the",
            "it would be 2.00 KiB per token in 1 exchange per step, about 0.0582 ms",
        ),
        (Link(50e-6, 1e12), "about 5.7 ms for 1 token on the", "about 0.05 ms for 1 token on the measured links"),
    ],
)
def test_the_advice_has_the_measured_times(link: Link, reason: str, advice: str) -> None:
    step = MeasuredStep(HostLinks({(0, 1): link}), layers=(28,), stream_bytes=STREAM * 4, tokens=1)
    reasons: list[str] = []
    warnings: list[str] = []
    describe_traffic(SPEC, "bfloat16", 2, (28,), [(0,), (1,)], reasons, warnings, step)
    assert reason in reasons[0]
    assert advice in warnings[0]


def test_a_layout_that_is_no_faster_on_the_measured_links_is_not_advised() -> None:
    """Nodes on one host exchange tensors in no time."""
    step = MeasuredStep(HostLinks({(0, 1): Link(0.0, float("inf"))}), layers=(28,), stream_bytes=STREAM, tokens=1)
    warnings: list[str] = []
    describe_traffic(SPEC, "bfloat16", 2, (28,), [(0,), (1,)], [], warnings, step)
    assert warnings == []
