"""Encoding of a volume at any step: fill, transform, choice of levels, and coding, tile by tile."""

from dataclasses import dataclass

import numpy as np

from tinc.entropy import BitRecorder, BitWriter
from tinc.residual.blocks import Blocks
from tinc.residual.coefficients import CoefficientCoder
from tinc.residual.fill import continue_blocks, spread_inside
from tinc.residual.mask import MaskCoder
from tinc.residual.quantizer import RATE, Quantizer, choose_levels, fit_points, round_down
from tinc.residual.transform import forward_blocks, inverse_blocks, split_blocks

__all__ = ["EncodedResidual", "ResidualEncoder"]


@dataclass(frozen=True)
class EncodedResidual:
    """The levels of all tiles, their streams, and the error that they leave."""

    quantizer: Quantizer
    levels: tuple[np.ndarray, ...]
    streams: tuple[bytes, ...]
    squared_error: float
    """Sum over coefficients, in squared working units: nearly that over voxels."""

    @property
    def size(self) -> int:
        """Bytes of all streams."""
        return sum(map(len, self.streams))

    def loss(self, step: float) -> float:
        """Return error + rate * bits."""
        return self.squared_error + 8 * RATE * step**2 * self.size


class ResidualEncoder:
    """Encodes one volume at any number of steps; the transform is done once."""

    def __init__(self, residual: np.ndarray, blocks: Blocks, mask: np.ndarray | None = None) -> None:
        """`residual` is in working units, [channels, ...]; its values count only where `mask` is true."""
        self.blocks = blocks
        if mask is not None:
            residual = spread_inside(residual, mask)
        tiles = range(blocks.num_tiles)
        self.voxels = [self._padded(residual, tile) for tile in tiles]
        self.masks = None if mask is None else [self._padded(mask, tile) for tile in tiles]
        self.mask = mask
        self.coefficients = [forward_blocks(tile) for tile in self.voxels]
        self._filled_for = 0.0
        self._costs: dict[int, tuple[float, np.ndarray]] = {}
        self._masks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def encode(self, step: float) -> EncodedResidual:
        """Return the streams of all tiles at a step in working units."""
        self._fill(step)
        quantizer = Quantizer.nearest(step)
        tiles = range(self.blocks.num_tiles)
        levels, streams = zip(*(self._encode_tile(tile, quantizer.step) for tile in tiles), strict=True)
        quantizer = fit_points(quantizer, self.coefficients, levels)
        error = sum(map(self._squared_error, tiles, map(quantizer.restore, levels)))
        return EncodedResidual(quantizer, levels, streams, error)

    def _padded(self, volume: np.ndarray, tile: int) -> np.ndarray:
        part = volume[self.blocks.box(tile)]
        block = self.blocks.block
        margin = [(0, g * b - n) for g, b, n in zip(self.blocks.grid(tile), block, part.shape, strict=True)]
        return split_blocks(np.pad(part, margin, mode="edge"), block)

    def _fill(self, step: float) -> None:
        """Continue blocks at the border of the mask so that they are cheap at this step."""
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

    def _encode_tile(self, tile: int, step: float) -> tuple[np.ndarray, bytes]:
        scaled = self.coefficients[tile] / step
        levels = round_down(scaled)
        axes = len(self.blocks.block)
        grid, block = scaled.shape[:axes], scaled.shape[axes:]
        learned_at, costs = self._costs.get(tile, (0.0, np.empty(0)))
        passes = 1
        if not learned_at / 1.15 < step < 1.15 * learned_at:  # costs of a step that is too far away are learned anew
            coder = CoefficientCoder(grid, block)
            coder.write(BitWriter(), levels)
            costs, passes = coder.cost_table(), 2
        for _ in range(passes):
            for _ in range(2):
                levels = choose_levels(scaled, costs, CoefficientCoder(grid, block).contexts(levels))
            coder, writer = CoefficientCoder(grid, block), BitWriter()
            if self.mask is not None:
                writer.write(*self._mask_bits(tile))
            coder.write(writer, levels)
            costs = coder.cost_table()
        self._costs[tile] = (step, costs)
        return levels, writer.finish()

    def _mask_bits(self, tile: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the bits of a tile's mask and their probabilities, which are the same at every step."""
        if tile not in self._masks:
            assert self.mask is not None
            recorder = BitRecorder()
            MaskCoder().write(recorder, self.mask[self.blocks.box(tile)])
            self._masks[tile] = recorder.recorded()
        return self._masks[tile]

    def _squared_error(self, tile: int, coefficients: np.ndarray) -> float:
        if self.masks is None:  # the transform is orthonormal
            return float(np.square(self.coefficients[tile] - coefficients).sum())
        return float(np.square((self.voxels[tile] - inverse_blocks(coefficients)) * self.masks[tile]).sum())
