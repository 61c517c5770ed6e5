"""One rank: from its setup to steps, the same behind every executor."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from shoal import wire
from shoal.comm.base import Communicator
from shoal.devices import cpu
from shoal.errors import EngineError
from shoal.kernels.select import make_kernels
from shoal.models.checkpoint import open_checkpoint
from shoal.models.decoder import Decoder, build_decoder
from shoal.models.loader import CheckpointWeights, DummyWeights, Weights
from shoal.models.manifest import Cut, manifest, shards
from shoal.models.precision import PRECISION
from shoal.models.registry import read_spec, tensor_names
from shoal.observe.logging import get_logger
from shoal.parallel.mesh import make_mesh
from shoal.parallel.topology import Topology
from shoal.worker import kv_cache
from shoal.worker.batch import SequenceTable
from shoal.worker.runner import Runner
from shoal.worker.sampler import VocabShare

log = get_logger("worker")

Connect = Callable[[wire.RankSetup, str, Sequence[int]], Communicator]  # opens the group of an axis


class Worker:
    """Answers one message at a time, on the thread that made it."""

    def __init__(self, setup: wire.RankSetup, connect: Connect) -> None:
        if setup.wire_version != wire.WIRE_VERSION:
            raise EngineError(
                f"rank {setup.rank} speaks wire version {wire.WIRE_VERSION}, the engine {setup.wire_version}: "
                "install the same version of Shoal for both"
            )
        self.setup = setup
        self.last_step = -1
        self._anonymous_at_import = cpu.anonymous_memory()
        torch.get_num_threads()  # a fresh thread that has not asked once loses what it sets to another thread's value
        torch.set_num_threads(setup.threads)
        self.device = torch.device(setup.device, setup.device_index) if setup.device == "cuda" else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.spec = read_spec(Path(setup.model_path))
        self.precision = PRECISION[setup.dtype]
        topology = Topology.of(tp=setup.world_size)
        self.mesh = make_mesh(topology, setup.rank, lambda axis, ranks: connect(setup, axis, ranks))
        self._shards = shards(self.spec, self.mesh.tp.size)
        self.shard = self._shards[self.mesh.tp.rank]
        self._model: Decoder | None = None
        self._runner: Runner | None = None
        self._table: SequenceTable | None = None
        self._weight_bytes = 0
        self._kv: kv_cache.KVMemory | None = None
        self._verbs: dict[str, Callable[[bytes], bytes]] = {
            "connect": lambda _: b"",  # done when there is a worker to answer
            "load": self._load,
            "profile": self._profile,
            "allocate": self._allocate,
            "warm_up": self._warm_up,
            "stats": self._stats,
        }

    @property
    def doing(self) -> str:
        return str(self.mesh.tp.comm.progress) if self.mesh.tp.size > 1 else "computing"

    def abort(self) -> None:
        """Ends a wait for other ranks. From any thread."""
        self.mesh.tp.comm.abort()

    @torch.inference_mode()
    def handle(self, message: wire.StepPlan | wire.Call) -> wire.StepResult | wire.Reply | None:
        """The answer; plans are answered by rank 0 alone, since every rank's result is the same."""
        if isinstance(message, wire.Call):
            return wire.Reply(message.id, self.setup.rank, self._verbs[message.verb](message.payload))
        if message.incarnation != self.setup.incarnation:  # of an engine that is no more
            return None
        if self._runner is None:
            raise EngineError(f"rank {self.setup.rank} got step {message.step} before its KV cache was allocated")
        result = self._runner.execute(message)
        self.last_step = message.step
        return result if self.setup.rank == 0 else None

    def _load(self, _: bytes) -> bytes:
        params = manifest(self.spec, tensor_names(self.spec))
        weights: Weights
        if self.setup.load_format == "dummy":
            weights = DummyWeights(params, self.shard, self.precision.weights, self.setup.seed)
        else:
            checkpoint = open_checkpoint(Path(self.setup.model_path))
            weights = CheckpointWeights(checkpoint, params, self.shard, self.precision.weights)
        kernels, why = make_kernels(self.setup.device, self.precision.activations)
        self._model = build_decoder(
            self.spec, self.shard, self.mesh.tp, weights, kernels, self.device, self.setup.max_model_len
        )
        item = self.precision.weights.itemsize
        self._weight_bytes = sum(self.shard.param_size(param) * item for param in params)
        info = wire.LoadInfo(
            rank=self.setup.rank,
            device=str(self.device),
            layers=self.spec.num_layers,
            q_heads=len(self.shard.heads.q_range),
            kv_heads=len(self.shard.heads.kv_ids),
            weight_bytes=self._weight_bytes,
            threads=torch.get_num_threads(),
            kernels=why,
            linear=type(self._model.head).__name__,
            comm=type(self.mesh.tp.comm).__name__,
        )
        return wire.encode(info)

    def _profile(self, _: bytes) -> bytes:
        """How many KV blocks fit into what the rank was given."""
        block_bytes = kv_cache.block_bytes(self.spec, self.shard, self.setup.block_size, self.precision.kv.itemsize)
        budget = self.setup.kv_budget
        if budget is None:
            budget = self._free_device_memory()
        # A rank without KV heads needs no memory for them, and must not be the one that decides.
        num_blocks = budget // block_bytes if block_bytes else 2**31 - 1
        return wire.encode(wire.Capacity(self.setup.rank, max(num_blocks, 0), block_bytes))

    def _free_device_memory(self) -> int:
        """Bytes of a GPU that are left after weights and the largest activation, which is measured."""
        torch.cuda.reset_peak_memory_stats(self.device)
        self._make_runner(num_blocks=-(-self.setup.max_num_batched_tokens // self.setup.block_size))
        self._run_largest_step()
        self._runner = self._table = self._kv = None
        torch.cuda.empty_cache()
        peak = torch.cuda.max_memory_allocated(self.device)
        total = self.setup.device_memory or int(
            torch.cuda.get_device_properties(self.device).total_memory * self.setup.memory_utilization
        )
        return total - peak

    def _allocate(self, payload: bytes) -> bytes:
        self._make_runner(int.from_bytes(payload, "little"))
        return b""

    def _make_runner(self, num_blocks: int) -> None:
        if self._model is None:
            raise EngineError(f"rank {self.setup.rank} was told to allocate before it loaded")
        setup = self.setup
        memory = kv_cache.allocate(self.spec, self.shard, num_blocks, setup.block_size, self.precision.kv, self.device)
        self._kv = memory
        self._table = SequenceTable(setup.max_num_seqs, setup.max_model_len, setup.block_size, self.device)
        vocab = VocabShare(
            self.shard.ranges[Cut.VOCAB].start, tuple(len(shard.ranges[Cut.VOCAB]) for shard in self._shards)
        )
        self._runner = Runner(self._model, memory.layers, self._table, vocab, self.mesh.tp)

    def _warm_up(self, _: bytes) -> bytes:
        """Runs a prompt and a decode, so that the first request does not pay for first calls."""
        tokens = min(8, self.setup.max_model_len - 1, self.setup.max_num_batched_tokens)
        if tokens > 0:
            self._run_made_up(tokens, decode=True)
        return b""

    def _run_largest_step(self) -> None:
        self._run_made_up(min(self.setup.max_num_batched_tokens, self.setup.max_model_len), decode=False)

    def _run_made_up(self, tokens: int, *, decode: bool) -> None:
        """A made-up sequence of its own, in the first blocks, forgotten again. Its keys are overwritten later."""
        if self._runner is None:
            return
        seq, blocks = -1, tuple(range(-(-(tokens + decode) // self.setup.block_size)))
        new = wire.NewSeq(seq, 0, bytes(4 * tokens), (), wire.Sampling(seed=0))
        plans = [wire.StepPlan(0, -1, (wire.Work(seq, 0, tokens, True, blocks),), new=(new,))]
        if decode:
            plans.append(wire.StepPlan(0, -1, (wire.Work(seq, tokens, 1, True),)))
        plans.append(wire.StepPlan(0, -1, (), released=(seq,)))
        for plan in plans:
            self._runner.execute(plan)

    def _stats(self, _: bytes) -> bytes:
        stats = wire.RankStats(
            rank=self.setup.rank,
            pid=os.getpid(),
            anonymous=cpu.anonymous_memory(),
            anonymous_at_import=self._anonymous_at_import,
            kv_bytes=self._kv.resident_bytes() if self._kv else 0,
            weight_bytes=self._weight_bytes,
        )
        return wire.encode(stats)
