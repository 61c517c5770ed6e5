"""A model as one rank holds it: its share of the weights, and its layers of the KV cache."""

from collections.abc import Mapping
from pathlib import Path

import torch

from shoal import wire
from shoal.errors import EngineError
from shoal.kernels.sampling import load_native as load_sampling
from shoal.kernels.select import make_kernels
from shoal.models.causal import CausalModel
from shoal.models.checkpoint import TensorEntry, open_checkpoint
from shoal.models.decoder import build_decoder
from shoal.models.fallback import FallbackSpec
from shoal.models.implementation import params_of, read_model, shards_of
from shoal.models.loader import CheckpointWeights, DummyWeights, Weights
from shoal.models.manifest import Cut, keeps_embedding, kv_block_bytes, weight_bytes
from shoal.models.precision import PRECISION
from shoal.models.registry import read_config
from shoal.models.transformers_model import build_transformers_model
from shoal.parallel.mesh import Mesh
from shoal.worker import kv_cache
from shoal.worker.sampler import VocabShare


class RankModel:
    """Of a rank's one or two models; the second one is a draft model."""

    def __init__(self, folder: Path, setup: wire.RankSetup, mesh: Mesh) -> None:
        """Reads config.json; weights come with `load`."""
        self.spec = read_model(folder, setup.model_impl if str(folder) == setup.model_path else "auto")
        self.weight_bytes = 0
        self.kernels = ""  # which, and why
        self._folder = folder
        self._setup = setup
        self._mesh = mesh
        self._precision = PRECISION[setup.dtype]
        self._shards = shards_of(self.spec, mesh.tp.size, setup.tp_split or None)
        self.shard = self._shards[mesh.tp.rank]
        self._decoder: CausalModel | None = None

    @property
    def decoder(self) -> CausalModel:
        if self._decoder is None:
            raise EngineError(f"rank {self._setup.rank} was told to go on before it had loaded")
        return self._decoder

    @property
    def vocabulary(self) -> VocabShare:
        sizes = tuple(len(shard.ranges[Cut.VOCAB]) for shard in self._shards)
        return VocabShare(self.shard.ranges[Cut.VOCAB].start, sizes)

    def load(self, device: torch.device) -> None:
        weights: Weights
        stored: Mapping[str, TensorEntry] = {}
        if self._setup.load_format == "dummy":
            params = params_of(self.spec)
            weights = DummyWeights(params, self.shard, self._precision.weights, self._setup.seed)
        else:
            checkpoint = open_checkpoint(self._folder)
            stored, params = checkpoint.tensors, params_of(self.spec, checkpoint.shapes)
            weights = CheckpointWeights(checkpoint, params, self.shard, self._precision.weights)
        kernels, why = make_kernels(self._setup.device, self._precision.activations)
        self.kernels = why if self._setup.device != "cpu" else f"{why}, sampling: {load_sampling()[1]}"
        tp = self._mesh.tp
        if isinstance(self.spec, FallbackSpec):
            config = read_config(self._folder)
            self._decoder = build_transformers_model(config, self.spec, self.shard, tp, weights, kernels, device)
        else:
            longest = self._setup.max_model_len
            self._decoder = build_decoder(self.spec, self.shard, tp, weights, kernels, device, longest)
        kept = keeps_embedding(params, stored, self._setup.device, self._setup.dtype)
        item = self._precision.weights.itemsize
        self.weight_bytes = weight_bytes(self.spec, params, self.shard, item, embedding_kept=kept)

    @property
    def block_bytes(self) -> int:
        """Of one KV block over the layers of this model."""
        return kv_block_bytes(self.spec, self.shard, self._setup.block_size, self._precision.kv.itemsize)

    def allocate(self, num_blocks: int, device: torch.device) -> kv_cache.KVMemory:
        return kv_cache.allocate(self.spec, self.shard, num_blocks, self._setup.block_size, self._precision.kv, device)
