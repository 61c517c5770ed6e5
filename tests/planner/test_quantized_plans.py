"""Plans with quantized weights: what is refused, and what the log says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from planner.test_planner import with_draft
from shoal.comm.local import LocalComm
from shoal.config.engine_options import EngineOptions
from shoal.config.option_forms import Quantization
from shoal.errors import ConfigError
from shoal.kernels.weight_format import INT4, INT8, QUANTIZATIONS
from shoal.models.implementation import params_of, rank_shards
from shoal.models.registry import read_spec
from shoal.parallel.mesh import make_mesh
from shoal.parallel.topology import Topology
from shoal.wire.plan import Layout
from shoal.worker.rank_model import RankModel
from support.plans import GIB, engine_plan, host, setup_of

Checkpoint = Callable[[str], Path]


def test_gpus_are_refused(checkpoint: Checkpoint) -> None:
    gpu = host(device="cuda", device_memory=80 * GIB)
    with pytest.raises(ConfigError) as caught:
        engine_plan(checkpoint("llama"), None, gpu, quantization="int8")
    assert str(caught.value) == (
        "--quantization int8 is for CPUs, but the device is cuda: leave it out, or use --device cpu"
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (
            "awq",
            "--quantization awq: Shoal does not have this format of vLLM's yet: use --quantization int8 or int4, or",
        ),
        ("fp8", "--quantization fp8: Shoal does not have this format of vLLM's yet"),
        (
            "experts_int8",
            "--quantization experts_int8 is vLLM's name: use --quantization int8, which also keeps experts",
        ),
        ("INT8", "--quantization takes int8, int4, int4-g32, int4-g64 or int4-g128, got 'INT8'"),
        ("int4-g16", "--quantization takes int8, int4, int4-g32, int4-g64 or int4-g128, got 'int4-g16'"),
        ("", "--quantization takes int8, int4, int4-g32, int4-g64 or int4-g128, got ''"),
        (8, "--quantization takes int8, int4, int4-g32, int4-g64 or int4-g128, got 8"),
        (["int8"], "--quantization takes int8, int4,"),
    ],
)
def test_other_formats_are_refused(value: object, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineOptions.from_flat(None, {"quantization": value})
    assert str(caught.value).startswith(says)


def test_every_value_has_its_formats() -> None:
    assert set(get_args(Quantization)) == QUANTIZATIONS.keys()


@pytest.mark.parametrize("layout", [{}, {"tensor_parallel_size": 3}, {"pipeline_parallel_size": 2}])
@pytest.mark.parametrize(
    ("dtype", "quantization"), [("float32", "int8"), ("bfloat16", "int8"), ("bfloat16", "int4-g32")]
)
def test_the_bytes_of_weights(checkpoint: Checkpoint, layout: dict[str, Any], dtype: str, quantization: str) -> None:
    """Embeddings, norms and biases are kept as they are."""
    folder = checkpoint("llama3")
    spec = read_spec(folder)
    params = params_of(spec)
    stages = (2, 1) if "pipeline_parallel_size" in layout else ()
    shards = rank_shards(spec, Layout(tp=layout.get("tensor_parallel_size", 1), stages=stages))
    found = engine_plan(folder, dtype=dtype, quantization=quantization, **layout)
    item = torch.empty(0, dtype=getattr(torch, dtype)).itemsize
    for rank, shard in zip(found.ranks, shards, strict=True):
        wanted = 0
        for param in shard.held(params):
            shape = shard.param_shape(param)
            small = len(shape) == 2 and param.name != "embedding"
            kept_in = INT8 if quantization == "int8" or param.name == "head" else INT4[32]
            wanted += kept_in.weight_bytes(shape) if small else item * shard.param_size(param)
        assert rank.weight_bytes == wanted
    assert found.model.quantization == quantization
    assert engine_plan(folder, dtype=dtype, **layout).model.quantization == ""


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize(
    ("name", "quantization"), [("llama3", "int8"), ("mixtral", "int8"), ("deepseek_v3", "int8"), ("mixtral", "int4")]
)
def test_a_rank_counts_what_is_planned(checkpoint: Checkpoint, name: str, quantization: str, load_format: str) -> None:
    found = engine_plan(checkpoint(name), quantization=quantization, load_format=load_format)
    model = RankModel(setup_of(found), make_mesh(Topology.of(), 0, lambda *_: LocalComm()))
    assert model.linear.startswith(f"{quantization} (")
    model.load(torch.device("cpu"))
    assert model.weight_bytes == found.ranks[0].weight_bytes


def test_the_log_says_what_is_quantized(checkpoint: Checkpoint) -> None:
    (reason,) = [each for each in engine_plan(checkpoint("opt"), quantization="int8").reasons if "int8" in each]
    assert reason == "quantization int8: 13 matrices"
    found = engine_plan(checkpoint("opt"), quantization="int8", tensor_parallel_size=3, tensor_parallel_split=(1, 3, 2))
    (reason,) = [each for each in found.reasons if each.startswith("quantization")]
    assert reason.startswith("quantization int8: 10 matrices; layers.0.out.weight of shape [64, 8], and 2 others are")
    assert reason.endswith("too small or too wide, and stay in float32")


def test_the_log_says_which_groups_are_cut(checkpoint: Checkpoint) -> None:
    """llama has 4 heads of 16 inputs and MLPs of 160 columns. Of three ranks two begin within a group."""
    found = engine_plan(checkpoint("llama"), quantization="int4-g32", tensor_parallel_size=3)
    (reason,) = [each for each in found.reasons if each.startswith("quantization")]
    assert reason.startswith("quantization int4-g32: matrices in int4, groups of 32: 12; in int8: 1; 6 of them are cut")
    (reason,) = [each for each in engine_plan(checkpoint("llama"), quantization="int4").reasons if "int4" in each]
    assert reason == "quantization int4: matrices in int4, groups of 128: 12; in int8: 1"


def test_a_draft_model_is_quantized_too(checkpoint: Checkpoint) -> None:
    plain, small = (
        with_draft(checkpoint("llama"), checkpoint("mistral"), quantization=each) for each in (None, "int8")
    )
    assert plain.draft is not None
    assert small.draft is not None
    assert (plain.draft.quantization, small.draft.quantization) == ("", "int8")
    alone = engine_plan(checkpoint("llama"), quantization="int8")
    assert 0 < small.ranks[0].weight_bytes - alone.ranks[0].weight_bytes < plain.ranks[0].weight_bytes / 2
