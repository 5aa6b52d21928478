"""Lossless coding of integer arrays by interpolation: from coarse to fine, values are predicted from their neighbours.

The values on a coarse lattice come first, then those halfway between, axis by axis, until the lattice is full. A pass
fills every other place along one axis: it predicts from two or four known values on that axis, as its writer chose, and
codes the differences. All places of a pass are coded together, in array operations.
"""

# a the axis of a pass, s its step: places i * s with odd i are filled from those with even i

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tinc.entropy import AdaptiveBits, BitReader, BitWriter

__all__ = ["MAX_BITS", "IntegerCoder", "Pass", "passes"]

MAX_BITS = 40
"""Magnitudes of values and of differences are below 2**40."""
_ACTIVITIES = 42
_TOP_BITS = 2
"""Number of bits below the leading one with adaptive probabilities; the others are nearly random."""


@dataclass(frozen=True)
class Pass:
    """The values that are coded together."""

    axis: int
    step: int
    place: tuple[slice, ...]
    """Places of the values."""

    def grid(self, axis: int) -> int:
        """Return the distance between known values along an axis."""
        return 2 * self.step if axis >= self.axis else self.step


def passes(shape: tuple[int, ...]) -> Iterator[Pass]:
    """Yield the passes that fill all but the first value."""
    step = 1 << max(max(shape) - 1, 1).bit_length() >> 1
    while step:
        for axis in range(len(shape)):
            if step < shape[axis]:
                before = [slice(None, None, step)] * axis
                after = [slice(None, None, 2 * step)] * (len(shape) - axis - 1)
                yield Pass(axis, step, (*before, slice(step, None, 2 * step), *after))
        step >>= 1


class IntegerCoder:
    """Codes int64 arrays of at least one value; magnitudes are below 2**40.

    A coder serves one stream, in one direction, since its counts adapt to the coded bits.
    """

    def __init__(self) -> None:
        activity, length = np.divmod(np.arange(_ACTIVITIES * (MAX_BITS + 2)), MAX_BITS + 2)
        # a difference is about as long as those around it
        self.is_longer = AdaptiveBits(np.where(length < activity - 1, 57000, np.where(length < activity, 40000, 16000)))
        self.top = AdaptiveBits(np.full((MAX_BITS + 2) << _TOP_BITS, 30000))

    def write(self, writer: BitWriter, values: np.ndarray) -> None:
        """Append an array to the stream."""
        self._write_rest(writer, values.reshape(-1)[:1], np.zeros(1, dtype=np.int64))
        missing = np.zeros_like(values)
        for pass_ in passes(values.shape):
            linear, cubic = _guesses(values, pass_)
            target = values[pass_.place]
            is_cubic = int(np.abs(target - cubic).sum() < np.abs(target - linear).sum())
            writer.write_raw(np.array([is_cubic]), 1)
            rest = target - (cubic if is_cubic else linear)
            self._write_rest(writer, rest.reshape(-1), _activity(values, missing, pass_).reshape(-1))
            missing[pass_.place] = np.abs(rest)

    def read(self, reader: BitReader, shape: tuple[int, ...]) -> np.ndarray:
        """Return the array of a stream."""
        values, missing = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        values.reshape(-1)[:1] = self._read_rest(reader, np.zeros(1, dtype=np.int64))
        for pass_ in passes(shape):
            guess = _guesses(values, pass_)[int(reader.read_raw(1, 1)[0])]
            activity = _activity(values, missing, pass_)
            rest = self._read_rest(reader, activity.reshape(-1)).reshape(activity.shape)
            values[pass_.place] = guess + rest
            missing[pass_.place] = np.abs(rest)
        return values

    def _write_rest(self, writer: BitWriter, rest: np.ndarray, activity: np.ndarray) -> None:
        magnitudes = np.abs(rest)
        lengths = _bit_length(magnitudes)
        left, place = lengths, activity * (MAX_BITS + 2)
        for length in range(MAX_BITS + 1):
            is_longer = left > length
            self.is_longer.write(writer, place + length, is_longer.astype(np.int64))
            left, place = left[is_longer], place[is_longer]
            if not left.size:
                break
        self._write_low_bits(writer, magnitudes, lengths)
        writer.write_raw((rest[lengths > 0] < 0).astype(np.int64), 1)

    def _read_rest(self, reader: BitReader, activity: np.ndarray) -> np.ndarray:
        lengths = np.zeros(activity.shape, dtype=np.int64)
        left = np.arange(len(activity))
        for length in range(MAX_BITS + 1):
            left = left[self.is_longer.read(reader, activity[left] * (MAX_BITS + 2) + length) > 0]
            if not left.size:
                break
            lengths[left] = length + 1
        rest = self._read_low_bits(reader, lengths)
        nonzero = lengths > 0
        rest[nonzero] *= 1 - 2 * reader.read_raw(int(nonzero.sum()), 1)
        return rest

    def _write_low_bits(self, writer: BitWriter, magnitudes: np.ndarray, lengths: np.ndarray) -> None:
        for place in range(_TOP_BITS):
            chosen = lengths > place + 1
            shift = lengths[chosen] - place - 2
            higher = (magnitudes[chosen] >> (shift + 1)) & ((1 << place) - 1)
            context = (lengths[chosen] << _TOP_BITS) + (1 << place) + higher
            self.top.write(writer, context, (magnitudes[chosen] >> shift) & 1)
        width = np.maximum(lengths - 1 - _TOP_BITS, 0)
        writer.write_raw(magnitudes & ((1 << width) - 1), width)

    def _read_low_bits(self, reader: BitReader, lengths: np.ndarray) -> np.ndarray:
        values = (lengths > 0).astype(np.int64)
        for place in range(_TOP_BITS):
            (chosen,) = np.nonzero(lengths > place + 1)
            higher = values[chosen] & ((1 << place) - 1)
            context = (lengths[chosen] << _TOP_BITS) + (1 << place) + higher
            values[chosen] = 2 * values[chosen] + self.top.read(reader, context)
        width = np.maximum(lengths - 1 - _TOP_BITS, 0)
        return (values << width) | reader.read_raw(len(lengths), width)


def _known(values: np.ndarray, pass_: Pass, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the values `offset` steps along the axis from those of the pass, and a mask of those that exist."""
    length, step = values.shape[pass_.axis], pass_.step
    places = np.arange(step, length, 2 * step) + offset * step
    exists = (places >= 0) & (places < length)
    taken = np.take(values[_others(pass_)], np.where(exists, places, 0), axis=pass_.axis)
    return taken, exists.reshape(-1, *[1] * (values.ndim - pass_.axis - 1))


def _others(pass_: Pass) -> tuple[slice, ...]:
    """Return the places of the pass, with all places along its own axis."""
    return (*pass_.place[: pass_.axis], slice(None), *pass_.place[pass_.axis + 1 :])


def _guesses(values: np.ndarray, pass_: Pass) -> tuple[np.ndarray, np.ndarray]:
    """Return predictions from two neighbours, and from four weighted by (-1, 9, 9, -1) / 16; fewer at the edges."""
    left, _ = _known(values, pass_, -1)
    right, has_right = _known(values, pass_, 1)
    linear = np.where(has_right, (left + right) >> 1, left)
    far_left, has_far_left = _known(values, pass_, -3)
    far_right, has_far_right = _known(values, pass_, 3)
    cubic = (9 * (left + right) - far_left - far_right + 8) >> 4
    return linear, np.where(has_right & has_far_left & has_far_right, cubic, linear)


def _activity(values: np.ndarray, missing: np.ndarray, pass_: Pass) -> np.ndarray:
    """Return the expected bit length of the differences, from the known values and differences around them."""
    left, _ = _known(values, pass_, -1)
    right, has_right = _known(values, pass_, 1)
    before, _ = _known(missing, pass_, -1)
    after, _ = _known(missing, pass_, 1)
    around = np.where(has_right, np.abs(right - left) + before + after, 2 * before)
    return np.minimum(_bit_length(around), _ACTIVITIES - 1)


def _bit_length(values: np.ndarray) -> np.ndarray:
    """Return the bit lengths of non-negative integers below 2**53; 0 has length 0."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)
