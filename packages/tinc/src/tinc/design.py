"""Which tree, which blocks and which tiles suit a volume and a number of bytes."""

import math
from collections.abc import Sequence

import numpy as np

from tinc.residual import RATE, Blocks, ResidualEncoder
from tinc.tree import TreeShape

__all__ = ["choose_blocks", "cut", "design_tree", "fit_widths", "leaf_splits", "tree_share"]

TILE_VOXELS = 1 << 19
SAMPLE_VOXELS = 1 << 18
MAX_BLOCK_VOXELS = 1 << 15
BITS_PER_WEIGHT = 5.5
"""What weights come to after training with rounding; the training steers to the bytes whatever they are."""
BITS_PER_LEVEL = 6.5
"""What a coefficient that is not zero comes to, with the zeros around it."""
_CONSTANT_BYTES = 1
MAX_LEAVES = 4096


def tree_share(target: float, voxels: int) -> float:
    """Return how many bytes of `target` to spend on the tree, beside a residual layer.

    On microscopy and MRI volumes a tree of more than a sixteenth of a bit a voxel takes from the residual layer what it
    does not give back.
    """
    return min(0.4 * target, voxels / 128)


def design_tree(extent: Sequence[int], channels: int, budget: float, constant: np.ndarray | None = None) -> TreeShape:
    """Return the tree whose weights will take about `budget` bytes.

    `constant` says, for a shape with this many leaves, which of them are constant; see `leaf_splits`.
    """
    active = () if constant is None or not constant.any() else tuple((~constant).tolist())
    return fit_widths(extent, channels, leaf_splits(extent, budget), active, budget)


def fit_widths(
    extent: Sequence[int], channels: int, splits: tuple[tuple[int, ...], ...], active: tuple[bool, ...], budget: float
) -> TreeShape:
    """Return the widest tree of these splits whose weights take about `budget` bytes."""
    constants = len(active) - sum(active)
    weights = 8 * (budget - 4 * (len(splits) + 4) - _CONSTANT_BYTES * constants)
    best = None
    for width in range(4, 129):
        shape = TreeShape(tuple(extent), splits, _widths(width, len(splits), channels), active)
        if best is not None and shape.num_weights * BITS_PER_WEIGHT > weights:
            break
        best = shape
    assert best is not None
    return best


def _widths(width: int, levels: int, channels: int) -> tuple[tuple[int, ...], ...]:
    trunk = (width, width, round(0.78 * width))
    middle = [(round(0.66 * width),)] * max(levels - 2, 0)
    leaf = (round(0.55 * width), round(0.4 * width)) if width >= 22 else (max(round(0.32 * width), 2),)
    if levels == 1:
        return ((*trunk, channels),)
    return (trunk, *middle, (*leaf, channels))


def leaf_splits(extent: Sequence[int], budget: float) -> tuple[tuple[int, ...], ...]:
    """Return the splits by level: a leaf for each kilobyte, at least four; the longest axes are halved first."""
    wanted = min(1 << max(2, round(math.log2(max(budget, 1) / 1024))), MAX_LEAVES)
    sizes, parts = list(extent), [1] * len(extent)
    levels = [tuple(parts)]
    leaves = 1
    while leaves < wanted:
        split = [1] * len(extent)
        # a level has four children where it can
        for _ in range(2):
            axis = max(range(len(sizes)), key=lambda axis: sizes[axis])
            if sizes[axis] < 16 or leaves * math.prod(split) >= wanted:
                break
            sizes[axis] = -(-sizes[axis] // 2)
            split[axis] *= 2
        if math.prod(split) == 1:
            break
        leaves *= math.prod(split)
        levels.append(tuple(split))
    return tuple(levels)


def cut(extent: tuple[int, ...], block: Sequence[int]) -> Blocks:
    """Return tiles of about 2**19 voxels, near to cubes, for blocks of these sizes along the axes after channels."""
    counts = [-(-size // b) for size, b in zip(extent[1:], block, strict=True)]
    tile, channels = list(counts), extent[0]
    while channels * math.prod(t * b for t, b in zip(tile, block, strict=True)) > TILE_VOXELS:
        axis = max(range(len(tile)), key=lambda axis: (tile[axis] > 1, tile[axis] * block[axis]))
        if tile[axis] > 1:
            tile[axis] = -(-tile[axis] // 2)
        elif channels > 1:
            channels = -(-channels // 2)
        else:
            break
    return Blocks(extent, (1, *block), (channels, *tile))


def choose_blocks(residual: np.ndarray, target: float, mask: np.ndarray | None = None) -> tuple[Blocks, float]:
    """Return the blocks with the least error + rate * bits at about `target` bytes, and a step for that.

    Axis by axis, blocks are halved and doubled as long as it pays, on a sample in the middle. The step does not depend
    on the mask.
    """
    extent = residual.shape
    box = _sample(extent)
    part = residual[box]
    inside = None if mask is None else mask[box]
    block = [min(8, 1 << (size - 1).bit_length()) for size in part.shape[1:]]
    step = _step_for(ResidualEncoder(residual, cut(extent, block)), target)
    costs: dict[tuple[int, ...], float] = {}

    def cost(block: Sequence[int]) -> float:
        key = tuple(block)
        if key not in costs:
            encoded = ResidualEncoder(part, cut(part.shape, key), inside).encode(step)
            costs[key] = encoded.squared_error + 8 * RATE * step**2 * encoded.size
        return costs[key]

    for axis in range(len(block)):
        for factor in (0.5, 2.0):
            while True:
                size = int(block[axis] * factor)
                tried = [*block[:axis], size, *block[axis + 1 :]]
                fits = 2 <= size <= min(32, 1 << (part.shape[axis + 1] - 1).bit_length())
                if not fits or math.prod(tried) > MAX_BLOCK_VOXELS or cost(tried) >= cost(block):
                    break
                block = tried
    return cut(extent, block), step


def _sample(extent: tuple[int, ...]) -> tuple[slice, ...]:
    """Return a box in the middle of at most about 2**18 voxels."""
    sizes = list(extent)
    while math.prod(sizes) > SAMPLE_VOXELS:
        axis = max(range(1, len(sizes)), key=lambda axis: sizes[axis])
        sizes[axis] = -(-sizes[axis] // 2)
    return tuple(slice((n - size) // 2, (n - size) // 2 + size) for n, size in zip(extent, sizes, strict=True))


def _step_for(encoder: ResidualEncoder, target: float) -> float:
    """Return a step that comes near to `target` bytes: about so many bits go to each level that is not zero."""
    magnitudes = np.abs(np.concatenate([each.reshape(-1) for each in encoder.coefficients]))
    nonzero = min(int(8 * target / BITS_PER_LEVEL), magnitudes.size - 1)
    return max(float(np.partition(magnitudes, -nonzero - 1)[-nonzero - 1]) / 0.66, 1.0)
