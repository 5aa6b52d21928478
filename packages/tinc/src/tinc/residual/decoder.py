"""Decoding of a tile, and of the part of it that a region needs."""

from collections.abc import Sequence

import numpy as np

from tinc.entropy import BitReader
from tinc.residual.blocks import Blocks
from tinc.residual.coefficients import CoefficientCoder
from tinc.residual.mask import MaskCoder
from tinc.residual.quantizer import Quantizer
from tinc.residual.transform import inverse_blocks, join_blocks

__all__ = ["decode_tile", "restore_region"]


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
    """Return the values of a tile within a region, and their place in the region.

    Args:
        blocks: the cut of the volume
        quantizer: the quantiser of the layer
        tile: number of the tile, which the region touches
        levels: the tile's levels from `decode_tile`
        region: a range of cells for each axis
        steps: voxels of a cell by axis; they divide the block
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
