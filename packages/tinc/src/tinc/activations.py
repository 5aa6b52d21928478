"""The activations of a segment, by their names in the configuration."""

import re

import torch
from torch import Tensor
from torch.nn import functional as F

from visionkernels.checks import InputError

__all__ = ["SINE_FREQUENCY", "activate", "check_activation"]

SINE_FREQUENCY = 30.0
"""Frequency of every sine but the first of a segment, and of the initialisation, independent of w0."""

_PLAIN = {"Sine": torch.sin, "ReLU": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh}
_LEAKY = re.compile(r"LeakyReLU(\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+)")


def check_activation(name: str) -> None:
    """Raise ValueError with the choices unless `name` is an activation."""
    if name not in _PLAIN and not _LEAKY.fullmatch(name):
        raise InputError(
            f"activation={name!r} must be one of {', '.join(map(repr, _PLAIN))}, or 'LeakyReLU' with its slope, "
            "e.g. 'LeakyReLU0.1'"
        )


def activate(name: str, x: Tensor) -> Tensor:
    """Apply the activation; `x` already includes the frequency of a sine."""
    if name in _PLAIN:
        return _PLAIN[name](x)
    leaky = _LEAKY.fullmatch(name)
    assert leaky is not None, name
    return F.leaky_relu(x, float(leaky[1]))
