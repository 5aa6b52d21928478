"""PyTorch files, and pickles of arrays, read without running code.

What a training checkpoint holds beside its weights has stand-ins.

A pickle may call every function that it may name, with any arguments, so no class of numpy is among them:
`numpy.ndarray(shape, "O8", data)` makes objects of a file's bytes.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["CheckpointError", "read_torch"]


class CheckpointError(ValueError):
    """A weights file that cannot be read, or that does not fit."""


def read_torch(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the content of a file of `torch.save`, a dictionary, and its plain entries as text.

    A plain pickle of numpy's arrays, as detectron2's model zoo has them, is read too; they become tensors. No code of
    the file runs: objects beside tensors, numbers, text and containers are stand-ins. Raises CheckpointError for a
    damaged file, one that needs code to load, and one that is no dictionary.
    """
    try:
        content = _read_arrays(path)
        if content is None:
            with torch.serialization.safe_globals(_SAFE_GLOBALS):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises almost any type
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked:
            raise CheckpointError(
                f"{path} needs the Python object {blocked[1]} to load, which could run code; "
                "save its state dict alone, or as safetensors"
            ) from error
        # torch's own text advises to load the file unsafely
        reason = "" if "weights_only" in str(error) else f": {str(error).partition(chr(10))[0]}"
        raise CheckpointError(f"{path} is damaged or no checkpoint of torch.save{reason}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a checkpoint is a dict of tensors")
    plain = {str(key): str(value) for key, value in content.items() if isinstance(value, str | int | float)}
    return dict(content), plain


class _Ignored:
    """Stands for an object that nobody reads."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Dtype(_Ignored):
    """Stands for numpy.dtype."""

    def __init__(self, code: Any, *flags: Any) -> None:
        self.code, self.order = code, "|"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array(_Ignored):
    """Stands for a numpy array of numbers; `tensor` is what it holds."""

    tensor: Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        # Python 2 wrote bytes as text
        data = data.encode("latin1") if isinstance(data, str) else data
        self.tensor = _tensor(data, dtype, shape, "F" if is_fortran else "C")


def _from_buffer(data: Any, dtype: Any, shape: Any, order: str) -> _Array:
    found = _Array()
    found.tensor = _tensor(data, dtype, shape, order)
    return found


def _tensor(data: Any, dtype: Any, shape: Any, order: Any) -> Tensor | None:
    code = _number_code(dtype)
    if code is None:
        return None
    native = np.frombuffer(data, code).astype(np.dtype(code).newbyteorder("="))
    return torch.from_numpy(native.reshape(shape, order=order))


def _number_code(dtype: Any) -> str | None:
    """The name of numpy's type, if it is one of numbers."""
    code = f"{dtype.order}{dtype.code}" if isinstance(dtype, _Dtype) else ""
    return code if re.fullmatch(r"[<>|=](b1|[iu][1248]|f[248])", code) else None


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _empty() -> bytes:
    return b""


def _scalar(dtype: Any, data: bytes = b"") -> Any:
    """Return the number of a numpy scalar (an accuracy, say); scalars of other kinds are ignored."""
    code = _number_code(dtype)
    return np.frombuffer(data, code).item() if code else _Ignored()


def _dict(*factory: Any) -> dict[Any, Any]:
    return {}


_IGNORED = (
    "argparse.Namespace",
    # Python 3.13 names another module
    *(
        f"{module}.{flavour}Path"
        for module in ("pathlib", "pathlib._local")
        for flavour in ("Posix", "Windows", "PurePosix", "PureWindows")
    ),
    # the factories of default dictionaries, and what a configuration of omegaconf consists of
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str")),
    "typing.Any",
    *(f"omegaconf.{name}" for name in ("base.ContainerMetadata", "base.Metadata")),
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "Boolean", "Bytes", "Float", "Integer", "Path", "String")),
    "numpy.ndarray",
)

_SAFE_GLOBALS: list[Any] = [
    *((_Ignored, name) for name in _IGNORED),
    (_Dtype, "numpy.dtype"),
    (_dict, "collections.defaultdict"),
    # numpy 1 and 2 write different module names
    *((_scalar, f"{core}.multiarray.scalar") for core in ("numpy.core", "numpy._core")),
    *((_Ignored, f"{core}.multiarray._reconstruct") for core in ("numpy.core", "numpy._core")),
]

_SAFE_IN_ARRAYS: dict[str, Any] = {name: stand_in for stand_in, name in _SAFE_GLOBALS} | {
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


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _SAFE_IN_ARRAYS:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return _SAFE_IN_ARRAYS[f"{module}.{name}"]


def _read_arrays(path: Path) -> Any:
    """Return what a plain pickle holds, its arrays as tensors; None for a file of torch.save."""
    with path.open("rb") as file:
        if file.read(2) not in _PICKLES:
            return None
        file.seek(0)
        content = _ArrayUnpickler(file, encoding="latin1").load()
    # torch's older format begins with a pickle of a number
    return None if content == torch.serialization.MAGIC_NUMBER else _with_tensors(content)


_PICKLES = tuple(bytes((0x80, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1))


def _with_tensors(content: Any) -> Any:
    if isinstance(content, _Array) and content.tensor is not None:
        return content.tensor
    return {key: _with_tensors(value) for key, value in content.items()} if isinstance(content, Mapping) else content
