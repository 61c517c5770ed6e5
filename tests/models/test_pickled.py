"""Files of torch.save: the offsets of their tensors are found without running code from the files.

Most tests call `list_tensors` in this process, as ranks do. Files that could block or end a process are read with
`read_pickled`, which starts a child process; so is one file of each kind.
"""

import functools
import os
import pickle
import resource
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.models.checkpoint.pickled import read_pickled
from shoal.models.checkpoint.stored_file import FileState, StoredTensor
from shoal.models.checkpoint.torch_files import list_here, list_tensors, load_tensors
from support.fakes import steady

pytestmark = pytest.mark.slow

_TYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I64": torch.int64,
}
_FUZZ = settings(steady, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])

Save = Callable[[Any, Path], None]


def zipped(content: Any, file: Path) -> None:
    torch.save(content, file)


def legacy(content: Any, file: Path) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


both = pytest.mark.parametrize("save", [zipped, legacy])


def tensors_of(file: Path) -> dict[str, Tensor]:
    """Return a tensor from its offset in the file, or from PyTorch if only PyTorch can read the file."""
    data = file.read_bytes()
    found = {}
    for name, entry in list_tensors(file).items():
        if entry.whole:
            found[name] = load_tensors(file)[name]
            assert (entry.shape, entry.strides) == (found[name].shape, found[name].stride())
            assert _TYPES[entry.dtype] == found[name].dtype
            continue
        raw = torch.frombuffer(bytearray(data[entry.offset :]) + bytearray(8), dtype=torch.uint8)
        raw = raw[: len(raw) // 8 * 8].view(_TYPES[entry.dtype])
        found[name] = raw.as_strided(entry.shape, entry.strides)
    return found


def assert_read(file: Path, expected: Mapping[str, Tensor]) -> None:
    found = tensors_of(file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.detach())


def in_child(file: Path, cpu_seconds: int = 60) -> dict[str, StoredTensor]:
    return read_pickled({file: FileState.of(file)}, cpu_seconds)[file]


def refusal(file: Path, read: Callable[[Path], object] = list_tensors) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(file)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    assert str(file) in message
    return message


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    return {
        "whole": base,
        "turned": base.t(),  # the same storage
        "rows": base[1:3],
        "columns": base[:, 2:5],
        "half": base.half(),
        "brain": base.bfloat16(),
        "double": base.double(),
        "count": torch.tensor(3),
        "parameter": torch.nn.Parameter(base[2]),
        "empty": torch.empty(0, 5),
        "name with ünicode": torch.ones(1),
    }


@both
def test_tensors_are_at_their_offsets(file: Path, save: Save) -> None:
    tensors = some_tensors()
    save(OrderedDict(tensors), file)
    assert_read(file, tensors)
    found = list_tensors(file)
    assert found["turned"].offset == found["whole"].offset != found["half"].offset
    assert found["rows"].offset == found["whole"].offset + 6 * 4
    assert (found["turned"].shape, found["turned"].strides) == ((6, 4), (1, 6))


def test_tensors_of_eight_bit_types_are_at_their_offsets(file: Path) -> None:
    tensors = {"a": torch.arange(6.0).to(torch.float8_e4m3fn), "b": torch.arange(6.0).to(torch.float8_e4m3fn)[3:]}
    torch.save(tensors, file)
    data = file.read_bytes()
    found = list_tensors(file)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == ("F8_E4M3", tuple(tensor.shape))
        start = found[name].offset
        assert data[start : start + len(tensor)] == tensor.view(torch.uint8).numpy().tobytes()


@both
def test_the_state_dict_of_a_module_is_read(file: Path, save: Save) -> None:
    """A state dict is an OrderedDict with an attribute `_metadata`."""
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).state_dict()
    save(state, file)
    assert_read(file, state)


def test_the_child_process_gives_the_same_result(tmp_path: Path) -> None:
    files = {}
    for number, save in enumerate((zipped, legacy)):
        save(OrderedDict(some_tensors()), tmp_path / f"{number}.bin")
        files[tmp_path / f"{number}.bin"] = FileState.of(tmp_path / f"{number}.bin")
    assert read_pickled(files) == list_here(files) == {file: list_tensors(file) for file in files}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_other_pickle_protocols_are_refused(file: Path) -> None:
    """From untrusted files, PyTorch reads only the pickle protocol that it writes, version 2."""
    torch.save({"a": torch.ones(2)}, file, pickle_protocol=4)
    assert "Unsupported operand" in refusal(file)


@both
def test_the_state_dict_of_a_training_checkpoint_is_read(file: Path, save: Save) -> None:
    tensors = some_tensors()
    other = {"step": 7, "lr": [1e-3, None], "moments": {0: torch.ones(3)}}
    save({"state_dict": tensors, "optimizer": other, "epoch": 3}, file)
    assert_read(file, tensors)


@both
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list instead of tensors by name"),
        (torch.ones(2), "holds a Tensor instead of tensors by name"),
        ({}, "holds no tensors by name and nothing else"),
        (
            {"model": {"a": torch.ones(2)}, "epoch": 3},
            "only the keys model, epoch; save the model's state_dict by itself",
        ),
        ({"state_dict": {"epoch": 3}}, "only the keys epoch;"),
        ({3: torch.ones(2)}, "only the keys 3;"),
        ({(1, 2): torch.ones(2)}, "only the keys tuple;"),
    ],
    ids=str,
)
def test_a_file_without_a_state_dict_is_refused(file: Path, save: Save, content: Any, message: str) -> None:
    save(content, file)
    assert message in refusal(file)


@both
def test_values_other_than_tensors_are_left_out(file: Path, save: Save) -> None:
    save({"a": torch.ones(2), "version": 3, "nothing": None, "list": [1.5, "x", (True,)]}, file)
    assert_read(file, {"a": torch.ones(2)})


# --- refusals ----------------------------------------------------------------------------------------------------


class Attack:
    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._reduced = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._reduced


@both
def test_code_in_a_file_is_never_run(file: Path, tmp_path: Path, save: Save) -> None:
    marker = tmp_path / "run"
    save({"a": torch.ones(2), "b": Attack(os.system, f"touch {marker}")}, file)
    for read in (list_tensors, in_child) if save is zipped else (list_tensors,):
        message = refusal(file, read)
        assert "asks for 'posix.system', which weights do not need; if you trust the file, convert it to" in message
    save({"a": torch.ones(2), "b": Attack(eval, f"open({str(marker)!r}, 'w')")}, file)
    assert "eval'" in refusal(file)
    save({"a": torch.ones(2), "b": Attack(getattr, "a", "upper")}, file)
    assert "getattr'" in refusal(file)
    assert not marker.exists()


@both
@pytest.mark.parametrize("name", ["torch.load", "torch._utils.eval", "collections.deque", "os.FloatStore", "a\tb.c"])
def test_names_similar_to_allowed_ones_are_refused(file: Path, save: Save, name: str) -> None:
    module, _, what = name.rpartition(".")
    write_program(file, save, f"c{module}\n{what}\n.".encode())
    assert "which weights do not need" in refusal(file)


def write_program(file: Path, save: Save, program: bytes) -> None:
    """Write a file with this pickle program and without storages."""
    if save is legacy:
        file.write_bytes(legacy_file(program, pickle.dumps([], 2), b""))
        return
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", program)
        archive.writestr("model/version", "3\n")
        archive.writestr("model/byteorder", "little")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def bomb_of_hashes() -> bytes:
    """Return a key of nested tuples, 60 deep, for which Python would compute 2**60 hashes."""
    return b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s."


def bomb_of_sharing() -> bytes:
    """Return nested lists: each contains the next list twice, so there are 2**60 lists in all."""
    return b"\x80\x02]" + b"q\x00]h\x00ah\x00a" * 60 + b"."


def bomb_of_pieces() -> bytes:
    """Return many tensors of 64 MiB each, 16 GiB in all, which take only a few bytes in the file."""
    return b"\x80\x02](" + (b"ctorch\nFloatTensor\n" + number(2**24) + b"\x85R") * 256 + b"e."


def bomb_of_numbers(name: str) -> bytes:
    """Return an object of 8 Gi elements that takes only a few bytes in the file."""
    module, _, what = name.rpartition(".")
    return b"\x80\x02}" + text("a") + f"c{module}\n{what}\n".encode() + number(2**33) + b"\x85Rs."


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02Nr\xff\xff\xff\xff.",  # the largest memo index; some unpicklers allocate that much
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00.",  # bytes longer than the file
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02X\xff\xff\xff\xffab.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.",
        bomb_of_sharing(),
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02N" + b"\x85" * 100_000 + b".",
        b"\x80\x02]q\x00h\x00a.",  # a list that contains itself
        b"\x80\x02}q\x00K\x01h\x00s.",
        b"\x80\x02}q\x00" + text("state_dict") + b"h\x00s.",
        b"I" + b"9" * 100_000 + b"\n.",
        b"\x80\x02h\x05.",
        b"\x80\x02.",
        b"\x80\x02NN.",
        b"\x80\x020.",
        b"\x80\x02(0.",
        b"\x80\x02t.",
        b"\x80\x02NR.",
        b"\x80\x02Na.",
        b"\x80\x02}K\x01s.",
        b"\x80\x02N}b.",
        b"\x80\x02NNb.",
        b"\x80\x02NQ.",
        b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n]]a\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\nN\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02ctorch\nFloatStorage\n)\x81.",
        b"Pabc\n.",
        b"\x82\x01.",
        b"",
        b"\x80",
    ],
    ids=lambda program: repr(program[:24]),
)
@both
def test_invalid_pickle_programs_are_refused(file: Path, save: Save, program: bytes) -> None:
    write_program(file, save, program)
    refusal(file)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            b"\x80\x02}N" + b"\x85" * 400_000 + b"K\x01s.",
            "was killed by SIGSEGV",
        ),  # a key that is nested too deeply for the stack
        (bomb_of_pieces(), "could not allocate memory for it"),
        (bomb_of_numbers("builtins.bytearray"), "could not allocate memory for it"),
    ],
    ids=["nesting", "pieces", "bytes"],
)
def test_programs_that_exhaust_memory_are_refused(file: Path, program: bytes, message: str) -> None:
    """Such a program crashes or fills only the child process."""
    write_program(file, zipped, program)
    found = refusal(file, in_child)
    assert message in found
    assert "convert it to safetensors" in found


@both
def test_tensors_with_a_negation_flag_are_refused(file: Path, save: Save) -> None:
    """`conj().imag` shares the storage of its source, with a flag that says that the elements must be negated."""
    tensor = torch.ones(3, dtype=torch.complex64).conj().imag
    assert tensor.is_neg()
    save({"a": tensor}, file)
    assert "numbers of a must be negated or conjugated on reading: save a copy of it" in refusal(file)
    save({"a": tensor.resolve_neg()}, file)
    assert_read(file, {"a": -torch.ones(3) * 0})


@both
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.empty(3, device="meta"),
    ],
    ids=["sparse", "quantized", "meta"],
)
@pytest.mark.filterwarnings("ignore")  # PyTorch warns about some of these kinds
def test_tensors_that_are_not_dense_are_refused(file: Path, save: Save, make: Callable[[], Tensor]) -> None:
    save({"a": make()}, file)
    assert "save a dense copy of it" in refusal(file)


def test_a_tensor_without_a_storage_in_the_file_is_refused(file: Path) -> None:
    """Even for untrusted files, PyTorch calls the constructor of this tensor, which allocates memory in the process."""
    write_program(file, zipped, bomb_of_numbers("torch.FloatTensor").replace(number(2**33), number(6)))
    assert "the numbers of a are not in the file" in refusal(file)


def tensor_program(
    *,
    count: int = 6,
    first: int = 0,
    shape: str = "K\x02K\x03",
    strides: str = "K\x03K\x01",
    view: bytes = b"",
) -> bytes:
    """Return the pickle of a dict with one tensor. In a legacy file `view` is the part of the storage that it shows."""
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count) + view + b"tQ"
    )
    sizes = b"(" + shape.encode("latin-1") + b"t(" + strides.encode("latin-1") + b"t"
    return (
        b"\x80\x02}"
        + text("a")
        + b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + number(first)
        + sizes
        + b"\x89}tRs."
    )


@both
@pytest.mark.parametrize(
    "change",
    [
        {"count": 5},
        {"first": 1},
        {"strides": "K\x04K\x01"},
        {"strides": "K\x01"},
        {"first": -1},
        {"strides": "K\x03J\xff\xff\xff\xff"},
        {"shape": "J\xff\xff\xff\xffK\x03"},
        {"count": 8, "first": 2},
        {"count": -1},
        {"count": 2**63, "first": 2},
        {"count": 2**70, "first": 2},
        {"count": 2**62, "first": 2**61},
        {"shape": "NN"},
    ],
    ids=str,
)
def test_a_tensor_outside_its_storage_is_refused(file: Path, save: Save, change: dict[str, Any]) -> None:
    """In an archive, the tensor must not reach the member that follows its storage."""
    if save is zipped:
        torch.save({"a": torch.arange(6.0), "b": torch.ones(1000)}, file)
    for program, right in ((tensor_program, True), (functools.partial(tensor_program, **change), False)):
        if save is zipped:
            rewrite(file, with_member("data.pkl", program()))
        else:
            count = 5 if not right and change.get("count") == 5 else 6
            data = struct.pack(f"<q{count}f", count, *range(count))
            file.write_bytes(legacy_file(program(view=b"N"), KEYS, data))
        if right:
            assert_read(file, {"a": torch.arange(6.0).view(2, 3)})
        else:
            refusal(file)


def test_a_folder_in_place_of_a_file_is_refused(file: Path) -> None:
    file.mkdir()
    assert "can't be read: Is a directory" in refusal(file)


# --- the child process -------------------------------------------------------------------------------------------


def child_time() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_one_child_reads_each_file_once(tmp_path: Path) -> None:
    """Loading PyTorch takes the child far longer than reading small files."""

    def time_of(*files: Path) -> float:
        before = child_time()
        found = read_pickled({file: FileState.of(file) for file in files})
        assert {name for tensors in found.values() for name in tensors} == {file.name for file in files}
        return child_time() - before

    files = [tmp_path / f"{number}.bin" for number in range(12)]
    for file in files:
        torch.save({file.name: torch.ones(2)}, file)
    alone = time_of(files[0])
    assert time_of(*files) < 4 * alone
    assert time_of(*files) < alone / 2  # the result is cached
    torch.save({files[0].name: torch.ones(2)}, tmp_path / "other")
    (tmp_path / "other").replace(files[0])
    assert time_of(*files) > alone / 2


def test_the_error_names_the_refused_file(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.bin" for number in range(3)]
    for file in files:
        torch.save({"a": torch.ones(2)}, file)
    write_program(files[1], zipped, bomb_of_hashes())

    def read(_: Path) -> object:
        return read_pickled({file: FileState.of(file) for file in files}, 1)

    found = refusal(files[1], read)  # the program blocks only the child process
    assert "took more than 1 s of processor time" in found
    assert "convert it to safetensors" in found
    files[1].unlink()
    files[1].mkdir()
    assert "can't be read: Is a directory" in refusal(files[1], read)


# --- archives ----------------------------------------------------------------------------------------------------


def rewrite(file: Path, change: Callable[[dict[str, bytes]], None], *, compressed: str = "") -> None:
    """Write the archive again with changed members."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            kind = zipfile.ZIP_DEFLATED if compressed and name.endswith(compressed) else zipfile.ZIP_STORED
            archive.writestr(name, data, kind)


def nothing(_: dict[str, bytes]) -> None:
    pass


def with_member(name: str, data: bytes) -> Callable[[dict[str, bytes]], None]:
    return lambda members: members.update({f"pytorch_model/{name}": data})


def without(name: str) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        del members[f"pytorch_model/{name}"]

    return change


@pytest.fixture
def archive(file: Path) -> Path:
    torch.save(some_tensors(), file)
    return file


def test_an_archive_of_another_program_is_read(archive: Path) -> None:
    """The archive has no padding between its members, so tensors are not aligned."""
    rewrite(archive, nothing)
    assert_read(archive, some_tensors())


@pytest.mark.parametrize("member", ["data/0", "data.pkl"])
def test_compressed_members_are_refused(archive: Path, member: str) -> None:
    rewrite(archive, nothing, compressed=member)
    assert f"{member} is compressed or encrypted" in refusal(archive)


def test_another_byte_order_is_refused(archive: Path) -> None:
    rewrite(archive, with_member("byteorder", b"big"))
    assert "have the byte order big; only little is supported" in refusal(archive)


def test_an_archive_without_its_parts_is_refused(archive: Path) -> None:
    rewrite(archive, without("data/1"))
    assert "failed locating file data/1: file not found" in refusal(archive)
    rewrite(archive, without("data.pkl"))
    assert "failed locating file data.pkl: file not found" in refusal(archive)


def test_a_member_shorter_than_its_storage_is_refused(archive: Path) -> None:
    rewrite(archive, with_member("data/0", b"\0" * 95))
    assert "the data of whole is cut off: 95 bytes of 96" in refusal(archive)


def test_a_script_module_is_refused(archive: Path) -> None:
    """The pickle of a torch.jit file needs the classes of its module."""
    rewrite(archive, with_member("data.pkl", b"c__torch__.Model\nModel\n."))
    assert "asks for '__torch__.Model.Model'" in refusal(archive)


# --- legacy files ------------------------------------------------------------------------------------------------


def legacy_file(content: bytes, keys: bytes, data: bytes, *, little: bool = True) -> bytes:
    facts = {"protocol_version": 1001, "little_endian": little}
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, facts)]
    return b"".join(head) + content + keys + data


KEYS = pickle.dumps(["0"], 2)
NUMBERS = struct.pack("<q6f", 6, *range(6))


def test_a_legacy_file_made_by_hand_is_read(file: Path) -> None:
    file.write_bytes(legacy_file(tensor_program(view=b"N"), KEYS, NUMBERS))
    assert_read(file, {"a": torch.arange(6.0).view(2, 3)})


def test_a_view_of_a_legacy_storage_is_read(file: Path) -> None:
    """PyTorch before 0.4 wrote a view as a key, a start and a size."""
    view = b"(" + text("1") + b"K\x02K\x04t"
    program = tensor_program(shape="K\x02K\x02", strides="K\x02K\x01", view=view)
    file.write_bytes(legacy_file(program, KEYS, NUMBERS))
    assert_read(file, {"a": torch.arange(2.0, 6.0).view(2, 2)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (legacy_file(tensor_program(view=b"N"), pickle.dumps(["1"], 2), NUMBERS), "storage key '1' not found"),
        (legacy_file(tensor_program(view=b"N"), pickle.dumps(7, 2), NUMBERS), "not iterable"),
        (legacy_file(tensor_program(view=b"N"), KEYS, NUMBERS[:-1]), "truncated"),
        (legacy_file(tensor_program(view=b"N"), KEYS, struct.pack("<q", -1)), "truncated"),
        (legacy_file(tensor_program(view=b"N"), KEYS, struct.pack("<q5f", 5, *range(5))), "wrong byte size"),
        (pickle.dumps({"a": 1}, 2), "not a file of weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "not a file of weights"),
        (b"", "not a file of weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_legacy_files_are_refused(file: Path, data: bytes, message: str) -> None:
    file.write_bytes(data)
    assert message in refusal(file)


def test_a_legacy_file_of_a_big_endian_machine_is_read(file: Path) -> None:
    """PyTorch writes this format in little-endian order on every machine."""
    file.write_bytes(legacy_file(tensor_program(view=b"N"), KEYS, NUMBERS, little=False))
    assert_read(file, {"a": torch.arange(6.0).view(2, 3)})


# --- random files ------------------------------------------------------------------------------------------------


def reads_or_refuses(file: Path) -> None:
    """Check that a file is either refused or gives tensors that are inside the file."""
    try:
        found = list_tensors(file)
    except CheckpointError:
        return
    size = file.stat().st_size
    for entry in found.values():
        if 0 not in entry.shape and not entry.whole:
            last = sum((n - 1) * stride for n, stride in zip(entry.shape, entry.strides, strict=True))
            assert entry.offset + (last + 1) * _TYPES[entry.dtype].itemsize <= size


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("samples")
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3).half()}
    for name, save in (("zip", zipped), ("legacy", legacy)):
        save(OrderedDict(tensors), folder / name)
    return [(folder / name).read_bytes() for name in ("zip", "legacy")]


@both
def test_a_file_truncated_anywhere_is_read_or_refused(file: Path, samples: list[bytes], save: Save) -> None:
    data = samples[save is legacy]
    for length in range(0, len(data), 1 if save is legacy else 7):
        file.write_bytes(data[:length])
        reads_or_refuses(file)
    file.write_bytes(data[:-1])
    refusal(file)


@_FUZZ
@given(st.data())
def test_mutated_files_are_read_or_refused(file: Path, samples: list[bytes], data: st.DataObject) -> None:
    """Bytes are changed, inserted or removed, mostly in the pickle or the directory."""
    content = bytearray(data.draw(st.sampled_from(samples)))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        content[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    file.write_bytes(content)
    reads_or_refuses(file)


@_FUZZ
@given(st.binary(max_size=300))
def test_random_bytes_are_read_or_refused(file: Path, data: bytes) -> None:
    for head in (b"", b"PK\x03\x04", legacy_file(b"", b"", b"")):
        file.write_bytes(head + data)
        reads_or_refuses(file)
