"""Every tensor of a model: its shape, how it is cut over ranks, and what it is fused with. Free of torch.

How a tensor is cut is said here, once: the decoder, the loader, the memory arithmetic and the check of a checkpoint
before any process starts all read the same manifest.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from shoal.errors import CheckpointError
from shoal.models.spec import ModelSpec, TensorNames
from shoal.parallel.partition import HeadSplit, split, split_heads

MLP_UNIT = 16  # shares of an MLP are multiples of it, where there is enough to share


class Cut(Enum):
    """Along what a tensor is cut."""

    WHOLE = "whole"
    Q_HEADS = "query heads"
    KV_HEADS = "KV heads"
    MLP = "MLP columns"
    VOCAB = "vocabulary"


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a checkpoint. A rank takes its range of `cut` along `dim`, and all of the other dimensions."""

    source: str
    shape: tuple[int, ...]
    cut: Cut = Cut.WHOLE
    dim: int = 0


@dataclass(frozen=True, slots=True)
class Param:
    """One tensor of the decoder: a rank's shares of the pieces, one after the other along dimension 0."""

    name: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds."""

    rank: int
    heads: HeadSplit
    ranges: Mapping[Cut, range]  # in elements of a tensor's dimension

    def shape(self, piece: Piece) -> tuple[int, ...]:
        if piece.cut is Cut.WHOLE:
            return piece.shape
        return (*piece.shape[: piece.dim], len(self.ranges[piece.cut]), *piece.shape[piece.dim + 1 :])

    def param_shape(self, param: Param) -> tuple[int, ...]:
        shapes = [self.shape(piece) for piece in param.pieces]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def param_size(self, param: Param) -> int:
        return math.prod(self.param_shape(param))


def weight_bytes(
    spec: ModelSpec, params: Iterable[Param], shard: Shard, item_bytes: int, *, embedding_kept: bool
) -> int:
    """Bytes of a rank's weights. A tied head is the embedding, unless the embedding is kept beside the packed head."""
    counted = [param for param in params if embedding_kept or not (spec.tie_embeddings and param.name == "embedding")]
    return sum(shard.param_size(param) for param in counted) * item_bytes


def keeps_embedding(spec: ModelSpec, device: str, dtype: str) -> bool:
    """Does a tied embedding take memory beside the head? On a CPU it stays in the file, if it is used as it is."""
    return device == "cpu" and dtype != spec.dtype


def shards(spec: ModelSpec, tp: int) -> tuple[Shard, ...]:
    """The shares of all tensor-parallel ranks."""
    heads = split_heads(spec.num_heads, spec.num_kv_heads, tp)
    mlp = split(spec.intermediate_size, tp, MLP_UNIT if spec.intermediate_size >= MLP_UNIT * tp else 1)
    vocab = split(spec.vocab_size, tp)
    d = spec.head_dim
    return tuple(
        Shard(
            rank,
            heads[rank],
            {
                Cut.Q_HEADS: range(heads[rank].q_range.start * d, heads[rank].q_range.stop * d),
                Cut.KV_HEADS: range(heads[rank].kv_ids.start * d, heads[rank].kv_ids.stop * d),
                Cut.MLP: mlp[rank],
                Cut.VOCAB: vocab[rank],
            },
        )
        for rank in range(tp)
    )


def manifest(spec: ModelSpec, names: TensorNames) -> tuple[Param, ...]:
    """Every parameter of the decoder, in the order of the layers."""
    return tuple(_params(spec, names))


def _params(spec: ModelSpec, names: TensorNames) -> Iterator[Param]:
    hidden = spec.hidden_size
    yield Param("embedding", (Piece(f"{names.embedding}.weight", (spec.vocab_size, hidden), Cut.VOCAB),))
    for i in range(spec.num_layers):
        yield from _layer(spec, names, f"layers.{i}.", names.layer.format(i=i))
    yield Param("final_norm", (Piece(f"{names.final_norm}.weight", (hidden,)),))
    head = names.embedding if spec.tie_embeddings else names.head
    yield Param("head", (Piece(f"{head}.weight", (spec.vocab_size, hidden), Cut.VOCAB),))


def _layer(spec: ModelSpec, names: TensorNames, ours: str, theirs: str) -> Iterator[Param]:
    hidden, d = spec.hidden_size, spec.head_dim
    q, kv = spec.num_heads * d, spec.num_kv_heads * d

    yield Param(f"{ours}input_norm", (Piece(f"{theirs}{names.input_norm}.weight", (hidden,)),))
    projections = ((names.q, q, Cut.Q_HEADS), (names.k, kv, Cut.KV_HEADS), (names.v, kv, Cut.KV_HEADS))
    yield Param(
        f"{ours}qkv.weight",
        tuple(Piece(f"{theirs}{name}.weight", (rows, hidden), cut) for name, rows, cut in projections),
    )
    if spec.qkv_bias:
        yield Param(
            f"{ours}qkv.bias", tuple(Piece(f"{theirs}{name}.bias", (rows,), cut) for name, rows, cut in projections)
        )
    if spec.qk_norm:
        yield Param(f"{ours}q_norm", (Piece(f"{theirs}{names.q_norm}.weight", (d,)),))
        yield Param(f"{ours}k_norm", (Piece(f"{theirs}{names.k_norm}.weight", (d,)),))
    yield Param(f"{ours}out.weight", (Piece(f"{theirs}{names.out}.weight", (hidden, q), Cut.Q_HEADS, dim=1),))
    if spec.out_bias:
        yield Param(f"{ours}out.bias", (Piece(f"{theirs}{names.out}.bias", (hidden,)),))

    yield Param(f"{ours}post_norm", (Piece(f"{theirs}{names.post_norm}.weight", (hidden,)),))
    inner = spec.intermediate_size
    gate_up = (names.gate, names.up)
    yield Param(
        f"{ours}gate_up.weight", tuple(Piece(f"{theirs}{name}.weight", (inner, hidden), Cut.MLP) for name in gate_up)
    )
    if spec.mlp_bias:
        yield Param(f"{ours}gate_up.bias", tuple(Piece(f"{theirs}{name}.bias", (inner,), Cut.MLP) for name in gate_up))
    yield Param(f"{ours}down.weight", (Piece(f"{theirs}{names.down}.weight", (hidden, inner), Cut.MLP, dim=1),))
    if spec.mlp_bias:
        yield Param(f"{ours}down.bias", (Piece(f"{theirs}{names.down}.bias", (hidden,)),))


def check(params: Iterable[Param], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Holds a checkpoint's tensors (name -> shape) against the manifest.

    Raises:
        CheckpointError: a tensor is missing or has another shape; it is named.
    """
    for param in params:
        for piece in param.pieces:
            if piece.source not in shapes:
                raise CheckpointError(f"{where} lacks the tensor {piece.source} of shape {list(piece.shape)}")
            found, wanted = list(shapes[piece.source]), list(piece.shape)
            if found != wanted:
                raise CheckpointError(f"{where}: {piece.source} has shape {found}, config.json asks for {wanted}")
