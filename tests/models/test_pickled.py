"""Files of torch.save, read without torch and without running anything of them."""

import io
import os
import pickle
import struct
import time
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
from shoal.models.checkpoint import pickle_program
from shoal.models.checkpoint.pickle_program import Refused, read_pickle
from shoal.models.checkpoint.pickled import ITEM_BYTES, read_pickled
from support.fakes import steady

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "I64": torch.int64}
_FUZZ = settings(steady, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])

Save = Callable[[Any, Path], None]


def zipped(content: Any, file: Path) -> None:
    torch.save(content, file)


def legacy(content: Any, file: Path) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


both = pytest.mark.parametrize("save", [zipped, legacy])


def tensors_of(file: Path) -> dict[str, Tensor]:
    """What lies where it is said to lie."""
    data = file.read_bytes()
    found = {}
    for name, entry in read_pickled(file).items():
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


def refusal(file: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_pickled(file)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
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
def test_tensors_lie_where_they_are_said_to(file: Path, save: Save) -> None:
    tensors = some_tensors()
    save(OrderedDict(tensors), file)
    assert_read(file, tensors)
    found = read_pickled(file)
    assert found["turned"].offset == found["whole"].offset
    assert (found["turned"].shape, found["turned"].strides) == ((6, 4), (1, 6))


@both
def test_a_modules_state_dict(file: Path, save: Save) -> None:
    """Its OrderedDict has an attribute, `_metadata`."""
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).state_dict()
    save(state, file)
    assert_read(file, state)


@both
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(file: Path, save: Save, protocol: int) -> None:
    tensors = some_tensors()
    zip_file = save is zipped
    torch.save(tensors, file, pickle_protocol=protocol, _use_new_zipfile_serialization=zip_file)
    assert_read(file, tensors)


@both
def test_a_state_dict_in_a_training_checkpoint(file: Path, save: Save) -> None:
    tensors = some_tensors()
    other = {"step": 7, "lr": [1e-3, None], "moments": {0: torch.ones(3)}}
    save({"state_dict": tensors, "optimizer": other, "epoch": 3}, file)
    assert_read(file, tensors)


@both
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds a list, and no tensors by name"),
        (torch.ones(2), "holds a Tensor, and no tensors by name"),
        ({}, "holds no tensors by name, but nothing"),
        ({"model": {"a": torch.ones(2)}, "epoch": 3}, "but model, epoch; save the model's state_dict by itself"),
        ({"state_dict": {"epoch": 3}}, "but epoch"),
        ({3: torch.ones(2)}, "but 3"),
    ],
    ids=str,
)
def test_no_state_dict(file: Path, save: Save, content: Any, message: str) -> None:
    save(content, file)
    assert message in refusal(file)


@both
def test_values_that_are_no_tensors_are_left_out(file: Path, save: Save) -> None:
    save({"a": torch.ones(2), "version": 3, "nothing": None, "list": [1.5, "x", (True,)]}, file)
    assert_read(file, {"a": torch.ones(2)})


# --- what is refused ---------------------------------------------------------------------------------------------


class Attack:
    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._reduced = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._reduced


@both
def test_nothing_is_run(file: Path, tmp_path: Path, save: Save) -> None:
    marker = tmp_path / "run"
    save({"a": torch.ones(2), "b": Attack(os.system, f"touch {marker}")}, file)
    assert "asks for 'posix.system', which weights do not need: refused" in refusal(file)
    save({"a": torch.ones(2), "b": Attack(eval, f"open({str(marker)!r}, 'w')")}, file)
    assert "eval'" in refusal(file)
    save({"a": torch.ones(2), "b": Attack(getattr, "a", "upper")}, file)
    assert "getattr'" in refusal(file)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["torch.load", "torch._utils.eval", "collections.deque", "os.FloatStorage", "a\\nb.c"])
def test_names_that_look_familiar(name: str) -> None:
    module, _, what = name.rpartition(".")
    with pytest.raises((Refused, ValueError)):
        read_pickle(io.BytesIO(f"c{module}\n{what}\n.".encode()))


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def bomb_of_hashes() -> bytes:
    """A key of tuples of tuples, 60 deep: Python hashes each as often as it is reached."""
    return b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s."


def bomb_of_sharing() -> bytes:
    """A list of lists, each twice the one before: 2**60 of them, if anyone counted."""
    return b"\x80\x02]" + b"q\x00]h\x00ah\x00a" * 60 + b"."


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02Nr\xff\xff\xff\xff.",  # the largest memo index: Python would make room for as many
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00.",  # bytes longer than the file
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.",
        bomb_of_hashes(),
        bomb_of_sharing(),
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02N" + b"\x85" * 100_000 + b".",
        b"\x80\x02]q\x00h\x00a.",  # a list of itself
        b"\x80\x02}q\x00K\x01h\x00s.",
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
def test_programs_that_make_no_sense_end_soon(program: bytes) -> None:
    """With a value that nobody has use for, or refused. What a bomb would take is not seconds, but for ever."""
    begun = time.process_time()
    try:
        value = read_pickle(io.BytesIO(program))
    except (ValueError, LookupError, TypeError):
        value = None
    assert not isinstance(value, pickle_program.Tensor)
    assert time.process_time() - begun < 10


@both
def test_numbers_that_are_to_be_negated(file: Path, save: Save) -> None:
    """`conj().imag` shares its numbers with what it was made of; that they are to be negated is said beside them."""
    tensor = torch.ones(3, dtype=torch.complex64).conj().imag
    assert tensor.is_neg()
    save({"a": tensor}, file)
    assert "changed when they are read (neg)" in refusal(file)
    save({"a": tensor.resolve_neg()}, file)
    assert_read(file, {"a": -torch.ones(3) * 0})


def test_a_program_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_program, "_MOST_OPERATIONS", 100)
    with pytest.raises(Refused, match="more than 100 operations"):
        read_pickle(io.BytesIO(b"N0" * 51 + b"N."))


def tensor_program(*, count: int = 6, first: int = 0, shape: str = "K\x02K\x03", strides: str = "K\x03K\x01") -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count) + b"tQ"
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


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def test_a_tensor_lies_within_its_storage() -> None:
    assert read_pickle(io.BytesIO(tensor_program()))["a"].shape == (2, 3)
    for program, message in (
        (tensor_program(count=5), "ends behind its storage: element 5 of 5"),
        (tensor_program(first=1), "element 6 of 6"),
        (tensor_program(strides="K\x04K\x01"), "element 6 of 6"),
        (tensor_program(strides="K\x01"), "with 1 strides"),
        (tensor_program(first=-1), "sizes are no numbers"),
        (tensor_program(count=2**63), "sizes are no numbers"),
        (tensor_program(count=2**70), "sizes are no numbers"),
        (tensor_program(shape="\x88\x88"), "sizes are no numbers"),
        (tensor_program(shape="NN"), "sizes are no numbers"),
    ):
        with pytest.raises(Refused, match=message):
            read_pickle(io.BytesIO(program))


# --- archives ----------------------------------------------------------------------------------------------------


def rewrite(file: Path, change: Callable[[dict[str, bytes]], None], *, compressed: str = "") -> None:
    """The archive again, with other members."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            kind = zipfile.ZIP_DEFLATED if compressed and name.endswith(compressed) else zipfile.ZIP_STORED
            archive.writestr(name, data, kind)


def nothing(_: dict[str, bytes]) -> None:
    pass


def without(name: str) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        del members[f"pytorch_model/{name}"]

    return change


@pytest.fixture
def archive(file: Path) -> Path:
    torch.save(some_tensors(), file)
    return file


def test_an_archive_written_by_somebody_else(archive: Path) -> None:
    """Without padding between members: tensors need not be aligned."""
    rewrite(archive, nothing)
    assert_read(archive, some_tensors())


@pytest.mark.parametrize("member", ["data/0", "data.pkl"])
def test_compressed_members(archive: Path, member: str) -> None:
    rewrite(archive, nothing, compressed=member)
    assert f"{member} is compressed or encrypted" in refusal(archive)


def test_byte_order(archive: Path) -> None:
    rewrite(archive, lambda members: members.update({"pytorch_model/byteorder": b"big"}))
    assert "have the byte order big; only little is supported" in refusal(archive)


def test_an_archive_without_its_parts(archive: Path) -> None:
    rewrite(archive, without("data/1"))
    assert "lacks storage 1" in refusal(archive)
    rewrite(archive, without("data.pkl"))
    assert "0 members data.pkl" in refusal(archive)


def test_a_member_shorter_than_its_storage(archive: Path) -> None:
    rewrite(archive, lambda members: members.update({"pytorch_model/data/0": b"\0" * 95}))
    assert "the data of whole is cut off: 95 bytes for 24 of F32" in refusal(archive)


def test_a_script_module(archive: Path) -> None:
    """As torch.jit saves it, it has classes of its own."""
    rewrite(archive, lambda members: members.update({"pytorch_model/data.pkl": b"c__torch__.Model\nModel\n."}))
    assert "asks for '__torch__.Model.Model'" in refusal(archive)


# --- legacy files ------------------------------------------------------------------------------------------------


def legacy_file(content: bytes, keys: bytes, data: bytes, *, little: bool = True) -> bytes:
    facts = {"protocol_version": 1001, "little_endian": little}
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, facts)]
    return b"".join(head) + content + keys + data


KEYS = pickle.dumps(["0"], 2)
NUMBERS = struct.pack("<q6f", 6, *range(6))


def test_a_legacy_file_by_hand(file: Path) -> None:
    file.write_bytes(legacy_file(tensor_program(), KEYS, NUMBERS))
    assert_read(file, {"a": torch.arange(6.0).view(2, 3)})


def test_a_view_of_a_storage(file: Path) -> None:
    """As PyTorch before 0.4 wrote it: the key of the view, its start, its size."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x06"
    view = b"(" + text("1") + b"K\x02K\x04tt"
    program = tensor_program(count=4, shape="K\x02K\x02", strides="K\x02K\x01")
    start, stop = program.index(b"(" + text("storage")), program.index(b"tQ")
    program = program[:start] + storage + view + program[stop + 1 :]
    file.write_bytes(legacy_file(program, KEYS, NUMBERS))
    assert_read(file, {"a": torch.arange(2.0, 6.0).view(2, 2)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (legacy_file(tensor_program(), KEYS, NUMBERS, little=False), "byte order big"),
        (legacy_file(tensor_program(), pickle.dumps(["1"], 2), NUMBERS), "its list of storages is not that of"),
        (legacy_file(tensor_program(), pickle.dumps("0", 2), NUMBERS), "its list of storages is not that of"),
        (legacy_file(tensor_program(), KEYS, NUMBERS[:-1]), "truncated"),
        (legacy_file(tensor_program(), KEYS, struct.pack("<q", -1)), "truncated"),
        (legacy_file(tensor_program(), KEYS, struct.pack("<q5f", 5, *range(5))), "the data of a is cut off"),
        (legacy_file(tensor_program(), pickle.dumps([], 2), b""), "lacks storage 0"),
        (pickle.dumps({"a": 1}, 2), "no file of torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "no file of weights"),
        (b"", "no file of weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_legacy_files_that_are_refused(file: Path, data: bytes, message: str) -> None:
    file.write_bytes(data)
    assert message in refusal(file)


def test_a_folder_in_place_of_a_file(file: Path) -> None:
    file.mkdir()
    assert "can't be read" in refusal(file)


# --- whatever comes ----------------------------------------------------------------------------------------------


def reads_or_refuses(file: Path) -> None:
    """Nothing else may happen. What is read, lies within the file."""
    try:
        found = read_pickled(file)
    except CheckpointError:
        return
    size = file.stat().st_size
    for entry in found.values():
        if 0 not in entry.shape:
            last = sum((n - 1) * stride for n, stride in zip(entry.shape, entry.strides, strict=True))
            assert entry.offset + (last + 1) * ITEM_BYTES[entry.dtype] <= size


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("samples")
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3).half()}
    for name, save in (("zip", zipped), ("legacy", legacy)):
        save(OrderedDict(tensors), folder / name)
    return [(folder / name).read_bytes() for name in ("zip", "legacy")]


@both
def test_every_truncation(file: Path, samples: list[bytes], save: Save) -> None:
    data = samples[save is legacy]
    for length in range(0, len(data), 1 if save is legacy else 7):
        file.write_bytes(data[:length])
        reads_or_refuses(file)
    file.write_bytes(data[:-1])
    refusal(file)


@_FUZZ
@given(st.data())
def test_mutated_files(file: Path, samples: list[bytes], data: st.DataObject) -> None:
    """Bytes changed, put in or left out, mostly where the pickle or the directory is."""
    content = bytearray(data.draw(st.sampled_from(samples)))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        content[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    file.write_bytes(content)
    reads_or_refuses(file)


_OPCODES = st.sampled_from([bytes([code]) for code in range(256)]) | st.sampled_from(
    [
        b"K\x01",
        b"h\x00",
        b"q\x00",
        b"}",
        b"]",
        b"(",
        b")",
        b"t",
        b"R",
        b"Q",
        b"b",
        b"s",
        b"u",
        b"a",
        b"e",
        b"\x86",
        b"0",
    ]
    + [
        b"ccollections\nOrderedDict\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch\nFloatStorage\n",
        text("storage"),
    ]
)


@_FUZZ
@given(st.lists(_OPCODES, max_size=30))
def test_random_programs(operations: list[bytes]) -> None:
    try:
        read_pickle(io.BytesIO(b"\x80\x02" + b"".join(operations) + b"."))
    except (ValueError, LookupError, TypeError):
        return


@_FUZZ
@given(st.binary(max_size=300))
def test_random_bytes(file: Path, data: bytes) -> None:
    for head in (b"", b"PK\x03\x04", legacy_file(b"", b"", b"")):
        file.write_bytes(head + data)
        reads_or_refuses(file)
