"""Coding of quantised block transforms: which coefficients are likely zero, one, or more, is learned as they pass.

Coefficients go in waves: all of one sum of frequencies, first of the even blocks of the checkerboard, then of the odd
ones. Whatever a coefficient's context looks at was coded in an earlier wave, so a wave is a handful of array operations
in either direction. The context is the magnitude to be expected from lower frequencies of the block, lower frequencies
of its neighbours and, on odd blocks, the same frequency of its neighbours; and how high the frequency is.

The means of the blocks go first, as a small volume of their own.
"""

# q signed quantised coefficient, G blocks along an axis, B coefficients of a block along an axis

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from tinc.entropy import AdaptiveBits, BitReader, BitWriter
from tinc.interpolation import IntegerCoder

__all__ = ["LARGEST", "MAX_UNARY", "CoefficientCoder"]

LARGEST = 1 << 24
MAX_UNARY = 15
"""Magnitudes from here on are written as an Exp-Golomb code of the rest."""

_CAP = 40
"""Magnitudes count at most so much as neighbours."""
_BUCKETS = 24
_CLASSES = 8
# of the expected magnitude, in 1 / 2**8: lower frequencies one step and two steps away, the same frequency in
# neighbouring blocks (odd blocks only), and lower ones there
_EVEN_WEIGHTS = (128, 52, 0, 76)
_ODD_WEIGHTS = (100, 26, 104, 26)


def _thresholds() -> np.ndarray:
    """Return the lower bounds of the buckets: the first widths are 1 / 24, then each is a fifth of its bound."""
    bounds, bound = [], 4
    for _ in range(_BUCKETS - 1):
        bounds.append(bound)
        bound += max(8, bound // 5)
    return np.array(bounds)


_THRESHOLDS = _thresholds()
# the bucket of each expected magnitude up to the last threshold
_BUCKET_OF = np.searchsorted(_THRESHOLDS, np.arange(_THRESHOLDS[-1] + 1), side="right")


@dataclass(frozen=True)
class _Wave:
    """Coefficients that are coded together; all arrays have one entry for each."""

    source: np.ndarray
    """Index in the flat array of coefficients."""
    places: np.ndarray
    """Index in the flat padded array."""
    is_odd: bool
    per_axis: np.ndarray
    """2**8 / number of axes along which there is a lower frequency."""
    per_neighbour: np.ndarray
    """2**8 / number of neighbouring blocks."""
    frequency_class: np.ndarray


@dataclass(frozen=True)
class _Geometry:
    """Places of coefficients and of their neighbours, for one grid of blocks.

    The padded array has the frequencies first, so that the values that a wave reads lie together, and room for
    neighbours that do not exist.
    """

    padded: tuple[int, ...]
    inner: tuple[slice, ...]
    steps: tuple[int, ...]
    """Distances to the next frequency, by axis."""
    across: tuple[int, ...]
    """Distances to the neighbouring blocks, along axes of several blocks."""
    waves: tuple[_Wave, ...]


@lru_cache(maxsize=8)
def _geometry(grid: tuple[int, ...], block: tuple[int, ...]) -> _Geometry:
    axes = len(grid)
    margins = [int(g > 1) for g in grid]
    padded = (*(b + 2 for b in block), *(g + 2 * margin for g, margin in zip(grid, margins, strict=True)))
    strides = [math.prod(padded[axis + 1 :]) for axis in range(2 * axes)]
    inner = (*[slice(2, None)] * axes, *(slice(margin, margin + g) for g, margin in zip(grid, margins, strict=True)))
    index = np.indices(block + grid).reshape(2 * axes, -1)
    frequencies, blocks = index[:axes], index[axes:]
    places = np.arange(math.prod(padded)).reshape(padded)[inner].reshape(-1)
    source = np.ravel_multi_index((*blocks, *frequencies), grid + block)
    order = 2 * frequencies.sum(0) + blocks.sum(0) % 2
    lower = (frequencies > 0).sum(0)
    edges = np.array(grid)[:, None] - 1
    neighbours = ((blocks > 0).astype(int) + (blocks < edges)).sum(0)
    # 16 stands for a block's whole band, whatever its size
    radius = ((frequencies * 16 // np.array(block)[:, None]) ** 2).sum(0)
    classes = np.searchsorted([1, 3, 8, 20, 48, 110, 260], radius, side="right")
    steps = tuple(strides[:axes])
    beside = [stride for stride, margin in zip(strides[axes:], margins, strict=True) if margin]
    across = tuple(sign * stride for stride in beside for sign in (1, -1))
    by_wave = np.argsort(order, kind="stable")
    bounds = np.searchsorted(order[by_wave], np.arange(order.max() + 2))
    waves = []
    for first, last in pairwise(bounds.tolist()):
        chosen = by_wave[first:last]
        if first < last and order[chosen[0]] > 1:  # those below are the means
            per_axis, per_neighbour = (256 // np.maximum(each[chosen], 1) for each in (lower, neighbours))
            is_odd = bool(order[chosen[0]] % 2)
            waves.append(_Wave(source[chosen], places[chosen], is_odd, per_axis, per_neighbour, classes[chosen]))
    return _Geometry(padded, inner, steps, across, tuple(waves))


class CoefficientCoder:
    """Codes the coefficients of a grid of blocks, an array [G1, ..., Gk, B1, ..., Bk] of int64.

    One coder is for one stream, in one direction: its counts are those of what has passed.
    """

    def __init__(self, grid: tuple[int, ...], block: tuple[int, ...]) -> None:
        self.geometry = _geometry(grid, block)
        self.shape = grid + block
        buckets = np.arange(_BUCKETS)
        expected = np.concatenate([[2], _THRESHOLDS]) / 256
        self.is_nonzero = AdaptiveBits(np.repeat(_guess(0.9 * expected), _CLASSES))
        self.is_more = AdaptiveBits(np.repeat(_guess(0.45 * expected), 2))
        self.goes_on = AdaptiveBits(np.full(6 * (MAX_UNARY - 1), 36000))
        self.is_longer = AdaptiveBits(np.full(32, 32768))
        self.means = IntegerCoder()
        self._group = np.minimum(buckets // 4, 5)

    def write(self, writer: BitWriter, coefficients: np.ndarray) -> None:
        """Append all coefficients to the stream. Raises ValueError for magnitudes above 2**24."""
        if np.abs(coefficients).max(initial=0) > LARGEST:
            raise ValueError(f"coefficients reach {np.abs(coefficients).max()}; at most {LARGEST} can be coded")
        self.means.write(writer, _means(coefficients))
        flat = coefficients.reshape(-1)
        seen = self._seen(coefficients)
        for wave, bucket in self._expected(seen):
            self._write_wave(writer, wave, bucket, flat[wave.source])

    def read(self, reader: BitReader) -> np.ndarray:
        """Return the coefficients of a stream."""
        axes = len(self.shape) // 2
        means = self.means.read(reader, self.shape[:axes])
        coefficients = np.zeros(self.shape, dtype=np.int64)
        _means(coefficients)[...] = means
        flat = coefficients.reshape(-1)
        seen = np.zeros(math.prod(self.geometry.padded), dtype=np.int32)
        for wave, bucket in self._expected(seen):
            values = self._read_wave(reader, wave, bucket)
            flat[wave.source] = values
            seen[wave.places] = np.minimum(np.abs(values), _CAP)
        return coefficients

    def cost_table(self) -> np.ndarray:
        """Return what each magnitude costs in each context, by the counts of what has passed.

        Bits [contexts, MAX_UNARY + 1], sign included; magnitudes from MAX_UNARY on share the last column.
        """
        nonzero = self.is_nonzero.table().reshape(_BUCKETS, _CLASSES) / 65536
        more = self.is_more.table()[2 * np.arange(_BUCKETS), None] / 65536
        goes_on = self.goes_on.table().reshape(6, -1)[self._group, None] / 65536
        costs = np.empty((_BUCKETS, _CLASSES, MAX_UNARY + 1))
        costs[:, :, 0] = -np.log2(1 - nonzero)
        reached = 1 - np.log2(nonzero)
        costs[:, :, 1] = reached - np.log2(1 - more)
        reached = reached - np.log2(more)
        for level in range(2, MAX_UNARY):
            costs[:, :, level] = reached - np.log2(1 - goes_on[:, :, level - 2])
            reached = reached - np.log2(goes_on[:, :, level - 2])
        costs[:, :, MAX_UNARY] = reached
        return costs.reshape(-1, MAX_UNARY + 1)

    def contexts(self, coefficients: np.ndarray) -> np.ndarray:
        """Return the row of `cost_table` for each coefficient; they decide it together."""
        contexts = np.zeros(self.shape, dtype=np.int64)
        flat = contexts.reshape(-1)
        for wave, bucket in self._expected(self._seen(coefficients)):
            flat[wave.source] = bucket * _CLASSES + wave.frequency_class
        return contexts

    def _seen(self, coefficients: np.ndarray) -> np.ndarray:
        """Return the magnitudes that contexts look at: padded, capped, and without the means."""
        axes = len(self.shape) // 2
        seen = np.zeros(self.geometry.padded, dtype=np.int32)
        order = (*range(axes, 2 * axes), *range(axes))
        seen[self.geometry.inner] = np.minimum(np.abs(coefficients), _CAP).transpose(order)
        seen[tuple([2] * axes)] = 0
        return seen.reshape(-1)

    def _expected(self, seen: np.ndarray) -> Iterator[tuple[_Wave, np.ndarray]]:
        """Yield each wave with the buckets of the magnitudes that are to be expected in it.

        A reader enters a wave's magnitudes in `seen` before it asks for the next one.
        """
        steps, across, waves = self.geometry.steps, self.geometry.across, self.geometry.waves
        near = np.zeros_like(seen)
        for number, wave in enumerate(waves):
            if not number or not wave.is_odd or waves[number - 1].is_odd:
                # the lower frequencies of the even and the odd blocks are known now
                both = waves[number : number + 1 + (number + 1 < len(waves) and waves[number + 1].is_odd)]
                for other in both:
                    near[other.places] = sum(seen[other.places - step] for step in steps)
            places = wave.places
            one, two, same, low = _ODD_WEIGHTS if wave.is_odd else _EVEN_WEIGHTS
            far = sum(seen[places - 2 * step] for step in steps)
            below = sum(near[places + beside] for beside in across)
            expected = (one * near[places] + two * far + (low * below * wave.per_neighbour >> 8)) * wave.per_axis
            if wave.is_odd:
                expected = expected + same * sum(seen[places + beside] for beside in across) * wave.per_neighbour
            yield wave, _BUCKET_OF[np.minimum(expected >> 8, _THRESHOLDS[-1])]

    def _write_wave(self, writer: BitWriter, wave: _Wave, bucket: np.ndarray, values: np.ndarray) -> None:
        magnitudes, is_negative = np.abs(values), values < 0
        self.is_nonzero.write(writer, bucket * _CLASSES + wave.frequency_class, (magnitudes > 0).astype(np.int64))
        chosen = magnitudes > 0
        bucket, rest = bucket[chosen], magnitudes[chosen]
        writer.write_raw(is_negative[chosen].astype(np.int64), 1)
        self.is_more.write(writer, 2 * bucket + wave.is_odd, (rest > 1).astype(np.int64))
        group, rest = self._group[bucket[rest > 1]], rest[rest > 1]
        for level in range(2, MAX_UNARY):
            if not rest.size:
                return
            self.goes_on.write(writer, group * (MAX_UNARY - 1) + level - 2, (rest > level).astype(np.int64))
            group, rest = group[rest > level], rest[rest > level]
        self._write_rest(writer, rest - MAX_UNARY + 1)

    def _read_wave(self, reader: BitReader, wave: _Wave, bucket: np.ndarray) -> np.ndarray:
        values = self.is_nonzero.read(reader, bucket * _CLASSES + wave.frequency_class)
        (nonzero,) = np.nonzero(values)
        is_negative = reader.read_raw(len(nonzero), 1)
        more = self.is_more.read(reader, 2 * bucket[nonzero] + wave.is_odd)
        rest = nonzero[more > 0]
        values[rest] = 2
        group = self._group[bucket[rest]]
        for level in range(2, MAX_UNARY):
            if not rest.size:
                break
            going = self.goes_on.read(reader, group * (MAX_UNARY - 1) + level - 2) > 0
            group, rest = group[going], rest[going]
            values[rest] = level + 1
        if rest.size:
            values[rest] = self._read_rest(reader, len(rest)) + MAX_UNARY - 1
        values[nonzero] *= 1 - 2 * is_negative
        return values

    def _write_rest(self, writer: BitWriter, values: np.ndarray) -> None:
        """Append values from 1 on, as an Exp-Golomb code whose lengths are learned."""
        lengths = np.floor(np.log2(values)).astype(np.int64)
        for length in range(int(lengths.max(initial=0)) + 1):
            left = lengths[lengths >= length]
            self.is_longer.write(writer, np.full(left.shape, length), (left > length).astype(np.int64))
        writer.write_raw(values, lengths)

    def _read_rest(self, reader: BitReader, count: int) -> np.ndarray:
        lengths = np.zeros(count, dtype=np.int64)
        (left,) = np.nonzero(np.ones(count))
        for length in range(24):
            left = left[self.is_longer.read(reader, np.full(left.shape, length)) > 0]
            if not left.size:
                break
            lengths[left] = length + 1
        return (1 << lengths) | reader.read_raw(count, lengths)


def _means(coefficients: np.ndarray) -> np.ndarray:
    """Return a view of the lowest frequencies."""
    key: Any = (..., *[0] * (coefficients.ndim // 2))
    return coefficients[key]  # type: ignore[no-any-return]


def _guess(mean: np.ndarray) -> np.ndarray:
    """Return the probability out of 2**16 that a geometric magnitude of this mean is not its least."""
    return np.round(65536 * mean / (1 + mean)).astype(np.int64)
