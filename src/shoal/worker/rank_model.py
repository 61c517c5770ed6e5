"""The part of a model that one rank holds: its share of the weights, and its layers of the KV cache."""

import json
from pathlib import Path
from typing import Any

import torch

from shoal.errors import EngineError
from shoal.kernels.bf16_linear import NativeBf16Linear, load_bf16
from shoal.kernels.linear import make_linear
from shoal.kernels.quantized_library import load_quantized
from shoal.kernels.sampling import load_native as load_sampling
from shoal.kernels.select import make_kernels
from shoal.models.causal_model import CausalModel
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.loader import CheckpointWeights, DummyWeights, Weights
from shoal.models.checkpoint.torch_files import list_here
from shoal.models.decoder import build_decoder
from shoal.models.implementation import params_of, read_model
from shoal.models.kv_format import KV_FORMATS
from shoal.models.manifest import Cut, Shard, keeps_embedding, kv_block_bytes, weight_bytes
from shoal.models.precision import PRECISION
from shoal.models.registry import read_config
from shoal.models.transformers.fallback_spec import FallbackSpec
from shoal.models.transformers.model import build_transformers_model
from shoal.parallel.all2all.backends import make_dispatch
from shoal.parallel.dispatch import Dispatch
from shoal.parallel.expert_placement import place_experts
from shoal.parallel.mesh import Mesh
from shoal.wire.ranks import RankSetup
from shoal.worker import kv_cache
from shoal.worker.sampler import VocabShare


class RankModel:
    """A rank's part of the model, or of the draft model.

    A draft model is not cut into stages: each rank of the last stage holds its share of all layers.
    """

    def __init__(self, setup: RankSetup, mesh: Mesh, *, draft: bool = False) -> None:
        """Read config.json. Weights are loaded by `load`."""
        plan, shard = setup.plan.model, setup.rank_plan.shard
        if draft:
            assert setup.plan.draft is not None
            assert setup.rank_plan.draft_shard is not None
            plan, shard = setup.plan.draft, setup.rank_plan.draft_shard
        self._plan = plan
        self._folder = Path(plan.folder)
        self._overrides: dict[str, Any] = json.loads(plan.overrides)
        self.spec = read_model(self._folder, plan.implementation, self._overrides)
        self.shard = Shard.of(shard)
        self.weight_bytes = 0
        self.kernels = ""  # the name of the kernels, and why they were chosen
        self._vocab_sizes = shard.vocab_sizes
        self._experts = "" if draft else setup.plan.layout.experts
        self._setup = setup
        self._device = setup.rank_plan.device
        self._mesh = mesh
        self._precision = PRECISION[setup.plan.dtype]
        self._decoder: CausalModel | None = None

    @property
    def loaded(self) -> bool:
        return self._decoder is not None

    @property
    def decoder(self) -> CausalModel:
        if self._decoder is None:
            raise EngineError(f"rank {self._setup.rank} was told to compute before it had loaded its weights")
        return self._decoder

    @property
    def vocabulary(self) -> VocabShare:
        return VocabShare(self.shard.ranges[Cut.VOCAB].start, self._vocab_sizes)

    def unload(self) -> None:
        """Drop the weights. `load` reads them again."""
        self._decoder = None
        self.weight_bytes = 0

    def load(self, device: torch.device) -> None:
        """Load the rank's share of the weights.

        Raises:
            CheckpointError: the files cannot be read, or have changed since the model was planned.
        """
        weights: Weights
        if self._setup.plan.load_format == "dummy":
            params = params_of(self.spec, quantization=self._plan.quantization)
            weights = DummyWeights(params, self.shard, self._precision.weights, self._setup.plan.seed)
        else:
            checkpoint = open_checkpoint(self._folder, self._overrides, self._plan.file_state, list_here)
            params = params_of(self.spec, checkpoint.shapes, self._plan.quantization)
            weights = CheckpointWeights(checkpoint, params, self.shard, self._precision.weights)
        kernels, why = make_kernels(self._device, self._precision.activations)
        self.kernels = why if self._device != "cpu" else f"{why}, sampling: {load_sampling()[1]}"
        tp = self._mesh.tp
        if isinstance(self.spec, FallbackSpec):
            config = read_config(self._folder, self._overrides)
            self._decoder = build_transformers_model(config, self.spec, self.shard, tp, weights, kernels, device)
        else:
            longest = self._setup.plan.max_model_len
            dispatch = self.dispatch_on(device)
            self._decoder = build_decoder(self.spec, self.shard, tp, weights, kernels, device, longest, dispatch)
        kept = keeps_embedding(self._device, head=self.shard.stage.last)
        item = self._precision.weights.itemsize
        self.weight_bytes = weight_bytes(self.spec, params, self.shard, item, embedding_kept=kept)

    @property
    def experts(self) -> int:
        """The number of experts that the rank holds of each mixture, whole or in part; 0 if its layers have none."""
        if self.spec.moe is None or not self._mixtures:
            return 0
        return self.spec.moe.num_experts if self.shard.experts is None else len(self.shard.experts)

    @property
    def _mixtures(self) -> int:
        """The number of layers of its stage that are mixtures of experts."""
        return sum(self.spec.moe_of(layer) is not None for layer in self.shard.stage.layers)

    @property
    def linear(self) -> str:
        """The names of the implementations of its linear layers."""
        some = torch.zeros((1, 1), dtype=self._precision.weights, device=self._device)
        linear = make_linear(some, None)
        plain = type(linear).__name__
        if isinstance(linear, NativeBf16Linear):
            plain = f"{plain} ({load_bf16()[1]})"
        return f"{self._plan.quantization} ({load_quantized()[1]}), {plain}" if self._plan.quantization else plain

    def dispatch_on(self, device: torch.device) -> Dispatch:
        """Return the exchange of tokens between the ranks that share experts."""
        # Without mixtures in its stage a rank exchanges nothing. The same holds for all ranks of its group.
        placed = None
        if self._experts and self.spec.moe is not None and self._mixtures:
            placed = place_experts(self.spec.moe.num_experts, self._mesh.ep.size, self._experts)
        return make_dispatch(self._mesh, placed, self._setup.plan.all2all, device)

    @property
    def stream(self) -> tuple[int, torch.dtype]:
        """The width and the type of the residual stream that stages pass on."""
        return self.spec.hidden_size, self._precision.activations

    @property
    def block_bytes(self) -> int:
        """The size of one KV block over the rank's layers of this model, in bytes."""
        return kv_block_bytes(self.spec, self.shard, self._setup.plan.block_size, KV_FORMATS[self._setup.plan.kv_dtype])

    def allocate(self, num_blocks: int, device: torch.device) -> kv_cache.KVMemory:
        plan = self._setup.plan
        return kv_cache.allocate(self.spec, self.shard, num_blocks, plan.block_size, plan.kv_dtype, device)
