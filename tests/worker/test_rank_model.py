"""The models of ranks, in stages with and without mixtures of experts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shoal.comm.local import LocalComm
from shoal.models.registry import read_spec
from shoal.parallel.dispatch import TensorParallelDispatch
from shoal.parallel.mesh import Axis, Mesh
from shoal.parallel.topology import Topology
from shoal.wire.plan import ReplicaPlace
from shoal.worker.rank_model import RankModel
from support.plans import engine_plan, setup_of


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_without_mixtures_has_no_experts_and_exchanges_nothing(
    checkpoint: Callable[[str], Path], stage: int
) -> None:
    """Stage 0 is the first layer of this model, which has no experts."""
    folder = checkpoint("deepseek_v3")
    alone, shared = Axis("tp", 0, 1, LocalComm()), Axis("ep", 0, 2, LocalComm())
    mesh = Mesh(
        Topology.of(dp=2, pp=2, tp=1),
        stage,
        pp=Axis("pp", stage, 2, LocalComm()),
        tp=alone,
        ep=shared,
        token_return=alone,
    )
    layers = read_spec(folder).num_layers
    plan = engine_plan(
        folder,
        ReplicaPlace(0, 2, 0, 2),
        pipeline_parallel_size=2,
        pipeline_layer_partition=(1, layers - 1),
        enable_expert_parallel=True,
        all2all_backend="all_to_all",
        max_model_len=64,
    )
    model = RankModel(setup_of(plan, stage), mesh)
    assert (model.experts > 0) == (stage == 1)
    dispatch = model.dispatch_on(torch.device("cpu"))
    assert (type(dispatch) is TensorParallelDispatch) == (stage == 0)
