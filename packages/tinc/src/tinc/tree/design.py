"""The choice of a tree's shape for a volume and a number of bytes."""

import math
from collections.abc import Sequence

import numpy as np

from tinc.tree.shape import TreeShape

__all__ = ["design_tree", "fit_widths", "leaf_splits", "tree_share"]

BITS_PER_WEIGHT = 5.5
"""Typical cost of a weight after training; whatever it is, the training steers to the number of bytes."""
MAX_LEAVES = 4096
_CONSTANT_BYTES = 1


def tree_share(target: float, voxels: int) -> float:
    """Return how many bytes of `target` to spend on the tree where a residual layer follows.

    On microscopy and MRI volumes a tree of more than a sixteenth of a bit a voxel costs the residual layer more than it
    gains.
    """
    return min(0.4 * target, voxels / 128)


def design_tree(extent: Sequence[int], channels: int, budget: float, constant: np.ndarray | None = None) -> TreeShape:
    """Return the shape of a tree whose weights take about `budget` bytes.

    `constant` marks the leaves of `leaf_splits` that are constant, in the order of `TreeShape.leaves`.
    """
    active = () if constant is None or not constant.any() else tuple((~constant).tolist())
    return fit_widths(extent, channels, leaf_splits(extent, budget), active, budget)


def fit_widths(
    extent: Sequence[int], channels: int, splits: tuple[tuple[int, ...], ...], active: tuple[bool, ...], budget: float
) -> TreeShape:
    """Return the widest tree with these splits whose weights take about `budget` bytes.

    Args:
        extent: voxels of the volume by axis, without channels
        channels: values of a voxel
        splits: splits of each level, as in `TreeShape`
        active: which leaves have layers; empty if all have
        budget: bytes of the weights and constants
    """
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
    """Return the splits of each level: a leaf for each kilobyte, at least four; the longest axes are halved first."""
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
