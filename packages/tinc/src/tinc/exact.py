"""The exact layer: samples on a grid of the allowed error, or their exact values, coded without loss.

The grid bounds the error: multiples of 2 e + 1 are at most e away from any integer, multiples of 2 e from any real. The
numbers of the grid are coded exactly, in boxes with a stream of their own. Without any error, an array that uses few of
the values in its range is coded by their ranks, and floating-point numbers by their bits.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinc.entropy import BitReader, BitWriter
from tinc.errors import TincFormatError
from tinc.interpolation import MAX_BITS, IntegerCoder
from tinc.signal import as_float32

__all__ = ["BitsGrid", "Grid", "PaletteGrid", "StepGrid", "choose_grid", "decode_box", "encode_box"]

_SIGN = 1 << 31


@dataclass(frozen=True)
class StepGrid:
    """A grid of samples offset + step * k."""

    dtype: str
    step: float
    """An integer for samples of an integer type."""
    offset: float = 0.0

    def numbers(self, samples: np.ndarray) -> np.ndarray:
        """Return k for each sample, as int64."""
        if self.dtype == "float32":
            # no encoder writes numbers beyond the coder's range
            numbers = np.rint((samples.astype(np.float64) - self.offset) / self.step)
            return numbers.clip(-(2.0**MAX_BITS), 2.0**MAX_BITS).astype(np.int64)
        half, step = int(self.step) // 2, int(self.step)
        return (samples.astype(np.int64) - int(self.offset) + half) // step

    def samples(self, numbers: np.ndarray) -> np.ndarray:
        """Return the samples of numbers."""
        if self.dtype == "float32":
            return as_float32(numbers * self.step + self.offset)
        limits = np.iinfo(self.dtype)
        values = numbers * int(self.step) + int(self.offset)
        return values.clip(limits.min, limits.max).astype(self.dtype)


@dataclass(frozen=True)
class PaletteGrid:
    """A grid of samples `values[k]`, which increase with k."""

    dtype: str
    values: np.ndarray

    def numbers(self, samples: np.ndarray) -> np.ndarray:
        """Return k for each sample; a sample between two values takes the upper one."""
        places = np.searchsorted(self.values, samples.astype(np.int64))
        return np.minimum(places, len(self.values) - 1).astype(np.int64)

    def samples(self, numbers: np.ndarray) -> np.ndarray:
        """Return the samples of numbers. Raises TincFormatError for a number without a value."""
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(self.values):
            raise TincFormatError("an exact section is damaged: it refers to values that its palette lacks")
        return self.values[numbers].astype(self.dtype)


@dataclass(frozen=True)
class BitsGrid:
    """A grid of all float32 values in increasing order, by their bits."""

    dtype: str = "float32"

    def numbers(self, samples: np.ndarray) -> np.ndarray:
        """Return k for each sample."""
        bits = np.ascontiguousarray(samples, dtype=np.float32).view(np.int32).astype(np.int64)
        return np.where(bits < 0, -1 - (bits + _SIGN), bits)

    def samples(self, numbers: np.ndarray) -> np.ndarray:
        """Return the samples of numbers."""
        bits = np.where(numbers < 0, -1 - numbers - _SIGN, numbers)
        return bits.astype(np.int32).view(np.float32)


Grid = StepGrid | PaletteGrid | BitsGrid


def choose_grid(samples: np.ndarray, max_error: float) -> Grid:
    """Return the coarsest grid on which no sample moves by more than `max_error`.

    Samples are kept exactly where float32 is too coarse for the bound.
    """
    dtype = samples.dtype.name
    if dtype == "float32":
        return _real_grid(samples, max_error)
    step = 2 * int(min(max_error, np.iinfo(dtype).max)) + 1
    values = np.unique(samples).astype(np.int64)
    used = len(np.unique((values + step // 2) // step))
    reach = int(values[-1] - values[0]) // step + 1
    # a palette costs about 12 bits a value, and saves the bits of the gaps in every sample
    if len(values) <= used and 12 * len(values) < samples.size * math.log2(reach / len(values)):
        return PaletteGrid(dtype, values)
    return StepGrid(dtype, step)


def _real_grid(samples: np.ndarray, max_error: float) -> Grid:
    largest = float(np.abs(samples).max())
    # rounding a sample to float32 costs half a unit in the last place
    slack = 2.0**-24 * (largest + max_error) + 2.0**-149
    if not max_error > 4 * slack or 2 * largest / max_error >= 1 << (MAX_BITS - 2):
        return BitsGrid()
    grid = StepGrid(samples.dtype.name, 2 * (max_error - 2 * slack), float(samples.flat[0]))
    worst = np.abs(grid.samples(grid.numbers(samples)).astype(np.float64) - samples).max()
    return grid if worst <= max_error else BitsGrid()


def encode_box(numbers: np.ndarray) -> bytes:
    """Return the stream of a box of grid numbers [channels, ...]."""
    writer = BitWriter()
    IntegerCoder().write(writer, numbers)
    return writer.finish()


def decode_box(stream: bytes, shape: Sequence[int]) -> np.ndarray:
    """Return the grid numbers of a stream."""
    return IntegerCoder().read(BitReader(stream), tuple(shape))


def encode_palette(values: np.ndarray) -> bytes:
    """Return the stream of a palette, which codes the differences of its values."""
    writer = BitWriter()
    IntegerCoder().write(writer, np.diff(values, prepend=0)[None])
    return writer.finish()


def decode_palette(stream: bytes, count: int) -> np.ndarray:
    """Return the values of a palette. Raises TincFormatError unless they increase."""
    steps = IntegerCoder().read(BitReader(stream), (1, count))[0]
    if (steps[1:] <= 0).any():
        raise TincFormatError("the palette is damaged")
    return np.cumsum(steps)
