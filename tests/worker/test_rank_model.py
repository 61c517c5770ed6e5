"""What a stage's rank says and does about experts, if its layers have some and if not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shoal.comm.local import LocalComm
from shoal.parallel.dispatch import TensorParallelDispatch
from shoal.parallel.mesh import Axis, Mesh
from shoal.parallel.topology import Topology
from shoal.worker.rank_model import RankModel
from support.setups import rank_setup


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_without_mixtures_has_no_experts_and_tells_nobody_of_steps(
    checkpoint: Callable[[str], Path], stage: int
) -> None:
    """Its first layer is the model's plain one."""
    folder = checkpoint("deepseek_v3")
    alone, shared = Axis("tp", 0, 1, LocalComm()), Axis("ep", 0, 2, LocalComm())
    mesh = Mesh(
        Topology.of(dp=2, pp=2, tp=1), stage, pp=Axis("pp", stage, 2, LocalComm()), tp=alone, ep=shared, back=alone
    )
    layers = RankModel(folder, rank_setup(), mesh, draft=True).spec.num_layers
    setup = rank_setup(
        rank=stage, world_size=2, dp_size=2, stages=(1, layers - 1), experts="linear", all2all="all_to_all"
    )
    model = RankModel(folder, setup, mesh)
    assert (model.experts > 0) == (stage == 1)
    dispatch = model.dispatch_on(torch.device("cpu"))
    assert (type(dispatch) is TensorParallelDispatch) == (stage == 0)
