"""Lossless coding of integer arrays: from coarse to fine, each value is guessed from those around it.

First come the values on a coarse lattice, then those halfway between, axis by axis, until all are there. A pass fills
every other place along one axis; it guesses by two or by four known values on that axis, whichever its writer found
nearer, and codes what is missing. All places of a pass are coded together, so it is array operations both ways.
"""

# a the axis of a pass, s its step: places i * s with odd i are filled from those with even i

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tinc.entropy import AdaptiveBits, BitReader, BitWriter

__all__ = ["MAX_BITS", "IntegerCoder", "Pass", "passes"]

MAX_BITS = 40
"""Magnitudes of values are below 2**40, and so are those of what is missing from a guess."""
_ACTIVITIES = 42
_TOP_BITS = 2
"""Below the leading one, so many bits are learned; the others are as good as random."""


@dataclass(frozen=True)
class Pass:
    """What is filled at once."""

    axis: int
    step: int
    place: tuple[slice, ...]
    """Of the values to be coded."""

    def grid(self, axis: int) -> int:
        """Return the distance of known values along an axis."""
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

    One coder is for one stream, in one direction: its counts are those of what has passed.
    """

    def __init__(self) -> None:
        activity, length = np.divmod(np.arange(_ACTIVITIES * (MAX_BITS + 2)), MAX_BITS + 2)
        # a value is about as long as its neighbourhood says
        self.is_longer = AdaptiveBits(np.where(length < activity - 1, 57000, np.where(length < activity, 40000, 16000)))
        self.top = AdaptiveBits(np.full((MAX_BITS + 2) << _TOP_BITS, 30000))

    def write(self, writer: BitWriter, values: np.ndarray) -> None:
        """Append an array to the stream."""
        self._write_rest(writer, values.reshape(-1)[:1], np.zeros(1, dtype=np.int64))
        missing = np.zeros_like(values)
        for each in passes(values.shape):
            linear, cubic = _guesses(values, each)
            target = values[each.place]
            is_cubic = int(np.abs(target - cubic).sum() < np.abs(target - linear).sum())
            writer.write_raw(np.array([is_cubic]), 1)
            rest = target - (cubic if is_cubic else linear)
            self._write_rest(writer, rest.reshape(-1), _activity(values, missing, each).reshape(-1))
            missing[each.place] = np.abs(rest)

    def read(self, reader: BitReader, shape: tuple[int, ...]) -> np.ndarray:
        """Return the array of a stream."""
        values, missing = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        values.reshape(-1)[:1] = self._read_rest(reader, np.zeros(1, dtype=np.int64))
        for each in passes(shape):
            guess = _guesses(values, each)[int(reader.read_raw(1, 1)[0])]
            activity = _activity(values, missing, each)
            rest = self._read_rest(reader, activity.reshape(-1)).reshape(activity.shape)
            values[each.place] = guess + rest
            missing[each.place] = np.abs(rest)
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


def _known(values: np.ndarray, each: Pass, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the values `offset` steps along the axis from those of the pass, and which of them exist."""
    length, step = values.shape[each.axis], each.step
    places = np.arange(step, length, 2 * step) + offset * step
    exists = (places >= 0) & (places < length)
    taken = np.take(values[_others(each)], np.where(exists, places, 0), axis=each.axis)
    return taken, exists.reshape(-1, *[1] * (values.ndim - each.axis - 1))


def _others(each: Pass) -> tuple[slice, ...]:
    """Return the places of the pass along all axes but its own."""
    return (*each.place[: each.axis], slice(None), *each.place[each.axis + 1 :])


def _guesses(values: np.ndarray, each: Pass) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of two neighbours, and of four (-1, 9, 9, -1) / 16; where some do not exist, of fewer."""
    left, _ = _known(values, each, -1)
    right, has_right = _known(values, each, 1)
    linear = np.where(has_right, (left + right) >> 1, left)
    far_left, has_far_left = _known(values, each, -3)
    far_right, has_far_right = _known(values, each, 3)
    cubic = (9 * (left + right) - far_left - far_right + 8) >> 4
    return linear, np.where(has_right & has_far_left & has_far_right, cubic, linear)


def _activity(values: np.ndarray, missing: np.ndarray, each: Pass) -> np.ndarray:
    """Return how long what is missing will be: twice the bit length of what is around, and whether that is in doubt."""
    left, _ = _known(values, each, -1)
    right, has_right = _known(values, each, 1)
    before, _ = _known(missing, each, -1)
    after, _ = _known(missing, each, 1)
    around = np.where(has_right, np.abs(right - left) + before + after, 2 * before)
    return np.minimum(_bit_length(around), _ACTIVITIES - 1)


def _bit_length(values: np.ndarray) -> np.ndarray:
    """Return the bits of non-negative integers below 2**53: 0 for 0."""
    return np.frexp(values.astype(np.float64))[1].astype(np.int64)
