"""Integer arithmetic of the decoder, so that a file decodes to the same voxels on every machine.

Matrices hold integers as floating point: while no partial sum reaches 2**24 (float32) or 2**53 (float64), every product
and sum is exact in any order of a BLAS or a GPU. Sines and cosines come from integer series, since the last digits of a
mathematics library differ between machines.
"""

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from visionkernels.checks import InputError

__all__ = [
    "ACTIVATION_BITS",
    "BASIS_BITS",
    "PHASE_BITS",
    "cosine_basis",
    "sine_table",
    "to_fixed",
]

ACTIVATION_BITS = 10
"""A sine of 1 is 2**10."""
PHASE_BITS = 12
"""A full turn is 2**12."""
BASIS_BITS = 14
"""A basis vector of length 1 is 2**14."""

_SERIES_BITS = 64
_PI = 0x3243F6A8885A308D3
"""pi * 2**64, rounded down."""


def _sine(turns: int, of: int, bits: int) -> int:
    """Return round(2**bits * sin(2 pi * turns / of)), ties away from zero, by an integer Taylor series."""
    turns %= of
    if 2 * turns > of:
        return -_sine(of - turns, of, bits)
    if 4 * turns > of:
        return _sine(of - 2 * turns, 2 * of, bits)
    angle = 2 * _PI * turns // of
    square = angle * angle >> _SERIES_BITS
    term = total = angle
    for n in range(2, 28, 2):
        term = -(term * square >> _SERIES_BITS) // (n * (n + 1))
        total += term
    return (total + (1 << (_SERIES_BITS - bits - 1))) >> (_SERIES_BITS - bits)


@cache
def sine_table(device: str = "cpu") -> Tensor:
    """Return round(2**10 * sin(2 pi * phase / 2**12)) for every phase, as float32 [4096]."""
    turn = 1 << PHASE_BITS
    return torch.tensor([_sine(phase, turn, ACTIVATION_BITS) for phase in range(turn)], dtype=torch.float32).to(device)


@cache
def cosine_basis(length: int, step: int = 1) -> np.ndarray:
    """Return the orthonormal basis of the DCT-II times 2**14, rounded, as float64 [frequency, place].

    basis[k, n] = c_k cos(pi (2 n + 1) k / (2 length)), c_0 = sqrt(1 / length), else c_k = sqrt(2 / length). A `step`
    above 1 gives the basis of step * length places, averaged over cells of `step` places: c_k is then smaller by the
    root of `step` and by sin(step x) / (step sin x), x = pi k / (2 step length).
    """
    turn, bits = 4 * length, 40
    cosines = [_sine(step + length, turn, bits) for step in range(turn)]
    basis = np.empty((length, length))
    for k in range(length):
        # share of the amplitude that averaging leaves to a wave of this frequency
        share = 1 << bits
        if k and step > 1:
            share = (_sine(k * step, turn * step, bits) << bits) // (step * _sine(k, turn * step, bits))
        gain = math.isqrt(((1 if k == 0 else 2) << (2 * bits)) // (length * step))
        for n in range(length):
            value = gain * cosines[(2 * n + 1) * k % turn] * share >> bits
            basis[k, n] = (value + (1 << (2 * bits - BASIS_BITS - 1))) >> (2 * bits - BASIS_BITS)
    return basis


def to_fixed(value: float, *, mantissa_bits: int, max_shift: int) -> tuple[int, int]:
    """Return (multiplier, shift) with value ~ multiplier / 2**shift and multiplier below 2**mantissa_bits.

    Values above the largest multiplier are clipped. Raises ValueError unless `value` is positive.
    """
    if not value > 0:
        raise InputError(f"value={value} must be positive")
    largest = (1 << mantissa_bits) - 1
    value = min(value, float(largest))
    _, exponent = math.frexp(value)
    shift = min(mantissa_bits - exponent, max_shift)
    multiplier = round(math.ldexp(value, shift))
    if multiplier > largest:
        multiplier, shift = (multiplier >> 1, shift - 1) if shift else (largest, 0)
    return max(multiplier, 1), shift
