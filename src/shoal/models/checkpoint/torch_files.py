"""Files of weights from `torch.save`, read with PyTorch's own reader for untrusted files.

Since PyTorch 1.6 such a file is a zip archive with a pickle of the saved object and an uncompressed member for each
storage. PyTorch maps the file into memory, so the address of a storage gives its offset in the file. In older files
the storages follow the pickle; PyTorch reads such a file as a whole.
"""

import contextlib
import dataclasses
import pickle
import re
import zipfile
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.models.checkpoint.stored_file import FileState, StoredTensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.complex128: "C128",
}
_LOCAL_HEADER = b"PK\x03\x04"
_ENCRYPTED = 1
_MAX_REASON = 300
_MAPS = Path("/proc/self/maps")


class _Unreadable(Exception):
    """A file can't be read. The message is the reason, the end of a sentence."""


def list_here(files: Mapping[Path, FileState]) -> dict[Path, dict[str, StoredTensor]]:
    """Do the same as `pickled.read_pickled`, but without a child process and its limits.

    This is for a process that has loaded PyTorch, and for files that a child process has read before.

    Raises:
        CheckpointError: see `list_tensors`.
    """
    return {file: list_tensors(file) for file in files}


def list_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return the place of each tensor of a state dict in the file.

    Raises:
        CheckpointError: see `load_tensors`; or a tensor is larger than its data in the file.
    """
    with _one_line(file):
        tensors = load_tensors(file)
        find = _offsets_in_archive(file) if _is_archive(file) else _offsets_in_storages(tensors)
        return {name: find(name, tensor) for name, tensor in tensors.items()}


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict, by name.

    They are views of a mapping of the file, or in memory if the format is older than PyTorch 1.6.

    Raises:
        CheckpointError: the file is truncated or malformed, asks for something that weights do not need, or has no
            state dict.
    """
    with _one_line(file):
        mapped = _is_archive(file)
        if mapped:
            _check_members(file)
        return _state_dict(torch.load(file, map_location="cpu", weights_only=True, mmap=mapped))


@contextlib.contextmanager
def _one_line(file: Path) -> Iterator[None]:
    """Turn any error of PyTorch into a CheckpointError of one line."""
    try:
        yield
    except CheckpointError:
        raise
    except _Unreadable as error:
        raise CheckpointError(f"{file} can't be read: {_shown(str(error))}") from None
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror or _shown(str(error))}") from None
    except Exception as error:  # noqa: BLE001 - the file may make PyTorch raise anything
        raise CheckpointError(_explained(file, error)) from None


def _explained(file: Path, error: Exception) -> str:
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return (
            f"{file} can't be read: PyTorch could not allocate memory for it ({file.stat().st_size} bytes, and the "
            "objects of its pickle); if you trust the file, convert it to safetensors"
        )
    unknown = re.search(r"GLOBAL (\S+)", text)
    if isinstance(error, pickle.UnpicklingError) and unknown:
        return (
            f"{file} can't be read: it asks for {_shown(unknown[1])!r}, which weights do not need; if you trust the "
            "file, convert it to safetensors"
        )
    # PyTorch's message is long, and advises to load the file without `weights_only`: only the reason is kept.
    reason = text.rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
    reason = re.split(r"(?<=\S)\. (?=[A-Z])", reason)[0]
    return f"{file} is truncated or not a file of weights: {_shown(f'{type(error).__name__}: {reason}')}"


def _shown(text: str) -> str:
    """Return text from an untrusted file as one short line that is safe for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:_MAX_REASON])


def _is_archive(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(_LOCAL_HEADER)) == _LOCAL_HEADER


def _check_members(file: Path) -> None:
    """Refuse members that PyTorch would misread or overwrite in its mapping: compressed or big-endian ones."""
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
                raise _Unreadable(f"{info.filename} is compressed or encrypted; torch.save stores it as it is")
            if info.filename.rpartition("/")[2] == "byteorder":
                with archive.open(info) as stream:
                    order = stream.read(16).decode("latin-1")
                if order != "little":
                    raise _Unreadable(f"its numbers have the byte order {order}; only little is supported")


def _state_dict(content: Any) -> dict[str, Tensor]:
    """Return the tensors by name from a saved object: a state dict, or a dict with one under `state_dict`."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise _Unreadable(f"it holds a {type(content).__name__} instead of tensors by name")
    found = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not found:
        # The repr of other keys could take forever: tuples that contain the next tuple twice, and so on.
        first = [str(key)[:40] if isinstance(key, str | int) else type(key).__name__ for key in list(content)[:5]]
        held = f", only the keys {', '.join(first)}" if first else " and nothing else"
        raise _Unreadable(f"it holds no tensors by name{held}; save the model's state_dict by itself")
    for name, tensor in found.items():
        _check_plain(name, tensor)
    return {name: tensor.detach() for name, tensor in found.items()}


def _check_plain(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose values are not simply those of its storage."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_quantized or tensor.is_nested:
        raise _Unreadable(f"{name} is no plain tensor: save a dense copy of it")
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise _Unreadable(f"{name} is {tensor.layout} on the device {tensor.device}: save a dense copy of it")
    if tensor.is_neg() or tensor.is_conj():
        raise _Unreadable(f"the numbers of {name} must be negated or conjugated on reading: save a copy of it")


_Find = Callable[[str, Tensor], StoredTensor]


def _offsets_in_archive(file: Path) -> _Find:
    """Return a function that finds a tensor in the file by its address, since PyTorch has mapped the file."""
    with zipfile.ZipFile(file) as archive:
        members = sorted((info.header_offset, info.file_size) for info in archive.infolist())
    mappings = _mappings()
    size = file.stat().st_size

    def find(name: str, tensor: Tensor) -> StoredTensor:
        if tensor.numel() == 0:
            return _stored(tensor, 0)
        start = _file_offset(mappings, tensor)
        if start is None:
            raise _Unreadable(f"the numbers of {name} are not in the file")
        member = bisect(members, (start, 0)) - 1
        available = min(members[member][1], size - start) if member >= 0 else 0
        if available < _extent(tensor):
            raise _Unreadable(f"the data of {name} is cut off: {available} bytes of {_extent(tensor)}")
        return _stored(tensor, start + int(tensor.storage_offset()) * tensor.itemsize)

    return find


def _offsets_in_storages(tensors: Mapping[str, Tensor]) -> _Find:
    """Return a function that gives each tensor an offset as if the storages were stored one after the other."""
    starts: dict[int, int] = {}
    end = 0
    for tensor in tensors.values():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in starts:
            starts[storage.data_ptr()] = end
            end += storage.nbytes()

    def find(name: str, tensor: Tensor) -> StoredTensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() < _extent(tensor):
            raise _Unreadable(f"the data of {name} is cut off: {storage.nbytes()} bytes of {_extent(tensor)}")
        start = starts[storage.data_ptr()] + int(tensor.storage_offset()) * tensor.itemsize
        return dataclasses.replace(_stored(tensor, start), whole=True)

    return find


def _stored(tensor: Tensor, offset: int) -> StoredTensor:
    dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return StoredTensor(dtype, tuple(tensor.shape), tensor.stride(), offset)


def _extent(tensor: Tensor) -> int:
    """Return the number of bytes from the start of a tensor's storage to the end of the tensor."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (int(tensor.storage_offset()) + last + 1) * tensor.itemsize


@dataclass(frozen=True, slots=True)
class _Mapping:
    """A part of a file that is mapped into this process's memory: its addresses, and its offset in the file."""

    addresses: range
    offset: int


def _mappings() -> list[_Mapping]:
    """Return all mappings of files, ordered by address (https://man7.org/linux/man-pages/man5/proc_pid_maps.5.html)."""
    found = []
    for line in _MAPS.read_text("utf-8", "surrogateescape").splitlines():
        addresses, _, offset, _, inode = line.split(maxsplit=5)[:5]
        if inode != "0":
            start, stop = (int(number, 16) for number in addresses.split("-"))
            found.append(_Mapping(range(start, stop), int(offset, 16)))
    return found


def _file_offset(mappings: list[_Mapping], tensor: Tensor) -> int | None:
    """Return the offset of a tensor's storage in its mapped file, or None if it is not in a mapped file."""
    address = tensor.untyped_storage().data_ptr()
    number = bisect(mappings, address, key=lambda mapping: mapping.addresses.start) - 1
    if number < 0 or address not in mappings[number].addresses:
        return None
    return mappings[number].offset + address - mappings[number].addresses.start
