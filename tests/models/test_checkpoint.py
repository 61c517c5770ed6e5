"""Headers of safetensors files are read, or refused with an error of one line if they are malformed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.errors import CheckpointError
from shoal.models.checkpoint.checkpoint import (
    INDEX,
    PICKLED_INDEX,
    PICKLED_SINGLE,
    SINGLE,
    Checkpoint,
    TensorEntry,
    open_checkpoint,
    same_numbers,
)
from shoal.models.checkpoint.torch_files import list_here

_SETTINGS = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])

Header = dict[str, Any]


def entry(dtype: str, shape: list[int], start: int, stop: int) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HEADER: Header = {
    "__metadata__": {"format": "pt"},
    "a": entry("F32", [2, 3], 0, 24),
    "b": entry("BF16", [5], 24, 34),
    "empty": entry("F16", [0, 7], 34, 34),
}
DATA = bytes(range(34))


def pack(header: object, data: bytes = DATA) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / SINGLE


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_the_header_of_a_single_file_is_read(file: Path) -> None:
    file.write_bytes(pack(HEADER))
    found = open_checkpoint(file.parent)
    assert found.folder == file.parent
    assert found.shapes == {"a": (2, 3), "b": (5,), "empty": (0, 7)}
    b = found.tensors["b"]
    assert (b.file, b.dtype) == (file, "BF16")
    assert file.read_bytes()[b.offset : b.offset + 10] == DATA[24:34]


def test_a_file_of_the_safetensors_library_is_read(checkpoint: Callable[[str], Path]) -> None:
    from safetensors import safe_open

    folder = checkpoint("llama")
    found = open_checkpoint(folder)
    with safe_open(folder / SINGLE, "pt") as theirs:
        assert set(found.tensors) == set(theirs.keys())
        for name, tensor in found.tensors.items():
            expected = theirs.get_tensor(name)
            assert tensor.shape == tuple(expected.shape)
            data = tensor.file.read_bytes()[tensor.offset : tensor.offset + expected.nbytes]
            assert data == expected.numpy().tobytes()


def shard(folder: Path) -> tuple[Path, Path]:
    first, second = folder / "first.safetensors", folder / "second.safetensors"
    first.write_bytes(pack({"a": entry("F32", [2, 3], 0, 24)}, DATA[:24]))
    second.write_bytes(pack({"b": entry("BF16", [5], 0, 10)}, DATA[24:]))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": first.name, "b": second.name}}))
    return first, second


def test_the_headers_of_all_shards_are_read(tmp_path: Path) -> None:
    first, second = shard(tmp_path)
    found = open_checkpoint(tmp_path)
    assert {name: (t.file, t.shape) for name, t in found.tensors.items()} == {"a": (first, (2, 3)), "b": (second, (5,))}


@pytest.mark.slow
def test_a_single_file_is_preferred_to_an_index(tmp_path: Path) -> None:
    """Transformers does the same, because the index may be out of date and name shards that no longer exist."""
    torch.save({"c": torch.ones(2)}, tmp_path / PICKLED_SINGLE)
    (tmp_path / PICKLED_INDEX).write_text(json.dumps({"weight_map": {"c": "gone.bin"}}))
    assert set(open_checkpoint(tmp_path, read_pickled=list_here).tensors) == {"c"}
    _, second = shard(tmp_path)
    second.unlink()
    (tmp_path / SINGLE).write_bytes(pack(HEADER))
    assert {tensor.file.name for tensor in open_checkpoint(tmp_path).tensors.values()} == {SINGLE}


def test_missing_shards_are_named(tmp_path: Path) -> None:
    first, second = shard(tmp_path)
    second.unlink()
    assert "lacks 1 of 2 shards: second.safetensors" in refusal(tmp_path)
    first.unlink()
    assert "lacks 2 of 2 shards: first.safetensors, second.safetensors" in refusal(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    _, second = shard(tmp_path)
    size = second.stat().st_size
    second.write_bytes(second.read_bytes()[:-1])
    assert refusal(tmp_path).startswith(f"{second} is truncated: it has {size - 1} bytes, but {size} by its header")


def test_pickled_files_are_read_only_if_there_are_no_safetensors_files(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / PICKLED_SINGLE)
    assert open_checkpoint(tmp_path, read_pickled=list_here).shapes == {"a": (2,), "b": (3,)}
    (tmp_path / SINGLE).write_bytes(pack(HEADER))
    assert open_checkpoint(tmp_path, read_pickled=list_here).tensors["a"].file == tmp_path / SINGLE
    (tmp_path / SINGLE).unlink()
    shard(tmp_path)
    assert set(open_checkpoint(tmp_path, read_pickled=list_here).tensors) == {"a", "b"}
    assert open_checkpoint(tmp_path, read_pickled=list_here).tensors["a"].file.suffix == ".safetensors"


@pytest.mark.slow
def test_pickled_shards_are_read_or_refused_by_name(tmp_path: Path) -> None:
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    torch.save({"a": torch.ones(2)}, tmp_path / files[0])
    torch.save({"b": torch.ones(3)}, tmp_path / files[1])
    index = tmp_path / PICKLED_INDEX
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": files[0], "b": files[1]}}))
    assert open_checkpoint(tmp_path, read_pickled=list_here).shapes == {"a": (2,), "b": (3,)}
    (tmp_path / files[1]).write_bytes(b"")
    assert f"{files[1]} is truncated or not a file of weights" in refusal(tmp_path, read_pickled=list_here)
    (tmp_path / files[1]).unlink()
    assert f"lacks 1 of 2 shards: {files[1]}" in refusal(tmp_path)
    index.write_text('{"weight_map": {}}')
    assert "its weight_map must map names to file names" in refusal(tmp_path)


def test_equal_tensors_of_an_old_file_are_recognized_only_if_they_share_storage(tmp_path: Path) -> None:
    """Only PyTorch reads the format from before version 1.6, so the numbers can't be compared without loading them."""
    one = torch.ones(2, 3)
    tensors = {"a": one, "b": one.view(2, 3), "row": one[1], "copy": one.clone()}
    torch.save(tensors, tmp_path / PICKLED_SINGLE, _use_new_zipfile_serialization=False)
    found = open_checkpoint(tmp_path, read_pickled=list_here).tensors
    assert {name for name, tensor in found.items() if same_numbers(found["a"], tensor)} == {"a", "b"}
    torch.save(tensors, tmp_path / PICKLED_SINGLE)
    found = open_checkpoint(tmp_path, read_pickled=list_here).tensors
    assert {name for name, tensor in found.items() if same_numbers(found["a"], tensor)} == {"a", "b", "copy"}


def test_files_that_have_changed_are_not_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / PICKLED_SINGLE)
    state = open_checkpoint(tmp_path, read_pickled=list_here).state
    assert open_checkpoint(tmp_path, state=state, read_pickled=list_here).state == state
    (tmp_path / PICKLED_SINGLE).write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="has changed since Shoal first read it"):
        open_checkpoint(tmp_path, state=state)


@pytest.mark.parametrize(
    ("shape", "strides", "overlaps"),
    [
        ((2, 3), None, False),
        ((2, 3), (3, 1), False),
        ((3, 2), (1, 3), False),
        ((2, 3), (8, 2), False),
        ((2, 1, 3), (3, 0, 1), False),
        ((0, 3), (0, 0), False),
        ((), (), False),
        ((2, 3), (0, 1), True),
        ((2, 3), (2, 1), True),
        ((4, 4), (1, 1), True),
    ],
)
def test_tensors_with_overlapping_elements_are_refused(
    shape: tuple[int, ...], strides: tuple[int, ...] | None, overlaps: bool
) -> None:
    found = TensorEntry(Path("a"), "F32", shape, 0, strides)
    assert found.overlaps == overlaps
    checkpoint = Checkpoint(Path(), {"x": found})
    if overlaps:
        with pytest.raises(CheckpointError, match="so that elements share memory: save a contiguous copy"):
            checkpoint.check_loadable(["x"])
    else:
        checkpoint.check_loadable(["x"])


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert SINGLE in message
    assert INDEX in message


@pytest.mark.parametrize("length", range(8))
def test_a_file_too_short_for_the_length_of_its_header_is_refused(file: Path, length: int) -> None:
    file.write_bytes(b"\0" * length)
    assert f"truncated or not a safetensors file: it has {length} bytes" in refusal(file.parent)


def test_a_header_longer_than_the_file_is_refused(file: Path) -> None:
    file.write_bytes(b"\xff" * 200)
    assert f"its header {2**64 - 1}" in refusal(file.parent)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": 7},
        {"dtype": ["F32"]},
        {"dtype": None},
        {"shape": None},
        {"shape": 6},
        {"shape": "23"},
        {"shape": [2.0, 3]},
        {"shape": [-2, -3]},
        {"shape": [True, 6]},
        {"shape": [[2], 3]},
        {"shape": {"2": 3}},
        {"data_offsets": None},
        {"data_offsets": []},
        {"data_offsets": [0]},
        {"data_offsets": [0, 24, 30]},
        {"data_offsets": [-8, 16]},
        {"data_offsets": [24, 0]},
        {"data_offsets": [0, 24.0]},
        {"data_offsets": [0, float("nan")]},
        {"data_offsets": ["0", "24"]},
        {"data_offsets": "ab"},
    ],
    ids=str,
)
def test_a_malformed_entry_is_refused(file: Path, change: Header) -> None:
    file.write_bytes(pack({**HEADER, "a": {**HEADER["a"], **change}}))
    message = refusal(file.parent)
    assert message.startswith(f"{file} has a malformed header")


@pytest.mark.parametrize("change", [{"shape": [2, 4]}, {"data_offsets": [0, 20]}, {"dtype": "F16"}])
def test_data_of_the_wrong_size_is_refused(file: Path, change: Header) -> None:
    file.write_bytes(pack({**HEADER, "a": {**HEADER["a"], **change}}))
    assert "bytes, which is not the size of" in refusal(file.parent)


def test_unsupported_types_are_refused(file: Path) -> None:
    file.write_bytes(pack({"a": entry("I32", [6], 0, 24), "b": entry("F32", [1], 0, 4), "c": entry("F8", [2], 0, 2)}))
    found = open_checkpoint(file.parent)
    found.check_loadable(["b"])
    with pytest.raises(CheckpointError, match="a is stored as I32; supported are F32, F16, BF16, F64"):
        found.check_loadable(["b", "a"])
    with pytest.raises(CheckpointError, match="c is stored as F8"):
        found.check_loadable(["c"])


@pytest.mark.parametrize("name", [SINGLE, INDEX])
def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / name} can't be read")


def opens_or_refuses(folder: Path) -> None:
    """Check that opening either raises CheckpointError or finds tensors that begin inside their file."""
    try:
        found = open_checkpoint(folder)
    except CheckpointError:
        return
    for tensor in found.tensors.values():
        assert 0 <= tensor.offset <= tensor.file.stat().st_size
        assert all(size >= 0 for size in tensor.shape)


@_SETTINGS
@given(st.binary(max_size=300))
def test_random_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(data)
    opens_or_refuses(tmp_path)


@_SETTINGS
@given(st.binary(max_size=200), st.binary(max_size=50))
def test_random_headers_are_read_or_refused(tmp_path: Path, header: bytes, data: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + data)
    opens_or_refuses(tmp_path)


@_SETTINGS
@given(st.data())
def test_mutated_files_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Some bytes of a valid file are changed, inserted or removed."""
    content = bytearray(pack(HEADER))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, max(len(content) - 1, 0)))
        content[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    (tmp_path / SINGLE).write_bytes(content[: data.draw(st.integers(0, len(content)))])
    opens_or_refuses(tmp_path)
    (tmp_path / SINGLE).write_bytes(content)
    opens_or_refuses(tmp_path)


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_VALUES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@_SETTINGS
@given(
    st.dictionaries(st.sampled_from(["a", "__metadata__", "x"]), _VALUES | st.just(HEADER["a"]), max_size=3),
    st.sampled_from(["dtype", "shape", "data_offsets"]),
    _VALUES,
)
def test_random_json_in_a_header_is_read_or_refused(tmp_path: Path, header: Header, key: str, value: Any) -> None:
    (tmp_path / SINGLE).write_bytes(pack(header))
    opens_or_refuses(tmp_path)
    (tmp_path / SINGLE).write_bytes(pack({**HEADER, "b": {**HEADER["b"], key: value}}))
    opens_or_refuses(tmp_path)


@_SETTINGS
@given(_VALUES)
def test_random_indexes_are_read_or_refused(tmp_path: Path, value: Any) -> None:
    shutil.rmtree(tmp_path, ignore_errors=True)
    tmp_path.mkdir()
    shard(tmp_path)
    for text in (value, {"weight_map": value}, {"weight_map": {"a": "first.safetensors", "b": value}}):
        (tmp_path / INDEX).write_text(json.dumps(text))
        opens_or_refuses(tmp_path)
