"""A model as one rank holds it: its share of the weights, and its layers of the KV cache."""

import json
from pathlib import Path
from typing import Any, cast

import torch

from shoal.config.engine_options import ExpertPlacement
from shoal.errors import EngineError
from shoal.kernels.linear import make_linear
from shoal.kernels.sampling import load_native as load_sampling
from shoal.kernels.select import make_kernels
from shoal.models.causal_model import CausalModel
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.loader import CheckpointWeights, DummyWeights, Weights
from shoal.models.decoder import build_decoder
from shoal.models.implementation import Cutting, params_of, rank_shards, read_model
from shoal.models.manifest import Cut, keeps_embedding, kv_block_bytes, weight_bytes
from shoal.models.precision import PRECISION
from shoal.models.registry import read_config
from shoal.models.transformers.fallback_spec import FallbackSpec
from shoal.models.transformers.model import build_transformers_model
from shoal.parallel.all2all.backends import make_dispatch
from shoal.parallel.dispatch import Dispatch
from shoal.parallel.mesh import Mesh
from shoal.parallel.placement import place_experts
from shoal.wire.ranks import RankSetup
from shoal.worker import kv_cache
from shoal.worker.sampler import VocabShare


class RankModel:
    """Of a rank's one or two models; the second one is a draft model, which the last stage's ranks hold whole."""

    def __init__(self, folder: Path, setup: RankSetup, mesh: Mesh, *, draft: bool = False) -> None:
        """Reads config.json; weights come with `load`."""
        self._overrides: dict[str, Any] = json.loads(setup.draft_overrides if draft else setup.overrides)
        self.spec = read_model(folder, "auto" if draft else setup.model_impl, self._overrides)
        self.weight_bytes = 0
        self.kernels = ""  # which, and why
        self._folder = folder
        self._draft = draft
        self._setup = setup
        self._mesh = mesh
        self._precision = PRECISION[setup.dtype]
        self._cutting = Cutting(setup.tp, setup.tp_split or None) if draft else _cutting(setup)
        shards = rank_shards(self.spec, self._cutting)
        stage = 0 if draft else mesh.pp.rank
        self._shards = shards[stage * setup.tp :][: setup.tp]
        self.shard = self._shards[mesh.tp.rank]
        self._decoder: CausalModel | None = None

    @property
    def loaded(self) -> bool:
        return self._decoder is not None

    @property
    def decoder(self) -> CausalModel:
        if self._decoder is None:
            raise EngineError(f"rank {self._setup.rank} was told to go on before it had loaded")
        return self._decoder

    @property
    def vocabulary(self) -> VocabShare:
        sizes = tuple(len(shard.ranges[Cut.VOCAB]) for shard in self._shards)
        return VocabShare(self.shard.ranges[Cut.VOCAB].start, sizes)

    def unload(self) -> None:
        """Lets go of the weights. `load` reads them again."""
        self._decoder = None
        self.weight_bytes = 0

    def load(self, device: torch.device) -> None:
        """
        Raises:
            CheckpointError: the files can't be read, or are not those that were read before.
        """
        weights: Weights
        if self._setup.load_format == "dummy":
            params = params_of(self.spec)
            weights = DummyWeights(params, self.shard, self._precision.weights, self._setup.seed)
        else:
            checkpoint = open_checkpoint(self._folder, self._overrides)
            checkpoint.check_state(self._setup.draft_file_state if self._draft else self._setup.file_state)
            params = params_of(self.spec, checkpoint.shapes)
            weights = CheckpointWeights(checkpoint, params, self.shard, self._precision.weights)
        kernels, why = make_kernels(self._setup.device, self._precision.activations)
        self.kernels = why if self._setup.device != "cpu" else f"{why}, sampling: {load_sampling()[1]}"
        tp = self._mesh.tp
        if isinstance(self.spec, FallbackSpec):
            config = read_config(self._folder, self._overrides)
            self._decoder = build_transformers_model(config, self.spec, self.shard, tp, weights, kernels, device)
        else:
            longest = self._setup.max_model_len
            dispatch = self.dispatch_on(device)
            self._decoder = build_decoder(self.spec, self.shard, tp, weights, kernels, device, longest, dispatch)
        kept = keeps_embedding(self._setup.device, head=self.shard.stage.last)
        item = self._precision.weights.itemsize
        self.weight_bytes = weight_bytes(self.spec, params, self.shard, item, embedding_kept=kept)

    @property
    def experts(self) -> int:
        """Of each mixture, those that it has, whole or in part; 0 if its layers have none."""
        if self.spec.moe is None or not self._mixtures:
            return 0
        return self.spec.moe.num_experts if self.shard.experts is None else len(self.shard.experts)

    @property
    def _mixtures(self) -> int:
        """Layers of its stage that are one."""
        return sum(self.spec.moe_of(layer) is not None for layer in self.shard.stage.layers)

    @property
    def linear(self) -> str:
        """How its linear layers are computed."""
        some = torch.zeros((1, 1), dtype=self._precision.weights, device=self._setup.device)
        return type(make_linear(some, None)).__name__

    def dispatch_on(self, device: torch.device) -> Dispatch:
        """A stage without mixtures tells its group nothing of a step: all of its ranks are of this stage."""
        placed = None
        if self._cutting.experts is not None and self.spec.moe is not None and self._mixtures:
            placed = place_experts(self.spec.moe.num_experts, self._mesh.ep.size, self._cutting.experts)
        return make_dispatch(self._mesh, placed, self._setup.all2all, device)

    @property
    def stream(self) -> tuple[int, torch.dtype]:
        """Width and type of what its stages hand on."""
        return self.spec.hidden_size, self._precision.activations

    @property
    def block_bytes(self) -> int:
        """Of one KV block over the layers of this model."""
        return kv_block_bytes(self.spec, self.shard, self._setup.block_size, self._precision.kv.itemsize)

    def allocate(self, num_blocks: int, device: torch.device) -> kv_cache.KVMemory:
        return kv_cache.allocate(self.spec, self.shard, num_blocks, self._setup.block_size, self._precision.kv, device)


def _cutting(setup: RankSetup) -> Cutting:
    return Cutting(
        tp=setup.tp,
        tp_split=setup.tp_split or None,
        stages=setup.stages,
        experts=cast(ExpertPlacement, setup.experts) if setup.experts else None,
        replica=setup.dp_rank,
        replicas=setup.dp_size,
    )
