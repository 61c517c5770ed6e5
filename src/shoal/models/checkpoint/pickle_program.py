"""Pickles as PyTorch writes them for weights, read without unpickling: nothing that a file names is ever called.

A pickle is a program for a stack machine. Here it is run operation by operation, by the few that a state dict needs;
whatever else a file asks for is refused by its name. Time and memory grow with the pickle's length and no faster:
the memo is a table of what was stored, calls copy no more pairs than operations were run, and only short plain keys are
hashed. (Python's own Unpickler makes room for the largest memo index that is named.)
"""

import pickletools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

_MOST_OPERATIONS = 2_000_000  # some 40,000 tensors in one file
_MOST_ARGUMENTS = 8
_PLAIN_KEYS = (str, int, float, bool, bytes, type(None))
_LONGEST_KEY = 4096  # of text or bytes; names of tensors are far shorter

STORAGE_TYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "ComplexDoubleStorage": "C128",
    "UntypedStorage": "U8",
}
_STORAGE_MODULES = ("torch", "torch.storage", "torch.cuda")


class Refused(ValueError):
    """The pickle asks for something that weights do not need, or makes no sense."""


class Stream(Protocol):
    """Bytes with a position."""

    def read(self, count: int, /) -> bytes: ...

    def readline(self) -> bytes: ...

    def tell(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Storage:
    """Elements `first` to `first + count` of the numbers that the file keeps under `key`."""

    key: str
    dtype: str
    count: int
    first: int = 0


@dataclass(frozen=True, slots=True)
class Tensor:
    """Element i, j, ... is number first + i * strides[0] + j * strides[1] + ... of the storage."""

    storage: Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Name:
    """Something that the pickle imports: a name, never the thing."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


def read_pickle(stream: Stream, dtypes: dict[str, str] | None = None) -> Any:
    """The value of the pickle at the stream's position, of plain Python values, `Storage` and `Tensor`. Leaves the
    stream behind it. `dtypes` is told the type of each storage that the pickle names, by key.

    Raises:
        Refused: it asks for what weights do not need.
        ValueError, LookupError, TypeError: it is cut off or malformed.
    """
    machine = _Machine({} if dtypes is None else dtypes)
    for number, (operation, argument, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
        if number >= _MOST_OPERATIONS:
            raise Refused(f"a pickle of more than {_MOST_OPERATIONS} operations")
        machine.run(operation.name, argument)
    return machine.result()


@dataclass(slots=True)
class _Machine:
    dtypes: dict[str, str]
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)  # lengths of the stack
    memo: dict[int, Any] = field(default_factory=dict)
    operations: int = 0
    copied: int = 0  # pairs, by calls

    def run(self, operation: str, argument: Any) -> None:
        self.operations += 1
        if operation in _LITERALS:
            self.stack.append(argument)
        elif operation in _CONSTANTS:
            self.stack.append(_CONSTANTS[operation])
        elif operation in _OPERATIONS:
            _OPERATIONS[operation](self, argument)
        elif operation not in ("PROTO", "FRAME", "STOP"):
            raise Refused(f"it asks for the operation {operation}, which weights do not need")

    def result(self) -> Any:
        if len(self.stack) != 1 or self.marks:
            raise Refused("a pickle that ends with values left over")
        return self.stack[0]

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise Refused("a pickle that takes from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self) -> Any:
        """What is below the items just taken."""
        value = self.pop()
        self.stack.append(value)
        return value

    # --- operations -----------------------------------------------------------------------------------------------

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def empty_list(self, _: Any) -> None:
        self.stack.append([])

    def empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def drop(self, _: Any) -> None:
        self.pop()

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.top()

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def tuple_of_marked(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def list_of_marked(self, _: Any) -> None:
        self.stack.append(self.pop_to_mark())

    def dict_of_marked(self, _: Any) -> None:
        items = self.pop_to_mark()
        self.stack.append({})
        self.set_pairs(items)

    def last_in_tuple(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def append(self, _: Any) -> None:
        item = self.pop()
        self.extend([item])

    def appends(self, _: Any) -> None:
        self.extend(self.pop_to_mark())

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            raise Refused(f"it appends to a {type(target).__name__}")
        target.extend(items)

    def set_item(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.set_pairs([key, value])

    def set_items(self, _: Any) -> None:
        self.set_pairs(self.pop_to_mark())

    def set_pairs(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is not dict or len(items) % 2:
            raise Refused(f"it sets items of a {type(target).__name__}")
        for i in range(0, len(items), 2):
            target[_key(items[i])] = items[i + 1]

    def name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(_known(_Name(module, name)))

    def stack_name(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise Refused("it asks for something whose name is no text")
        self.stack.append(_known(_Name(module, name)))

    def persistent(self, _: Any) -> None:
        storage = _storage(self.pop())
        if self.dtypes.setdefault(storage.key, storage.dtype) != storage.dtype:
            raise Refused(f"it has storage {storage.key} as {self.dtypes[storage.key]} and as {storage.dtype}")
        self.stack.append(storage)

    def call(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple) or str(function) not in _CALLS:
            raise Refused(f"it calls {function if isinstance(function, _Name) else type(function).__name__}: refused")
        if len(arguments) > _MOST_ARGUMENTS:
            raise Refused(f"it calls {function} with {len(arguments)} arguments")
        if str(function) == _ORDERED_DICT:
            self.count_pairs(arguments)
        self.stack.append(_CALLS[str(function)](*arguments))

    def count_pairs(self, arguments: tuple[Any, ...]) -> None:
        """A list may be fetched from the memo and copied again and again; one that is copied once took an operation
        for each of its pairs."""
        self.copied += sum(len(given) for given in arguments if isinstance(given, tuple | list))
        if self.copied > self.operations:
            raise Refused(f"it copies {self.copied} pairs within {self.operations} operations")

    def build(self, _: Any) -> None:
        """Attributes of a dict (`_metadata` of a state dict), which nobody reads."""
        self.pop()
        if type(self.top()) is not dict:
            raise Refused(f"it sets attributes of a {type(self.top()).__name__}")


def _key(key: Any) -> Hashable:
    """Of a dict. Others could take forever to hash or compare: tuples of tuples, each of them twice the one before,
    or a number of a million digits that is used a million times."""
    if type(key) not in _PLAIN_KEYS:
        raise Refused(f"it has a {type(key).__name__} as a key")
    if isinstance(key, int) and not -(2**63) <= key < 2**64:
        raise Refused(f"it has a key of {key.bit_length()} bits")
    if isinstance(key, str | bytes) and len(key) > _LONGEST_KEY:
        raise Refused(f"it has a key of {len(key)} characters")
    return key  # type: ignore[no-any-return]


def _known(name: _Name) -> _Name:
    storage = name.module in _STORAGE_MODULES and name.name in STORAGE_TYPES
    if not storage and str(name) not in _CALLS:
        raise Refused(f"it asks for {str(name)[:200]!r}, which weights do not need: refused")
    return name


def _storage(given: Any) -> Storage:
    """`given` is ("storage", type, key, device, count), in old files with (key of a view, start, count) or None."""
    if not isinstance(given, tuple) or len(given) not in (5, 6) or given[0] != "storage":
        raise Refused("it refers to something outside of it that is no storage")
    kind, key, _, count = given[1:5]
    if not isinstance(kind, _Name) or kind.name not in STORAGE_TYPES or not isinstance(key, str):
        raise Refused("it refers to a storage without type or key")
    _key(key)
    view = given[5] if len(given) == 6 else None
    if view is None:
        return Storage(key, STORAGE_TYPES[kind.name], _size(count))
    first, seen = _size(view[1]), _size(view[2])
    if first + seen > count:
        raise Refused(f"a view of {seen} numbers from {first} on, in a storage of {count}")
    return Storage(key, STORAGE_TYPES[kind.name], seen, first)


def _tensor(
    storage: Any, first: Any, shape: Any, strides: Any, _grad: Any = False, _hooks: Any = None, metadata: Any = None
) -> Tensor:
    """`metadata` says what is to be done with the numbers of the storage: to negate or to conjugate them."""
    if not isinstance(storage, Storage):
        raise Refused("it has a tensor without a storage")
    if metadata:
        named = ", ".join(str(key)[:40] for key in list(metadata)[:5]) if isinstance(metadata, dict) else "unknown"
        raise Refused(
            f"it has a tensor whose numbers are to be changed when they are read ({named}): save a copy of it"
        )
    tensor = Tensor(storage, _size(first), _sizes(shape), _sizes(strides))
    if len(tensor.shape) != len(tensor.strides):
        raise Refused(f"a tensor of shape {list(tensor.shape)} with {len(tensor.strides)} strides")
    if 0 not in tensor.shape:
        last = tensor.first + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
        if last >= storage.count:
            raise Refused(
                f"a tensor of shape {list(tensor.shape)} ends behind its storage: element {last} of {storage.count}"
            )
    return tensor


def _sizes(given: Any) -> tuple[int, ...]:
    if not isinstance(given, tuple | list) or len(given) > 64:
        raise Refused("it has a tensor whose sizes are no numbers")
    for size in given:
        _size(size)
    return given if type(given) is tuple else tuple(given)


def _size(given: Any) -> int:
    """A number that an address can hold."""
    if type(given) is not int or not 0 <= given < 2**63:
        raise Refused("it has a tensor whose sizes are no numbers")
    return given


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Refused("it has a parameter without a tensor")
    return data


def _ordered_dict(pairs: Any = ()) -> dict[Hashable, Any]:
    if not isinstance(pairs, tuple | list):
        raise Refused("it has an OrderedDict of something else than pairs")
    found: dict[Hashable, Any] = {}
    for pair in pairs:
        key, value = pair
        found[_key(key)] = value
    return found


_ORDERED_DICT = "collections.OrderedDict"
_CALLS: dict[str, Callable[..., Any]] = {
    _ORDERED_DICT: _ordered_dict,
    "torch.Size": _sizes,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}

_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.drop,
    "EMPTY_LIST": _Machine.empty_list,
    "EMPTY_DICT": _Machine.empty_dict,
    "LIST": _Machine.list_of_marked,
    "DICT": _Machine.dict_of_marked,
    "TUPLE": _Machine.tuple_of_marked,
    "TUPLE1": lambda machine, _: machine.last_in_tuple(1),
    "TUPLE2": lambda machine, _: machine.last_in_tuple(2),
    "TUPLE3": lambda machine, _: machine.last_in_tuple(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "BINPERSID": _Machine.persistent,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}
