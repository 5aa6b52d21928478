"""What to put where a volume is background, so that block transforms see no step: the decoder never looks there."""

import numpy as np

from tinc.residual.transform import forward_blocks

__all__ = ["continue_blocks", "spread_inside"]


def spread_inside(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return `values` [channels, ...] inside the mask, and outside of it a smooth continuation.

    From fine to coarse, halves are averaged over what is inside; from coarse to fine, what is missing is taken from the
    level above.
    """
    weight = mask.astype(np.float64)
    levels = [(values * weight, weight)]
    while max(levels[-1][0].shape[1:]) > 1:
        levels.append((_halved(levels[-1][0]), _halved(levels[-1][1])))
    total, weight = levels.pop()
    guess = total / np.maximum(weight, 1e-12)
    for total, weight in reversed(levels):
        coarse = _smoothed(_doubled(guess, total.shape))
        share = np.minimum(weight, 1.0)
        guess = share * total / np.maximum(weight, 1e-12) + (1 - share) * coarse
    return np.where(mask, values, guess)


def continue_blocks(blocks: np.ndarray, inside: np.ndarray, step: float, iterations: int = 8) -> np.ndarray:
    """Return blocks [N, B1, ..., Bk] whose values outside of the mask cost few coefficients at this step.

    In turns, coefficients that would hardly survive the quantiser are dropped, and what is inside is put back.
    """
    axes = blocks.ndim - 1
    ones = (1,) * (axes - 1)
    values = blocks
    for turn in range(iterations):
        coefficients = forward_blocks(values.reshape(len(values), *ones, *values.shape[1:]))
        coefficients[np.abs(coefficients) < step * (1.5 - turn / iterations)] = 0
        smooth = forward_blocks(coefficients, inverse=True).reshape(values.shape)
        values = np.where(inside, blocks, smooth)
    return values


def _halved(values: np.ndarray) -> np.ndarray:
    padded = np.pad(values, [(0, 0)] + [(0, size % 2) for size in values.shape[1:]])
    sizes = [part for size in padded.shape[1:] for part in (size // 2, 2)]
    return padded.reshape(len(values), *sizes).mean(tuple(range(2, 2 * values.ndim, 2))[: values.ndim - 1])


def _doubled(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    for axis in range(1, values.ndim):
        values = values.repeat(2, axis)
    return values[tuple(slice(size) for size in shape)]


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Average each value with its neighbours along each axis, 1 2 1."""
    for axis in range(1, values.ndim):
        if values.shape[axis] > 1:
            padded = np.pad(
                values, [(int(axis == each), int(axis == each)) for each in range(values.ndim)], mode="edge"
            )
            size = values.shape[axis]
            before, after = (np.take(padded, np.arange(size) + by, axis=axis) for by in (0, 2))
            values = (before + 2 * values + after) / 4
    return values
