"""In which precision the sums of an integer layer are exact."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["HALF_BITS", "Exactness", "column_sums", "exactness"]

HALF_BITS = 5
"""Of a sine that Triton multiplies in two parts, the bits of the lower one."""


@dataclass(frozen=True)
class Exactness:
    """What a layer's arithmetic fits into; by the largest sum of |W| and |b| over a column."""

    is_exact_in_float32: bool
    is_exact_in_halves: bool
    """Whether float32 holds the sums of the upper bits and those of the lower HALF_BITS."""
    product_fits_int32: bool

    @staticmethod
    def unknown() -> "Exactness":
        """Return what holds for any weights."""
        return Exactness(False, False, False)


def column_sums(table: Tensor, weights: Sequence[Tensor]) -> tuple[float, list[float], list[float]]:
    """Return the largest of `table`, each layer's largest sum of |W| and |b|, and how far each is from integers.

    The last list begins with the table. All numbers are read back from the device at once.
    """
    sums = [layer.abs().sum(1, dtype=torch.float64).max() for layer in weights]
    remainders = [(each - each.round()).abs().max().double() for each in (table, *weights)]
    numbers = torch.stack([table.abs().max().double(), *sums, *remainders]).tolist()
    return numbers[0], numbers[1 : len(sums) + 1], numbers[len(sums) + 1 :]


def exactness(column_sum: float, multiplier: int, shift: int, bits: int) -> Exactness:
    """Raise ValueError where float64 or int64 would overflow."""
    if not math.isfinite(column_sum) or column_sum * 2.0**bits >= 2**53:
        raise ValueError(f"weights sum up to {column_sum:g} in a column; with bits={bits}, allowed is below 2**53")
    total = int(column_sum)
    largest = (total << bits) * multiplier + (1 << shift)
    if largest >= 1 << 63:
        raise ValueError(
            f"multipliers: {multiplier} times sums of {total << bits} with shifts of {shift} exceeds 2**63; lower them"
        )
    upper = max(bits - HALF_BITS, HALF_BITS)
    return Exactness(total << bits < 1 << 24, total << upper < 1 << 24, largest < 1 << 31)
