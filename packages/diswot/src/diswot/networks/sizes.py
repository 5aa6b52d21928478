"""Checks of the sizes of a network, before anything is allocated."""

from collections.abc import Sequence

from visionkernels.checks import check

__all__ = ["WEIGHT_LIMIT", "check_sizes", "check_weights"]

# a gigabyte of float32; what is larger is a mistake in a size
WEIGHT_LIMIT = 250_000_000


def check_sizes(argument: str, values: Sequence[int], length: int, largest: int) -> tuple[int, ...]:
    """Return `values` as a tuple; ValueError unless there are `length` of them, each from 1 to `largest`."""
    values = tuple(values)
    holds = len(values) == length and all(isinstance(value, int) and 1 <= value <= largest for value in values)
    check(holds, argument, values, f"{length} whole numbers from 1 to {largest}")
    return values


def check_weights(argument: str, value: object, count: int) -> None:
    """Raise ValueError for sizes that would make a network of about `count` > `WEIGHT_LIMIT` weights."""
    check(count <= WEIGHT_LIMIT, argument, value, f"of at most {WEIGHT_LIMIT} weights, not about {count}")
