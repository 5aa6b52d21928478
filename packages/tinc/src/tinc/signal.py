"""The array to compress as a signal: its samples, channels first, and the working integers that stand for them."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from visionkernels.checks import InputError

__all__ = [
    "DTYPES",
    "FRACTION_BITS",
    "MAX_AXES",
    "MAX_CHANNELS",
    "SampleFormat",
    "Signal",
    "as_float32",
    "read_signal",
    "refuse_mask",
    "value_range",
]

DTYPES = ("uint8", "uint16", "int16", "float32")
MAX_AXES = 4
MAX_CHANNELS = 64
FRACTION_BITS = 4
"""A working unit is 1 / 16 of a count of an integer array."""
FLOAT_BITS = 24
"""The range of a floating-point array takes this many bits of working units."""


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
        """Return samples; integers are rounded half to even and clipped to their type."""
        if self.is_float:
            # a product with a power of two and one sum, so that every machine rounds alike
            return as_float32(working * 2.0**self.exponent + self.offset)
        half = (1 << (FRACTION_BITS - 1)) - 1
        rounded = (working + half + ((working >> FRACTION_BITS) & 1)) >> FRACTION_BITS
        limits = np.iinfo(self.dtype)
        return rounded.clip(limits.min, limits.max).astype(self.dtype)


def as_float32(values: np.ndarray) -> np.ndarray:
    """Round float64 to float32; values beyond its range become its largest."""
    largest = float(np.finfo(np.float32).max)
    return values.clip(-largest, largest).astype(np.float32)


@dataclass(frozen=True)
class Signal:
    """An array that was checked, and the working integers that the layers of a file approximate."""

    samples: np.ndarray
    """[channels, ...] in native byte order."""
    channel_axis: int | None
    """The array's axis of channels, counted from the front; None without one."""
    format: SampleFormat
    working: np.ndarray
    """int64 of the shape of `samples`; zeros if some samples are not finite, which only the exact layer takes."""

    @property
    def extent(self) -> tuple[int, ...]:
        """Sizes, channels first."""
        return tuple(self.working.shape)

    @property
    def box(self) -> tuple[slice, ...]:
        """The whole volume as a region, without channels."""
        return tuple(slice(0, size) for size in self.extent[1:])

    @cached_property
    def peak(self) -> float:
        """The range that a PSNR refers to."""
        return value_range(self.samples)

    def psnr(self, squared_error: float) -> float:
        """Return the PSNR in dB of a sum of squared errors in squared working units."""
        unit = 2.0**self.format.exponent
        mse = squared_error / self.working.size * unit**2
        return math.inf if mse == 0 else 10 * math.log10(self.peak**2 / mse)

    def squared_error(self, working: np.ndarray) -> float:
        """Return the sum of squared errors of the samples that working integers stand for, in squared working units."""
        errors = self.format.to_samples(working).astype(np.float64) - self.samples
        return float(np.square(errors).sum()) / 4.0**self.format.exponent


def refuse_mask(array: Any, name: str) -> None:
    """Raise ValueError for a masked array, also one of Dask, since its mask would be lost."""
    if any(isinstance(part, np.ma.MaskedArray) for part in (array, getattr(array, "_meta", None))):
        raise InputError(f"{name} is a masked array, and its mask would be lost: fill it first, e.g. {name}.filled(0)")


def read_signal(
    array: np.ndarray, channel_axis: int | None, *, nan: Literal["raise", "fill"], keeps_nan: bool
) -> Signal:
    """Check an array and return it as a signal.

    float32 values that are not finite raise ValueError or become the mean of the others, as `nan` says, unless
    `keeps_nan`. Raises TypeError for other types than `DTYPES`, ValueError for a masked array, an empty array and other
    numbers of axes or channels than a file takes.
    """
    refuse_mask(array, "array")
    samples, axis = _channels_first(np.asarray(array), channel_axis)
    if not keeps_nan:
        samples = _finite(samples, nan)
    if not np.isfinite(samples).all():
        return Signal(samples, axis, SampleFormat("float32"), np.zeros(samples.shape, dtype=np.int64))
    format = _format_of(samples)
    return Signal(samples, axis, format, format.to_working(samples))


def _channels_first(array: np.ndarray, channel_axis: int | None) -> tuple[np.ndarray, int | None]:
    """Return samples [channels, ...] in native byte order, and the axis of the channels."""
    native = array.dtype.newbyteorder("=")
    if native.name not in DTYPES:
        raise TypeError(f"array is {array.dtype}; it must be one of {', '.join(DTYPES)}: convert it first")
    if array.size == 0:
        raise InputError(f"array has shape {array.shape}: it is empty")
    axes = array.ndim - (channel_axis is not None)
    if not 2 <= axes <= MAX_AXES:
        raise InputError(f"array has {axes} axes besides channels; it must have 2 to {MAX_AXES}")
    if channel_axis is None:
        return array.astype(native, copy=False)[None], None
    if isinstance(channel_axis, bool) or not -array.ndim <= channel_axis < array.ndim:
        raise InputError(f"channel_axis={channel_axis} must be in [{-array.ndim}, {array.ndim})")
    channel_axis %= array.ndim
    if array.shape[channel_axis] > MAX_CHANNELS:
        raise InputError(f"axis {channel_axis} has {array.shape[channel_axis]} channels; at most {MAX_CHANNELS}")
    moved = np.moveaxis(array, channel_axis, 0)
    return np.ascontiguousarray(moved.astype(native, copy=False)), channel_axis


def _finite(samples: np.ndarray, nan: str) -> np.ndarray:
    if samples.dtype != np.float32:
        return samples
    finite = np.isfinite(samples)
    if finite.all():
        return samples
    count = int(finite.size - finite.sum())
    if nan == "raise" or not finite.any():
        raise InputError(f"array has {count} values that are not finite; pass nan='fill' to replace them by the mean")
    return np.where(finite, samples, samples[finite].mean(dtype=np.float64).astype(np.float32))


def _format_of(samples: np.ndarray) -> SampleFormat:
    """Return the format of finite samples of one of `DTYPES`."""
    if samples.dtype != np.float32:
        return SampleFormat(samples.dtype.name)
    low, high = float(samples.min()), float(samples.max())
    reach = max(high - low, abs(low) * 2.0**-FLOAT_BITS, 2.0**-120)
    return SampleFormat("float32", low, math.frexp(reach)[1] - FLOAT_BITS)


def value_range(samples: np.ndarray) -> float:
    """Return the range that a PSNR refers to: that of an integer type, or of the values of a float32 array."""
    if samples.dtype == np.float32:
        reach = float(samples.max()) - float(samples.min())
        return reach if reach > 0 else 1.0
    limits = np.iinfo(samples.dtype)
    return float(limits.max) - float(limits.min)
