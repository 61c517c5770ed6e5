"""The weights in a model folder: in which file and where each tensor is stored. Free of torch.

Weights are in safetensors files, or else in files of `torch.save` (`pickled`). A safetensors file has the length of its
header in eight bytes (little endian), the header as JSON, `{name: {dtype, shape, data_offsets}}`, and then the data.
(https://github.com/huggingface/safetensors)
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shoal.errors import CheckpointError
from shoal.git_lfs import refuse_pointer
from shoal.models.checkpoint.pickled import read_pickled
from shoal.models.checkpoint.stored_file import FileState, StoredTensor
from shoal.models.config_json.quantization import weight_block
from shoal.models.registry import read_config

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLED_SINGLE = "pytorch_model.bin"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
ITEM_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1}
QUANTIZED = "F8_E4M3"
_PLAIN = ("F32", "F16", "BF16", "F64")
LOADABLE = (*_PLAIN, QUANTIZED)
_SCALES = "_scale_inv"  # suffix of the name of the scales of a quantized tensor
# Name of a dtype in config.json -> its name in safetensors files.
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_MAX_HEADER_BYTES = 100 * 2**20
_STATE_DIGITS = 16
# Files other than the weights that change the answers of a model.
_OTHER_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
_COMPARED_BYTES = 2**20  # bytes of two tensors that are read and compared at a time


ReadPickled = Callable[[Mapping[Path, FileState]], dict[Path, dict[str, StoredTensor]]]


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of a quantized tensor, by which its numbers are multiplied.

    There is one for each block of `block` = (rows, columns) numbers of its matrices: [..., ceil(rows / block[0]),
    ceil(columns / block[1])].
    """

    entry: "TensorEntry"
    block: tuple[int, int]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The place of a tensor in a file, and its form.

    `loaded_as` is set if only PyTorch can read the file, as a whole: the name of the tensor in the result. `offset` is
    then no place in the file, but equal offsets mean the same numbers.
    """

    file: Path
    dtype: str  # as safetensors files name it
    shape: tuple[int, ...]
    offset: int  # of the first byte in the file
    strides: tuple[int, ...] | None = None  # in elements; None: row-major
    scales: Scales | None = None  # if the tensor is quantized
    loaded_as: str | None = field(default=None, compare=False)

    @property
    def size(self) -> int:
        """The number of bytes of the tensor's numbers."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def row_major(self) -> bool:
        """True if the numbers are stored row after row without gaps."""
        if self.strides is None or 0 in self.shape:
            return True
        expected = 1
        for stride, size in reversed(list(zip(self.strides, self.shape, strict=True))):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def overlaps(self) -> bool:
        """True if several elements may share a place in the file, as in an expanded tensor."""
        if self.strides is None or 0 in self.shape:
            return False
        reach = 0  # the largest offset that the dimensions with smaller strides reach
        for stride, size in sorted((t, n) for t, n in zip(self.strides, self.shape, strict=True) if n > 1):
            if stride <= reach:
                return True
            reach += stride * (size - 1)
        return False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a model folder, and the state of its files when the headers were read.

    `files` are those with the tensors, and the other files that change the answers of the model.
    """

    folder: Path
    tensors: Mapping[str, TensorEntry]
    files: Mapping[Path, FileState] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """A digest that changes when one of the files is replaced or written to."""
        states = sorted(f"{file.name} {state}" for file, state in self.files.items())
        return hashlib.sha256("\n".join(states).encode()).hexdigest()[:_STATE_DIGITS]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.tensors.items()}

    def check_state(self, expected: str) -> None:
        """Check that the files are in the state in which they were before ("": any state).

        Raises:
            CheckpointError: a file was replaced or written to.
        """
        if expected and self.state != expected:
            raise CheckpointError(
                f"{self.folder} has changed since Shoal first read it: a file of the model was replaced or written to. "
                "Start Shoal again, so that all its processes run the same model"
            )

    def check_loadable(self, names: Iterable[str]) -> None:
        """Check that the named tensors are stored in a form that can be loaded.

        Raises:
            CheckpointError: a tensor is not.
        """
        for name in names:
            entry = self.tensors[name]
            if entry.dtype not in LOADABLE:
                raise CheckpointError(
                    f"{entry.file}: {name} is stored as {entry.dtype}; supported are {', '.join(LOADABLE)}"
                )
            if entry.dtype == QUANTIZED:
                _check_scales(name, entry)
            if entry.overlaps:
                raise CheckpointError(
                    f"{entry.file}: {name} of shape {list(entry.shape)} has strides {list(entry.strides or ())}, so "
                    "that elements share memory: save a contiguous copy of it"
                )


def dtype_of(entry: TensorEntry) -> str | None:
    """Return the dtype of a tensor as config.json names it, or None if models are not computed in this dtype."""
    return next((name for name, stored in _STORED.items() if stored == entry.dtype), None)


def same_numbers(one: TensorEntry, other: TensorEntry) -> bool:
    """Return whether two tensors hold the same numbers in the same dtype.

    Both are read up to the first difference. Tensors that are not row-major, or that only PyTorch can read, count as
    different, unless they are the same place in a file.

    Raises:
        CheckpointError: a file can't be read.
    """
    if one == other:
        return True
    plain = all(entry.dtype in _PLAIN and entry.row_major and entry.loaded_as is None for entry in (one, other))
    if not plain or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    try:
        with one.file.open("rb") as first, other.file.open("rb") as second:
            first.seek(one.offset)
            second.seek(other.offset)
            left = one.size
            while left:
                wanted = min(left, _COMPARED_BYTES)
                if first.read(wanted) != second.read(wanted):
                    return False
                left -= wanted
    except OSError as error:
        raise CheckpointError(f"{one.file} or {other.file} can't be read: {error.strerror}") from None
    return True


def open_checkpoint(
    folder: Path,
    overrides: Mapping[str, Any] = MappingProxyType({}),
    state: str = "",
    read_pickled: ReadPickled = read_pickled,
) -> Checkpoint:
    """Read the headers of all files with weights in a folder.

    As in transformers, safetensors files are preferred to pickled files, and a single file to an index: an index may be
    left over from an older copy of the model.

    Args:
        overrides: are applied to config.json.
        state: the state in which the files were before; "": they were not read before.
        read_pickled: the reader of pickled files. This one needs no PyTorch in this process, but takes seconds at its
            first call.

    Raises:
        CheckpointError: there are no weights, a shard is missing, a file is truncated or malformed, or the files are
            not in this state.
    """
    files, pickled = _weight_files(folder)
    states = _model_states(folder, files)
    Checkpoint(folder, {}, states).check_state(state)
    for file in files:
        refuse_pointer(file)
    tensors: dict[str, TensorEntry] = {}
    if pickled:
        for file, stored in read_pickled({file: states[file] for file in files}).items():
            tensors.update(_entries(file, stored))
    else:
        for file in files:
            tensors.update(_read_safetensors(file))
    for file, found in states.items():
        found.check(file, _states([file])[file])
    return Checkpoint(folder, _with_scales(folder, overrides, tensors), states)


def check_files(folder: Path, state: str) -> None:
    """Check that the files of a model are still those that were read before, without reading them.

    Raises:
        CheckpointError: a file is missing, or the files are not in this state.
    """
    Checkpoint(folder, {}, _model_states(folder, _weight_files(folder)[0])).check_state(state)


def _weight_files(folder: Path) -> tuple[list[Path], bool]:
    """Return the files with the weights, and whether they are pickled.

    Raises:
        CheckpointError: there are none, or a shard is missing.
    """
    for index, single in ((folder / INDEX, folder / SINGLE), (folder / PICKLED_INDEX, folder / PICKLED_SINGLE)):
        files = [single] if single.exists() else _shards(index) if index.exists() else []
        if files:
            return files, single.name == PICKLED_SINGLE
    wanted = ", ".join((SINGLE, INDEX, PICKLED_SINGLE))
    raise CheckpointError(f"{folder} has no weights: it has none of {wanted} and {PICKLED_INDEX}")


def _model_states(folder: Path, files: Iterable[Path]) -> dict[Path, FileState]:
    """Return the states of the files with weights, and of the other files that change the answers of the model."""
    return _states([*files, *(folder / name for name in _OTHER_FILES if (folder / name).exists())])


def _states(files: Iterable[Path]) -> dict[Path, FileState]:
    """Return the state of each file.

    Raises:
        CheckpointError: a file can't be read.
    """
    found = {}
    for file in files:
        try:
            found[file] = FileState.of(file)
        except OSError as error:
            raise CheckpointError(f"{file} can't be read: {error.strerror}") from None
    return found


def _with_scales(folder: Path, overrides: Mapping[str, Any], tensors: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Return the tensors, where each quantized one has its scales if the folder has them."""
    scaled = [name for name, entry in tensors.items() if entry.dtype == QUANTIZED and name + _SCALES in tensors]
    block = weight_block(read_config(folder, overrides)) if scaled else None
    if block is None:
        return tensors
    found = {name: Scales(tensors[name + _SCALES], block) for name in scaled}
    return tensors | {name: dataclasses.replace(tensors[name], scales=scales) for name, scales in found.items()}


def _check_scales(name: str, entry: TensorEntry) -> None:
    """Check that a quantized tensor has scales, and that these have the right shape.

    Raises:
        CheckpointError: it lacks scales, or they have another shape.
    """
    where = f"{entry.file}: {name} is stored as {entry.dtype}"
    if entry.scales is None:
        raise CheckpointError(
            f"{where}, which needs a tensor {name}{_SCALES}, and weight_block_size in quantization_config of "
            "config.json"
        )
    found, block = entry.scales.entry, entry.scales.block
    if len(entry.shape) not in (2, 3):
        raise CheckpointError(f"{where} with the shape {list(entry.shape)}, but only matrices can be quantized")
    wanted = [*entry.shape[:-2], *(-(-size // step) for size, step in zip(entry.shape[-2:], block, strict=True))]
    if list(found.shape) != wanted or found.dtype not in _PLAIN:
        raise CheckpointError(
            f"{where} in blocks of {list(block)}: {name}{_SCALES} is {found.dtype} {list(found.shape)}, but must be "
            f"F32 {wanted}"
        )


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names, which must all exist."""
    refuse_pointer(index)
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} can't be read: {type(error).__name__} {error}") from None
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{index} can't be read: its weight_map must map names to file names")
    folder = index.parent
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}")
    return [folder / name for name in names]


def _entries(file: Path, stored: Mapping[str, StoredTensor]) -> dict[str, TensorEntry]:
    return {
        name: TensorEntry(
            file, found.dtype, found.shape, found.offset, found.strides, loaded_as=name if found.whole else None
        )
        for name, found in stored.items()
    }


def _read_safetensors(file: Path) -> dict[str, TensorEntry]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{file} is truncated or not a safetensors file: it has {size} bytes, its header {length}"
                )
            header: dict[str, Any] = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for name, entry in entries.items():
            _check_entry(name, entry)
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} has a malformed header: {type(error).__name__} {error}") from None

    start = 8 + length
    end = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end > size:
        raise CheckpointError(f"{file} is truncated: it has {size} bytes, but {end} by its header; download it again")
    found = {
        name: TensorEntry(file, entry["dtype"], tuple(entry["shape"]), start + entry["data_offsets"][0])
        for name, entry in entries.items()
    }
    for name, entry in found.items():
        stored = entries[name]["data_offsets"]
        if entry.dtype in ITEM_BYTES and stored[1] - stored[0] != math.prod(entry.shape) * ITEM_BYTES[entry.dtype]:
            raise CheckpointError(
                f"{file}: the data of {name} has {stored[1] - stored[0]} bytes, which is not the size of "
                f"{entry.dtype} {list(entry.shape)}"
            )
    return found


def _check_entry(name: str, entry: Any) -> None:
    """Check the form of one entry of a safetensors header.

    Raises:
        ValueError, KeyError, TypeError: the entry is malformed.
    """
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    sizes = [*shape, *offsets]
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes)
    if not isinstance(dtype, str) or not whole or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name}: dtype {dtype!r}, shape {shape!r}, data_offsets {offsets!r}")
