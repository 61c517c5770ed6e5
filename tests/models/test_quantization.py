"""FP8 weights: in every cut, a rank gets the numbers times the scales of their blocks. Other files are refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from shoal import LLM, SamplingParams
from shoal.errors import CheckpointError
from shoal.models.checkpoint.checkpoint import SINGLE, open_checkpoint
from shoal.models.checkpoint.loader import CheckpointWeights
from shoal.models.config_json.quantization import weight_block
from shoal.models.implementation import params_of, shards_of
from shoal.models.manifest import Cut, Param, Piece, Shard, weight_bytes
from shoal.models.registry import read_spec
from shoal.models.spec import Unsupported
from shoal.parallel.partition import split_heads
from shoal.parallel.stages import Stage
from support.fakes import steady
from support.quantized import quantize, write_quantized

ONE_STAGE = Stage(0, 1, range(1))


def config_of(block: tuple[int, int]) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}}


def write(folder: Path, tensors: Mapping[str, Tensor], block: tuple[int, int] = (2, 3)) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(block)))
    save_file(dict(tensors), folder / SINGLE)


def shard(cut: range) -> Shard:
    return Shard(0, split_heads(1, 1, 1)[0], {Cut.MLP: cut}, ONE_STAGE)


def load(folder: Path, piece: Piece, cut: range, dtype: torch.dtype = torch.float32) -> Tensor:
    return CheckpointWeights(open_checkpoint(folder), [Param("p", (piece,))], shard(cut), dtype).tensor("p")


@settings(steady, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_cut_gets_the_right_scales(tmp_path: Path, data: st.DataObject) -> None:
    """Cuts are by rows, columns or stripes, of stacked or transposed matrices, at borders of blocks or within them."""
    height, width = data.draw(st.integers(1, 13)), data.draw(st.integers(1, 13))
    block = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    stack = data.draw(st.none() | st.integers(1, 3))
    transposed = stack is None and data.draw(st.booleans())
    shape = (height, width) if stack is None else (stack, height, width)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    numbers, scales, wide = quantize(torch.randn(shape, generator=generator), block)
    write(tmp_path, {"w": numbers, "w_scale_inv": scales}, block)

    matrix = wide.t() if transposed else wide.flatten(0, -2)
    period = data.draw(st.integers(1, len(matrix)))
    run = data.draw(st.integers(1, period))
    start = data.draw(st.integers(0, period - run))
    rows = [row for row in range(len(matrix)) if start <= row % period < start + run]
    dim = data.draw(st.integers(0, 1))
    length = (len(rows), matrix.shape[1])[dim]
    first = data.draw(st.integers(0, length))
    cut = range(first, data.draw(st.integers(first, length)))
    piece = Piece("w", (len(rows), matrix.shape[1]), Cut.MLP, dim, transposed, start, run, period, shape)
    expected = matrix[torch.tensor(rows, dtype=torch.int64)].narrow(dim, cut.start, len(cut))
    assert torch.equal(load(tmp_path, piece, cut), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_fp8_number_is_widened_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    """A tensor with all 256 bytes except the two NaNs is widened in several parts, with scales in bfloat16."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes[(codes & 127) != 127].repeat(1, 40).view(-1, 254).view(torch.float8_e4m3fn)
    scales = torch.tensor([[0.5, 2.0, 0.25, 1.0, 8.0, 3.0]]).repeat(5, 1).bfloat16()
    write(tmp_path, {"w": numbers, "w_scale_inv": scales}, (8, 50))
    expected = (numbers.float() * scales.float()[0].repeat_interleave(50)[:254]).to(dtype)
    assert torch.equal(load(tmp_path, Piece("w", (40, 254)), range(0), dtype), expected)


def test_loading_needs_little_more_memory_than_the_widened_tensor(tmp_path: Path) -> None:
    numbers, scales, _ = quantize(torch.randn(4096, 2048), (128, 128))
    write(tmp_path, {"w": numbers, "w_scale_inv": scales}, (128, 128))
    weights = CheckpointWeights(
        open_checkpoint(tmp_path), [Param("p", (Piece("w", (4096, 2048)),))], shard(range(0)), torch.bfloat16
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        found = weights.tensor("p")
    held = peak = 0
    for event in profiled.profiler.kineto_results.events() if profiled.profiler else ():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert found.nbytes <= peak < found.nbytes + 2**21


# --- refusals -------------------------------------------------------------------------------------------------------


def refusal(folder: Path, names: list[str]) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder).check_loadable(names)
    return str(caught.value)


def test_missing_scales_are_named(tmp_path: Path) -> None:
    numbers, scales, _ = quantize(torch.randn(4, 6), (2, 3))
    write(tmp_path, {"w.weight": numbers, "v.weight": numbers.clone(), "v.weight_scale_inv": scales})
    open_checkpoint(tmp_path).check_loadable(["v.weight"])
    assert "which needs a tensor w.weight_scale_inv" in refusal(tmp_path, ["v.weight", "w.weight"])


def test_a_missing_block_size_is_refused(tmp_path: Path) -> None:
    numbers, scales, _ = quantize(torch.randn(4, 6), (2, 3))
    write(tmp_path, {"w": numbers, "w_scale_inv": scales})
    (tmp_path / "config.json").write_text("{}")
    assert "weight_block_size in quantization_config" in refusal(tmp_path, ["w"])


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (torch.ones(2, 3), "F32 [2, 3], but must be F32 [2, 2]"),
        (torch.ones(1), "F32 [1], but must be F32 [2, 2]"),
        (torch.ones(2, 2, dtype=torch.int32), "I32 [2, 2], but must be F32 [2, 2]"),
    ],
)
def test_scales_of_the_wrong_shape_or_type_are_refused(tmp_path: Path, scales: Tensor, message: str) -> None:
    numbers, _, _ = quantize(torch.randn(4, 6), (2, 3))
    write(tmp_path, {"w": numbers, "w_scale_inv": scales})
    assert message in refusal(tmp_path, ["w"])


def test_quantized_vectors_and_other_fp8_types_are_refused(tmp_path: Path) -> None:
    vector = torch.ones(4).to(torch.float8_e4m3fn)
    write(tmp_path, {"w": vector, "w_scale_inv": torch.ones(2), "v": torch.ones(4).to(torch.float8_e5m2)})
    assert "with the shape [4], but only matrices can be quantized" in refusal(tmp_path, ["w"])
    assert "v is stored as F8_E5M2; supported are" in refusal(tmp_path, ["v"])


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"quant_method": "gptq"}, Unsupported, "weights quantized by 'gptq' can't be loaded"),
        ({"quant_method": None}, Unsupported, "weights quantized by None can't be loaded"),
        ({"fmt": "e5m2"}, Unsupported, "of fmt 'e5m2' can't be loaded"),
        ({"weight_block_size": None}, Unsupported, "without a weight_block_size"),
        ({"weight_block_size": [128]}, CheckpointError, "must be two positive integers"),
        ({"weight_block_size": [128, 0]}, CheckpointError, "must be two positive integers"),
        ({"weight_block_size": "128"}, CheckpointError, "must be two positive integers"),
    ],
)
def test_unsupported_configurations_are_refused(
    changes: dict[str, Any], kind: type[CheckpointError], message: str
) -> None:
    config = config_of((128, 128))
    assert weight_block(config) == (128, 128)
    with pytest.raises(kind, match=message):
        weight_block({"quantization_config": {**config["quantization_config"], **changes}})


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_a_model_without_quantization_has_no_blocks(config: dict[str, Any]) -> None:
    assert weight_block(config) is None


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 3])
@pytest.mark.parametrize("name", ["llama_6_2", "phi3", "gpt2", "deepseek_v2", "deepseek_v3"])
def test_fp8_weights_give_the_tokens_of_widened_weights(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str, tp: int
) -> None:
    """In each family, an FP8 checkpoint and a float32 checkpoint with the same numbers give the same tokens."""
    quantized, widened = write_quantized(checkpoint(name), tmp_path, block=(16, 24))
    prompts: Any = [{"prompt_token_ids": [(7 * i + 5 * length) % 250 + 3 for i in range(length)]} for length in (2, 19)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    found = []
    for folder in (quantized, widened):
        backend = "uni" if tp == 1 else "threads"
        with LLM(
            str(folder), tensor_parallel_size=tp, distributed_executor_backend=backend, kv_cache_memory_bytes=2**20
        ) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        found.append([(out.outputs[0].token_ids, out.outputs[0].cumulative_logprob) for out in outputs])
    assert found[0] == found[1]


def test_memory_is_counted_at_the_widened_size(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    quantized, widened = write_quantized(checkpoint("llama"), tmp_path, block=(16, 24))
    sizes = []
    for folder in (quantized, widened):
        spec, stored = read_spec(folder), open_checkpoint(folder)
        params = params_of(spec, stored.shapes)
        stored.check_loadable(piece.source for param in params for piece in param.pieces)
        sizes.append([weight_bytes(spec, params, s, 2, embedding_kept=True) for s in shards_of(spec, 3)])
    assert sizes[0] == sizes[1]
    assert sum(stored.dtype == "F8_E4M3" for stored in open_checkpoint(quantized).tensors.values()) == 3 * 7
