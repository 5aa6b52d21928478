"""Stand-ins for what files of weights hold beside them: nothing of a file is called, whatever it names.

A pickle may call every function that it may name, with any arguments, so no class of numpy is among them:
`numpy.ndarray(shape, "O8", data)` makes objects of a file's bytes.
"""

import re
from typing import Any

import numpy as np

from visionkernels.checks import InputError

__all__ = ["SAFE_GLOBALS", "CheckpointError", "Dtype", "Ignored", "number_code"]


class CheckpointError(InputError):
    """A weights file that cannot be read, or that does not fit."""


class Ignored:
    """Stands for an object that nobody reads."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Dtype(Ignored):
    """Stands for numpy.dtype."""

    def __init__(self, code: Any, *flags: Any) -> None:
        self.code, self.order = code, "|"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


def number_code(dtype: Any) -> str | None:
    """Return the name of numpy's type, if it is one of numbers."""
    if not (isinstance(dtype, Dtype) and isinstance(dtype.code, str) and isinstance(dtype.order, str)):
        return None
    code = f"{dtype.order}{dtype.code}"
    return code if re.fullmatch(r"[<>|=](b1|[iu][1248]|f[248])", code) else None


def _scalar(dtype: Any, data: bytes = b"") -> Any:
    """Return the number of a numpy scalar (an accuracy, say); scalars of other kinds are ignored."""
    code = number_code(dtype)
    return np.frombuffer(data, code).item() if code else Ignored()


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

SAFE_GLOBALS: list[Any] = [
    *((Ignored, name) for name in _IGNORED),
    (Dtype, "numpy.dtype"),
    (_dict, "collections.defaultdict"),
    # numpy 1 and 2 write different module names
    *((_scalar, f"{core}.multiarray.scalar") for core in ("numpy.core", "numpy._core")),
    *((Ignored, f"{core}.multiarray._reconstruct") for core in ("numpy.core", "numpy._core")),
]
