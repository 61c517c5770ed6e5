"""Manifests: the shares of any number of ranks are the whole, and a checkpoint is checked against its manifest."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import CheckpointError
from shoal.models import manifest
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.manifest import Cut, Param, Piece
from shoal.models.registry import read_spec, tensor_names
from shoal.models.spec import (
    AttentionSpec,
    ExpertNames,
    Layout,
    ModelSpec,
    MoESpec,
    NormSpec,
    RopeSpec,
    RoutingSpec,
    TensorNames,
)
from shoal.parallel.expert_placement import place_experts
from support.checkpoints import MAKERS

RMS = NormSpec("rms", 1e-5)
LAYER = NormSpec("layer", 1e-5, bias=True)
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
    attention=(AttentionSpec(8**-0.5, RopeSpec(10000.0)),),
    norm=RMS,
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
        layout=draw(st.sampled_from(get_args(Layout))),
        norm=draw(st.sampled_from([RMS, LAYER, NormSpec("layer", 1e-5, weight=False)])),
        final_norm=draw(st.booleans()),
        qk_norm=draw(st.sampled_from([None, RMS, LAYER])),
        gated=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        up_bias=draw(st.booleans()),
        down_bias=draw(st.booleans()),
        head_bias=draw(st.booleans()),
        embedding_size=draw(st.sampled_from([None, 40])),
        position_offset=draw(st.sampled_from([None, 0, 2])),
    )


RANKS = st.integers(1, 9)


@given(specs(), RANKS)
@settings(deadline=None)
def test_shares_of_all_ranks_are_the_whole(spec: ModelSpec, tp: int) -> None:
    """Each element is on exactly one rank, except that KV heads may be on several."""
    shards = manifest.make_shards(spec, tp)
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
def test_each_rank_has_the_kv_heads_of_its_query_heads(spec: ModelSpec, tp: int) -> None:
    group = spec.num_heads // spec.num_kv_heads
    for shard in manifest.make_shards(spec, tp):
        heads, d = shard.heads, spec.head_dim
        for local, query in enumerate(heads.q_range):
            assert heads.kv_ids[heads.q_to_kv[local]] == query // group
        assert shard.ranges[Cut.Q_HEADS] == range(heads.q_range.start * d, heads.q_range.stop * d)
        assert shard.ranges[Cut.KV_HEADS] == range(heads.kv_ids.start * d, heads.kv_ids.stop * d)
        assert {q // group for q in heads.q_range} == set(heads.kv_ids), "a rank has a KV head without query heads"


def params(spec: ModelSpec) -> tuple[Param, ...]:
    return manifest.make_manifest(spec, TensorNames() if spec.gated else TensorNames(up=("mlp.up_proj",)))


@given(specs(), RANKS)
@settings(deadline=None)
def test_shapes_fit_together(spec: ModelSpec, tp: int) -> None:
    found = params(spec)
    assert len({param.name for param in found}) == len(found)
    for shard in manifest.make_shards(spec, tp):
        q, kv = len(shard.ranges[Cut.Q_HEADS]), len(shard.ranges[Cut.KV_HEADS])
        mlp, vocab, hidden = len(shard.ranges[Cut.MLP]), len(shard.ranges[Cut.VOCAB]), spec.hidden_size
        shapes = {param.name: shard.param_shape(param) for param in found}
        up = "layers.1.gate_up" if spec.gated else "layers.1.up"
        columns = 2 * mlp if spec.gated else mlp
        width = spec.embedding_size or hidden
        expected: dict[str, tuple[int, ...]] = {
            "embedding": (vocab, width),
            "head": (vocab, width),
            "layers.1.qkv.weight": (q + 2 * kv, hidden),
            "layers.1.out.weight": (hidden, q),
            f"{up}.weight": (columns, hidden),
            "layers.1.down.weight": (hidden, mlp),
        }
        optional: dict[str, tuple[bool, tuple[int, ...]]] = {
            "layers.1.qkv.bias": (spec.qkv_bias, (q + 2 * kv,)),
            "layers.1.out.bias": (spec.out_bias, (hidden,)),
            f"{up}.bias": (spec.up_bias, (columns,)),
            "layers.1.down.bias": (spec.down_bias, (hidden,)),
            "head_bias": (spec.head_bias, (vocab,)),
            "positions": (spec.position_offset is not None, (spec.max_positions + (spec.position_offset or 0), hidden)),
            "project_in.weight": (width != hidden, (hidden, width)),
            "project_out.weight": (width != hidden, (width, hidden)),
        }
        expected |= {name: shape for name, (there, shape) in optional.items() if there}
        assert {name: shape for name, shape in shapes.items() if name in {**expected, **optional}} == expected
        assert all(shard.param_size(param) == math.prod(shapes[param.name]) for param in found)


LAYOUTS: dict[Layout, set[str]] = {
    "pre": {"attention_norm", "mlp_norm"},
    "post": {"attention_out_norm", "mlp_out_norm"},
    "sandwich": {"attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm"},
    "parallel": {"attention_norm", "mlp_norm"},
    "parallel_one": {"attention_norm"},
    "norm_sum": {"attention_norm", "mlp_norm"},
}


@pytest.mark.parametrize("layout", get_args(Layout))
def test_each_layout_has_its_norms(layout: Layout) -> None:
    found = {param.name for param in params(dataclasses.replace(SPEC, layout=layout, norm=LAYER))}
    names = {name.removeprefix("layers.1.") for name in found if name.startswith("layers.1.") and "norm" in name}
    assert names == {f"{name}.{end}" for name in LAYOUTS[layout] for end in ("weight", "bias")}
    assert {"final_norm.weight", "final_norm.bias"} <= found
    without = params(dataclasses.replace(SPEC, layout=layout, final_norm=False))
    assert not any(param.name.startswith("final_norm") for param in without)


def test_a_one_plus_norm_adds_one_to_its_weight_in_float32() -> None:
    spec = dataclasses.replace(SPEC, norm=NormSpec("rms_wide", 1e-5, one_plus=True))
    assert {(param.dtype, param.plus) for param in params(spec) if "norm" in param.name} == {("float32", 1.0)}
    assert {(param.dtype, param.plus) for param in params(spec) if "norm" not in param.name} == {(None, 0.0)}
    assert {(param.dtype, param.plus) for param in params(SPEC)} == {(None, 0.0)}


def source_rows(piece: Piece) -> list[int]:
    """Return the rows of a piece in the file's tensor, by the definition in `Piece`."""
    run, period = piece.run or piece.shape[0], piece.period or 0
    return [row // run * period + piece.start + row % run for row in range(piece.shape[0])]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("end", ["weight", "bias"])
def test_queries_keys_and_values_may_be_in_one_tensor(end: str, transposed: bool) -> None:
    """The tensor has all rows of the queries first, then the keys, then the values."""
    names = TensorNames(qkv=("qkv",), up=("gate_up",), transposed=transposed)
    spec = dataclasses.replace(SPEC, qkv_bias=True, up_bias=True)
    found = {param.name: param for param in manifest.make_manifest(spec, names)}
    qkv = found[f"layers.0.qkv.{end}"].pieces
    assert [piece.source for piece in qkv] == [f"model.layers.0.qkv.{end}"] * 3
    assert [source_rows(piece) for piece in qkv] == [[*range(64)], [*range(64, 96)], [*range(96, 128)]]
    whole = (128,) if end == "bias" else (64, 128) if transposed else (128, 64)
    assert {piece.stored_shape for piece in qkv} == {whole}
    gate_up = found[f"layers.0.gate_up.{end}"].pieces
    assert [source_rows(piece) for piece in gate_up] == [[*range(112)], [*range(112, 224)]]
    assert all(piece.contiguous for piece in (*qkv, *gate_up))
    assert {piece.transposed for piece in (*qkv, *gate_up)} == {transposed and end == "weight"}
    down = found["layers.0.down.weight"].pieces[0]
    assert (down.shape, down.stored_shape) == ((64, 112), (112, 64) if transposed else (64, 112))


@pytest.mark.parametrize("end", ["weight", "bias"])
def test_queries_keys_and_values_may_be_interleaved_by_head(end: str) -> None:
    spec = dataclasses.replace(SPEC, num_kv_heads=8, qkv_bias=True)
    names = TensorNames(qkv=("qkv",), interleaved=True)
    (param,) = (p for p in manifest.make_manifest(spec, names) if p.name == f"layers.0.qkv.{end}")
    rows = [source_rows(piece) for piece in param.pieces]
    assert rows[0] == [head * 24 + i for head in range(8) for i in range(8)]
    assert rows[2] == [row + 16 for row in rows[0]]
    assert sorted(row for part in rows for row in part) == list(range(192))
    assert not any(piece.contiguous for piece in param.pieces)
    assert {piece.stored_shape[0] for piece in param.pieces} == {192}


def test_weight_bytes_are_right() -> None:
    """The expected numbers are computed by hand, for 2 layers, a tied head, positions, and norms in float32."""
    spec = dataclasses.replace(SPEC, num_kv_heads=8)
    layer = 64 * 64 * 4 + 3 * 64 * 112 + 2 * 64
    plain = 2 * layer + 64 + 2 * 301 * 64

    def found(spec: ModelSpec, *, kept: bool = True) -> int:
        (shard,) = manifest.make_shards(spec, 1)
        return manifest.weight_bytes(spec, params(spec), shard, 2, embedding_kept=kept)

    assert found(spec) == 2 * plain
    tied = dataclasses.replace(spec, tie_embeddings=True)
    assert found(tied) == 2 * plain
    assert found(tied, kept=False) == 2 * (plain - 301 * 64)
    assert found(dataclasses.replace(spec, position_offset=2)) == 2 * (plain + 258 * 64)
    wide = dataclasses.replace(spec, norm=NormSpec("rms_wide", 1e-5, one_plus=True))
    assert found(wide) == 2 * plain + 2 * 5 * 64
    assert found(dataclasses.replace(spec, embedding_scale=8.0)) == 2 * plain


@given(specs(), st.lists(st.integers(1, 9), min_size=1, max_size=9))
@settings(deadline=None)
def test_unequal_shares_are_the_whole(spec: ModelSpec, weights: list[int]) -> None:
    found = manifest.make_shards(spec, len(weights), weights)
    for cut, total in ((Cut.MLP, spec.intermediate_size), (Cut.VOCAB, spec.vocab_size)):
        assert [i for shard in found for i in shard.ranges[cut]] == list(range(total))
    assert manifest.make_shards(spec, len(weights), [weight * 3 for weight in weights]) == found
    assert manifest.make_shards(spec, len(weights), [1] * len(weights)) == manifest.make_shards(spec, len(weights))


def test_an_unequal_cut_has_the_expected_sizes() -> None:
    first, second, third = manifest.make_shards(SPEC, 3, (2, 1, 1))
    assert [len(shard.ranges[Cut.Q_HEADS]) for shard in (first, second, third)] == [32, 16, 16]
    assert [len(shard.ranges[Cut.KV_HEADS]) for shard in (first, second, third)] == [16, 8, 8]
    assert [len(shard.ranges[Cut.MLP]) for shard in (first, second, third)] == [48, 32, 32]
    assert [len(shard.ranges[Cut.VOCAB]) for shard in (first, second, third)] == [151, 75, 75]


def test_one_rank_holds_everything() -> None:
    (shard,) = manifest.make_shards(SPEC, 1)
    for param in params(SPEC):
        assert all(shard.shape(piece) == piece.shape for piece in param.pieces)


def test_an_equal_cut_has_the_expected_sizes() -> None:
    """Groups of query heads are split, because with whole groups one rank would have 4 of the 8 heads instead of 3."""
    shards = manifest.make_shards(SPEC, 3)
    assert [len(shard.ranges[Cut.VOCAB]) for shard in shards] == [101, 100, 100]
    assert [len(shard.ranges[Cut.MLP]) for shard in shards] == [48, 32, 32]
    assert [len(shard.ranges[Cut.Q_HEADS]) for shard in shards] == [24, 24, 16]


# --- mixtures of experts ------------------------------------------------------------------------------------------


@st.composite
def mixtures(draw: st.DrawFn) -> ModelSpec:
    """Draw a spec of three layers, some of them mixtures whose experts are in separate tensors."""
    moe = MoESpec(
        draw(st.integers(2, 9)),
        draw(st.integers(1, 70)),
        RoutingSpec(2, correction_bias=draw(st.booleans()), wide=draw(st.booleans())),
        tuple(draw(st.lists(st.booleans(), min_size=3, max_size=3))),
        shared_size=draw(st.sampled_from([0, 1, 50])),
        shared_gate=draw(st.booleans()),
    )
    return dataclasses.replace(SPEC, num_layers=3, moe=moe, tie_embeddings=draw(st.booleans()))


@given(mixtures(), RANKS)
@settings(deadline=None)
def test_shares_of_mixtures_are_the_whole(spec: ModelSpec, tp: int) -> None:
    """Experts may be cut or whole: each element of an expert is on one rank. The router is on all ranks."""
    moe = spec.moe
    assert moe is not None
    found = {param.name: param for param in manifest.make_manifest(spec, TensorNames())}
    shards = manifest.make_shards(spec, tp)
    for i, mixed in enumerate(moe.layers):
        at = f"layers.{i}."
        assert (f"{at}gate_up.weight" in found) != mixed
        names = [f"{at}router.weight"] + [f"{at}experts.{e}.{m}.weight" for e in (0, 1) for m in ("gate_up", "down")]
        assert all((name in found) == mixed for name in names)
        assert (f"{at}correction_bias" in found) == (mixed and moe.routing.correction_bias)
        assert (f"{at}shared.down.weight" in found) == (mixed and moe.shared_size > 0)
        assert (f"{at}shared_gate.weight" in found) == (mixed and moe.shared_size > 0 and moe.shared_gate)
        if mixed:
            assert all(shard.param_shape(found[names[0]]) == (moe.num_experts, 64) for shard in shards)
    assert sum(param.expert is not None for param in found.values()) == 2 * moe.num_experts * sum(moe.layers)
    for cut, total in ((Cut.EXPERT, moe.intermediate_size), (Cut.SHARED, moe.shared_size)):
        assert [i for shard in shards for i in shard.ranges[cut]] == list(range(total))

    placed = place_experts(moe.num_experts, tp, "round_robin")
    whole = [shard.with_experts(spec, experts) for shard, experts in zip(shards, placed, strict=True)]
    experts = [param for param in found.values() if param.expert is not None]
    for param in experts:
        holders = [shard for shard in whole if shard.holds(param)]
        assert len(holders) == 1
        assert all(holders[0].shape(piece) == piece.shape for piece in param.pieces)
        columns = [shard.shape(param.pieces[0])[0] for shard in shards]
        assert sum(columns) == moe.intermediate_size or param.name.endswith("down.weight")
    assert sum(shard.param_size(param) for shard in whole for param in shard.held(experts)) == sum(
        shard.param_size(param) for shard in shards for param in shard.held(experts)
    )
    others = [param for param in found.values() if param.expert is None]
    assert [[shard.param_shape(param) for param in others] for shard in whole] == [
        [shard.param_shape(param) for param in others] for shard in shards
    ]


def test_weight_bytes_of_a_mixture_are_right() -> None:
    """The expected numbers are computed by hand, for a dense layer and a mixture with a router in float32."""
    moe = MoESpec(5, 24, RoutingSpec(2, wide=True), (False, True), shared_size=40, shared_gate=True)
    spec = dataclasses.replace(SPEC, num_kv_heads=8, moe=moe)
    attention, ends = 64 * 64 * 4 + 2 * 64, 64 + 2 * 301 * 64
    mixture = 5 * 3 * 64 * 24 + 3 * 64 * 40 + 64
    found = manifest.make_manifest(spec, TensorNames())
    (alone,) = manifest.make_shards(spec, 1)
    whole = 2 * (2 * attention + ends + 3 * 64 * 112 + mixture) + 4 * 5 * 64
    assert manifest.weight_bytes(spec, found, alone, 2, embedding_kept=True) == whole
    two = alone.with_experts(spec, (0, 4))
    assert manifest.weight_bytes(spec, found, two, 2, embedding_kept=True) == whole - 2 * 3 * 3 * 64 * 24


def test_experts_may_be_in_one_tensor() -> None:
    """The tensor is [experts, rows, columns]; the rows of `gate` come before the rows of `up`."""
    spec = dataclasses.replace(SPEC, moe=MoESpec(3, 10, RoutingSpec(2), (True, True)))
    names = TensorNames(experts=ExpertNames().stacked())
    found = {param.name: param for param in manifest.make_manifest(spec, names)}
    pieces = found["layers.1.experts.2.gate_up.weight"].pieces
    assert {piece.source for piece in pieces} == {"model.layers.1.mlp.experts.gate_up_proj"}
    assert [source_rows(piece) for piece in pieces] == [[*range(40, 50)], [*range(50, 60)]]
    assert {piece.stored_shape for piece in pieces} == {(3, 20, 64)}
    (down,) = found["layers.1.experts.2.down.weight"].pieces
    assert (source_rows(down), down.stored_shape) == ([*range(128, 192)], (3, 64, 10))


def test_a_tied_head_reads_the_embedding() -> None:
    (head,) = (param for param in params(dataclasses.replace(SPEC, tie_embeddings=True)) if param.name == "head")
    assert [piece.source for piece in head.pieces] == ["model.embed_tokens.weight"]
    (head,) = (param for param in params(SPEC) if param.name == "head")
    assert [piece.source for piece in head.pieces] == ["lm_head.weight"]


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_manifest_names_exactly_the_tensors_of_the_checkpoint(checkpoint: Callable[[str], Path], name: str) -> None:
    folder = checkpoint(name)
    spec, shapes = read_spec(folder), open_checkpoint(folder).shapes
    found = manifest.make_manifest(spec, tensor_names(spec, shapes))
    manifest.check_shapes(found, shapes, "here")
    assert {piece.source for param in found for piece in param.pieces} == set(shapes)


def test_a_checkpoint_with_a_missing_or_misshapen_tensor_is_refused() -> None:
    found = params(SPEC)
    shapes = {piece.source: piece.shape for param in found for piece in param.pieces}
    manifest.check_shapes(found, shapes, "here")
    manifest.check_shapes(found, {**shapes, "something.else": (5,)}, "here")
    for name, shape in shapes.items():
        with pytest.raises(CheckpointError) as caught:
            manifest.check_shapes(found, {k: v for k, v in shapes.items() if k != name}, "here")
        assert str(caught.value) == f"here lacks the tensor {name} of shape {list(shape)}"
        with pytest.raises(CheckpointError) as caught:
            manifest.check_shapes(found, {**shapes, name: (*shape, 1)}, "here")
        assert str(caught.value).startswith("here: ")
        assert name in str(caught.value)
        assert str([*shape, 1]) in str(caught.value)
        assert str(list(shape)) in str(caught.value)
