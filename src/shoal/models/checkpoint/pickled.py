"""Files of weights that `torch.save` wrote: where each tensor lies in them. Free of torch.

Since PyTorch 1.6 such a file is a zip archive: a pickle of what was saved, and a member, never compressed, for each
storage. Before, the pickle was followed by the storages themselves. In both the numbers lie in the file as they lie in
memory, so that a tensor is an offset, as it is in a safetensors file.
"""

import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from shoal.errors import CheckpointError
from shoal.models.checkpoint.pickle_program import Refused, Tensor, read_pickle

_BYTES = {16: "C128", 8: "C64 F64 I64", 4: "F32 I32", 2: "F16 BF16 I16", 1: "I8 U8 BOOL"}
ITEM_BYTES = {name: size for size, names in _BYTES.items() for name in names.split()}
_LONGEST_PICKLE = 64 * 2**20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER = b"PK\x03\x04"
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 1
_MALFORMED = (
    *(ValueError, LookupError, TypeError, ArithmeticError, RuntimeError, EOFError, MemoryError),
    *(zipfile.BadZipFile, struct.error),
)

Storages = Mapping[str, range]  # a storage's key -> its bytes in the file


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """`offset` in bytes, `strides` in elements."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


def read_pickled(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict, by name. Runs nothing of what the file holds.

    Raises:
        CheckpointError: the file is truncated or malformed, asks for something that weights do not need, or holds no
            state dict.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            zipped = stream.read(len(_LOCAL_HEADER)) == _LOCAL_HEADER
            content, storages = _read_archive(stream) if zipped else _read_legacy(stream, size)
        return {name: _located(name, tensor, storages, size) for name, tensor in _state_dict(content).items()}
    except Refused as error:
        raise CheckpointError(f"{file} can't be read: {_line(error)}") from None
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror or _line(error)}") from None
    except _MALFORMED as error:
        raise CheckpointError(f"{file} is truncated or no file of weights: {_line(error)}") from None


def _line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _state_dict(content: Any) -> dict[str, Tensor]:
    """Names and tensors of what was saved: a dict of them, or a dict that has one as its `state_dict`."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise Refused(f"it holds a {type(content).__name__}, and no tensors by name")
    found = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not found:
        keys = ", ".join(str(key)[:40] for key in list(content)[:5])
        raise Refused(f"it holds no tensors by name, but {keys or 'nothing'}; save the model's state_dict by itself")
    return found


def _located(name: str, tensor: Tensor, storages: Storages, file_size: int) -> StoredTensor:
    storage = tensor.storage
    item = ITEM_BYTES[storage.dtype]
    if storage.key not in storages:
        raise Refused(f"it lacks storage {storage.key}, which holds {name}")
    region = storages[storage.key]
    if len(region) < (storage.first + storage.count) * item or region.stop > file_size:
        raise Refused(
            f"the data of {name} is cut off: {len(region)} bytes for {storage.first + storage.count} of {storage.dtype}"
        )
    offset = region.start + (storage.first + tensor.first) * item
    return StoredTensor(storage.dtype, tensor.shape, tensor.strides, offset)


def _read_archive(stream: BinaryIO) -> tuple[Any, Storages]:
    """The format since PyTorch 1.6. Members lie under one folder, whose name is of no importance."""
    with zipfile.ZipFile(stream) as archive:
        members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)]
    if len(pickles) != 1:
        raise Refused(f"a zip archive with {len(pickles)} members data.pkl, where torch.save writes one")
    folder = pickles[0].removesuffix("data.pkl")

    if f"{folder}byteorder" in members:
        order = _bytes(stream, _region(stream, members[f"{folder}byteorder"]), 16)
        if order != b"little":
            raise Refused(f"its numbers have the byte order {order.decode('latin-1')}; only little is supported")
    where = _region(stream, members[pickles[0]])
    content = read_pickle(_Window(stream, where.start, where.stop))
    data = f"{folder}data/"
    storages = {
        name.removeprefix(data): _region(stream, info) for name, info in members.items() if name.startswith(data)
    }
    return content, storages


def _region(stream: BinaryIO, info: zipfile.ZipInfo) -> range:
    """Where the data of a member lie: behind a header of its own, whose lengths are not those of the directory."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _ENCRYPTED:
        raise Refused(f"{info.filename} is compressed or encrypted; torch.save stores it as it is")
    header = _bytes(stream, range(info.header_offset, info.header_offset + _LOCAL_HEADER_BYTES), _LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES or not header.startswith(_LOCAL_HEADER):
        raise Refused(f"{info.filename} is not where the archive's directory says")
    name, extra = struct.unpack_from("<HH", header, _LOCAL_HEADER_BYTES - 4)
    start = info.header_offset + _LOCAL_HEADER_BYTES + name + extra
    return range(start, start + info.file_size)


def _bytes(stream: BinaryIO, where: range, most: int) -> bytes:
    stream.seek(where.start)
    return stream.read(min(len(where), most))


def _read_legacy(stream: BinaryIO, size: int) -> tuple[Any, Storages]:
    """The format before: pickles of a magic number, a version, facts of the machine, the content and the storages'
    keys; then for each key a count, in 8 bytes, and the numbers."""
    window = _Window(stream, 0, size)
    if read_pickle(window) != _LEGACY_MAGIC or read_pickle(window) != _LEGACY_PROTOCOL:
        raise Refused("it is no file of torch.save")
    machine = read_pickle(window)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Refused("its numbers have the byte order big; only little is supported")
    dtypes: dict[str, str] = {}
    content, keys = read_pickle(window, dtypes), read_pickle(window)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in dtypes for key in keys):
        raise Refused("its list of storages is not that of its content")
    regions: dict[str, range] = {}
    position = window.tell()
    for key in keys:
        count = int.from_bytes(_bytes(stream, range(position, position + 8), 8), "little")
        regions[key] = range(position + 8, position + 8 + count * ITEM_BYTES[dtypes[key]])
        position = regions[key].stop
        if position > size:
            raise Refused(
                f"it is truncated: {size} bytes, of which storage {key} promises {position}; download it again"
            )
    return content, regions


class _Window:
    """Some bytes of a file. However much a pickle asks for, it gets no more than there is, and than a pickle needs."""

    def __init__(self, stream: BinaryIO, start: int, stop: int) -> None:
        self._stream = stream
        self._position = start
        self._stop = min(stop, start + _LONGEST_PICKLE)

    def read(self, count: int, /) -> bytes:
        return self._advance(self._at().read(max(min(count, self._stop - self._position), 0)))

    def readline(self) -> bytes:
        return self._advance(self._at().readline(max(self._stop - self._position, 0)))

    def tell(self) -> int:
        return self._position

    def _at(self) -> BinaryIO:
        if self._stream.tell() != self._position:
            self._stream.seek(self._position)
        return self._stream

    def _advance(self, data: bytes) -> bytes:
        self._position += len(data)
        return data
