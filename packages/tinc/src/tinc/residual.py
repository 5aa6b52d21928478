"""The residual layer: what the tree leaves over, as blocks of quantised cosine transforms in tiles of their own.

A tile is a box of blocks with a stream of its own, so that a region is decoded from its tiles alone. The quantiser
chooses, for each coefficient, the level that is best in error + rate * bits, with the bits that it will really cost.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from tinc.coefficients import LARGEST, MAX_UNARY, CoefficientCoder
from tinc.entropy import BitReader, BitRecorder, BitWriter
from tinc.fill import continue_blocks, spread_inside
from tinc.mask import MaskCoder
from tinc.transform import forward_blocks, inverse_blocks, join_blocks, split_blocks

__all__ = ["Blocks", "EncodedResidual", "Quantizer", "ResidualEncoder", "decode_tile", "restore_region"]

MANTISSA_BITS = 10
RATE = 0.12
"""Squared steps that a bit is worth."""
MAX_COEFFICIENT = 1 << 33
"""Of working units; more would not be summed exactly."""
_POINT_BITS = 6


@dataclass(frozen=True)
class Blocks:
    """How a volume [channels, ...] is cut; every axis counts, the channels' too."""

    extent: tuple[int, ...]
    """Of the volume."""
    block: tuple[int, ...]
    """Voxels of a block by axis: 1, 2, 4, 8, 16 or 32."""
    tile: tuple[int, ...]
    """Blocks of a tile by axis."""

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tiles by axis."""
        return tuple(-(-n // (b * t)) for n, b, t in zip(self.extent, self.block, self.tile, strict=True))

    @property
    def num_tiles(self) -> int:
        """Tiles in all, in row-major order."""
        return math.prod(self.counts)

    def grid(self, tile: int) -> tuple[int, ...]:
        """Return the blocks of a tile by axis; the last tile of an axis may have fewer."""
        return tuple(
            min(t, -(-n // b) - place * t)
            for place, n, b, t in zip(self.place(tile), self.extent, self.block, self.tile, strict=True)
        )

    def place(self, tile: int) -> tuple[int, ...]:
        """Return the place of a tile among the tiles."""
        return tuple(int(each) for each in np.unravel_index(tile, self.counts))

    def box(self, tile: int) -> tuple[slice, ...]:
        """Return what a tile covers of the volume, without the margin that fills its last blocks."""
        sizes = [b * t for b, t in zip(self.block, self.tile, strict=True)]
        return tuple(
            slice(place * size, min((place + 1) * size, n))
            for place, size, n in zip(self.place(tile), sizes, self.extent, strict=True)
        )

    def touching(self, region: Sequence[slice]) -> Iterator[int]:
        """Yield the tiles that a region touches."""
        sizes = [b * t for b, t in zip(self.block, self.tile, strict=True)]
        ranges = [range(part.start // s, -(-part.stop // s)) for part, s in zip(region, sizes, strict=True)]
        for place in product(*ranges):
            yield int(np.ravel_multi_index(place, self.counts))


@dataclass(frozen=True)
class Quantizer:
    """A level q is sign(q) (64 |q| + point) mantissa 2**exponent, with a point for |q| = 1, for 2, and for more."""

    mantissa: int
    exponent: int
    points: tuple[int, int, int] = (0, 0, 0)

    @property
    def step(self) -> float:
        """Distance of two levels in working units."""
        return math.ldexp(self.mantissa, self.exponent + _POINT_BITS)

    @staticmethod
    def nearest(step: float) -> "Quantizer":
        """Return the quantiser whose step is nearest."""
        fraction, exponent = math.frexp(step)
        mantissa = min(round(math.ldexp(fraction, MANTISSA_BITS)), (1 << MANTISSA_BITS) - 1)
        return Quantizer(mantissa, exponent - MANTISSA_BITS - _POINT_BITS)

    def restore(self, levels: np.ndarray) -> np.ndarray:
        """Return the coefficients of levels, in working units, as int64."""
        magnitudes = np.minimum(np.abs(levels), LARGEST)
        points = np.array((0, *self.points), dtype=np.int64)[np.minimum(magnitudes, 3)]
        values = ((magnitudes << _POINT_BITS) + points) * self.mantissa
        if self.exponent >= 0:
            values <<= self.exponent
        else:
            values = (values + ((1 << -self.exponent) >> 1)) >> -self.exponent
        return np.sign(levels) * np.minimum(values, MAX_COEFFICIENT)


@dataclass(frozen=True)
class EncodedResidual:
    """Streams of all tiles, and what they leave over."""

    quantizer: Quantizer
    streams: tuple[bytes, ...]
    squared_error: float
    """Sum over coefficients, in squared working units: nearly that over voxels."""

    @property
    def size(self) -> int:
        """Bytes of all streams."""
        return sum(map(len, self.streams))


class ResidualEncoder:
    """Encodes one volume at any number of steps; the transform is done once."""

    def __init__(self, residual: np.ndarray, blocks: Blocks, mask: np.ndarray | None = None) -> None:
        """`residual` is in working units, [channels, ...]; only where `mask` is true does it matter."""
        self.blocks = blocks
        if mask is not None:
            residual = spread_inside(residual, mask)
        tiles = range(blocks.num_tiles)
        self.voxels = [self._padded(residual, tile) for tile in tiles]
        self.masks = None if mask is None else [self._padded(mask, tile) for tile in tiles]
        self.mask = mask
        self.coefficients = [forward_blocks(each) for each in self.voxels]
        self._filled_for = 0.0
        self._costs: dict[int, tuple[float, np.ndarray]] = {}
        self._masks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _padded(self, volume: np.ndarray, tile: int) -> np.ndarray:
        part = volume[self.blocks.box(tile)]
        block = self.blocks.block
        margin = [(0, g * b - n) for g, b, n in zip(self.blocks.grid(tile), block, part.shape, strict=True)]
        return split_blocks(np.pad(part, margin, mode="edge"), block)

    def _fill(self, step: float) -> None:
        """Continue blocks at the border of the mask as suits the step."""
        if self.masks is None or self._filled_for / 1.03 < step < 1.03 * self._filled_for:
            return
        self._filled_for = step
        axes = len(self.blocks.block)
        inner = tuple(range(axes, 2 * axes))
        for tile, (voxels, inside) in enumerate(zip(self.voxels, self.masks, strict=True)):
            border = inside.any(inner) & ~inside.all(inner)
            if border.any():
                filled = voxels.copy()
                filled[border] = continue_blocks(voxels[border], inside[border], step)
                self.coefficients[tile] = forward_blocks(filled)

    def encode(self, step: float) -> EncodedResidual:
        """Return the streams of all tiles at a step in working units."""
        self._fill(step)
        quantizer = Quantizer.nearest(step)
        tiles = range(self.blocks.num_tiles)
        levels, streams = zip(*(self._encode_tile(tile, quantizer.step) for tile in tiles), strict=True)
        quantizer = _with_points(quantizer, self.coefficients, levels)
        error = sum(map(self._squared_error, tiles, map(quantizer.restore, levels)))
        return EncodedResidual(quantizer, streams, error)

    def _mask_bits(self, tile: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the bits of a tile's mask and their probabilities, which no step changes."""
        if tile not in self._masks:
            assert self.mask is not None
            recorder = BitRecorder()
            MaskCoder().write(recorder, self.mask[self.blocks.box(tile)])
            self._masks[tile] = recorder.recorded()
        return self._masks[tile]

    def _squared_error(self, tile: int, coefficients: np.ndarray) -> float:
        if self.masks is None:  # the transform keeps lengths
            return float(np.square(self.coefficients[tile] - coefficients).sum())
        return float(np.square((self.voxels[tile] - inverse_blocks(coefficients)) * self.masks[tile]).sum())

    def _encode_tile(self, tile: int, step: float) -> tuple[np.ndarray, bytes]:
        scaled = self.coefficients[tile] / step
        levels = (np.sign(scaled) * np.minimum(np.floor(np.abs(scaled) + 0.34), LARGEST - 1)).astype(np.int64)
        axes = len(self.blocks.block)
        grid, block = scaled.shape[:axes], scaled.shape[axes:]
        learned_at, costs = self._costs.get(tile, (0.0, np.empty(0)))
        passes = 1
        if not learned_at / 1.15 < step < 1.15 * learned_at:  # at such steps bits may cost otherwise
            coder = CoefficientCoder(grid, block)
            coder.write(BitWriter(), levels)
            costs, passes = coder.cost_table(), 2
        for _ in range(passes):
            for _ in range(2):
                levels = _choose_levels(scaled, costs, CoefficientCoder(grid, block).contexts(levels))
            coder, writer = CoefficientCoder(grid, block), BitWriter()
            if self.mask is not None:
                writer.write(*self._mask_bits(tile))
            coder.write(writer, levels)
            costs = coder.cost_table()
        self._costs[tile] = (step, costs)
        return levels, writer.finish()


def _choose_levels(scaled: np.ndarray, costs: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    """Return for each coefficient, in steps, the best of the nearest level, the one below it and zero."""
    magnitudes = np.abs(scaled)
    nearest = np.minimum(np.floor(magnitudes + 0.5), LARGEST - 1).astype(np.int64)
    tried = np.minimum(nearest, MAX_UNARY - 1)
    best = np.full(scaled.shape, np.inf)
    chosen = np.zeros_like(tried)
    for candidate in (tried, np.maximum(tried - 1, 0), np.zeros_like(tried)):
        loss = np.square(magnitudes - candidate) + RATE * costs[contexts, candidate]
        chosen = np.where(loss < best, candidate, chosen)
        best = np.minimum(loss, best)
    chosen = np.where(nearest < MAX_UNARY, chosen, nearest)
    # the means are coded otherwise
    means = (..., *[0] * (scaled.ndim // 2))
    chosen[means] = nearest[means]
    return np.where(scaled < 0, -chosen, chosen)


def _with_points(quantizer: Quantizer, coefficients: Sequence[np.ndarray], levels: Sequence[np.ndarray]) -> Quantizer:
    """Put each level where the mean of its coefficients is."""
    sums, counts = np.zeros(4), np.zeros(4)
    for values, level in zip(coefficients, levels, strict=True):
        (chosen,) = np.nonzero(level.reshape(-1))
        magnitudes = np.abs(level.reshape(-1)[chosen])
        rest = np.abs(values.reshape(-1)[chosen]) / quantizer.step - magnitudes
        kind = np.minimum(magnitudes, 3)
        sums += np.bincount(kind, rest, minlength=4)
        counts += np.bincount(kind, minlength=4)
    means = np.rint(sums / np.maximum(counts, 1) * (1 << _POINT_BITS)).clip(-31, 31).astype(int)
    return Quantizer(quantizer.mantissa, quantizer.exponent, tuple(means[1:].tolist()))


def decode_tile(blocks: Blocks, tile: int, stream: bytes, *, has_mask: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the levels of a tile as blocks [G1, ..., Gk, B1, ..., Bk], and its mask [channels, ...]."""
    reader = BitReader(stream)
    mask = None
    if has_mask:
        mask = MaskCoder().read(reader, tuple(part.stop - part.start for part in blocks.box(tile)))
    return CoefficientCoder(blocks.grid(tile), blocks.block).read(reader), mask


def restore_region(
    blocks: Blocks, quantizer: Quantizer, tile: int, levels: np.ndarray, region: Sequence[slice], steps: Sequence[int]
) -> tuple[np.ndarray, tuple[slice, ...]]:
    """Return the values of a tile within a region, and where in the region they lie.

    Along each axis the region counts cells of `steps` voxels, which divide the block.
    """
    chosen, inside, target = [], [], []
    for axis, (part, block, step) in enumerate(zip(region, blocks.block, steps, strict=True)):
        start = blocks.place(tile)[axis] * blocks.tile[axis] * block // step
        cells = block // step
        low = max(part.start, start)
        high = min(part.stop, start + levels.shape[axis] * cells)
        first, last = (low - start) // cells, -(-(high - start) // cells)
        chosen.append(slice(first, last))
        inside.append(slice(low - start - first * cells, high - start - first * cells))
        target.append(slice(low - part.start, high - part.start))
    low_frequencies = tuple(slice(block // step) for block, step in zip(blocks.block, steps, strict=True))
    coefficients = quantizer.restore(levels[(*chosen, *low_frequencies)])
    return join_blocks(inverse_blocks(coefficients, steps))[tuple(inside)], tuple(target)
