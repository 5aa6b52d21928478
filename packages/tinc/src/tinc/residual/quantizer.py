"""Between the coefficients of a transform and integer levels.

The quantiser chooses, for each coefficient, the level that is best in error + rate * bits, with the bits that the level
costs where it stands.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinc.residual.coefficients import LARGEST, MAX_UNARY

__all__ = ["RATE", "Quantizer", "choose_levels", "fit_points", "round_down"]

MANTISSA_BITS = 10
RATE = 0.12
"""Squared steps that a bit is worth."""
MAX_COEFFICIENT = 1 << 33
"""Largest magnitude of a coefficient, in working units, with which sums are still exact."""
_POINT_BITS = 6


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


def round_down(scaled: np.ndarray) -> np.ndarray:
    """Return levels of coefficients in steps, rounded to the lower one up to 0.66: a first guess without costs."""
    return (np.sign(scaled) * np.minimum(np.floor(np.abs(scaled) + 0.34), LARGEST - 1)).astype(np.int64)


def choose_levels(scaled: np.ndarray, costs: np.ndarray, contexts: np.ndarray) -> np.ndarray:
    """Return the best of the nearest level, the one below it and zero for each coefficient in steps.

    `costs` are the bits of magnitudes by context, from `CoefficientCoder.cost_table`.
    """
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
    # the means of blocks are coded by interpolation, at other costs
    means = (..., *[0] * (scaled.ndim // 2))
    chosen[means] = nearest[means]
    return np.where(scaled < 0, -chosen, chosen)


def fit_points(quantizer: Quantizer, coefficients: Sequence[np.ndarray], levels: Sequence[np.ndarray]) -> Quantizer:
    """Return the quantiser whose levels stand at the means of their coefficients."""
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
