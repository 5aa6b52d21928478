"""The activations of a segment, by the words of the configuration."""

import re

import torch
from torch import Tensor
from torch.nn import functional as F

from visionkernels.checks import InputError

__all__ = ["SINE_FREQUENCY", "activate", "check_activation"]

SINE_FREQUENCY = 30.0
"""Of every sine but the first of a segment, and of the initialisation, whatever w0 says."""

_PLAIN = {"Sine": torch.sin, "ReLU": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh}
_LEAKY = re.compile(r"LeakyReLU(\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+)")


def check_activation(name: str) -> None:
    """Raise ValueError for a word that is no activation, with the choices."""
    if name not in _PLAIN and not _LEAKY.fullmatch(name):
        raise InputError(
            f"activation={name!r} must be one of {', '.join(map(repr, _PLAIN))}, or 'LeakyReLU' with its slope, "
            "e.g. 'LeakyReLU0.1'"
        )


def activate(name: str, x: Tensor) -> Tensor:
    """Apply the activation; the frequency of a sine is already in `x`."""
    if name in _PLAIN:
        return _PLAIN[name](x)
    leaky = _LEAKY.fullmatch(name)
    assert leaky is not None, name
    return F.leaky_relu(x, float(leaky[1]))
