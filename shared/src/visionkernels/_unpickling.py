"""PyTorch files read without running code: what a training checkpoint holds beside its weights has stand-ins.

A pickle may call every function that it may name, with any arguments, so no class of numpy is among them:
`numpy.ndarray(shape, "O8", data)` makes objects of a file's bytes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["CheckpointError", "read_torch"]


class CheckpointError(ValueError):
    """A weights file that cannot be read, or that does not fit."""


def read_torch(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the content of a file of `torch.save`, a dictionary, and its plain entries as text.

    No code of the file runs: objects beside tensors, numbers, text and containers are stand-ins. Raises CheckpointError
    for a damaged file, one that needs code to load, and one that is no dictionary.
    """
    try:
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


def _scalar(dtype: Any, data: bytes = b"") -> Any:
    """Return the number of a numpy scalar (an accuracy, say); scalars of other kinds are ignored."""
    is_number = isinstance(dtype, _Dtype) and re.fullmatch(
        r"[<>|=](b1|[iu][1248]|f[248])", f"{dtype.order}{dtype.code}"
    )
    return np.frombuffer(data, is_number[0]).item() if is_number else _Ignored()


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
