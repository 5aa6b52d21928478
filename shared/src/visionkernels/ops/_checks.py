"""Checks of arguments that several ops make; messages name the argument, its value and the allowed ones."""

import math

import torch
from torch import Tensor

from visionkernels.checks import InputError


def check_floating(op: str, kind: str, **tensors: Tensor) -> None:
    """Raise TypeError unless all tensors are floating; `kind` names what `op` takes ("logits")."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}; {op} takes floating-point {kind}")


def check_devices(**tensors: Tensor) -> None:
    """Raise TypeError unless all tensors are on the device of the first."""
    first, *others = tensors
    for name in others:
        if tensors[name].device != tensors[first].device:
            raise TypeError(f"{name} is on {tensors[name].device}; expected {tensors[first].device}, as {first}")


def check_alike(**tensors: Tensor) -> None:
    """Raise TypeError unless all tensors are on the device of the first, ValueError unless they have its shape."""
    check_devices(**tensors)
    first, *others = tensors
    for name in others:
        if tensors[name].shape != tensors[first].shape:
            ours, expected = list(tensors[name].shape), list(tensors[first].shape)
            raise InputError(f"{name} has shape {ours}; expected {expected}, as {first}")


def check_positive(**numbers: float) -> None:
    """Raise ValueError unless all numbers are positive and finite."""
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise InputError(f"{name}={number} must be a positive number")


def check_not_negative(**numbers: float) -> None:
    """Raise ValueError unless all numbers are finite and at least 0."""
    for name, number in numbers.items():
        if not 0 <= number < math.inf:
            raise InputError(f"{name}={number} must be a number of at least 0")


def check_index(name: str, index: Tensor, *, hint: str = "") -> None:
    """Raise TypeError unless `index` is int64 or int32; `hint` ends the message."""
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} is {index.dtype}; expected int64 or int32{hint}")


def check_range(name: str, index: Tensor, size: int) -> None:
    """Raise ValueError for numbers outside [0, size); on a GPU they trip a device-side assertion."""
    if not is_readable(index):
        return
    if not index.is_cpu:
        # reading the result back would synchronise
        torch._assert_async(((index >= 0) & (index < size)).all())
        return
    low, high = (int(extreme) for extreme in index.aminmax())
    if low < 0 or high >= size:
        raise InputError(f"{name} spans [{low}, {high}]; allowed is [0, {size - 1}]")


def is_readable(tensor: Tensor) -> bool:
    """Whether values can be checked: not while compiling, on the meta device, and in empty tensors."""
    return not (torch.compiler.is_compiling() or tensor.is_meta or not tensor.numel())
