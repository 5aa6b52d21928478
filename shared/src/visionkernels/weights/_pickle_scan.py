"""What a pickle would do, read off its opcodes before anything executes it.

A pickle of a kilobyte may ask for gigabytes (a buffer of a size of its choice, one text that a thousand calls copy),
and a key that nests tuples deeply enough ends the interpreter, since their hash recurses in C. The opcodes are walked
with sizes and depths in the place of objects; what a file asks for is bounded by its own size.
"""

import pickletools
from collections.abc import Iterable
from typing import IO, Any, cast

from visionkernels.weights._stand_ins import SAFE_GLOBALS, CheckpointError

__all__ = ["scan_pickle"]

MAX_DEPTH = 200
SPARE_BYTES = 2**24
"""Bytes that even the smallest file may ask for."""

# calls that build state dicts and what stands beside them; none takes memory of a size that a number names
_CALLS = frozenset(
    [
        *(name for _, name in SAFE_GLOBALS),
        *(f"collections.{name}" for name in ("Counter", "OrderedDict", "defaultdict")),
        *(f"{core}.numeric._frombuffer" for core in ("numpy.core", "numpy._core")),
        *(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "parameter", "qtensor")),
        *(f"torch._utils._rebuild_{name}" for name in ("parameter_with_state", "sparse_tensor")),
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._tensor._rebuild_from_type_v2",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("bytes", "complex", "set")),
        "_codecs.encode",
        "torch.Size", "torch.device",
    ]
)  # fmt: skip


class _Object:
    """What an object would take: `size` of its own, `inner` of its items, and how deep it nests."""

    __slots__ = ("depth", "inner", "items", "size", "value")

    def __init__(self, size: int = 0, *, value: Any = None, items: Iterable["_Object"] = ()) -> None:
        self.value, self.items = value, list(items)
        self.size, self.inner, self.depth = size, 0, 0
        self.grow(self.items)

    def grow(self, items: Iterable["_Object"]) -> None:
        for item in items:
            self.size += 8
            self.inner += item.size
            self.depth = max(self.depth, item.depth + 1)


_MARK = _Object()
_LEAVES = {"NONE", "NEWTRUE", "NEWFALSE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE"}
_BUILT = {"TUPLE", "LIST", "DICT", "FROZENSET"}
_GROWN = {"APPENDS", "ADDITEMS", "SETITEMS"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = {"PROTO", "FRAME"}


class _Scan:
    def __init__(self, path: object, file_size: int) -> None:
        self.path, self.file_size = path, file_size
        self.left = 4 * file_size + SPARE_BYTES
        self.stack: list[_Object] = []
        self.memo: dict[int, _Object] = {}

    def pop_mark(self) -> list[_Object]:
        place = next(index for index in reversed(range(len(self.stack))) if self.stack[index] is _MARK)
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise CheckpointError(f"{self.path} is damaged: it asks for far more memory than it has bytes")

    def push(self, item: _Object) -> None:
        if item.depth > MAX_DEPTH:
            raise CheckpointError(f"{self.path} is damaged: it nests objects more than {MAX_DEPTH} deep")
        self.stack.append(item)

    def call(self, name: Any, arguments: list[_Object]) -> None:
        if not isinstance(name, str):
            raise CheckpointError(f"{self.path} is damaged: it calls something without a name")
        if name not in _CALLS:
            # in the words of torch, from which the reader of the error takes the name
            raise ValueError(f"GLOBAL {name}")
        self.spend(sum(8 + item.size + item.inner for item in arguments))
        result = _Object(items=arguments)
        result.size += result.inner
        self.push(result)

    def persistent_load(self, key: _Object) -> None:
        """See that a storage has no more elements than the file has bytes."""
        counts = [item.value for item in key.items[4:5]]
        if any(not isinstance(count, int) or not 0 <= count <= self.file_size for count in counts):
            raise CheckpointError(f"{self.path} is damaged: it asks for a storage of {counts[0]!r} elements")
        self.push(_Object())

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _NOTHING:
            return
        if name == "MARK":
            stack.append(_MARK)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self.pop_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MEMOIZE" or "PUT" in name:
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif "GET" in name:
            stack.append(self.memo[argument])
        elif name in _TUPLES:
            items = stack[-_TUPLES[name] :]
            del stack[-_TUPLES[name] :]
            self.push(_Object(items=items))
        elif name in _BUILT:
            self.push(_Object(items=self.pop_mark()))
        elif name in _GROWN:
            self._grow(self.pop_mark())
        elif name == "APPEND":
            self._grow([stack.pop()])
        elif name == "SETITEM":
            self._grow([stack.pop(), stack.pop()])
        elif name == "GLOBAL":
            stack.append(_Object(value=argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            last, first = stack.pop().value, stack.pop().value
            stack.append(_Object(value=f"{first}.{last}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            self.call(function.value, arguments.items)
        elif name == "NEWOBJ_EX":
            options, arguments, kind = stack.pop(), stack.pop(), stack.pop()
            self.call(kind.value, [*arguments.items, options])
        elif name == "INST":
            self.call(argument.replace(" ", "."), self.pop_mark())
        elif name == "OBJ":
            kind, *given = self.pop_mark()
            self.call(kind.value, given)
        elif name == "BUILD":
            state = stack.pop()
            self.spend(state.size + state.inner)
            self._grow([state])
        elif name == "PERSID":
            self.push(_Object())
        elif name == "BINPERSID":
            self.persistent_load(stack.pop())
        elif name in _LEAVES:
            stack.append(_Object())
        elif isinstance(argument, str | bytes | bytearray | int | float):
            size = len(argument) if isinstance(argument, str | bytes | bytearray) else 8
            stack.append(_Object(size, value=argument))
        else:
            raise CheckpointError(f"{self.path} is damaged: its pickle has the instruction {name}")

    def _grow(self, items: list[_Object]) -> None:
        self.stack[-1].grow(items)
        if self.stack[-1].depth > MAX_DEPTH:
            raise CheckpointError(f"{self.path} is damaged: it nests objects more than {MAX_DEPTH} deep")


class _Bounded:
    """A stream that takes no memory for a text of a stated size which the file cannot hold."""

    def __init__(self, stream: IO[bytes], path: object, most: int) -> None:
        self.stream, self.path, self.most, self.readline = stream, path, most, stream.readline

    def read(self, size: int) -> bytes:
        if size > self.most:
            raise CheckpointError(f"{self.path} is damaged: it states a text of {size} bytes")
        return self.stream.read(size)


def scan_pickle(stream: IO[bytes], path: object, file_size: int) -> tuple[int, Any]:
    """Walk the next pickle of `stream`, which then stands behind it; return its protocol, and its value if it is plain.

    Raises CheckpointError, in the name of `path`, for objects nested too deeply and for more memory than `file_size`
    bytes justify; ValueError for a call that no state dict needs and, as pickletools does, for a damaged pickle.
    """
    scan, protocol = _Scan(path, file_size), 0
    try:
        # compressed archives may be larger than the file
        for opcode, argument, _ in pickletools.genops(cast(Any, _Bounded(stream, path, 4 * file_size + SPARE_BYTES))):
            protocol = int(argument or 0) if opcode.name == "PROTO" else protocol
            if opcode.name != "STOP":
                scan.step(opcode.name, argument)
        return protocol, scan.stack[-1].value
    except (IndexError, KeyError, AttributeError, StopIteration) as error:
        raise ValueError("an instruction of its pickle has nothing to act on") from error
