"""How tensors are cut: every rank count gives the whole back, and a checkpoint is held against it."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import CheckpointError
from shoal.models import manifest
from shoal.models.checkpoint import open_checkpoint
from shoal.models.manifest import Cut, Param, Shard
from shoal.models.registry import read_spec, tensor_names
from shoal.models.spec import ModelSpec, RopeSpec, TensorNames

SPEC = ModelSpec(
    family="llama",
    hidden_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    intermediate_size=112,
    vocab_size=301,
    max_positions=256,
    norm_eps=1e-5,
    rope=RopeSpec(10000.0),
    tie_embeddings=False,
    dtype="float32",
)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.integers(1, 8))
    return dataclasses.replace(
        SPEC,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * draw(st.integers(1, 6)),
        head_dim=draw(st.sampled_from([2, 8, 16])),
        intermediate_size=draw(st.integers(1, 300)),
        vocab_size=draw(st.integers(1, 400)),
        tie_embeddings=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


RANKS = st.integers(1, 9)


@given(specs(), RANKS)
@settings(deadline=None)
def test_shares_give_the_whole(spec: ModelSpec, tp: int) -> None:
    """Each element on exactly one rank; of the KV heads on at least one."""
    shards = manifest.shards(spec, tp)
    assert [shard.rank for shard in shards] == list(range(tp))
    totals = {
        Cut.Q_HEADS: spec.num_heads * spec.head_dim,
        Cut.MLP: spec.intermediate_size,
        Cut.VOCAB: spec.vocab_size,
    }
    for cut, total in totals.items():
        assert [i for shard in shards for i in shard.ranges[cut]] == list(range(total))
    kv = {i for shard in shards for i in shard.ranges[Cut.KV_HEADS]}
    assert kv == set(range(spec.num_kv_heads * spec.head_dim))


@given(specs(), RANKS)
@settings(deadline=None)
def test_queries_find_their_keys(spec: ModelSpec, tp: int) -> None:
    group = spec.num_heads // spec.num_kv_heads
    for shard in manifest.shards(spec, tp):
        heads, d = shard.heads, spec.head_dim
        for local, query in enumerate(heads.q_range):
            assert heads.kv_ids[heads.q_to_kv[local]] == query // group
        assert shard.ranges[Cut.Q_HEADS] == range(heads.q_range.start * d, heads.q_range.stop * d)
        assert shard.ranges[Cut.KV_HEADS] == range(heads.kv_ids.start * d, heads.kv_ids.stop * d)
        assert {q // group for q in heads.q_range} == set(heads.kv_ids), "no head that nobody reads"


def params(spec: ModelSpec) -> tuple[Param, ...]:
    return manifest.manifest(spec, TensorNames())


@given(specs(), RANKS)
@settings(deadline=None)
def test_shapes_fit_together(spec: ModelSpec, tp: int) -> None:
    found = params(spec)
    assert len({param.name for param in found}) == len(found)
    for shard in manifest.shards(spec, tp):
        q, kv = len(shard.ranges[Cut.Q_HEADS]), len(shard.ranges[Cut.KV_HEADS])
        mlp, vocab, hidden = len(shard.ranges[Cut.MLP]), len(shard.ranges[Cut.VOCAB]), spec.hidden_size
        shapes = {param.name: shard.param_shape(param) for param in found}
        expected = {
            "embedding": (vocab, hidden),
            "head": (vocab, hidden),
            "final_norm": (hidden,),
            "layers.1.qkv.weight": (q + 2 * kv, hidden),
            "layers.1.out.weight": (hidden, q),
            "layers.1.gate_up.weight": (2 * mlp, hidden),
            "layers.1.down.weight": (hidden, mlp),
        }
        if spec.qkv_bias:
            expected["layers.0.qkv.bias"] = (q + 2 * kv,)
        if spec.out_bias:
            expected["layers.0.out.bias"] = (hidden,)
        if spec.mlp_bias:
            expected |= {"layers.0.gate_up.bias": (2 * mlp,), "layers.0.down.bias": (hidden,)}
        if spec.qk_norm:
            expected |= {"layers.0.q_norm": (spec.head_dim,), "layers.0.k_norm": (spec.head_dim,)}
        assert shapes == {**shapes, **expected}
        assert all(shard.param_size(param) == math.prod(shapes[param.name]) for param in found)
        assert ("layers.0.qkv.bias" in shapes) == spec.qkv_bias
        assert ("layers.0.out.bias" in shapes) == spec.out_bias
        assert ("layers.0.down.bias" in shapes) == spec.mlp_bias
        assert ("layers.0.q_norm" in shapes) == spec.qk_norm


def test_one_rank_holds_everything() -> None:
    (shard,) = manifest.shards(SPEC, 1)
    for param in params(SPEC):
        assert all(shard.shape(piece) == piece.shape for piece in param.pieces)


def test_known_cut() -> None:
    """8 query and 4 KV heads of 8 over 3 ranks: groups stay together while that leaves no rank fuller."""
    sizes: Callable[[Shard], list[int]] = lambda shard: [len(shard.ranges[cut]) for cut in list(Cut)[1:]]  # noqa: E731
    found = [sizes(shard) for shard in manifest.shards(SPEC, 3)]
    assert [row[3] for row in found] == [101, 100, 100]
    assert [row[2] for row in found] == [48, 32, 32]
    assert [row[0] for row in found] == [24, 24, 16]


def test_tied_head_reads_the_embedding() -> None:
    (head,) = (param for param in params(dataclasses.replace(SPEC, tie_embeddings=True)) if param.name == "head")
    assert [piece.source for piece in head.pieces] == ["model.embed_tokens.weight"]
    (head,) = (param for param in params(SPEC) if param.name == "head")
    assert [piece.source for piece in head.pieces] == ["lm_head.weight"]


@pytest.mark.parametrize("name", ["llama", "llama3", "llama_6_2", "qwen3"])
def test_all_of_a_checkpoint_and_nothing_else(checkpoint: Callable[[str], Path], name: str) -> None:
    folder = checkpoint(name)
    spec, shapes = read_spec(folder), open_checkpoint(folder).shapes
    found = manifest.manifest(spec, tensor_names(spec))
    manifest.check(found, shapes, "here")
    assert {piece.source for param in found for piece in param.pieces} == set(shapes)


def test_check() -> None:
    found = params(SPEC)
    shapes = {piece.source: piece.shape for param in found for piece in param.pieces}
    manifest.check(found, shapes, "here")
    manifest.check(found, {**shapes, "something.else": (5,)}, "here")
    for name, shape in shapes.items():
        with pytest.raises(CheckpointError) as caught:
            manifest.check(found, {k: v for k, v in shapes.items() if k != name}, "here")
        assert str(caught.value) == f"here lacks the tensor {name} of shape {list(shape)}"
        with pytest.raises(CheckpointError) as caught:
            manifest.check(found, {**shapes, name: (*shape, 1)}, "here")
        assert str(caught.value).startswith("here: ")
        assert name in str(caught.value)
        assert str([*shape, 1]) in str(caught.value)
        assert str(list(shape)) in str(caught.value)
