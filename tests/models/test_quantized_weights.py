"""Loading weights in fewer bits: which parameters, from every type, and in every cut."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.kernels.linear_weights import LinearWeights
from shoal.kernels.quantized import quantize_weight
from shoal.kernels.weight_format import INT4, INT8
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.loader import CheckpointWeights, DummyWeights
from shoal.models.implementation import params_of, read_model, shards_of
from shoal.models.manifest import Cut, Shard
from shoal.models.registry import read_spec
from support import other_models
from support.quantized import write_quantized

Checkpoint = Callable[[str], Path]
CPU = torch.device("cpu")


def matrices(folder: Path, shard: Shard, quantization: str = "int8") -> dict[str, Tensor | LinearWeights]:
    """Return all parameters that are asked for as weights of linear layers, as a rank loads them."""
    spec, stored = read_model(folder, "auto"), open_checkpoint(folder)
    params = params_of(spec, stored.shapes, quantization)
    weights = CheckpointWeights(stored, params, shard, torch.float32)
    return {
        param.name: weights.linear(param.name, CPU)
        for param in shard.held(params)
        if len(shard.param_shape(param)) == 2
    }


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("llama3", {"embedding"}),
        ("opt_350m", {"embedding", "positions", "project_in.weight", "project_out.weight"}),
        ("mixtral", {"embedding", *(f"layers.{i}.router.weight" for i in range(3))}),
    ],
)
def test_linear_layers_are_quantized(checkpoint: Checkpoint, name: str, plain: set[str]) -> None:
    (shard,) = shards_of(read_spec(checkpoint(name)), 1)
    found = matrices(checkpoint(name), shard)
    assert {name for name, weight in found.items() if isinstance(weight, Tensor)} == plain
    assert "head" in found.keys() - plain


def test_latent_attention_and_shared_experts(checkpoint: Checkpoint) -> None:
    """The matrices of single heads are not linear layers of their own."""
    (shard,) = shards_of(read_spec(checkpoint("deepseek_v3")), 1)
    found = matrices(checkpoint("deepseek_v3"), shard)
    kinds = {name.split(".")[-2]: isinstance(weight, LinearWeights) for name, weight in found.items() if "." in name}
    assert [name for name, small in kinds.items() if not small] == ["k_up", "v_up", "router"]
    assert {"q_down", "q_up", "kv_down", "out", "gate_up", "down"} <= kinds.keys()


def test_linear_layers_of_transformers(tmp_path: Path) -> None:
    other_models.save("StableLm", tmp_path)
    spec = read_model(tmp_path, "auto")
    (shard,) = shards_of(spec, 1)
    found = matrices(tmp_path, shard)
    assert [name for name, weight in found.items() if isinstance(weight, Tensor)] == ["embedding"]
    assert isinstance(found["model.layers.0.self_attn.q_proj.weight"], LinearWeights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_type_of_checkpoint(checkpoint: Checkpoint, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(checkpoint("llama") / "model.safetensors").items()}
    (tmp_path / "config.json").write_bytes((checkpoint("llama") / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    (shard,) = shards_of(read_spec(tmp_path), 1)
    found = matrices(tmp_path, shard)["layers.1.down.weight"]
    assert isinstance(found, LinearWeights)
    wanted = quantize_weight(tensors["model.layers.1.mlp.down_proj.weight"], INT8)
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.scales, wanted.scales)


@pytest.mark.parametrize(("tp", "split"), [(2, None), (3, None), (2, (3, 1))])
def test_each_rank_quantizes_its_own_slice(checkpoint: Checkpoint, tp: int, split: tuple[int, ...] | None) -> None:
    """Slices of outputs have the codes of the whole; slices of inputs have scales of their own, which are no larger."""
    folder = checkpoint("llama")
    whole = load_file(folder / "model.safetensors")
    up = quantize_weight(whole["model.layers.0.mlp.up_proj.weight"], INT8)
    down = quantize_weight(whole["model.layers.0.mlp.down_proj.weight"], INT8)
    for shard in shards_of(read_spec(folder), tp, split):
        found, span = matrices(folder, shard), shard.ranges[Cut.MLP]
        columns = slice(span.start, span.stop)
        mine, other = found["layers.0.gate_up.weight"], found["layers.0.down.weight"]
        assert isinstance(mine, LinearWeights)
        assert isinstance(other, LinearWeights)
        assert torch.equal(mine.codes[len(span) :], up.codes[columns])
        assert torch.equal(mine.scales[len(span) :], up.scales[columns])
        assert (other.scales <= down.scales).all()
        part = quantize_weight(whole["model.layers.0.mlp.down_proj.weight"][:, columns], INT8)
        assert torch.equal(other.codes, part.codes)


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3"])
def test_the_head_stays_in_8_bits(checkpoint: Checkpoint, name: str) -> None:
    """All other linear layers, those of experts too, have 4."""
    (shard,) = shards_of(read_spec(checkpoint(name)), 1)
    found = matrices(checkpoint(name), shard, "int4-g32")
    formats = {name: weight.format for name, weight in found.items() if isinstance(weight, LinearWeights)}
    assert formats.pop("head") is INT8
    assert set(formats.values()) == {INT4[32]}
    assert formats.keys() | {"head"} == {
        name for name, weight in matrices(checkpoint(name), shard).items() if isinstance(weight, LinearWeights)
    }


@pytest.mark.parametrize(("tp", "split"), [(2, None), (3, None), (2, (1, 1)), (2, (3, 1))])
def test_groups_of_a_rank(checkpoint: Checkpoint, tp: int, split: tuple[int, ...] | None) -> None:
    """Slices of outputs have the codes of the whole, and so have slices of inputs that begin where a group does.

    Another rank's first group begins with its first input.
    """
    folder = checkpoint("llama")
    whole = load_file(folder / "model.safetensors")
    up, down = whole["model.layers.0.mlp.up_proj.weight"], whole["model.layers.0.mlp.down_proj.weight"]
    aligned = 0
    for shard in shards_of(read_spec(folder), tp, split):
        found, span = matrices(folder, shard, "int4-g32"), shard.ranges[Cut.MLP]
        columns = slice(span.start, span.stop)
        mine, other = found["layers.0.gate_up.weight"], found["layers.0.down.weight"]
        assert isinstance(mine, LinearWeights)
        assert isinstance(other, LinearWeights)
        assert torch.equal(mine.codes[len(span) :], quantize_weight(up, INT4[32]).codes[columns])
        assert torch.equal(other.codes, quantize_weight(down[:, columns], INT4[32]).codes)
        if span.start % 32 == 0 and span.stop % 32 == 0:
            aligned += 1
            assert torch.equal(other.codes, quantize_weight(down, INT4[32]).codes[:, columns])
    assert aligned or split != (1, 1)


def test_made_up_weights(checkpoint: Checkpoint) -> None:
    spec = read_spec(checkpoint("llama"))
    (shard,) = shards_of(spec, 1)
    weights = DummyWeights(params_of(spec, quantization="int4"), shard, torch.float32, 0)
    found = weights.linear("layers.0.qkv.weight", CPU)
    assert isinstance(found, LinearWeights)
    assert torch.equal(found.codes, quantize_weight(weights.tensor("layers.0.qkv.weight"), INT4[128]).codes)


def test_a_checkpoint_in_fp8(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Its numbers are widened, as without int8, and then quantized."""
    stored, widened = write_quantized(checkpoint("llama"), tmp_path, block=(16, 24))
    (shard,) = shards_of(read_spec(stored), 1)
    found, wanted = (matrices(folder, shard)["layers.2.gate_up.weight"] for folder in (stored, widened))
    assert isinstance(found, LinearWeights)
    assert isinstance(wanted, LinearWeights)
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.scales, wanted.scales)
