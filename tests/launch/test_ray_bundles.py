"""How the ranks of a replica are put into bundles of a Ray cluster. Nothing of Ray is needed."""

import pytest

from shoal import env
from shoal.config.option_forms import parse_placement, parse_resources
from shoal.errors import ConfigError
from shoal.launch.ray.bundles import (
    ClusterNode,
    bundle_sizes,
    check_resources,
    check_totals,
    own_share,
    ranks_of_bundles,
    ranks_that_fit,
)

GPU = {"GPU": 1.0}


def cluster(*gpus: float) -> list[ClusterNode]:
    return [
        ClusterNode(f"id{i}", f"10.0.0.{i}", {"GPU": count, "CPU": 8.0}, {"GPU": count}) for i, count in enumerate(gpus)
    ]


@pytest.mark.parametrize(
    ("gpus", "tp", "stages", "wanted", "sizes"),
    [
        ((8, 8), 4, 2, "auto", [8]),  # one node has room for all
        ((4, 4), 4, 2, "auto", [4, 4]),
        ((4, 4), 2, 4, "auto", [4, 4]),  # two stages per node
        ((4, 2), 2, 3, "auto", [4, 2]),
        ((3, 3), 2, 2, "auto", [2, 2]),  # a group is not cut
        ((2, 2), 4, 1, "auto", [2, 2]),  # no node has room for a group
        ((2, 2), 3, 1, "auto", [2, 1]),
        ((4, 4), 4, 2, "tp-across", [4, 4]),
        ((4, 4), 3, 2, "tp-across", [4, 2]),  # two of three ranks of each group on the first host
        ((4, 4), 2, 1, "tp-across", [1, 1]),
        ((4, 4), 4, 1, "0=0-2|1=3", [3, 1]),
    ],
)
def test_bundles_follow_the_placement(
    gpus: tuple[float, ...], tp: int, stages: int, wanted: str, sizes: list[int]
) -> None:
    placement = parse_placement(wanted, "--placement")
    assert bundle_sizes(cluster(*gpus), GPU, tp=tp, stages=stages, wanted=placement) == sizes


def test_a_rank_may_take_a_part_of_a_device_or_several_resources() -> None:
    assert ranks_that_fit({"GPU": 1.0}, parse_resources('{"GPU": 0.1}', "--ray-resources")) == 10
    assert ranks_that_fit({"GPU": 4.0, "CPU": 3.0}, {"GPU": 1.0, "CPU": 1.0}) == 3
    assert ranks_that_fit({"GPU": 4.0}, {"accelerator": 1.0}) == 0


def test_ranks_that_take_a_part_of_a_gpu_have_a_bundle_each() -> None:
    """Two of them in one bundle would get the same GPU."""
    part = {"GPU": 0.6, "slot": 0.5}
    nodes = [ClusterNode("a", "10.0.0.1", {"GPU": 2.0, "slot": 4.0}, {}), ClusterNode("b", "10.0.0.2", {}, {})]
    assert bundle_sizes(nodes, part, tp=2, stages=2, wanted="auto") == [1, 1, 1, 1]
    assert ranks_that_fit({"GPU": 3.0, "slot": 8.0}, part) == 3  # what is left of three GPUs has no room for two more
    assert ranks_that_fit({"GPU": 3.0, "slot": 1.0}, part) == 2
    assert ranks_that_fit({"GPU": 2.7, "slot": 8.0}, part) == 3
    check_totals(nodes, part, [1, 1])
    with pytest.raises(ConfigError, match=r"3 ranks need 1.8 GPU, 1.5 slot in bundles of 1 \+ 1 \+ 1 ranks"):
        check_totals(nodes, part, [1, 1, 1])
    for placement in ("tp-across", "10.0.0.1=0|10.0.0.2=1"):
        wanted = parse_placement(placement, "--placement")
        with pytest.raises(ConfigError, match=r"each rank takes 0.6 GPU, so Ray decides where it runs"):
            bundle_sizes(nodes, part, tp=2, stages=1, wanted=wanted)


def test_ranks_that_take_a_part_of_a_gpu_are_alone_in_bundles_of_others() -> None:
    bundles = [{"GPU": 1.0}, {"GPU": 1.0}]
    assert ranks_of_bundles(bundles, {"GPU": 0.5}, 2, {}) == {0: 1, 1: 1}


def test_the_part_of_a_gpu_may_come_from_the_variable_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.ray_gpus_per_rank() is None
    monkeypatch.setenv("VLLM_RAY_PER_WORKER_GPUS", "0.4")
    assert env.ray_gpus_per_rank() == 0.4
    for text in ("0", "-1", "half", "nan", "inf"):
        monkeypatch.setenv("VLLM_RAY_PER_WORKER_GPUS", text)
        with pytest.raises(ConfigError, match="VLLM_RAY_PER_WORKER_GPUS must be a number of GPUs above 0"):
            env.ray_gpus_per_rank()


def test_more_than_one_gpu_for_a_rank_must_be_whole() -> None:
    for good in (0.25, 1.0, 2.0):
        check_resources({"GPU": good, "CPU": 1.5})
    with pytest.raises(ConfigError, match=r"a part of one GPU, or whole GPUs, but not 1.5"):
        check_resources({"GPU": 1.5})


@pytest.mark.parametrize("text", ["{}", "[1]", '{"GPU": 0}', '{"GPU": -1}', '{"GPU": "1"}', '{"GPU": true}', "GPU"])
def test_resources_in_another_form_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--ray-resources"):
        parse_resources(text, "--ray-resources")


def test_a_cluster_that_is_too_small_is_refused_with_the_arithmetic() -> None:
    check_totals(cluster(4, 4), GPU, [4, 4])
    with pytest.raises(ConfigError, match=r"8 ranks need 8 GPU in bundles of 4 \+ 4 ranks, and the Ray cluster has 10"):
        check_totals(cluster(4, 3), GPU, [4, 4])
    with pytest.raises(ConfigError, match=r"no node of the Ray cluster has 1 TPU for a rank: 10.0.0.0: 4 GPU, 8 CPU"):
        bundle_sizes(cluster(4), {"TPU": 1.0}, tp=1, stages=1, wanted="auto")
    with pytest.raises(ConfigError, match="no nodes"):
        bundle_sizes([], GPU, tp=1, stages=1, wanted="auto")


def test_a_given_placement_group_is_filled_in_order() -> None:
    bundles = [{"CPU": 1.0}, {"GPU": 2.0}, {"GPU": 2.0}, {"GPU": 2.0}]
    assert ranks_of_bundles(bundles, GPU, 3, {}) == {1: 2, 2: 1}
    with pytest.raises(ConfigError, match=r"8 ranks need 8 GPU, but the placement group of this process has"):
        ranks_of_bundles(bundles, GPU, 8, {})


def test_what_the_own_process_uses_of_a_given_group_is_not_free() -> None:
    own = own_share(
        {"CPU_group_0_ab12": 1.0, "CPU_group_ab12": 1.0, "bundle_group_0_ab12": 0.001, "node:10.0.0.1": 0.1}
    )
    assert own == {0: {"CPU": 1.0}}
    assert ranks_of_bundles([{"CPU": 2.0}, {"CPU": 2.0}], {"CPU": 1.0}, 3, own) == {0: 1, 1: 2}
