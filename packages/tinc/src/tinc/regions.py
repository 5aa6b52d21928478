"""Regions of an array: boxes with a slice for each axis, from NumPy's indices, and in voxels or cells."""

import operator
from typing import Any

from visionkernels.checks import InputError

__all__ = ["IndexTypeError", "Region", "check_region", "index_region", "slice_region", "voxels_of"]

Region = tuple[slice, ...]


class IndexTypeError(InputError, IndexError):
    """An index is of a kind that a compressed array does not take; NumPy's own error for others is IndexError."""


def check_region(region: Region | None, sizes: tuple[int, ...]) -> Region:
    """Return the region with integer ends; None is the whole array. Raises IndexError for one that is not inside."""
    if region is None:
        return tuple(slice(0, size) for size in sizes)
    if len(region) != len(sizes):
        raise IndexError(f"the region has {len(region)} axes, the array {len(sizes)}")
    checked = []
    for axis, (part, size) in enumerate(zip(region, sizes, strict=True)):
        start = 0 if part.start is None else part.start
        stop = size if part.stop is None else part.stop
        if part.step not in (None, 1) or not 0 <= start <= stop <= size:
            raise IndexError(f"the region's {start}:{stop} is not inside axis {axis} of size {size}")
        checked.append(slice(int(start), int(stop)))
    return tuple(checked)


def index_region(key: Any, shape: tuple[int, ...]) -> tuple[Region, tuple[Any, ...]]:
    """Return the region that an index touches, and the index within it.

    Raises IndexError as NumPy does, and for booleans, lists, masks and None, which is then a ValueError as well.
    """
    keys = list(key) if isinstance(key, tuple) else [key]
    ellipses = [place for place, part in enumerate(keys) if part is Ellipsis]
    if len(ellipses) > 1:
        raise IndexError("an index can have one ellipsis only")
    for place in ellipses:
        keys[place : place + 1] = [slice(None)] * (len(shape) - len(keys) + 1)
    if len(keys) > len(shape):
        raise IndexError(f"{len(keys)} indices for an array of {len(shape)} axes")
    keys += [slice(None)] * (len(shape) - len(keys))
    parts = [_axis_region(part, size, axis) for axis, (part, size) in enumerate(zip(keys, shape, strict=True))]
    return tuple(region for region, _ in parts), tuple(inner for _, inner in parts)


def _axis_region(key: Any, size: int, axis: int) -> tuple[slice, slice | int]:
    if isinstance(key, slice):
        return slice_region(key, size)
    try:
        number = None if isinstance(key, bool) else operator.index(key)
    except TypeError:
        number = None
    if number is None:
        raise IndexTypeError(
            f"index {key!r} must be an integer, a slice or an ellipsis; masks, lists and None apply to file.decode()"
        )
    try:
        place = range(size)[number]
    except IndexError:
        raise IndexError(f"index {key} is not inside axis {axis} of size {size}") from None
    return slice(place, place + 1), 0


def slice_region(key: slice, size: int) -> tuple[slice, slice]:
    """Return the smallest range around the places of a slice, and the slice within it."""
    touched = range(size)[key]
    if not touched:
        return slice(0, 0), slice(None)
    low, high = min(touched[0], touched[-1]), max(touched[0], touched[-1])
    return slice(low, high + 1), slice(None, None, touched.step)


def voxels_of(region: Region, steps: tuple[int, ...], sizes: tuple[int, ...]) -> Region:
    """Return the voxels of a region of cells of `steps` voxels; cells at the end of an axis may be smaller."""
    return tuple(
        slice(part.start * step, min(part.stop * step, size))
        for part, step, size in zip(region, steps, sizes, strict=True)
    )
