"""Plain pickles of numpy's arrays, as detectron2's model zoo has them, read without running code.

Python's unpickler as it is may be made to call, to change what this process has, to ask for memory without end, and to
overflow its stack. This one calls stand-ins alone, sets no attributes, and takes simple keys; what the arrays take is
bounded by the size of the file.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from visionkernels.weights._stand_ins import SAFE_GLOBALS, CheckpointError, Ignored, number_code

__all__ = ["read_arrays"]


def read_arrays(path: Path) -> Any:
    """Return what a plain pickle holds, its arrays of numbers as tensors; None for other files and torch.save's.

    Raises CheckpointError for arrays that are larger than the file, and whatever a damaged pickle makes pickle raise.
    """
    with path.open("rb") as file:
        if file.read(2) not in _BEGINNINGS:
            return None
        file.seek(0)
        content = _Unpickler(file, encoding="latin1").load()
    # torch's older format begins with a pickle of a number
    if content == torch.serialization.MAGIC_NUMBER:
        return None
    return _Converter(path).convert(content)


_BEGINNINGS = tuple(bytes((0x80, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1))


class _Array(Ignored):
    """Stands for a numpy array."""

    def __init__(self, *arguments: Any) -> None:
        self.parts: tuple[Any, ...] = ()

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        # Python 2 wrote bytes as text
        data = data.encode("latin1") if isinstance(data, str) else data
        self.parts = data, dtype, shape, "F" if is_fortran else "C"


def _from_buffer(data: Any, dtype: Any, shape: Any, order: str) -> _Array:
    found = _Array()
    found.parts = data, dtype, shape, order
    return found


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _empty() -> bytes:
    return b""


_KNOWN: dict[str, Any] = {name: stand_in for stand_in, name in SAFE_GLOBALS} | {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _encode,
    # how protocol 2 writes no bytes
    "__builtin__.bytes": _empty,
    "numpy.ndarray": _Array,
    **{
        f"{core}.{name}": stand_in
        for core in ("numpy.core", "numpy._core")
        for name, stand_in in (("multiarray._reconstruct", _Array), ("numeric._frombuffer", _from_buffer))
    },
}


# the one in Python: that in C makes room for whatever number an object is given in its memo
class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _KNOWN:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return _KNOWN[f"{module}.{name}"]

    def load_build(self) -> None:
        """Give a state to a stand-in alone: others are functions and classes of this process."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Ignored):
            self.stack[-1].__setstate__(state)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        """Add pairs to the dictionary on the stack; the hash of a nested key may overflow the stack of C."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float | None) or not isinstance(self.stack[-1], dict):
                raise pickle.UnpicklingError("keys must be text or numbers, in a dictionary")
            dict.__setitem__(self.stack[-1], key, value)

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]
    dispatch |= {
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
    }
    for _opcode in (pickle.ADDITEMS, pickle.FROZENSET):
        del dispatch[_opcode[0]]


class _Converter:
    """Turns arrays into tensors, each object once, within twice the size of the file."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes_left = path, 2 * path.stat().st_size + 2**20
        self.known: dict[int, Any] = {}

    def convert(self, content: Any) -> Any:
        if id(content) in self.known:
            return self.known[id(content)]
        found = content
        if isinstance(content, _Array):
            found = self._tensor(*content.parts) if content.parts else content
        elif isinstance(content, Mapping):
            found = {key: self.convert(value) for key, value in dict.items(cast(Any, content))}
        self.known[id(content)] = found
        return found

    def _tensor(self, data: Any, dtype: Any, shape: Any, order: Any) -> Tensor | Ignored:
        code = number_code(dtype)
        if code is None:
            return Ignored()
        array = np.frombuffer(data, code)
        self.bytes_left -= array.nbytes
        if self.bytes_left < 0:
            raise CheckpointError(f"{self.path} is damaged: its arrays are larger than the file")
        native = array.astype(np.dtype(code).newbyteorder("="))
        return torch.from_numpy(native.reshape(shape, order=order))
