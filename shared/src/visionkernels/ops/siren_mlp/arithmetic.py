"""The integer arithmetic of a layer, and the precision in which its sums are exact."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["HALF_BITS", "IntegerArithmetic", "LayerArithmetic", "column_sums"]

HALF_BITS = 5
"""Bits of the lower part of a sine, which Triton multiplies in two parts."""


@dataclass(frozen=True)
class LayerArithmetic:
    """A layer's sums s become the phases (s multiplier + half) >> shift; flags say which formats hold them."""

    multiplier: int
    shift: int
    is_exact_in_float32: bool = False
    is_exact_in_halves: bool = False
    """Whether float32 holds the sums of the upper bits and those of the lower HALF_BITS."""
    product_fits_int32: bool = False

    @classmethod
    def of(cls, column_sum: float, multiplier: int, shift: int, bits: int) -> "LayerArithmetic":
        """Return the arithmetic of a layer by its largest sum of |W| and |b| over a column.

        Raises ValueError where float64 or int64 would overflow.
        """
        if not math.isfinite(column_sum) or column_sum * 2.0**bits >= 2**53:
            raise ValueError(f"weights sum up to {column_sum:g} in a column; with bits={bits}, allowed is below 2**53")
        total = int(column_sum)
        largest = (total << bits) * multiplier + (1 << shift)
        if largest >= 1 << 63:
            raise ValueError(
                f"multipliers: {multiplier} times sums of {total << bits} with shifts of {shift} exceeds 2**63; "
                "lower them"
            )
        upper = max(bits - HALF_BITS, HALF_BITS)
        return cls(multiplier, shift, total << bits < 1 << 24, total << upper < 1 << 24, largest < 1 << 31)


@dataclass(frozen=True)
class IntegerArithmetic:
    """The arithmetic of a tree in integers: the bits of its sines, and its layers."""

    bits: int
    layers: tuple[LayerArithmetic, ...]


def column_sums(table: Tensor, weights: Sequence[Tensor]) -> tuple[float, list[float], list[float]]:
    """Return the table's largest number, each layer's largest sum of |W| and |b|, and their distances from integers.

    The distances begin with the table's. All numbers are read back from the device at once.
    """
    sums = [layer.abs().sum(1, dtype=torch.float64).max() for layer in weights]
    remainders = [(numbers - numbers.round()).abs().max().double() for numbers in (table, *weights)]
    largest, *rest = torch.stack([table.abs().max().double(), *sums, *remainders]).tolist()
    return largest, rest[: len(sums)], rest[len(sums) :]
