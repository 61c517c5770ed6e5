"""Plans: the decisions, what they depend on, and their reasons in the log."""

import itertools
import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import LLM
from shoal.comm.local import LocalComm
from shoal.config.engine_options import EngineOptions, from_environment
from shoal.devices import cuda
from shoal.devices.hardware import Hardware
from shoal.devices.numa import MemoryNode
from shoal.errors import ConfigError
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.registry import read_spec
from shoal.parallel.mesh import make_mesh
from shoal.parallel.topology import Topology
from shoal.planner.host_devices import discover
from shoal.planner.host_links import Measured
from shoal.planner.model_reader import ModelReader
from shoal.planner.placement import ReplicaHost
from shoal.planner.planner import Planner
from shoal.wire.plan import EnginePlan, Layout, ModelFiles, ReplicaPlace
from shoal.wire.topology import ClusterTopology, Device, DeviceLink, HostTopology
from shoal.worker.rank_model import RankModel
from support.checkpoints import SIZES
from support.gpus import pose_as_host_with
from support.plans import GIB, engine_plan, facts, host, planner_of, setup_of

Checkpoint = Callable[[str], Path]


def plan(folder: Path, hardware: Hardware | None = None, **options: Any) -> EnginePlan:
    return engine_plan(folder, None, hardware, **options)


def cost_shares(found: EnginePlan) -> tuple[float, ...]:
    return tuple(rank.cost_share for rank in found.ranks)


def cache_budgets(found: EnginePlan) -> tuple[int | None, ...]:
    return tuple(rank.kv_budget for rank in found.ranks)


def test_the_default_cache_lets_two_engines_fit_side_by_side(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    assert cache_budgets(plan(folder)) == (4 * GIB,)
    assert cache_budgets(plan(folder, tensor_parallel_size=2)) == (2 * GIB,) * 2
    assert cache_budgets(plan(folder, host(host_memory_available=5 * GIB))) == (2 * GIB,)


def test_device_memory_holds_weights_activations_cache_and_the_longest_context(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    for length in (None, 64):
        found = plan(folder, tensor_parallel_size=2, device_memory="8MiB", max_model_len=length)
        for rank, kv in zip(found.ranks, cache_budgets(found), strict=True):
            assert kv is not None
            tokens = kv // rank.block_bytes * 16
            needed = (
                rank.weight_bytes
                + rank.activation_bytes
                + kv
                + min(tokens, length or tokens) * rank.context_token_bytes
            )
            assert (
                8 * 2**20 - 16 * rank.context_token_bytes - rank.block_bytes
                < needed
                <= 8 * 2**20 + 16 * rank.context_token_bytes
            )
        assert found.ranks[0].weight_bytes > found.ranks[1].weight_bytes  # it has the larger share of 301 rows


def test_a_tied_head_is_counted_beside_its_embedding(checkpoint: Checkpoint) -> None:
    """On a CPU the head is packed, so it takes memory beside the embedding. Nothing stays mapped in the file."""
    folder = checkpoint("llama3")
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    table = 301 * 64 * 4
    assert 0.95 * on_disk < plan(folder).ranks[0].weight_bytes - table < on_disk  # the files have headers too
    assert plan(folder, dtype="bfloat16").ranks[0].weight_bytes == plan(folder).ranks[0].weight_bytes // 2


def loaded_bytes(found: EnginePlan) -> int:
    """Return the size of the weights that the first rank of a plan loads, in bytes."""
    model = RankModel(setup_of(found), make_mesh(Topology.of(), 0, lambda *_: LocalComm()))
    model.load(torch.device("cpu"))
    return model.weight_bytes


@pytest.mark.parametrize(
    ("said", "dtype", "load_format"),
    [
        ("float32", "auto", "auto"),
        ("float32", "bfloat16", "auto"),
        ("bfloat16", "auto", "auto"),  # the file has float32, whatever config.json says
        ("bfloat16", "float32", "auto"),
        ("float32", "auto", "dummy"),
    ],
)
def test_a_tied_embedding_is_counted_whatever_the_file_holds(
    checkpoint: Checkpoint, tmp_path: Path, said: str, dtype: str, load_format: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("llama3"), folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": said}))
    found = plan(folder, dtype=dtype, load_format=load_format)
    numbers = sum(math.prod(shape) for shape in open_checkpoint(folder).shapes.values())
    item = {"float32": 4, "bfloat16": 2}[found.dtype]
    assert found.ranks[0].weight_bytes == item * (numbers + 301 * 64)
    assert loaded_bytes(found) == found.ranks[0].weight_bytes


@pytest.mark.parametrize("options", [{"kv_cache_memory_bytes": "64GiB"}, {"device_memory": "64GiB"}])
def test_more_memory_than_the_host_has_is_refused(checkpoint: Checkpoint, options: Any) -> None:
    flag = "--" + next(iter(options)).replace("_", "-")
    with pytest.raises(ConfigError, match=f"more than this host has available: lower {flag}"):
        plan(checkpoint("llama"), **options)


def test_the_context_length_is_the_models_unless_the_cache_is_smaller(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    block = 2 * 3 * 16 * 4 * 8 * 4
    assert plan(folder).max_model_len == 256
    assert plan(folder, kv_cache_memory_bytes=5 * block).max_model_len == 80
    assert plan(folder, kv_cache_memory_bytes=5 * block, max_model_len=70).max_model_len == 70
    with pytest.raises(ConfigError, match=r"room for 80 tokens \(5 blocks of 16\), 1 fewer .* --max-model-len 81"):
        plan(folder, kv_cache_memory_bytes=5 * block, max_model_len=81)


def test_a_given_cache_size_overrides_device_memory(checkpoint: Checkpoint) -> None:
    found = plan(checkpoint("llama"), kv_cache_memory_bytes="1MiB", device_memory="64GiB")
    assert cache_budgets(found) == (2**20,)


def test_enforce_eager_records_no_steps(checkpoint: Checkpoint) -> None:
    assert [plan(checkpoint("llama"), enforce_eager=eager).record_steps for eager in (False, True)] == [True, False]


def test_the_executor_depends_on_the_number_of_ranks(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    assert plan(folder).executor == "uni"
    assert plan(folder, tensor_parallel_size=2).executor == "mp"
    assert plan(folder, distributed_executor_backend="mp").executor == "mp"


def test_more_ranks_than_cores_give_a_warning(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    assert not plan(folder, tensor_parallel_size=2).warnings
    (warning,) = plan(folder, tensor_parallel_size=3).warnings
    assert "3 ranks share 2 CPU cores" in warning


def test_gpus_are_not_shared(checkpoint: Checkpoint) -> None:
    gpus = host(device="cuda", device_memory=80 * GIB, devices_shareable=False)
    found = plan(checkpoint("llama"), gpus, tensor_parallel_size=2)
    assert cache_budgets(found) == (None, None)  # each rank measures
    with pytest.raises(ConfigError, match="needs 3 devices; this host has 2"):
        plan(checkpoint("llama"), gpus, tensor_parallel_size=3)
    with pytest.raises(ConfigError, match="threads can't move tensors between 2 GPUs"):
        plan(checkpoint("llama"), gpus, tensor_parallel_size=2, distributed_executor_backend="threads")
    small = host(device="cuda", device_memory=2**19, devices_shareable=False)
    with pytest.raises(ConfigError, match="--tensor-parallel-size"):
        plan(checkpoint("llama"), small)


# --- unequal ranks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "tp", "message"), [("2,1,1", 2, "3 shares.*is 2"), ("2", 3, "1 share, .*is 3")])
def test_a_split_without_a_share_for_each_rank_is_refused(
    checkpoint: Checkpoint, split: str, tp: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"--tensor-parallel-split {split} has {message}"):
        plan(checkpoint("llama"), tensor_parallel_split=split, tensor_parallel_size=tp)


def test_a_split_decides_what_each_rank_holds(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama")
    found = plan(folder, tensor_parallel_split="2,1,1", tensor_parallel_size=3)
    assert found.layout.tp_split == (2, 1, 1)
    first, second, third = found.ranks
    assert first.block_bytes == 2 * second.block_bytes == 2 * third.block_bytes
    # Every rank holds whole norms, and the 7 units of 16 columns cannot be divided exactly as 2:1:1.
    assert first.weight_bytes > second.weight_bytes >= third.weight_bytes > first.weight_bytes / 2
    (line,) = [reason for reason in found.reasons if reason.startswith("shares 2:1:1")]
    assert "4, 2, 2 query heads; 2, 1, 1 KV heads; 48, 32, 32 MLP columns" in line


@pytest.mark.parametrize(("name", "split"), [("llama", "2,1,1"), ("llama_6_2", None), ("gemma", "5,1,2")])
def test_every_rank_holds_the_same_blocks(checkpoint: Checkpoint, name: str, split: str | None) -> None:
    found = plan(checkpoint(name), tensor_parallel_split=split, tensor_parallel_size=3)
    budgets = [budget for budget in cache_budgets(found) if budget is not None]
    assert len({kv // rank.block_bytes for rank, kv in zip(found.ranks, budgets, strict=True)}) == 1
    assert 4 * GIB - 3 <= sum(budgets) <= 4 * GIB


def test_unequal_ranks_with_the_same_budget(checkpoint: Checkpoint) -> None:
    """The rank with the most weights has the least room. The host needs memory for the blocks that fit on every rank,
    which is less than the sum of the budgets."""
    options: Any = {"tensor_parallel_split": "2,1,1", "tensor_parallel_size": 3}
    found = plan(checkpoint("llama"), device_memory="16MiB", **options)
    blocks = [(kv or 0) // rank.block_bytes for rank, kv in zip(found.ranks, cache_budgets(found), strict=True)]
    assert 0 < blocks[0] < min(blocks[1:])
    large = plan(checkpoint("llama"), host(host_memory_available=3 * GIB), kv_cache_memory_bytes="1.4GiB", **options)
    assert cache_budgets(large) == (int(1.4 * GIB),) * 3  # two of the ranks use half of it
    with pytest.raises(ConfigError, match="3 ranks need 3"):
        plan(checkpoint("llama"), host(host_memory_available=3 * GIB), kv_cache_memory_bytes="1.6GiB", **options)


# --- stages and replicas ------------------------------------------------------------------------------------------


def test_stages_cost_about_the_same(checkpoint: Checkpoint) -> None:
    """The head has 301 x 64 weights, which count for a third; a layer has about 37,000."""
    found = plan(checkpoint("llama"), pipeline_parallel_size=2)
    assert found.layout == Layout(stages=(2, 1))
    assert (found.executor, found.max_in_flight, len(found.ranks)) == ("mp", 3, 2)
    assert "2 stages of 2,1 layers: so that they cost about the same" in found.reasons
    assert sum(cost_shares(found)) == pytest.approx(1)
    first, second = cost_shares(found)
    assert first > second > 0.36


def test_a_last_stage_with_an_expensive_head_gets_fewer_layers(tmp_path: Path) -> None:
    """A tied embedding makes no difference, because rows of it are only looked up."""
    sizes = {**SIZES, "num_hidden_layers": 7, "vocab_size": 3 * 2 * 37000 // 64}
    for tied in (True, False):
        folder = tmp_path / str(tied)
        folder.mkdir()
        config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": tied, **sizes}
        (folder / "config.json").write_text(json.dumps(config))
        found = plan(folder, pipeline_parallel_size=3, load_format="dummy")
        assert found.layout.stages == (3, 3, 1)
        asked = plan(folder, pipeline_parallel_size=3, load_format="dummy", pipeline_layer_partition="2,2,3")
        assert asked.layout.stages == (2, 2, 3)
        assert "3 stages of 2,2,3 layers: as --pipeline-layer-partition asks" in asked.reasons
        assert cost_shares(asked)[2] > 0.5


def test_the_partition_may_be_given_by_the_environment(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,2")
    options = {**from_environment(), "pipeline_parallel_size": 2}
    assert plan(checkpoint("llama"), **options).layout.stages == (1, 2)
    monkeypatch.setenv("SHOAL_PIPELINE_LAYER_PARTITION", "2,1")
    options = {**from_environment(), "pipeline_parallel_size": 2}
    assert plan(checkpoint("llama"), **options).layout.stages == (2, 1)


def test_cost_shares_depend_on_the_split(checkpoint: Checkpoint) -> None:
    options: Any = {"tensor_parallel_size": 2, "tensor_parallel_split": "3,1", "pipeline_parallel_size": 3}
    found = plan(checkpoint("llama"), **options)
    assert len(cost_shares(found)) == 6
    for stage in range(3):
        more, less = cost_shares(found)[2 * stage : 2 * stage + 2]
        assert 2 < more / less < 4


def test_each_of_four_ranks_holds_at_most_a_third(tmp_path: Path) -> None:
    """Weights and a KV cache of the same number of blocks, for a model whose layers are most of its weights."""
    config = {**SIZES, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = plan(tmp_path, load_format="dummy").ranks[0]
    parts = plan(tmp_path, load_format="dummy", tensor_parallel_size=2, pipeline_parallel_size=2).ranks
    blocks = 1000
    assert len(parts) == 4
    assert all(
        part.weight_bytes + blocks * part.block_bytes <= 0.33 * (whole.weight_bytes + blocks * whole.block_bytes)
        for part in parts
    )
    assert sum(part.block_bytes for part in parts) == whole.block_bytes


def test_replicas_share_the_hosts_memory_and_cores(checkpoint: Checkpoint) -> None:
    options: Any = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    hardware = host(cores=tuple(range(10, 21)), num_devices=11)
    for_all = plan(checkpoint("llama"), hardware, data_parallel_size=2, **options)
    assert for_all.place == ReplicaPlace(size=2, local_size=2)
    alone = plan(checkpoint("llama"), hardware, **options)
    assert alone.place == ReplicaPlace()
    assert cache_budgets(for_all) == tuple((budget or 0) // 2 for budget in cache_budgets(alone))
    assert "2 x 2 x 2 = 8 ranks on 11 CPU cores" in for_all.reasons

    cores: list[int] = []
    five = host(cores=tuple(range(10, 21)), num_devices=11, host_memory_available=5 * GIB)
    planner = planner_of(checkpoint("llama"), hardware=five, data_parallel_size=2, **options)
    for number in range(2):
        found = planner.plan(ReplicaPlace(rank=number, size=2, local_rank=number, local_size=2))
        assert GIB - 4 <= sum(budget or 0 for budget in cache_budgets(found)) <= GIB
        assert found.layout.replica == number
        cores += [core for rank in found.ranks for core in rank.cores]
    assert cores == list(range(10, 21))


def test_an_added_replica_has_a_cache_as_large_as_the_others(checkpoint: Checkpoint) -> None:
    """A new share of the host's memory would be smaller. It is used only if there is no room for the same size."""
    for available, same in ((20 * GIB, True), (9 * GIB, False)):
        planner = planner_of(checkpoint("llama"), hardware=host(host_memory_available=available))
        (first,) = cache_budgets(planner.first_plan)
        (added,) = cache_budgets(planner.plan(ReplicaPlace(2, 3, local_rank=2, local_size=3)))
        assert first is not None
        assert added is not None
        assert (added == first) == same
        assert added <= first


@pytest.mark.parametrize(("given", "dtype"), [("half", "float16"), ("float", "float32"), ("bfloat16", "bfloat16")])
def test_other_names_of_types_are_understood(checkpoint: Checkpoint, given: str, dtype: str) -> None:
    assert plan(checkpoint("llama"), dtype=given).dtype == dtype


def test_cpu_cores_are_divided_among_ranks(checkpoint: Checkpoint) -> None:
    def cores(given: Any, *, local_rank: int = 0, **options: Any) -> tuple[tuple[int, ...], ...]:
        options |= {"tensor_parallel_size": 2, "cpu_cores": given}
        place = ReplicaPlace(rank=local_rank, size=2, local_rank=local_rank, local_size=2)
        eight = host(cores=tuple(range(8)), num_devices=8)
        return tuple(rank.cores for rank in engine_plan(checkpoint("llama"), place, eight, **options).ranks)

    assert cores("auto", local_rank=1) == ((4, 5), (6, 7))
    assert cores("2-5", local_rank=1) == ((4,), (5,))
    assert cores("0|1,3|2|4-6", local_rank=0) == ((0,), (1, 3))
    assert cores("0|1,3|2|4-6", local_rank=1) == ((2,), (4, 5, 6))
    assert cores([[7], [6], [5], [4]], local_rank=1) == ((5,), (4,))
    with pytest.raises(ConfigError, match="--cpu-cores has 2 lists, but this host runs 4 ranks"):
        cores("0|1")
    with pytest.raises(ConfigError, match="names 8, 9, which this process may not use"):
        cores("6-9")


def test_nobind_does_not_bind_ranks_to_cores(checkpoint: Checkpoint) -> None:
    two = {"tensor_parallel_size": 2}
    bound, free = (plan(checkpoint("llama"), host(), **options) for options in (two, {**two, "cpu_cores": "nobind"}))
    assert [rank.cores for rank in bound.ranks] == [rank.cores for rank in free.ranks] == [(0,), (1,)]
    assert bound.bind_cores
    assert not free.bind_cores


def test_vllms_variable_for_the_cache_size(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("llama")
    default = cache_budgets(plan(folder))
    for text, wanted in (("0", default), ("", default), ("1", (GIB,)), ("0.5", (GIB // 2,))):
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", text)
        assert cache_budgets(plan(folder)) == wanted
    assert cache_budgets(plan(folder, tensor_parallel_size=2)) == (GIB // 2,) * 2
    assert cache_budgets(plan(folder, kv_cache_memory_bytes="2MiB")) == (2**21,)
    gpu = host(device="cuda", device_memory=80 * GIB)
    assert cache_budgets(plan(folder, gpu)) == (None,)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100")
    with pytest.raises(ConfigError, match="lower VLLM_CPU_KVCACHE_SPACE"):
        plan(folder)
    for text in ("-1", "4GiB", "nan", "1e9"):
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", text)
        with pytest.raises(ConfigError, match="VLLM_CPU_KVCACHE_SPACE must be a number of GiB"):
            plan(folder)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_host_without_replicas_needs_no_memory_for_them(checkpoint: Checkpoint, device: str) -> None:
    small = host(device=device, host_memory_available=1, device_memory=1, num_devices=1, devices_shareable=False)
    options = {"tensor_parallel_size": 2, "data_parallel_size": 2}
    with pytest.raises(ConfigError):
        engine_plan(checkpoint("llama"), ReplicaPlace(size=2), small, **options)
    place = ReplicaPlace(size=2, local_size=0)
    planner = planner_of(checkpoint("llama"), place, small, **options)
    found = planner.first_plan
    assert found.max_model_len == planner.model.spec.max_positions
    assert set(cache_budgets(found)) == {None}
    assert engine_plan(checkpoint("llama"), place, small, max_model_len=7, **options).max_model_len == 7


def test_each_replica_needs_memory(checkpoint: Checkpoint) -> None:
    options: Any = {"device_memory": "3GiB", "data_parallel_size": 2}
    assert cache_budgets(plan(checkpoint("llama"), host(host_memory_available=6 * GIB), **options))
    with pytest.raises(ConfigError, match=r"2 ranks need 6.00 GiB .* 1.00 GiB more than this host"):
        plan(checkpoint("llama"), host(host_memory_available=5 * GIB), **options)


def test_ranks_of_all_replicas_are_counted(checkpoint: Checkpoint) -> None:
    three: Any = {"tensor_parallel_size": 2, "pipeline_parallel_size": 3, "data_parallel_size": 4}
    (warning,) = plan(checkpoint("llama"), **three).warnings
    assert "2 x 3 x 4 = 24 ranks share 2 CPU cores" in warning
    gpus = host(device="cuda", num_devices=8, device_memory=80 * GIB, devices_shareable=False)
    with pytest.raises(
        ConfigError,
        match=r"--tensor-parallel-size 2 x --pipeline-parallel-size 3 x --data-parallel-size 4 needs 2 x 3 x 4 = 24 "
        r"devices; this host has 8 \(cuda\)",
    ):
        plan(checkpoint("llama"), gpus, **three)
    assert len(plan(checkpoint("llama"), gpus, tensor_parallel_size=2, data_parallel_size=4).ranks) == 2


def test_a_replica_on_gpus_has_its_own(checkpoint: Checkpoint) -> None:
    visible = ("7", "6", "5", "4")
    gpus = host(device="cuda", num_devices=4, device_memory=80 * GIB, devices_shareable=False, visible=visible)
    place = ReplicaPlace(rank=1, size=2, local_rank=1, local_size=2)
    found = engine_plan(checkpoint("llama"), place, gpus, pipeline_parallel_size=2)
    assert [reason for reason in found.reasons if "cuda:" in reason] == [
        "rank 0 on cuda:2 (CUDA_VISIBLE_DEVICES entry 5)",
        "rank 1 on cuda:3 (CUDA_VISIBLE_DEVICES entry 4)",
    ]


def crossed(name: str = "here") -> Measured:
    """Return a measured host with four GPUs, of which 0 and 2 have NVLink, and so have 1 and 3."""
    pairs = itertools.combinations(range(4), 2)
    links = tuple(
        DeviceLink(first=i, second=j, kind="nvlink" if j == i + 2 else "pcie", path="NV4" if j == i + 2 else "SYS")
        for i, j in pairs
    )
    known = HostTopology(name=name, devices=tuple(Device(index=i) for i in range(4)), links=links)
    return Measured(ClusterTopology(hosts=(known,)), "--topology FILE")


def measured_plan(folder: Path, hardware: Hardware, measured: Measured, **options: Any) -> EnginePlan:
    parsed = EngineOptions.from_flat(str(folder), options)
    reader = ModelReader(parsed.model_options, ModelFiles(str(folder)))
    size = parsed.parallel.data_parallel_size
    place = ReplicaPlace(size - 1, size, local_rank=size - 1, local_size=size)
    return Planner(reader, [ReplicaHost(parsed, facts(hardware))], place, measured=measured).first_plan


@pytest.mark.parametrize(
    ("layout", "devices"),
    [
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, [0, 2, 1, 3]),
        ({"tensor_parallel_size": 2, "data_parallel_size": 2}, [1, 3]),  # of the second replica
        ({"tensor_parallel_size": 4}, [0, 1, 2, 3]),
        ({"pipeline_parallel_size": 3}, [0, 1, 2]),
    ],
)
def test_the_ranks_of_a_group_get_the_devices_with_the_fastest_links(
    checkpoint: Checkpoint, layout: dict[str, int], devices: list[int]
) -> None:
    gpus = host(device="cuda", num_devices=4, device_memory=80 * GIB, devices_shareable=False)
    found = measured_plan(checkpoint("llama"), gpus, crossed(), **layout)
    assert [rank.device_index for rank in found.ranks] == devices
    told = "here: ranks take the devices 0,2,1,3, so that groups have the fastest links" in found.reasons
    assert told == (2 in layout.values() and len(layout) == 2)


def test_devices_that_were_not_measured_keep_their_order(checkpoint: Checkpoint) -> None:
    gpus = host(device="cuda", num_devices=8, device_memory=80 * GIB, devices_shareable=False)
    found = measured_plan(checkpoint("llama"), gpus, crossed(), tensor_parallel_size=2)
    assert [rank.device_index for rank in found.ranks] == [0, 1]
    assert "here has 8 devices, and was measured with 4: the links between them are not used" in found.warnings


def test_the_cores_of_a_rank_are_of_one_numa_node(checkpoint: Checkpoint) -> None:
    nodes = tuple(MemoryNode(node, tuple(range(node, 8, 2))) for node in range(2))
    cores = host(num_devices=8, cores=tuple(range(8)), nodes=nodes)
    found = plan(checkpoint("llama"), cores, tensor_parallel_size=4)
    assert [rank.cores for rank in found.ranks] == [(0, 2), (4, 6), (1, 3), (5, 7)]
    assert [rank.numa_node for rank in found.ranks] == [0, 0, 1, 1]
    near = "rank 0 on node 0, rank 1 on node 0, rank 2 on node 1, rank 3 on node 1"
    assert f"here: cores and memory by NUMA node: {near}" in found.reasons
    found = plan(checkpoint("llama"), cores, tensor_parallel_size=2, cpu_cores="0,2,4|1,3,6")
    assert [rank.numa_node for rank in found.ranks] == [0, None]
    assert "here: cores and memory by NUMA node: rank 0 on node 0, rank 1 on no single node" in found.reasons
    found = plan(checkpoint("llama"), cores, tensor_parallel_size=2, cpu_cores="nobind")
    assert [rank.numa_node for rank in found.ranks] == [None, None]


def test_each_replica_of_a_host_has_its_own_node(checkpoint: Checkpoint) -> None:
    nodes = tuple(MemoryNode(node, tuple(range(4 * node, 4 * node + 4))) for node in range(2))
    cores = host(num_devices=8, cores=tuple(range(8)), nodes=nodes)
    planner = planner_of(checkpoint("llama"), hardware=cores, data_parallel_size=2)
    second = planner.plan(ReplicaPlace(1, 2, local_rank=1, local_size=2))
    assert [(rank.cores, rank.numa_node) for rank in second.ranks] == [((4, 5, 6, 7), 1)]


def test_a_topology_of_other_hosts_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(
        ConfigError, match=r"--topology FILE is of other hosts: it has there, and this .* runs on here;"
    ):
        measured_plan(checkpoint("llama"), host(), crossed("there"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 4}, "4 is more than the model's 3 layers.*use --pipeline-parallel-size 3 or less"),
        (
            {"pipeline_parallel_size": 2, "pipeline_layer_partition": "2,2"},
            "2,2 has 4 layers, but the model has 3: the numbers must sum to 3",
        ),
        (
            {"pipeline_parallel_size": 2, "pipeline_layer_partition": "1,1,1"},
            "1,1,1 has 3 stages, but --pipeline-parallel-size is 2: .* or use --pipeline-parallel-size 3",
        ),
        ({"pipeline_layer_partition": "3,1"}, "3,1 has 2 stages, but --pipeline-parallel-size is 1"),
        ({"enable_expert_parallel": True}, "--enable-expert-parallel: a llama model has no experts"),
        ({"distributed_executor_backend": "uni", "pipeline_parallel_size": 2}, "uni runs one rank, not 2"),
        ({"distributed_executor_backend": "uni", "data_parallel_size": 3}, "uni runs one rank, not 3"),
    ],
)
def test_impossible_layouts_are_refused(checkpoint: Checkpoint, tmp_path: Path, options: Any, message: str) -> None:
    """They are refused before the weights are read; this folder has none."""
    shutil.copy(checkpoint("llama") / "config.json", tmp_path)
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path, **options)


def model_of(folder: Path, layers: int) -> Path:
    """Write the configuration of a Llama without weights. Its head costs a sixth of a layer."""
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("tp", [1, 2])
def test_a_last_stage_with_a_draft_model_gets_fewer_layers(tmp_path: Path, tp: int) -> None:
    """The draft model has one layer, and a head that costs a sixth of one. It makes one pass without the head, and one
    with it for each of two drafts: three layers and a third."""
    large, small = model_of(tmp_path / "large", 8), model_of(tmp_path / "small", 1)
    options: Any = {"pipeline_parallel_size": 2, "load_format": "dummy", "tensor_parallel_size": tp}
    assert plan(large, **options).layout.stages == (4, 4)
    speculative = {"model": str(small), "num_speculative_tokens": 2}
    found = with_draft(large, small, speculative_config=speculative, **options)
    assert found.layout.stages == (6, 2)
    assert "2 stages of 6,2 layers: so that they cost about the same, with the draft model on the last one" in (
        found.reasons
    )
    assert sum(cost_shares(found)) == pytest.approx(1)
    assert sum(cost_shares(found)[:tp]) == pytest.approx(6 / 11.5, abs=0.01)
    asked = with_draft(large, small, speculative_config=speculative, pipeline_layer_partition="4,4", **options)
    assert asked.layout.stages == (4, 4)
    assert sum(cost_shares(asked)[:tp]) == pytest.approx(4 / 11.5, abs=0.01)


def test_fewer_steps_in_flight_than_stages_give_a_warning(checkpoint: Checkpoint) -> None:
    options: Any = {"pipeline_parallel_size": 2}
    (warning,) = plan(checkpoint("llama"), max_in_flight=1, **options).warnings
    assert warning == (
        "--max-in-flight 1 lets only 1 of 2 pipeline stages compute at a time, the others wait: use --max-in-flight 3, "
        "or leave it out"
    )
    assert not plan(checkpoint("llama"), max_in_flight=2, **options).warnings
    assert not plan(checkpoint("llama"), max_in_flight=1).warnings


def test_a_draft_model_is_on_the_last_stage(checkpoint: Checkpoint) -> None:
    plain = plan(checkpoint("llama"), pipeline_parallel_size=2)
    small = plan(checkpoint("mistral"))
    both = with_draft(checkpoint("llama"), checkpoint("mistral"), pipeline_parallel_size=2)
    assert both.ranks[0].shard == plain.ranks[0].shard
    assert both.ranks[0].draft_shard is None
    assert both.ranks[1].draft_shard is not None
    assert (both.ranks[0].weight_bytes, both.ranks[0].block_bytes) == (
        plain.ranks[0].weight_bytes,
        plain.ranks[0].block_bytes,
    )
    assert both.ranks[1].weight_bytes == plain.ranks[1].weight_bytes + small.ranks[0].weight_bytes
    assert both.ranks[1].block_bytes == plain.ranks[1].block_bytes + small.ranks[0].block_bytes


# --- mixtures of experts ------------------------------------------------------------------------------------------


def experts_of(found: EnginePlan) -> list[int | None]:
    """Return how many whole experts each rank holds; None for a rank with a part of every expert."""
    return [None if rank.shard.experts is None else len(rank.shard.experts) for rank in found.ranks]


def replica(folder: Path, rank: int, size: int, **options: Any) -> EnginePlan:
    return engine_plan(folder, ReplicaPlace(rank=rank, size=size, local_rank=rank, local_size=size), **options)


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
def test_experts_are_placed_on_a_stages_ranks_over_all_replicas(checkpoint: Checkpoint, strategy: str) -> None:
    folder = checkpoint("mixtral")
    options: Any = {"enable_expert_parallel": True, "expert_placement_strategy": strategy, "tensor_parallel_size": 3}
    options["pipeline_parallel_size"] = 2
    replicas = [replica(folder, rank, 2, **options) for rank in range(2)]
    moe = read_spec(folder).moe
    assert moe is not None
    for stage in range(2):
        held = [
            expert
            for found in replicas
            for rank in found.ranks[3 * stage : 3 * stage + 3]
            for expert in rank.shard.experts or ()
        ]
        assert sorted(held) == list(range(moe.num_experts))
    assert {found.executor for found in replicas} == {"mp"}
    assert all(found.all2all for found in replicas)


def test_a_single_replica_has_all_experts(checkpoint: Checkpoint) -> None:
    folder = checkpoint("mixtral")
    cut = plan(folder, tensor_parallel_size=2)
    assert experts_of(cut) == [None, None]
    whole = plan(folder, tensor_parallel_size=2, enable_expert_parallel=True)
    moe = read_spec(folder).moe
    assert moe is not None
    assert experts_of(whole) == [-(-moe.num_experts // 2), moe.num_experts // 2]
    assert whole.all2all == ""


def test_replicas_that_share_experts_have_ranks_in_processes(checkpoint: Checkpoint) -> None:
    folder = checkpoint("mixtral")
    assert replica(folder, 0, 2).executor == "uni"
    assert replica(folder, 0, 2, enable_expert_parallel=True).executor == "mp"
    with pytest.raises(ConfigError, match="uni runs one rank, not 2"):
        replica(folder, 0, 2, enable_expert_parallel=True, distributed_executor_backend="uni")


def test_auto_chooses_the_all2all_backend_that_sends_less(checkpoint: Checkpoint) -> None:
    """Each token needs three of five experts: both of two ranks for most tokens, but only a few of eight."""
    few = replica(checkpoint("mixtral"), 0, 2, enable_expert_parallel=True)
    many = replica(checkpoint("mixtral"), 0, 8, enable_expert_parallel=True)
    assert (few.all2all, many.all2all) == ("allgather_reducescatter", "all_to_all")
    for found in (few, many):
        assert any(reason.startswith(f"all2all backend {found.all2all}: 3 experts") for reason in found.reasons)
    asked = replica(checkpoint("mixtral"), 0, 8, enable_expert_parallel=True, all2all_backend="allgather_reducescatter")
    assert asked.all2all == "allgather_reducescatter"


def test_flags_of_experts_without_effect_give_a_warning(checkpoint: Checkpoint) -> None:
    dense, mixture = checkpoint("llama"), checkpoint("mixtral")
    for folder in (dense, mixture):
        (warning,) = plan(folder, expert_placement_strategy="round_robin").warnings
        assert "--expert-placement-strategy round_robin changes nothing without --enable-expert-parallel" in warning
        (warning,) = plan(folder, all2all_backend="all_to_all").warnings
        assert "--all2all-backend all_to_all changes nothing without --enable-expert-parallel" in warning
    (warning,) = plan(mixture, all2all_backend="all_to_all", enable_expert_parallel=True).warnings
    assert "--all2all-backend all_to_all changes nothing with one replica" in warning
    assert not replica(mixture, 0, 2, all2all_backend="all_to_all", enable_expert_parallel=True).warnings


# --- a draft model ------------------------------------------------------------------------------------------------


def with_draft(folder: Path, draft: Path, **options: Any) -> EnginePlan:
    options = {"speculative_config": {"model": str(draft), "num_speculative_tokens": 3}, **options}
    parsed = EngineOptions.from_flat(str(folder), options)
    reader = ModelReader(parsed.model_options, ModelFiles(str(folder), str(draft)))
    return Planner(reader, [ReplicaHost(parsed, facts())], ReplicaPlace()).first_plan


def test_a_draft_model_is_counted(checkpoint: Checkpoint) -> None:
    large, small = plan(checkpoint("llama")), plan(checkpoint("mistral"))
    both = with_draft(checkpoint("llama"), checkpoint("mistral"))
    assert both.draft is not None
    assert both.draft.folder == str(checkpoint("mistral"))
    (rank,) = both.ranks
    assert rank.weight_bytes == large.ranks[0].weight_bytes + small.ranks[0].weight_bytes
    assert rank.block_bytes == large.ranks[0].block_bytes + small.ranks[0].block_bytes
    assert rank.activation_bytes >= large.ranks[0].activation_bytes + small.ranks[0].activation_bytes


def test_drafts_need_rows_of_logits_too(checkpoint: Checkpoint) -> None:
    """The step has so many rows that the logits are the fullest moment."""
    options: Any = {"max_num_seqs": 512, "max_num_batched_tokens": 2048}
    ngram = {"method": "ngram", "num_speculative_tokens": 3}
    alone = plan(checkpoint("llama"), **options).ranks[0].activation_bytes
    assert plan(checkpoint("llama"), speculative_config=ngram, **options).ranks[0].activation_bytes > alone


def test_a_draft_model_must_fit_the_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocabulary of 259 tokens, but the model has one of 301"):
        with_draft(checkpoint("llama"), checkpoint("qwen3"))
    shorter = tmp_path / "shorter"
    shutil.copytree(checkpoint("llama"), shorter)
    config = json.loads((shorter / "config.json").read_text())
    (shorter / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100}))
    with pytest.raises(ConfigError, match="--max-model-len 101 is more than the draft model's 100 positions"):
        with_draft(checkpoint("llama"), shorter, max_model_len=101)
    found = with_draft(checkpoint("llama"), shorter)
    assert found.max_model_len == 100
    assert "max_model_len 100, not the model's 256: the draft model has no more" in found.reasons


# --- visible GPUs -------------------------------------------------------------------------------------------------


def test_ranks_get_visible_gpus(checkpoint: Checkpoint) -> None:
    visible: dict[str, Any] = {"visible_devices": "3,GPU-ab,9", "visible": ("3", "GPU-ab")}
    gpus = host(device="cuda", device_memory=80 * GIB, devices_shareable=False, **visible)
    found = plan(checkpoint("llama"), gpus, tensor_parallel_size=2)
    assert "rank 0 on cuda:0 (CUDA_VISIBLE_DEVICES entry 3)" in found.reasons
    assert "rank 1 on cuda:1 (CUDA_VISIBLE_DEVICES entry GPU-ab)" in found.reasons
    with pytest.raises(ConfigError, match=r"has 2 \(cuda\) under CUDA_VISIBLE_DEVICES='3,GPU-ab,9'"):
        plan(checkpoint("llama"), gpus, tensor_parallel_size=3)


@pytest.mark.slow
def test_a_host_with_all_gpus_hidden_has_cpus_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "torch_has_cuda", lambda: True)
    pose_as_host_with("0, GPU-aa, 81559", tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert discover(EngineOptions.from_flat(None, {})).device == "cpu"
    with pytest.raises(ConfigError, match="shows no CUDA device under CUDA_VISIBLE_DEVICES='-1'; use --device cpu"):
        discover(EngineOptions.from_flat(None, {"device": "cuda"}))


def test_the_log_of_a_start_says_what_each_rank_holds(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "shoal")
    folder = checkpoint("llama_6_2")
    block = 2 * 3 * 16 * 2 * 24 * 4  # bytes on the middle rank, which needs both KV heads and so has the least room
    options: Any = {"tensor_parallel_size": 3, "distributed_executor_backend": "threads", "max_model_len": 100}
    with LLM(str(folder), kv_cache_memory_bytes=20 * block, **options) as llm:
        assert llm.stats().num_blocks == 20
    lines = [record.getMessage() for record in caplog.records]
    assert "KV cache: 20 blocks x 16 = 320 tokens, 3.2 requests of 100" in lines
    assert "rank 1 has the least room: all ranks use its 20 KV blocks" in lines
    for rank, kv_heads in enumerate([1, 2, 1]):
        assert any(f"tp {rank} of 3, layers 0-2, 2 query and {kv_heads} KV heads" in line for line in lines)
    (ready,) = [line for line in lines if line.startswith("engine ready in")]
    assert all(phase in ready for phase in ("connect", "load", "profile", "allocate", "warm_up"))
