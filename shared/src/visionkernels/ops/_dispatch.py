"""The one rule by which every op chooses among its reference, eager and Triton implementations.

`use_backend(...)` outranks the `backend` argument, which outranks the environment variable VISIONKERNELS_BACKEND.
"auto" takes Triton for GPU tensors where Triton imports and knows the dtype, else eager.
"""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from visionkernels.checks import InputError

__all__ = ["Backend", "choose_backend", "implementation", "is_autocast", "use_backend", "without_autocast"]

Backend = Literal["auto", "triton", "eager", "reference"]

_logger = logging.getLogger("visionkernels")
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TRITON_IMPORTS = importlib.util.find_spec("triton") is not None
# plain module state, read once: torch.compile guards on it, which it cannot do for a ContextVar or os.environ
_environment = os.environ.get("VISIONKERNELS_BACKEND", "auto")
_override: Backend | None = None
_logged: set[tuple[str, str]] = set()


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Run every op inside the block with `backend`, whatever its argument says; blocks nest.

    The choice holds for all threads of the process. Raises ValueError for an unknown name.
    """
    global _override
    previous, _override = _override, _known(backend, "backend")
    try:
        yield
    finally:
        _override = previous


def choose_backend(op: str, backend: Backend, *tensors: Tensor, unsupported: str | None = None) -> Backend:
    """Return "triton", "eager" or "reference" for `op` on `tensors`, one or more on one device.

    `unsupported` is the reason why Triton cannot run this call, if there is one ("slot_weight has no kernel"): "auto"
    then takes eager, and an explicit "triton" raises. Raises ValueError for an unknown name, RuntimeError for a backend
    that cannot run here.
    """
    wanted = _override or (_known(backend, "backend") if backend != "auto" else None)
    wanted = wanted or _known(_environment, "VISIONKERNELS_BACKEND")
    reason = unsupported
    for tensor in tensors:
        reason = reason or _why_triton_cannot_run(tensor)
    if wanted == "triton" and reason:
        raise RuntimeError(f"backend='triton' cannot run {op}: {reason}; use backend='auto' or 'eager'")
    if wanted != "auto":
        return wanted
    is_on_gpu = tensors[0].is_cuda
    chosen: Backend = "triton" if is_on_gpu and not reason else "eager"
    if not torch.compiler.is_compiling() and (op, chosen) not in _logged:
        _logged.add((op, chosen))
        _logger.info("%s runs on its %s backend%s", op, chosen, f" ({reason})" if is_on_gpu and reason else "")
    return chosen


def implementation(package: str, backend: Backend) -> ModuleType:
    """Return the module of an op's package that implements a chosen backend; Triton's is imported at its first use."""
    name = f"{package}.{backend}"
    _import(name)
    return sys.modules[name]


def _import(name: str) -> None:
    importlib.import_module(name)


# torch.compile cannot trace an import by name, so it runs this one as it is. This is what the decorator
# torch.compiler.assume_constant_result does, without importing torch._dynamo, which takes seconds.
_import._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast chooses the precision on the tensor's device."""
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context in which operations on the tensor's device keep the precision of their inputs."""
    # where autocast is off, the device may not have it, as meta; compiled code would enter a context for nothing
    return torch.autocast(tensor.device.type, enabled=False) if is_autocast(tensor) else nullcontext()


def _known(backend: str, source: str) -> Backend:
    if backend not in get_args(Backend):
        raise InputError(f"{source}={backend!r} is not a backend; use one of {', '.join(get_args(Backend))}")
    return backend  # type: ignore[return-value]


def _why_triton_cannot_run(tensor: Tensor) -> str | None:
    if not _TRITON_IMPORTS:
        return "triton is not installed (pip install triton)"
    # read at each call, since a test may switch the interpreter on before it imports the kernels
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {tensor.device.type}, and Triton needs a GPU (or TRITON_INTERPRET=1)"
    if tensor.dtype not in _TRITON_DTYPES:
        return f"its kernels take float16, bfloat16 and float32, not {str(tensor.dtype).removeprefix('torch.')}"
    return None
