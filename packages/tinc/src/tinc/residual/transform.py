"""The block transform of the residual layer: orthonormal DCT-II forward, its inverse in integers."""

from collections.abc import Sequence

import numpy as np

from tinc.arithmetic import BASIS_BITS, cosine_basis

__all__ = ["forward_blocks", "inverse_blocks", "join_blocks", "split_blocks"]


def split_blocks(volume: np.ndarray, block: Sequence[int]) -> np.ndarray:
    """View a volume whose axes are multiples of the block's as [G1, ..., Gk, B1, ..., Bk]."""
    axes = len(block)
    sizes = [size for total, part in zip(volume.shape, block, strict=True) for size in (total // part, part)]
    return volume.reshape(sizes).transpose(*range(0, 2 * axes, 2), *range(1, 2 * axes, 2))


def join_blocks(blocks: np.ndarray) -> np.ndarray:
    """Undo `split_blocks`."""
    axes = blocks.ndim // 2
    order = [axis for pair in zip(range(axes), range(axes, 2 * axes), strict=True) for axis in pair]
    return blocks.transpose(order).reshape(
        [a * b for a, b in zip(blocks.shape[:axes], blocks.shape[axes:], strict=True)]
    )


def forward_blocks(blocks: np.ndarray, *, inverse: bool = False) -> np.ndarray:
    """Return the orthonormal coefficients of blocks [G1, ..., Gk, B1, ..., Bk], or the blocks of such, as float64."""
    axes = blocks.ndim // 2
    result = blocks.astype(np.float64)
    for axis in range(axes, 2 * axes):
        basis = cosine_basis(result.shape[axis]) / (1 << BASIS_BITS)
        result = np.moveaxis(np.moveaxis(result, axis, -1) @ (basis if inverse else basis.T), -1, axis)
    return result


def inverse_blocks(coefficients: np.ndarray, steps: Sequence[int] | None = None) -> np.ndarray:
    """Return the blocks of integer coefficients, in integers: each axis is summed exactly, then rounded half up.

    With `steps`, an axis has only its lowest frequencies, and a value is the mean of so many places (nearly: what the
    other frequencies add to it is left out).

    Magnitudes are at most 2**33 and axes at most 32 long, so that float64 holds every sum.
    """
    axes = coefficients.ndim // 2
    result = coefficients.astype(np.float64)
    for axis, step in zip(range(axes, 2 * axes), (1,) * axes if steps is None else steps, strict=True):
        if result.shape[axis] * step > 1:
            summed = np.moveaxis(result, axis, -1) @ cosine_basis(result.shape[axis], step)
            result = np.moveaxis(np.floor(summed * 2.0**-BASIS_BITS + 0.5), -1, axis)
    return result.astype(np.int64)
