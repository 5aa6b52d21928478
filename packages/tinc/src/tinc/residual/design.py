"""The choice of blocks, and of a step to begin with, for a volume and a number of bytes."""

import math
from collections.abc import Sequence

import numpy as np

from tinc.residual.blocks import Blocks, cut
from tinc.residual.encoder import ResidualEncoder

__all__ = ["choose_blocks"]

SAMPLE_VOXELS = 1 << 18
MAX_BLOCK_VOXELS = 1 << 15
BITS_PER_LEVEL = 6.5
"""Typical cost of a level that is not zero, with the zeros around it."""


def choose_blocks(residual: np.ndarray, target: float, mask: np.ndarray | None = None) -> tuple[Blocks, float]:
    """Return the blocks with the least error + rate * bits at about `target` bytes, and a step for that size.

    Axis by axis, blocks are halved and doubled as long as it pays, on a sample from the middle of the volume. The step
    does not depend on the mask.
    """
    extent = residual.shape
    box = _middle(extent)
    part = residual[box]
    inside = None if mask is None else mask[box]
    block = [min(8, 1 << (size - 1).bit_length()) for size in part.shape[1:]]
    step = _step_for(ResidualEncoder(residual, cut(extent, block)), target)
    losses: dict[tuple[int, ...], float] = {}

    def loss(block: Sequence[int]) -> float:
        key = tuple(block)
        if key not in losses:
            losses[key] = ResidualEncoder(part, cut(part.shape, key), inside).encode(step).loss(step)
        return losses[key]

    for axis in range(len(block)):
        for factor in (0.5, 2.0):
            while True:
                size = int(block[axis] * factor)
                tried = [*block[:axis], size, *block[axis + 1 :]]
                fits = 2 <= size <= min(32, 1 << (part.shape[axis + 1] - 1).bit_length())
                if not fits or math.prod(tried) > MAX_BLOCK_VOXELS or loss(tried) >= loss(block):
                    break
                block = tried
    return cut(extent, block), step


def _middle(extent: tuple[int, ...]) -> tuple[slice, ...]:
    """Return a box of at most about 2**18 voxels in the middle."""
    sizes = list(extent)
    while math.prod(sizes) > SAMPLE_VOXELS:
        axis = max(range(1, len(sizes)), key=lambda axis: sizes[axis])
        sizes[axis] = -(-sizes[axis] // 2)
    return tuple(slice((n - size) // 2, (n - size) // 2 + size) for n, size in zip(extent, sizes, strict=True))


def _step_for(encoder: ResidualEncoder, target: float) -> float:
    """Return a step at which the levels that are not zero take about `target` bytes."""
    magnitudes = np.abs(np.concatenate([tile.reshape(-1) for tile in encoder.coefficients]))
    nonzero = min(int(8 * target / BITS_PER_LEVEL), magnitudes.size - 1)
    return max(float(np.partition(magnitudes, -nonzero - 1)[-nonzero - 1]) / 0.66, 1.0)
