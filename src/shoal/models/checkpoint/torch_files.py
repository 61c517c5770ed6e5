"""Files of weights that `torch.save` wrote, read by PyTorch's own reader for files from strangers.

Since PyTorch 1.6 such a file is a zip archive: a pickle of what was saved, and a member, never compressed, for each
storage. PyTorch maps it into memory, so that the address of a storage says where in the file it lies. Before, the
pickle was followed by the storages themselves; PyTorch reads such a file as a whole.
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
_LONGEST_REASON = 300
_MAPS = Path("/proc/self/maps")


class _Refused(Exception):
    """Why a file is not read: the end of a sentence."""


def list_here(files: Mapping[Path, FileState]) -> dict[Path, dict[str, StoredTensor]]:
    """Do what `pickled.read_pickled` does, without a child process and its bounds: for a process that has loaded
    PyTorch, and files that a child has read before.

    Raises:
        CheckpointError: as `list_tensors`.
    """
    return {file: list_tensors(file) for file in files}


def list_tensors(file: Path) -> dict[str, StoredTensor]:
    """Return where each tensor of a state dict lies: within the file, and within the member of its storage.

    Raises:
        CheckpointError: as `load_tensors`; or a tensor reaches beyond the data that the file has for it.
    """
    with _one_line(file):
        tensors = load_tensors(file)
        find = _places_in_archive(file) if _is_archive(file) else _places_in_memory(tensors)
        return {name: find(name, tensor) for name, tensor in tensors.items()}


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict, by name: views of a mapping of the file, or, where its format is that from
    before PyTorch 1.6, in memory.

    Raises:
        CheckpointError: the file is truncated or malformed, asks for something that weights do not need, or holds no
            state dict.
    """
    with _one_line(file):
        mapped = _is_archive(file)
        if mapped:
            _check_members(file)
        return _state_dict(torch.load(file, map_location="cpu", weights_only=True, mmap=mapped))


@contextlib.contextmanager
def _one_line(file: Path) -> Iterator[None]:
    """Say in one line what is wrong with the file, whatever PyTorch raises."""
    try:
        yield
    except CheckpointError:
        raise
    except _Refused as error:
        raise CheckpointError(f"{file} can't be read: {_shown(str(error))}") from None
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror or _shown(str(error))}") from None
    except Exception as error:  # noqa: BLE001 - the file may make PyTorch raise anything
        raise CheckpointError(_explained(file, error)) from None


def _explained(file: Path, error: Exception) -> str:
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return (
            f"{file} can't be read: PyTorch gets no memory for it ({file.stat().st_size} bytes and what its pickle "
            "asks for); if you trust the file, convert it to safetensors"
        )
    unknown = re.search(r"GLOBAL (\S+)", text)
    if isinstance(error, pickle.UnpicklingError) and unknown:
        return (
            f"{file} can't be read: it asks for {_shown(unknown[1])!r}, which weights do not need; if you trust the "
            "file, convert it to safetensors"
        )
    # Around the reason PyTorch advises at length to load the file without `weights_only`: one sentence is enough.
    reason = text.rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
    reason = re.split(r"(?<=\S)\. (?=[A-Z])", reason)[0]
    return f"{file} is truncated or no file of weights: {_shown(f'{type(error).__name__}: {reason}')}"


def _shown(text: str) -> str:
    """What a stranger's file has put into a message, as one line for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:_LONGEST_REASON])


def _is_archive(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(_LOCAL_HEADER)) == _LOCAL_HEADER


def _check_members(file: Path) -> None:
    """Refuse what PyTorch would take for numbers as they lie in memory, or would turn round in its mapping."""
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
                raise _Refused(f"{info.filename} is compressed or encrypted; torch.save stores it as it is")
            if info.filename.rpartition("/")[2] == "byteorder":
                with archive.open(info) as stream:
                    order = stream.read(16).decode("latin-1")
                if order != "little":
                    raise _Refused(f"its numbers have the byte order {order}; only little is supported")


def _state_dict(content: Any) -> dict[str, Tensor]:
    """Names and tensors of what was saved: a dict of them, or a dict that has one as its `state_dict`."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise _Refused(f"it holds a {type(content).__name__}, and no tensors by name")
    found = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not found:
        # Others than these could take forever to put into words: tuples of tuples, each of them twice the one before.
        first = [str(key)[:40] if isinstance(key, str | int) else type(key).__name__ for key in list(content)[:5]]
        raise _Refused(
            f"it holds no tensors by name, but {', '.join(first) or 'nothing'}; save the model's state_dict by itself"
        )
    for name, tensor in found.items():
        _check_plain(name, tensor)
    return {name: tensor.detach() for name, tensor in found.items()}


def _check_plain(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose numbers are not those of its storage."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_quantized or tensor.is_nested:
        raise _Refused(f"{name} is no plain tensor: save a dense copy of it")
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise _Refused(f"{name} is {tensor.layout} on the device {tensor.device}: save a dense copy of it")
    if tensor.is_neg() or tensor.is_conj():
        raise _Refused(f"the numbers of {name} are to be negated or conjugated when they are read: save a copy of it")


_Find = Callable[[str, Tensor], StoredTensor]


def _places_in_archive(file: Path) -> _Find:
    """Find a tensor in the file by where it lies in memory: PyTorch has mapped the file, and still does."""
    with zipfile.ZipFile(file) as archive:
        members = sorted((info.header_offset, info.file_size) for info in archive.infolist())
    mappings = _mappings()
    size = file.stat().st_size

    def find(name: str, tensor: Tensor) -> StoredTensor:
        if tensor.numel() == 0:
            return _stored(tensor, 0)
        start = _position(mappings, tensor)
        if start is None:
            raise _Refused(f"the numbers of {name} are not in the file")
        member = bisect(members, (start, 0)) - 1
        there = min(members[member][1], size - start) if member >= 0 else 0
        if there < _reach(tensor):
            raise _Refused(f"the data of {name} is cut off: {there} bytes of {_reach(tensor)}")
        return _stored(tensor, start + _first(tensor) * tensor.itemsize)

    return find


def _places_in_memory(tensors: Mapping[str, Tensor]) -> _Find:
    """Give each storage a place of its own behind those before it, in the order of the tensors' names in the file."""
    starts: dict[int, int] = {}
    end = 0
    for tensor in tensors.values():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in starts:
            starts[storage.data_ptr()] = end
            end += storage.nbytes()

    def find(name: str, tensor: Tensor) -> StoredTensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() < _reach(tensor):
            raise _Refused(f"the data of {name} is cut off: {storage.nbytes()} bytes of {_reach(tensor)}")
        start = starts[storage.data_ptr()] + _first(tensor) * tensor.itemsize
        return dataclasses.replace(_stored(tensor, start), whole=True)

    return find


def _stored(tensor: Tensor, offset: int) -> StoredTensor:
    dtype = _DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return StoredTensor(dtype, tuple(tensor.shape), tensor.stride(), offset)


def _first(tensor: Tensor) -> int:
    """The number of its storage that a tensor begins with."""
    return int(tensor.storage_offset())


def _reach(tensor: Tensor) -> int:
    """How many bytes of its storage a tensor reaches over."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (_first(tensor) + last + 1) * tensor.itemsize


@dataclass(frozen=True, slots=True)
class _Mapping:
    """A part of a file that lies in this process's memory: its addresses, and where in the file it begins."""

    addresses: range
    offset: int


def _mappings() -> list[_Mapping]:
    """All of them, by address. (https://man7.org/linux/man-pages/man5/proc_pid_maps.5.html)"""
    found = []
    for line in _MAPS.read_text("utf-8", "surrogateescape").splitlines():
        addresses, _, offset, _, inode = line.split(maxsplit=5)[:5]
        if inode != "0":
            start, stop = (int(number, 16) for number in addresses.split("-"))
            found.append(_Mapping(range(start, stop), int(offset, 16)))
    return found


def _position(mappings: list[_Mapping], tensor: Tensor) -> int | None:
    """Where in the file its storage begins; None where that is memory of this process's own."""
    address = tensor.untyped_storage().data_ptr()
    number = bisect(mappings, address, key=lambda mapping: mapping.addresses.start) - 1
    if number < 0 or address not in mappings[number].addresses:
        return None
    return mappings[number].offset + address - mappings[number].addresses.start
