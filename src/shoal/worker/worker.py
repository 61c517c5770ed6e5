"""The worker: the state and the operations of one rank, from its setup to its steps, for every executor."""

import os
from collections.abc import Callable, Sequence

import torch

from shoal.activity import KV_CACHE, WEIGHTS
from shoal.comm.base import Communicator
from shoal.devices import cpu
from shoal.errors import EngineError, UserError
from shoal.kernels.reference import GATHER_BYTES
from shoal.log import get_logger
from shoal.parallel.mesh import Mesh, make_mesh
from shoal.parallel.pipeline import Pipeline
from shoal.parallel.topology import Topology
from shoal.trace.clocks import now
from shoal.wire.base import WIRE_VERSION, encode
from shoal.wire.ranks import (
    Capacity,
    LoadInfo,
    RankCall,
    RankReply,
    RankSetup,
    RankStats,
    StepMask,
    StepPlan,
    StepResult,
)
from shoal.wire.trace import END, TRACE
from shoal.worker.draft_model import DraftModel
from shoal.worker.free_memory import release_memory, trim_heap
from shoal.worker.kv_cache import KVMemory
from shoal.worker.made_up_steps import made_up_steps
from shoal.worker.measured_traffic import measured_traffic
from shoal.worker.memory_errors import explain_out_of_memory
from shoal.worker.rank_model import RankModel
from shoal.worker.rank_trace import RankTrace
from shoal.worker.recorded_steps import MOST_TOKENS
from shoal.worker.runner import Runner
from shoal.worker.sequence_table import SequenceTable
from shoal.worker.thread_binding import prefer_memory

log = get_logger("worker")

# A function that opens the communicator of an axis of the mesh, whose members are given by their global ranks.
Connect = Callable[[RankSetup, str, Sequence[int]], Communicator]


class Worker:
    """The state and the operations of one rank. It handles one message at a time, on the thread that made it."""

    def __init__(self, setup: RankSetup, connect: Connect) -> None:
        if setup.wire_version != WIRE_VERSION:
            raise EngineError(
                f"rank {setup.rank} has wire version {WIRE_VERSION}, but the engine has {setup.wire_version}: install "
                "the same version of Shoal for both"
            )
        self.setup = setup
        self.last_step = -1
        self._handling = False
        self._num_handled = 0  # messages so far
        self._anonymous_at_import = cpu.anonymous_memory()
        prefer_memory(setup.rank, setup.rank_plan.numa_node)
        torch.get_num_threads()  # without this first call, a new thread may get the number that another thread has set
        torch.set_num_threads(len(setup.rank_plan.cores))
        mine, plan = setup.rank_plan, setup.plan
        self.device = torch.device("cuda", mine.device_index) if mine.device == "cuda" else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._connect = connect
        self.mesh = self._make_mesh()
        self._model = RankModel(setup, self.mesh)
        width, dtype = self._model.stream
        self._pipeline = Pipeline(
            *(self.mesh.pp, self.mesh.token_return),
            width=width,
            dtype=dtype,
            device=self.device,
            depth=plan.max_in_flight,
        )
        self._draft = None
        if mine.draft_shard is not None:
            self._draft = RankModel(setup, self.mesh, draft=True)
        self._models = [self._model] if self._draft is None else [self._model, self._draft]
        self._runner: Runner | None = None
        self._kv: list[KVMemory] = []
        self._num_blocks = setup.num_blocks
        self._loads = 0  # how many times it has read its weights
        self._busy_ns = 0  # time spent on steps by earlier runners
        self._trace: RankTrace | None = None  # not None: it records what it does
        self._verbs: dict[str, Callable[[bytes], bytes]] = {
            "connect": lambda _: b"",  # the constructor has connected
            "load": self._load,
            "profile": self._profile,
            "allocate": self._allocate,
            "warm_up": self._warm_up,
            "stats": self._stats,
            TRACE: self._record,
            "sleep": self._sleep,
            "wake_up": self._wake_up,
        }

    def _make_mesh(self) -> Mesh:
        """Connect to the other ranks."""
        setup, layout = self.setup, self.setup.plan.layout
        return make_mesh(
            Topology.of(dp=layout.replicas, pp=layout.num_stages, tp=layout.tp),
            setup.global_rank,
            lambda axis, ranks: self._connect(setup, axis, ranks),
            expert_parallel=bool(layout.experts),
        )

    def rejoin(self, setup: RankSetup) -> None:
        """Connect again to the other ranks, some of which were replaced, and forget all sequences.

        Weights and the memory of the KV cache stay. The layers keep their communicators, which have new groups then.
        """
        self.setup = setup
        self._handling = False
        self._drop_runner()
        self._pipeline.drop_pending()
        self.mesh = self._make_mesh()
        if self._trace is not None:
            self._trace.watch(self.mesh)

    def _drop_runner(self) -> None:
        if self._runner is not None:
            self._busy_ns += self._runner.busy_ns
            self._runner = None

    @property
    def doing(self) -> str:
        """The current activity of the rank, for error messages."""
        if not self._handling:
            return "waiting for a plan"
        busy = [axis for axis in self.mesh.axes if axis.comm.progress.operation] or self.mesh.axes[:1]
        return ", ".join(f"{axis.name} {axis.comm.progress}" for axis in busy) or "computing"

    @property
    def position(self) -> tuple[object, ...]:
        """Something that changes with everything that the rank does; (): it has nothing to do. For any thread."""
        if not self._handling:
            return ()
        return (
            self._num_handled,
            *((axis.comm.progress.count, axis.comm.progress.operation) for axis in self.mesh.axes),
        )

    @property
    def waits(self) -> bool:
        """True if the rank is in an operation with other ranks. Any thread may ask."""
        return self._handling and any(axis.comm.progress.operation for axis in self.mesh.axes)

    def abort(self) -> None:
        """End a wait for other ranks. Any thread may call it; it never raises."""
        for axis in self.mesh.axes:
            try:
                axis.comm.abort()
            except Exception as error:  # noqa: BLE001 - other axes must be aborted too; this is not the first error
                log.warning(
                    "rank %d could not abort the communication on axis %s: %s", self.setup.rank, axis.name, error
                )

    @torch.inference_mode()
    def handle(self, message: StepPlan | StepMask | RankCall) -> StepResult | RankReply | None:
        """Handle a message, and return the answer to it, if there is one.

        Step plans are answered only by the first rank of the last stage, because all results there are the same. The
        answer to a masked plan comes with its mask.
        """
        self._num_handled += 1
        self._handling = True
        answer = self._answer(message) if self._trace is None else self._trace.timed(message, self._answer)
        self._handling = False  # not reached after an error, so that `doing` says where the rank stopped
        return answer

    def _answer(self, message: StepPlan | StepMask | RankCall) -> StepResult | RankReply | None:
        if isinstance(message, RankCall):
            return RankReply(message.id, self.setup.rank, self._verbs[message.verb](message.payload))
        if message.incarnation != self.setup.incarnation:  # from an earlier start of the engine
            return None
        if self._runner is None:
            raise EngineError(f"rank {self.setup.rank} got step {message.step}, but has no weights or no KV cache")
        if isinstance(message, StepMask):
            result = self._runner.apply_mask(message)
        else:
            result = self._runner.execute(message)
        if result is not None:
            self.last_step = result.step
        return result if self._pipeline.last and self.mesh.tp.rank == 0 else None

    def _load(self, _: bytes) -> bytes:
        kept = self._loaded
        if not kept:
            self._load_weights()
        model = self._model
        info = LoadInfo(
            rank=self.setup.rank,
            device=str(self.device),
            first_layer=model.shard.stage.layers.start,
            layers=len(model.shard.stage.layers),
            q_heads=len(model.shard.heads.q_range),
            kv_heads=len(model.shard.heads.kv_ids),
            experts=model.experts,
            weight_bytes=self._weight_bytes,
            threads=torch.get_num_threads(),
            kernels=model.kernels,
            linear=model.linear,
            comm=", ".join(f"{axis.name} over {axis.comm.backend}" for axis in self.mesh.axes),
            weights_kept=kept,
        )
        return encode(info)

    def _load_weights(self) -> None:
        for each in self._models:
            each.load(self.device)
        trim_heap()  # matrices that were read and then packed leave gaps between those that are kept
        self._loads += 1

    @property
    def _loaded(self) -> bool:
        return all(each.loaded for each in self._models)

    @property
    def _weight_bytes(self) -> int:
        return sum(each.weight_bytes for each in self._models)

    def _profile(self, _: bytes) -> bytes:
        """Return the rank's `Capacity`: how many KV blocks fit into its memory, and the size of one."""
        block_bytes = sum(each.block_bytes for each in self._models)
        budget = self.setup.rank_plan.kv_budget
        if budget is None:
            budget = self._free_device_memory()
        # A rank without KV heads needs no memory for blocks, so it must not limit their number.
        num_blocks = budget // block_bytes if block_bytes else 2**31 - 1
        return encode(Capacity(self.setup.rank, max(num_blocks, 0), block_bytes))

    def _free_device_memory(self) -> int:
        """Return the bytes of a GPU that are left after the weights and the largest step, which is run and measured.

        Memory that other processes use is taken into account too.
        """
        setup = self.setup
        free, total = torch.cuda.mem_get_info(self.device)
        reachable = free + torch.cuda.memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._allocate_kv(
            num_blocks=-(-setup.plan.max_num_batched_tokens // setup.plan.block_size) + setup.plan.max_num_seqs
        )
        self._make_runner()
        self._run_largest_steps()
        cache = sum(memory.pool.nbytes for memory in self._kv)
        self._runner, self._kv = None, []
        torch.cuda.empty_cache()
        peak = torch.cuda.max_memory_allocated(self.device) - cache + GATHER_BYTES
        peak += self._pipeline.pending_send_bytes(setup.plan.max_num_batched_tokens)
        return min(int(total * setup.plan.memory_utilization), reachable) - peak

    def _allocate(self, payload: bytes) -> bytes:
        """Allocate the KV cache, unless the rank has it already."""
        num_blocks = int.from_bytes(payload, "little")
        if not self._kv or num_blocks != self._num_blocks:
            self._allocate_kv(num_blocks)
        if self._loaded:
            self._make_runner()
        return b""

    def _allocate_kv(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._kv = [each.allocate(num_blocks, self.device) for each in self._models]

    def _make_runner(self) -> None:
        if self._trace is not None:
            self._trace.watch_layers(self._models)
        setup, model = self.setup, self._model
        scratch = self._num_blocks * setup.plan.block_size
        sizes = setup.plan.max_num_seqs, setup.plan.max_model_len, setup.plan.block_size
        most_tokens = max(setup.plan.max_num_seqs, MOST_TOKENS)  # with drafts a sequence has several
        table = SequenceTable(*sizes, self.device, scratch, samples=self._pipeline.last, most_decoded=most_tokens)
        vocabulary, tp = model.vocabulary, self.mesh.tp
        draft = None
        if self._draft is not None:
            draft = DraftModel(
                self._draft.decoder,
                self._kv[1].layers,
                table,
                vocabulary,
                tp,
                count=setup.plan.num_drafts,
                record_steps=setup.plan.record_steps,
            )
        parts = model.decoder, self._kv[0].layers, table, vocabulary, tp, self._pipeline
        self._runner = Runner(*parts, draft=draft, record_steps=setup.plan.record_steps)

    def _warm_up(self, _: bytes) -> bytes:
        """Run a prompt and a decoding step, so that the first request need not wait for one-time initialization."""
        tokens = min(8, self.setup.plan.max_model_len - 1, self.setup.plan.max_num_batched_tokens)
        if tokens > 0:
            self._run_made_up([tokens], decode=True)
        return b""

    def _sleep(self, payload: bytes) -> bytes:
        """Give parts of the memory back to the system. The rank forgets all its sequences."""
        if self._runner is not None:
            self._runner.settle()
        self._drop_runner()
        parts = payload.decode().split(",")
        if KV_CACHE in parts:
            self._kv = []
        if WEIGHTS in parts:
            for each in self._models:
                each.unload()
        release_memory(self.device)
        return b""

    def _wake_up(self, payload: bytes) -> bytes:
        """Take parts of the memory again.

        Returns:
            The reason if that is impossible, else nothing. The rank must then be told to sleep again.
        """
        parts = payload.decode().split(",")
        try:
            if WEIGHTS in parts:
                self._load_weights()
            if KV_CACHE in parts:
                self._allocate_kv(self._num_blocks)
        except Exception as error:
            why = str(error) if isinstance(error, UserError) else explain_out_of_memory(error, self.setup)
            if why is None:
                raise
            return why.encode()
        if self._kv and self._loaded:
            self._make_runner()
        return b""

    def _run_largest_steps(self) -> None:
        """Run a step full of prompts, and one in which every sequence draws tokens, with all sampling parameters."""
        setup = self.setup
        longest = min(setup.plan.max_model_len, setup.plan.max_num_batched_tokens)
        prompts = [longest] * min(setup.plan.max_num_batched_tokens // longest, setup.plan.max_num_seqs)
        self._run_made_up(prompts)
        drafts = min(setup.plan.num_drafts, setup.plan.max_model_len - 1, setup.plan.max_num_batched_tokens - 1)
        self._run_made_up([1] * min(setup.plan.max_num_seqs, setup.plan.max_num_batched_tokens // (1 + drafts)), drafts)

    def _run_made_up(self, lengths: Sequence[int], num_drafts: int = 0, *, decode: bool = False) -> None:
        """Run made-up sequences, and forget them. The arguments are those of `made_up_steps`."""
        if self._runner is None:
            return
        for plan in made_up_steps(lengths, self.setup.plan.block_size, num_drafts, decode=decode):
            self._runner.execute(plan)
        self._runner.settle()

    def _stats(self, _: bytes) -> bytes:
        stats = RankStats(
            rank=self.setup.rank,
            pid=os.getpid(),
            anonymous=cpu.anonymous_memory(),
            anonymous_at_import=self._anonymous_at_import,
            kv_bytes=sum(memory.resident_bytes() for memory in self._kv),
            weight_bytes=self._weight_bytes,
            stage=self.mesh.pp.rank,
            busy_us=(self._busy_ns + (self._runner.busy_ns if self._runner is not None else 0)) // 1000,
            traffic=measured_traffic(self.mesh),
            loads=self._loads,
            stage_wait_us=self._pipeline.waited_ns // 1000,
        )
        return encode(stats)

    def _record(self, payload: bytes) -> bytes:
        """Record what the rank does from now on, or no longer. Return the events so far, as `TrackEvents`."""
        asked = now()
        if self._trace is None:
            self._trace = RankTrace(self.setup)
            self._trace.watch(self.mesh)
            if self._loaded:
                self._trace.watch_layers(self._models)
        events = self._trace.take(asked)
        if payload == END:
            self._trace.unwatch(self.mesh, self._models)
            self._trace = None
        return encode(events)
