"""Loading a rank's share of the weights: all shares together are the whole, and a rank holds only its share."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from shoal.errors import CheckpointError
from shoal.models.checkpoint.checkpoint import PICKLED_SINGLE, SINGLE, Checkpoint, open_checkpoint
from shoal.models.checkpoint.loader import CheckpointWeights, DummyWeights
from shoal.models.checkpoint.stored_file import split_into_reads
from shoal.models.checkpoint.torch_files import list_here
from shoal.models.manifest import Cut, Param, Piece, Shard, keeps_embedding, make_manifest, make_shards
from shoal.models.registry import read_spec, tensor_names
from shoal.models.spec import (
    AttentionSpec,
    ExpertNames,
    ModelSpec,
    MoESpec,
    NormSpec,
    RopeSpec,
    RoutingSpec,
    TensorNames,
)
from shoal.parallel.partition import split_heads
from shoal.parallel.stages import Stage
from support.fakes import steady

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}

SPEC = ModelSpec(
    family="llama",
    hidden_size=12,
    num_layers=1,
    num_heads=6,
    num_kv_heads=3,
    head_dim=2,
    intermediate_size=40,
    vocab_size=31,
    max_positions=64,
    attention=(AttentionSpec(2**-0.5, RopeSpec(10000.0)),),
    norm=NormSpec("rms", 1e-5),
    tie_embeddings=False,
    dtype="float32",
    qk_norm=NormSpec("rms", 1e-5),
    qkv_bias=True,
    out_bias=True,
    up_bias=True,
    down_bias=True,
)


def write(folder: Path, tensors: Mapping[str, Tensor], *, pad: int = 0) -> Checkpoint:
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + pad)
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return open_checkpoint(folder)


def made_up(params: tuple[Param, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    pieces = {piece.source: piece.shape for param in params for piece in param.pieces}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in pieces.items()}


def put_together(param: Param, parts: list[tuple[Shard, Tensor]]) -> list[Tensor]:
    """Assemble the pieces of a parameter from the tensors of all ranks, which must agree where they overlap."""
    wholes = []
    taken = [0] * len(parts)
    for piece in param.pieces:
        whole = torch.full(piece.shape, torch.nan)
        for number, (shard, tensor) in enumerate(parts):
            length = shard.shape(piece)[0]
            part = tensor.narrow(0, taken[number], length)
            taken[number] += length
            share = shard.ranges[piece.cut] if piece.cut is not Cut.WHOLE else range(piece.shape[piece.dim])
            place = whole.narrow(piece.dim, share.start, len(share))
            known = ~place.isnan()
            assert torch.equal(place[known], part[known])
            place.copy_(part)
        wholes.append(whole)
    assert taken == [len(tensor) for _, tensor in parts]
    return wholes


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tp=st.integers(1, 9),
    kv_heads=st.integers(1, 5),
    group=st.integers(1, 4),
    vocab=st.integers(1, 70),
    inner=st.integers(1, 90),
    tie=st.booleans(),
)
def test_all_ranks_together_hold_the_whole(
    tmp_path: Path, tp: int, kv_heads: int, group: int, vocab: int, inner: int, tie: bool
) -> None:
    spec = dataclasses.replace(
        SPEC,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * group,
        vocab_size=vocab,
        intermediate_size=inner,
        tie_embeddings=tie,
    )
    params = make_manifest(spec, TensorNames())
    wholes = made_up(params)
    checkpoint = write(tmp_path, wholes)
    ranks = [(shard, CheckpointWeights(checkpoint, params, shard, torch.float32)) for shard in make_shards(spec, tp)]
    for param in params:
        parts = [(shard, weights.tensor(param.name)) for shard, weights in ranks]
        assert [tuple(part.shape) for _, part in parts] == [shard.param_shape(param) for shard, _ in parts]
        for piece, whole in zip(param.pieces, put_together(param, parts), strict=True):
            assert torch.equal(whole, wholes[piece.source])


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_all_ranks_together_hold_a_real_checkpoint(checkpoint: Callable[[str], Path], name: str) -> None:
    from safetensors.torch import load_file

    folder = checkpoint(name)
    spec, wholes = read_spec(folder), load_file(folder / SINGLE)
    params = make_manifest(spec, tensor_names(spec))
    for tp in (1, 3):
        ranks = [
            (shard, CheckpointWeights(open_checkpoint(folder), params, shard, torch.float32))
            for shard in make_shards(spec, tp)
        ]
        for param in params:
            found = put_together(param, [(shard, weights.tensor(param.name)) for shard, weights in ranks])
            assert all(torch.equal(f, wholes[p.source]) for f, p in zip(found, param.pieces, strict=True))


# --- other forms in the file --------------------------------------------------------------------------------------


def rows_of(piece: Piece, stored: Tensor) -> Tensor:
    """Return the rows of a piece by the definition in `Piece`."""
    matrix = stored.t() if piece.transposed else stored
    run, period = piece.run or piece.shape[0], piece.period or piece.shape[0]
    rows = [row // run * period + piece.start + row % run for row in range(piece.shape[0])]
    return matrix[torch.tensor(rows, dtype=torch.int64)]


@settings(steady, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tp=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    stacked=st.sampled_from(["apart", "one after the other", "interleaved"]),
    transposed=st.booleans(),
    weights=st.none() | st.lists(st.integers(1, 4), min_size=5, max_size=5),
)
def test_shares_are_right_for_stripes_and_transposed_matrices(
    tmp_path: Path, tp: int, kv_heads: int, group: int, stacked: str, transposed: bool, weights: list[int] | None
) -> None:
    group = 1 if stacked == "interleaved" else group  # interleaved, each query head has its own key and value
    spec = dataclasses.replace(SPEC, num_kv_heads=kv_heads, num_heads=kv_heads * group)
    names = TensorNames(transposed=transposed, interleaved=stacked == "interleaved")
    if stacked != "apart":
        names = dataclasses.replace(names, qkv=("qkv",), up=("up",))
    params = make_manifest(spec, names)
    generator = torch.Generator().manual_seed(5)
    wholes = {
        piece.source: torch.randn(piece.stored_shape, generator=generator) for param in params for piece in param.pieces
    }
    checkpoint = write(tmp_path, wholes)
    ranks = [
        (shard, CheckpointWeights(checkpoint, params, shard, torch.float32))
        for shard in make_shards(spec, tp, weights and weights[:tp])
    ]
    for param in params:
        parts = [(shard, weights.tensor(param.name)) for shard, weights in ranks]
        assert all(part.is_contiguous() for _, part in parts)
        for piece, whole in zip(param.pieces, put_together(param, parts), strict=True):
            assert torch.equal(whole, rows_of(piece, wholes[piece.source]))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 3])
@pytest.mark.parametrize("stacked", [False, True])
def test_shares_of_experts_are_right(tmp_path: Path, stacked: bool, tp: int, stored: torch.dtype) -> None:
    """Experts are in separate tensors or in one tensor; a rank has a share of each expert, or some whole experts."""
    spec = dataclasses.replace(SPEC, moe=MoESpec(4, 22, RoutingSpec(2), (True,)))
    names = TensorNames(experts=ExpertNames().stacked() if stacked else ExpertNames())
    params = make_manifest(spec, names)
    generator = torch.Generator().manual_seed(3)
    wholes = {
        piece.source: torch.randn(piece.stored_shape, generator=generator).to(stored)
        for param in params
        for piece in param.pieces
    }
    checkpoint = write(tmp_path, wholes)
    at = "model.layers.0.mlp.experts"

    def expert(e: int) -> tuple[Tensor, Tensor]:
        if stacked:
            return wholes[f"{at}.gate_up_proj"][e].float(), wholes[f"{at}.down_proj"][e].float()
        gate, up, down = (wholes[f"{at}.{e}.{name}_proj.weight"].float() for name in ("gate", "up", "down"))
        return torch.cat([gate, up]), down

    cut = make_shards(spec, tp)
    for shard in cut:
        weights, columns = CheckpointWeights(checkpoint, params, shard, torch.float32), shard.ranges[Cut.EXPERT]
        for e in range(4):
            gate_up, down = expert(e)
            rows = [gate_up[start + columns.start : start + columns.stop] for start in (0, 22)]
            assert torch.equal(weights.tensor(f"layers.0.experts.{e}.gate_up.weight"), torch.cat(rows))
            found = weights.tensor(f"layers.0.experts.{e}.down.weight")
            assert torch.equal(found, down[:, columns.start : columns.stop])
    whole = cut[-1].with_experts(spec, (1, 3))
    weights = CheckpointWeights(checkpoint, params, whole, stored)
    assert [weights.optional(f"layers.0.experts.{e}.down.weight") is None for e in range(4)] == [True, False] * 2
    found = weights.tensor("layers.0.experts.3.down.weight")
    assert torch.equal(found.float(), expert(3)[1])


@pytest.mark.parametrize("cut", [range(3, 17), range(4, 8), range(5, 6), range(20), range(7, 7), range(2, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_share_may_begin_or_end_inside_a_run(tmp_path: Path, cut: range, transposed: bool) -> None:
    piece = Piece("a", (20, 3), Cut.MLP, 0, transposed, start=4, run=4, period=12, stored=None)
    whole = torch.arange(180.0).view(60, 3)
    checkpoint = write(tmp_path, {"a": whole.t() if transposed else whole})
    shard = Shard(0, split_heads(1, 1, 1)[0], {Cut.MLP: cut}, Stage(0, 1, range(1)))
    (param,) = (Param("p", (piece,)),)
    found = CheckpointWeights(checkpoint, [param], shard, torch.float32).tensor("p")
    assert torch.equal(found, rows_of(piece, whole.t() if transposed else whole)[cut.start : cut.stop])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_shares_of_pickled_weights_are_right(tmp_path: Path, stored: torch.dtype, legacy: bool) -> None:
    """Pickled tensors may be strided or misaligned, but the tensors of a rank are contiguous and aligned."""
    params = make_manifest(SPEC, TensorNames())
    wholes = made_up(params, stored)
    turned = "model.layers.0.mlp.down_proj.weight"
    saved = {**wholes, turned: wholes[turned].t().contiguous().t(), "mask": torch.ones(1, dtype=torch.uint8).expand(9)}
    torch.save(saved, tmp_path / PICKLED_SINGLE, _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(tmp_path, read_pickled=list_here)
    assert (checkpoint.tensors[turned].strides or ())[0] == 1
    for tp in (1, 3):
        ranks = [(shard, CheckpointWeights(checkpoint, params, shard, stored)) for shard in make_shards(SPEC, tp)]
        for param in params:
            parts = [(shard, weights.tensor(param.name)) for shard, weights in ranks]
            assert all(part.is_contiguous() and part.data_ptr() % stored.itemsize == 0 for _, part in parts)
            found = put_together(param, [(shard, part.float()) for shard, part in parts])
            for piece, whole in zip(param.pieces, found, strict=True):
                assert torch.equal(whole, wholes[piece.source].float())


@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_parameters_may_have_their_own_type_and_an_added_number(tmp_path: Path, wanted: torch.dtype) -> None:
    stored = torch.tensor([0.5, -1.0, 2.0]).half()
    checkpoint = write(tmp_path, {"n": stored})
    (shard,) = make_shards(SPEC, 1)
    params = [
        Param("wide", (Piece("n", (3,)),), "float32", 1.0),
        Param("plus", (Piece("n", (3,)),), plus=1.0),
        Param("plain", (Piece("n", (3,)),)),
    ]
    for weights in (
        CheckpointWeights(checkpoint, params, shard, wanted),
        DummyWeights(params, shard, wanted, 0),
    ):
        assert weights.tensor("wide").dtype == torch.float32
        assert weights.tensor("plus").dtype == weights.tensor("plain").dtype == wanted
    found = CheckpointWeights(checkpoint, params, shard, wanted)
    assert found.tensor("wide").tolist() == found.tensor("plus").tolist() == [1.5, 0.0, 3.0]
    assert found.tensor("plain").tolist() == [0.5, -1.0, 2.0]


@pytest.mark.parametrize("transposed", [False, True])
def test_assembling_a_parameter_allocates_no_second_copy(tmp_path: Path, transposed: bool) -> None:
    """Only the returned tensor is allocated, even if it is converted, cut, transposed and stacked."""
    names = TensorNames(transposed=transposed)
    spec = dataclasses.replace(SPEC, hidden_size=64, intermediate_size=512)
    params = make_manifest(spec, names)
    generator = torch.Generator().manual_seed(5)
    wholes = {
        piece.source: torch.randn(piece.stored_shape, generator=generator).half()
        for param in params
        for piece in param.pieces
    }
    weights = CheckpointWeights(write(tmp_path, wholes), params, make_shards(spec, 2)[1], torch.float32)
    for name in ("layers.0.gate_up.weight", "layers.0.down.weight", "layers.0.qkv.weight"):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            found = weights.tensor(name)
        allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profiler.events())
        assert found.nbytes <= allocated <= 1.01 * found.nbytes + 4096


# --- memory of a rank --------------------------------------------------------------------------------------------


def mapped(folder: Path) -> bool:
    return str(folder) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_loaded_weights_do_not_change_with_the_file(tmp_path: Path, stored: torch.dtype) -> None:
    """The file is overwritten and truncated after loading; no tensor of any rank changes."""
    params = make_manifest(SPEC, TensorNames())
    wholes = made_up(params, stored)
    checkpoint = write(tmp_path, wholes)
    ranks = [CheckpointWeights(checkpoint, params, shard, torch.float32) for shard in make_shards(SPEC, 2)]
    read = [{param.name: weights.tensor(param.name) for param in params} for weights in ranks]
    before = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in read]
    with (tmp_path / SINGLE).open("r+b") as file:
        file.write(b"\xff" * (tmp_path / SINGLE).stat().st_size)
        file.truncate(10)
    assert all(
        torch.equal(tensor, old[name]) for new, old in zip(read, before, strict=True) for name, tensor in new.items()
    )
    assert not mapped(tmp_path)


def test_a_tied_embedding_takes_memory_beside_the_head() -> None:
    """On a GPU it takes memory only if it is on another stage than the head."""
    assert keeps_embedding("cpu")
    assert keeps_embedding("cpu", head=False)
    assert not keeps_embedding("cuda")
    assert keeps_embedding("cuda", head=False)


def replace_file(file: Path) -> None:
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes())
    other.rename(file)


def truncate_file(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def rewrite_file(file: Path) -> None:
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(1, 1))  # times of files may have a resolution of some milliseconds


@pytest.mark.parametrize(
    ("change", "message"),
    [(replace_file, "was replaced"), (truncate_file, "was truncated"), (rewrite_file, "was written to")],
)
def test_a_file_that_changes_before_it_is_read_is_refused(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    params = make_manifest(SPEC, TensorNames())
    checkpoint = write(tmp_path, made_up(params))
    weights = CheckpointWeights(checkpoint, params, make_shards(SPEC, 1)[0], torch.float32)
    weights.tensor("embedding")
    change(tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=message):
        weights.tensor("layers.0.qkv.weight")


def test_a_file_that_is_truncated_while_it_is_read_is_refused(tmp_path: Path) -> None:
    """The error comes even if the state of the file is not checked."""
    params = make_manifest(SPEC, TensorNames())
    checkpoint = dataclasses.replace(write(tmp_path, made_up(params)), files={})
    os.truncate(tmp_path / SINGLE, checkpoint.tensors["model.embed_tokens.weight"].offset + 7)
    weights = CheckpointWeights(checkpoint, params, make_shards(SPEC, 1)[0], torch.float32)
    with pytest.raises(CheckpointError, match=r"truncated while it was being read: it ends after \d+ bytes"):
        weights.tensor("embedding")


@given(st.data())
def test_reads_cover_a_tensor_once_and_keep_their_limit(data: st.DataObject) -> None:
    """For all strides, each element is in exactly one part, and no part spans more than `most` elements of the file."""
    shape = data.draw(st.lists(st.integers(0, 5), max_size=3))
    order = data.draw(st.permutations(range(len(shape))))
    gaps = data.draw(st.integers(0, 3))
    most = data.draw(st.integers(1, 40))
    whole = torch.zeros([shape[i] + gaps for i in order]).permute([order.index(i) for i in range(len(shape))])
    view = whole[tuple(slice(size) for size in shape)]
    for part in split_into_reads(view.shape, view.stride(), most):
        cut = view[part]
        assert 1 + sum((n - 1) * stride for n, stride in zip(cut.shape, cut.stride(), strict=True)) <= most
        cut += 1
    assert bool((view == 1).all())


def test_copies_are_no_larger_than_the_share(tmp_path: Path) -> None:
    """If a slice kept the whole tensor alive, each rank would need memory for the whole."""
    params = make_manifest(SPEC, TensorNames())
    checkpoint = write(tmp_path, made_up(params))
    for shard in make_shards(SPEC, 3):
        weights = CheckpointWeights(checkpoint, params, shard, torch.float32)
        for name in ("layers.0.qkv.weight", "layers.0.out.weight", "layers.0.gate_up.weight", "layers.0.down.weight"):
            tensor = weights.tensor(name)
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_unaligned_data_is_read(tmp_path: Path, pad: int) -> None:
    params = make_manifest(SPEC, TensorNames())
    wholes = made_up(params)
    weights = CheckpointWeights(write(tmp_path, wholes, pad=pad), params, make_shards(SPEC, 1)[0], torch.float32)
    assert torch.equal(weights.tensor("embedding"), wholes["model.embed_tokens.weight"])


# --- types -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_converted_to_the_wanted_type(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    params = make_manifest(SPEC, TensorNames())
    wholes = made_up(params, stored)
    weights = CheckpointWeights(write(tmp_path, wholes), params, make_shards(SPEC, 1)[0], wanted)
    assert torch.equal(weights.tensor("embedding"), wholes["model.embed_tokens.weight"].to(wanted))


def test_an_unsupported_type_is_refused(tmp_path: Path) -> None:
    params = make_manifest(SPEC, TensorNames())
    checkpoint = write(tmp_path, made_up(params))
    name = "model.norm.weight"
    tensors = {**checkpoint.tensors, name: dataclasses.replace(checkpoint.tensors[name], dtype="I32")}
    weights = CheckpointWeights(Checkpoint(tmp_path, tensors), params, make_shards(SPEC, 1)[0], torch.float32)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is stored as I32; supported are F32"):
        weights.tensor("final_norm.weight")


def test_an_optional_parameter_is_none_if_the_model_lacks_it(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, out_bias=False)
    params = make_manifest(spec, TensorNames())
    (shard,) = make_shards(spec, 1)
    for weights in (
        CheckpointWeights(write(tmp_path, made_up(params)), params, shard, torch.float32),
        DummyWeights(params, shard, torch.float32, 0),
    ):
        assert weights.optional("layers.0.out.bias") is None
        assert weights.optional("layers.0.qkv.bias") is not None


# --- dummy weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dummy_weights_have_the_right_shapes_and_types(tp: int, dtype: torch.dtype) -> None:
    params = make_manifest(SPEC, TensorNames())
    for shard in make_shards(SPEC, tp):
        weights = DummyWeights(params, shard, dtype, 0)
        for param in params:
            tensor = weights.tensor(param.name)
            assert tuple(tensor.shape) == shard.param_shape(param)
            assert tensor.dtype == dtype
            assert tensor.is_contiguous()
            assert tensor.isfinite().all()


def test_dummy_weights_depend_on_seed_name_and_row() -> None:
    params = make_manifest(SPEC, TensorNames())
    (shard,) = make_shards(SPEC, 1)
    first, again, other = (DummyWeights(params, shard, torch.float32, seed) for seed in (0, 0, 1))
    assert torch.equal(first.tensor("head"), again.tensor("head"))
    assert not torch.equal(first.tensor("head"), other.tensor("head"))
    assert not torch.equal(first.tensor("head"), first.tensor("embedding"))
    rows = first.tensor("embedding")
    assert len(rows.unique(dim=0)) == len(rows)
