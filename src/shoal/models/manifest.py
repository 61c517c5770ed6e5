"""The manifest of a model: all its tensors, with their shapes, cuts over ranks, and places in the files. Free of torch.

Only the manifest defines how a tensor is cut. The decoder, the loader, the memory arithmetic and the check of a
checkpoint before any process starts all read it.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from shoal.errors import CheckpointError
from shoal.kernels.weight_format import Quantization, WeightFormat
from shoal.models.kv_format import KVFormat
from shoal.models.spec import ExpertNames, LatentSpec, ModelSpec, MoESpec, NormSpec, TensorNames
from shoal.parallel.partition import HeadSplit, split, split_heads
from shoal.parallel.stages import Stage
from shoal.wire.plan import ShardPlan

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MLP_UNIT = 16  # the shares of an MLP are multiples of this, unless it is too small for that


class Cut(Enum):
    """The dimension of the model along which a tensor is cut."""

    WHOLE = "whole"
    Q_HEADS = "query heads"
    KV_HEADS = "KV heads"
    LATENT_QUERIES = "query heads of latent attention"
    LATENT_KEYS = "keys of these heads, made from latents"
    LATENT_VALUES = "values of these heads, made from latents"
    MLP = "MLP columns"
    EXPERT = "columns of each expert"
    SHARED = "columns of the shared experts"
    VOCAB = "vocabulary"


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one tensor of a checkpoint. A rank takes its range of `cut` along `dim`, and all other dimensions whole.

    `shape` is that of the rows, [out, in] or [out]. In the file they may be `transposed`, and a part of a larger tensor
    of shape `stored`: row r is row (r // run) * period + start + r % run of that tensor (transposed back). Without
    `run` the rows are consecutive from `start` on. A file's tensor of three dimensions counts as a single matrix: its
    matrices are one below the other.
    """

    source: str
    shape: tuple[int, ...]
    cut: Cut = Cut.WHOLE
    dim: int = 0
    transposed: bool = False
    start: int = 0
    run: int | None = None
    period: int | None = None
    stored: tuple[int, ...] | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor in the file."""
        if self.stored is not None:
            return self.stored
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def contiguous(self) -> bool:
        """True if the rows are consecutive in the file's tensor."""
        return self.run is None or self.period is None or self.run == self.period


@dataclass(frozen=True, slots=True)
class Param:
    """One tensor of the decoder: a rank's shares of the pieces, concatenated along dimension 0."""

    name: str
    pieces: tuple[Piece, ...]
    dtype: str | None = None  # None: the dtype of the weights
    plus: float = 0.0  # added after the conversion to `dtype` (Gemma's files have w for a norm's weight of 1 + w)
    at: int | Literal["first", "last", "every"] = "every"  # its layer, or the pipeline stages that have it
    expert: int | None = None  # the number of its expert, if it belongs to one
    quantizable: bool = False  # it is the weight of a linear layer that may be kept in fewer bits
    format: WeightFormat | None = None  # in which ranks keep it, if it takes their share; None: as it is, in `dtype`


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model that one rank holds."""

    rank: int  # among the tensor-parallel ranks
    heads: HeadSplit
    ranges: Mapping[Cut, range]  # in elements of a tensor's dimension
    stage: Stage
    experts: tuple[int, ...] | None = None  # the experts that it holds whole; None: it holds a part of each

    @classmethod
    def of(cls, plan: ShardPlan) -> "Shard":
        """Return the shard that a plan describes."""
        heads = HeadSplit(range(*plan.q_heads), range(*plan.kv_heads), plan.q_to_kv)
        ranges = {Cut[name]: range(*span) for name, span in plan.columns.items()}
        return cls(plan.tp_rank, heads, ranges, Stage(plan.stage, plan.num_stages, range(*plan.layers)), plan.experts)

    def plan(self, vocab_sizes: tuple[int, ...]) -> ShardPlan:
        """Return the shard as a message. vocab_sizes: the vocabulary's tokens on each tensor-parallel rank."""
        return ShardPlan(
            tp_rank=self.rank,
            stage=self.stage.number,
            num_stages=self.stage.count,
            layers=_span(self.stage.layers),
            q_heads=_span(self.heads.q_range),
            kv_heads=_span(self.heads.kv_ids),
            q_to_kv=self.heads.q_to_kv,
            columns={cut.name: _span(columns) for cut, columns in self.ranges.items()},
            experts=self.experts,
            vocab_sizes=vocab_sizes,
        )

    def holds(self, param: Param) -> bool:
        if self.experts is not None and param.expert is not None and param.expert not in self.experts:
            return False
        if isinstance(param.at, int):
            return param.at in self.stage.layers
        return {"first": self.stage.first, "last": self.stage.last, "every": True}[param.at]

    def held(self, params: Iterable[Param]) -> tuple[Param, ...]:
        return tuple(param for param in params if self.holds(param))

    def with_experts(self, spec: ModelSpec, experts: tuple[int, ...]) -> "Shard":
        """Return the shard of a rank that holds these experts whole, instead of a part of each expert."""
        if spec.moe is None:
            return self
        ranges = {**self.ranges, Cut.EXPERT: range(spec.moe.intermediate_size)}
        return dataclasses.replace(self, experts=experts, ranges=ranges)

    def shape(self, piece: Piece) -> tuple[int, ...]:
        if piece.cut is Cut.WHOLE:
            return piece.shape
        return (*piece.shape[: piece.dim], len(self.ranges[piece.cut]), *piece.shape[piece.dim + 1 :])

    def param_shape(self, param: Param) -> tuple[int, ...]:
        shapes = [self.shape(piece) for piece in param.pieces]
        if len(shapes) == 1:  # its shape may be (), a single number
            return shapes[0]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def param_size(self, param: Param) -> int:
        return math.prod(self.param_shape(param))

    def format_of(self, param: Param) -> WeightFormat | None:
        """Return the format in which the rank keeps its share of a parameter; None: as it is."""
        return param.format if param.format is not None and param.format.takes(self.param_shape(param)) else None

    def param_bytes(self, param: Param, item_bytes: int) -> int:
        """Return the bytes of the rank's share. item_bytes: see `weight_bytes`."""
        kept = self.format_of(param)
        if kept is not None:
            return kept.weight_bytes(self.param_shape(param))
        return self.param_size(param) * (item_bytes if param.dtype is None else ITEM_BYTES[param.dtype])


def _span(numbers: range) -> tuple[int, int]:
    return numbers.start, numbers.stop


def weight_bytes(
    spec: ModelSpec, params: Iterable[Param], shard: Shard, item_bytes: int, *, embedding_kept: bool
) -> int:
    """Return the bytes of the parameters that a rank holds.

    Args:
        item_bytes: the size of an element of a parameter without a type of its own.
        embedding_kept: see `keeps_embedding`.
    """
    shared = spec.tie_embeddings and not embedding_kept  # embedding and head are one tensor
    counted = [param for param in shard.held(params) if not (shared and param.name == "embedding")]
    return sum(shard.param_bytes(param, item_bytes) for param in counted)


def keeps_embedding(device: str, *, head: bool = True) -> bool:
    """Tell whether a tied embedding takes memory of its own on a rank.

    It does on a rank without the `head`, and on a CPU: there the head is packed, which an embedding can't be.
    """
    return device == "cpu" or not head


def kv_block_bytes(spec: ModelSpec, shard: Shard, block_size: int, kv: KVFormat) -> int:
    """Return the bytes of one KV block on a rank: keys and values of all its layers.

    Latents are not divided: each rank with heads holds them whole.
    """
    token = spec.cached_per_token * len(shard.heads.kv_ids) * kv.row_bytes(spec.head_dim)
    return len(shard.stage.layers) * block_size * token


def make_shards(spec: ModelSpec, tp: int, weights: Sequence[int] | None = None) -> tuple[Shard, ...]:
    """Return the shards of the tensor-parallel ranks of a single stage, even or in proportion to `weights`."""
    heads = split_heads(spec.num_heads, spec.num_kv_heads, tp, weights)
    columns = {Cut.MLP: spec.intermediate_size}
    if spec.moe is not None:
        columns |= {Cut.EXPERT: spec.moe.intermediate_size, Cut.SHARED: spec.moe.shared_size}
    inner = {cut: split(size, tp, MLP_UNIT if size >= MLP_UNIT * tp else 1, weights) for cut, size in columns.items()}
    vocab = split(spec.vocab_size, tp, weights=weights)
    d = spec.head_dim
    return tuple(
        Shard(
            rank,
            heads[rank],
            _latent_ranges(spec.latent, heads[rank].q_range)
            | {
                Cut.Q_HEADS: range(heads[rank].q_range.start * d, heads[rank].q_range.stop * d),
                Cut.KV_HEADS: range(heads[rank].kv_ids.start * d, heads[rank].kv_ids.stop * d),
                Cut.VOCAB: vocab[rank],
            }
            | {cut: shares[rank] for cut, shares in inner.items()},
            Stage(0, 1, range(spec.num_layers)),
        )
        for rank in range(tp)
    )


def _latent_ranges(latent: LatentSpec | None, heads: range) -> dict[Cut, range]:
    if latent is None:
        return {}
    widths = {
        Cut.LATENT_QUERIES: latent.query_dim,
        Cut.LATENT_KEYS: latent.nope_dim,
        Cut.LATENT_VALUES: latent.value_dim,
    }
    return {cut: range(heads.start * width, heads.stop * width) for cut, width in widths.items()}


def quantized(params: Iterable[Param], wanted: Quantization) -> tuple[Param, ...]:
    """Return the parameters, where those that may be quantized are kept in the formats that are wanted."""
    return tuple(
        dataclasses.replace(param, format=wanted.head if param.name == "head" else wanted.layers)
        if param.quantizable
        else param
        for param in params
    )


def make_manifest(spec: ModelSpec, names: TensorNames) -> tuple[Param, ...]:
    """Return all parameters of the decoder, in the order in which it is built."""
    return tuple(_params(spec, names))


def _params(spec: ModelSpec, names: TensorNames) -> Iterator[Param]:
    hidden, width, base = spec.hidden_size, spec.embedding_width, names.prefix
    embedding = f"{base}{names.embedding}.weight"
    yield Param("embedding", (Piece(embedding, (spec.vocab_size, width), Cut.VOCAB),), at="first")
    if width != hidden:
        yield Param("project_in.weight", (Piece(f"{base}{names.project_in}.weight", (hidden, width)),), at="first")
    if spec.position_offset is not None:
        rows = spec.max_positions + spec.position_offset
        yield Param("positions", (Piece(f"{base}{names.positions}.weight", (rows, hidden)),), at="first")
    for i in range(spec.num_layers):
        for param in _layer(spec, names, i, f"layers.{i}.", base + names.layer.format(i=i)):
            yield dataclasses.replace(param, at=i)
    for param in _norm_and_head(spec, names, embedding):
        yield dataclasses.replace(param, at="last")


def _norm_and_head(spec: ModelSpec, names: TensorNames, embedding: str) -> Iterator[Param]:
    """Yield the parameters of norm and head. A tied head is the tensor `embedding`."""
    hidden, width, base = spec.hidden_size, spec.embedding_width, names.prefix
    if spec.final_norm:
        yield from _norm("final_norm", f"{base}{names.final_norm}", spec.norm, hidden)
    if width != hidden:
        yield Param("project_out.weight", (Piece(f"{base}{names.project_out}.weight", (width, hidden)),))
    head = embedding if spec.tie_embeddings else f"{names.head}.weight"
    yield Param("head", (Piece(head, (spec.vocab_size, width), Cut.VOCAB),), quantizable=True)
    if spec.head_bias:
        yield Param("head_bias", (Piece(f"{names.head}.bias", (spec.vocab_size,), Cut.VOCAB),))


def _layer(spec: ModelSpec, names: TensorNames, i: int, ours: str, theirs: str) -> Iterator[Param]:
    def norm(name: str, spelled: str) -> Iterator[Param]:
        return _norm(ours + name, theirs + spelled, spec.norm, spec.hidden_size)

    if spec.norms_before:
        yield from norm("attention_norm", names.attention_norm)
    if spec.latent is None:
        yield from _attention(spec, names, ours, theirs)
    else:
        yield from _latent_attention(spec, spec.latent, names, ours, theirs)
    if spec.norms_after:
        yield from norm("attention_out_norm", names.attention_out_norm)
    if spec.norms_mlp:
        yield from norm("mlp_norm", names.mlp_norm)
    moe = spec.moe_of(i)
    if moe is None:
        yield from _mlp(spec, names, ours, theirs)
    else:
        yield from _mixture(spec, moe, names.experts, ours, theirs)
    if spec.norms_after:
        yield from norm("mlp_out_norm", names.mlp_out_norm)


def _norm(ours: str, theirs: str, norm: NormSpec, size: int) -> Iterator[Param]:
    if norm.weight:
        dtype, plus = ("float32" if norm.kind == "rms_wide" else None), float(norm.one_plus)
        yield Param(f"{ours}.weight", (Piece(f"{theirs}.weight", (size,)),), dtype, plus)
    if norm.bias:
        yield Param(f"{ours}.bias", (Piece(f"{theirs}.bias", (size,)),))


def _attention(spec: ModelSpec, names: TensorNames, ours: str, theirs: str) -> Iterator[Param]:
    hidden, d = spec.hidden_size, spec.head_dim
    q, kv = spec.num_heads * d, spec.num_kv_heads * d
    stacked = _Stack(
        tuple(theirs + name for name in names.qkv),
        ((q, Cut.Q_HEADS), (kv, Cut.KV_HEADS), (kv, Cut.KV_HEADS)),
        run=d if names.interleaved else None,
    )
    yield Param(f"{ours}qkv.weight", stacked.weights(hidden, names.transposed), quantizable=True)
    if spec.qkv_bias:
        yield Param(f"{ours}qkv.bias", stacked.biases())
    if spec.qk_norm is not None:
        yield from _norm(f"{ours}q_norm", f"{theirs}{names.q_norm}", spec.qk_norm, d)
        yield from _norm(f"{ours}k_norm", f"{theirs}{names.k_norm}", spec.qk_norm, d)
    out = Piece(f"{theirs}{names.out}.weight", (hidden, q), Cut.Q_HEADS, 1, names.transposed)
    yield Param(f"{ours}out.weight", (out,), quantizable=True)
    if spec.out_bias:
        yield Param(f"{ours}out.bias", (Piece(f"{theirs}{names.out}.bias", (hidden,)),))


def _latent_attention(
    spec: ModelSpec, latent: LatentSpec, names: TensorNames, ours: str, theirs: str
) -> Iterator[Param]:
    """Yield the parameters of latent attention.

    Projections to latents are whole on every rank; projections from latents and the output are cut by heads.
    """
    hidden, spelled = spec.hidden_size, names.latent

    def down(name: str, source: str, rows: int) -> Iterator[Param]:
        yield Param(f"{ours}{name}.weight", (Piece(f"{theirs}{source}.weight", (rows, hidden)),), quantizable=True)
        if spec.qkv_bias:
            yield Param(f"{ours}{name}.bias", (Piece(f"{theirs}{source}.bias", (rows,)),))

    queries, source, columns = spec.num_heads * latent.query_dim, spelled.q, hidden
    if latent.q_rank is not None:
        yield from down("q_down", spelled.q_down, latent.q_rank)
        yield from _norm(f"{ours}q_norm", f"{theirs}{spelled.q_norm}", latent.norm, latent.q_rank)
        source, columns = spelled.q_up, latent.q_rank
    q_up = Piece(f"{theirs}{source}.weight", (queries, columns), Cut.LATENT_QUERIES)
    yield Param(f"{ours}q_up.weight", (q_up,), quantizable=True)
    yield from down("kv_down", spelled.kv_down, latent.cached_dim)
    yield from _norm(f"{ours}kv_norm", f"{theirs}{spelled.kv_norm}", latent.norm, latent.kv_rank)

    def up(name: str, cut: Cut, start: int, width: int) -> Param:
        period = latent.nope_dim + latent.value_dim
        piece = Piece(
            f"{theirs}{spelled.kv_up}.weight",
            (spec.num_heads * width, latent.kv_rank),
            cut,
            start=start,
            run=width,
            period=period,
            stored=(spec.num_heads * period, latent.kv_rank),
        )
        return Param(f"{ours}{name}.weight", (piece,))

    yield up("k_up", Cut.LATENT_KEYS, 0, latent.nope_dim)
    yield up("v_up", Cut.LATENT_VALUES, latent.nope_dim, latent.value_dim)
    values = spec.num_heads * latent.value_dim
    out = Piece(f"{theirs}{names.out}.weight", (hidden, values), Cut.LATENT_VALUES, 1)
    yield Param(f"{ours}out.weight", (out,), quantizable=True)
    if spec.out_bias:
        yield Param(f"{ours}out.bias", (Piece(f"{theirs}{names.out}.bias", (hidden,)),))


def _mlp(spec: ModelSpec, names: TensorNames, ours: str, theirs: str) -> Iterator[Param]:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    parts = ((inner, Cut.MLP),) * (2 if spec.gated else 1)
    stacked = _Stack(tuple(theirs + name for name in names.up), parts)
    name = f"{ours}gate_up" if spec.gated else f"{ours}up"
    yield Param(f"{name}.weight", stacked.weights(hidden, names.transposed), quantizable=True)
    if spec.up_bias:
        yield Param(f"{name}.bias", stacked.biases())
    down = Piece(f"{theirs}{names.down}.weight", (hidden, inner), Cut.MLP, 1, names.transposed)
    yield Param(f"{ours}down.weight", (down,), quantizable=True)
    if spec.down_bias:
        yield Param(f"{ours}down.bias", (Piece(f"{theirs}{names.down}.bias", (hidden,)),))


def _mixture(spec: ModelSpec, moe: MoESpec, names: ExpertNames, ours: str, theirs: str) -> Iterator[Param]:
    """Yield the parameters of a mixture.

    The router is whole on every rank, each expert has parameters of its own, and shared experts are cut like an MLP.
    """
    hidden, size, matrices = spec.hidden_size, moe.intermediate_size, 2 if spec.gated else 1
    up = "gate_up" if spec.gated else "up"
    router = Piece(theirs + names.router, (moe.num_experts, hidden))
    yield Param(f"{ours}router.weight", (router,), "float32" if moe.routing.wide else None)
    if moe.routing.correction_bias:
        yield Param(f"{ours}correction_bias", (Piece(theirs + names.correction_bias, (moe.num_experts,)),), "float32")
    up_names, down_names = tuple(theirs + name for name in names.up), (theirs + names.down,)
    for e in range(moe.num_experts):
        pieces = _expert_pieces(up_names, e, moe.num_experts, matrices, (size, hidden), 0)
        yield Param(f"{ours}experts.{e}.{up}.weight", pieces, expert=e, quantizable=True)
        pieces = _expert_pieces(down_names, e, moe.num_experts, 1, (hidden, size), 1)
        yield Param(f"{ours}experts.{e}.down.weight", pieces, expert=e, quantizable=True)
    if not moe.shared_size:
        return
    stacked = _Stack(tuple(theirs + name for name in names.shared_up), ((moe.shared_size, Cut.SHARED),) * matrices)
    yield Param(f"{ours}shared.{up}.weight", stacked.weights(hidden, False), quantizable=True)
    down = Piece(f"{theirs}{names.shared_down}.weight", (hidden, moe.shared_size), Cut.SHARED, 1)
    yield Param(f"{ours}shared.down.weight", (down,), quantizable=True)
    if moe.shared_gate:
        yield Param(f"{ours}shared_gate.weight", (Piece(f"{theirs}{names.shared_gate}.weight", (1, hidden)),))


def _expert_pieces(
    names: tuple[str, ...], expert: int, experts: int, count: int, shape: tuple[int, int], dim: int
) -> tuple[Piece, ...]:
    """Return the pieces of `count` matrices [out, in] of one expert.

    Matrices that share one of the `names` are one below the other in one tensor. A name without {e} is that of a tensor
    with the matrices of all experts.
    """
    per_name, (rows, columns) = count // len(names), shape
    pieces = []
    for i in range(count):
        name, start = names[i // per_name], i % per_name * rows
        stored: tuple[int, ...] = (per_name * rows, columns)
        if "{e}" not in name:
            start, stored = start + expert * stored[0], (experts, *stored)
        pieces.append(Piece(name.format(e=expert), shape, Cut.EXPERT, dim, start=start, stored=stored))
    return tuple(pieces)


@dataclass(frozen=True, slots=True)
class _Stack:
    """Matrices that the decoder holds in one tensor. In the file each has a tensor of its own, or all share one.

    A shared tensor has the matrices one after the other, or alternates between them every `run` rows.
    """

    sources: tuple[str, ...]
    parts: tuple[tuple[int, Cut], ...]  # the rows and the cut of each matrix
    run: int | None = None

    def weights(self, columns: int, transposed: bool) -> tuple[Piece, ...]:
        return self._pieces("weight", (columns,), transposed)

    def biases(self) -> tuple[Piece, ...]:
        return self._pieces("bias", (), False)

    def _pieces(self, end: str, columns: tuple[int, ...], transposed: bool) -> tuple[Piece, ...]:
        if len(self.sources) == len(self.parts):
            return tuple(
                Piece(f"{source}.{end}", (rows, *columns), cut, transposed=transposed)
                for source, (rows, cut) in zip(self.sources, self.parts, strict=True)
            )
        (source,) = self.sources
        pieces, before = [], 0
        whole = (sum(rows for rows, _ in self.parts), *columns)
        for i, (rows, cut) in enumerate(self.parts):
            piece = Piece(
                f"{source}.{end}",
                (rows, *columns),
                cut,
                transposed=transposed,
                start=before if self.run is None else i * self.run,
                run=self.run,
                period=None if self.run is None else self.run * len(self.parts),
                stored=whole[::-1] if transposed else whole,
            )
            pieces.append(piece)
            before += rows
        return tuple(pieces)


def check_shapes(params: Iterable[Param], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Check the tensors of a checkpoint (name -> shape) against the manifest.

    Raises:
        CheckpointError: a tensor is missing or has another shape. The error names it.
    """
    for param in params:
        for piece in param.pieces:
            wanted = list(piece.stored_shape)
            if piece.source not in shapes:
                raise CheckpointError(f"{where} lacks the tensor {piece.source} of shape {wanted}")
            found = list(shapes[piece.source])
            if found != wanted:
                raise CheckpointError(f"{where}: {piece.source} has shape {found}, config.json asks for {wanted}")
