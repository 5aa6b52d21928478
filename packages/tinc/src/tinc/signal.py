"""Between the samples of an array and the integers that the layers of a file work on."""

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["DTYPES", "FRACTION_BITS", "SampleFormat", "as_float32", "describe"]

FRACTION_BITS = 4
"""A working unit is 1 / 16 of a count of an integer array."""
FLOAT_BITS = 24
"""The range of a floating-point array is so many bits of working units."""
DTYPES = ("uint8", "uint16", "int16", "float32")


@dataclass(frozen=True)
class SampleFormat:
    """Samples of `dtype` are offset + working * 2**exponent."""

    dtype: str
    offset: float = 0.0
    exponent: int = -FRACTION_BITS

    @property
    def is_float(self) -> bool:
        """Whether samples are floating point."""
        return self.dtype == "float32"

    def to_working(self, samples: np.ndarray) -> np.ndarray:
        """Return working integers, int64 of the shape of `samples`."""
        if not self.is_float:
            return samples.astype(np.int64) << FRACTION_BITS
        scaled = (samples.astype(np.float64) - self.offset) * 2.0**-self.exponent
        return np.rint(scaled).astype(np.int64)

    def to_samples(self, working: np.ndarray) -> np.ndarray:
        """Return samples: integers are rounded half to even and clipped to their type."""
        if self.is_float:
            # a product with a power of two and one sum, so that every machine rounds alike
            return as_float32(working * 2.0**self.exponent + self.offset)
        half = (1 << (FRACTION_BITS - 1)) - 1
        rounded = (working + half + ((working >> FRACTION_BITS) & 1)) >> FRACTION_BITS
        limits = np.iinfo(self.dtype)
        return rounded.clip(limits.min, limits.max).astype(self.dtype)


def as_float32(values: np.ndarray) -> np.ndarray:
    """Round float64 to float32, beyond its range to the largest."""
    largest = float(np.finfo(np.float32).max)
    return values.clip(-largest, largest).astype(np.float32)


def describe(samples: np.ndarray) -> SampleFormat:
    """Return the format of a finite array of one of `DTYPES`."""
    if samples.dtype != np.float32:
        return SampleFormat(samples.dtype.name)
    low, high = float(samples.min()), float(samples.max())
    reach = max(high - low, abs(low) * 2.0**-FLOAT_BITS, 2.0**-120)
    return SampleFormat("float32", low, math.frexp(reach)[1] - FLOAT_BITS)
