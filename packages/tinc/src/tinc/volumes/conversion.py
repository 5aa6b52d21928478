"""Conversion to the codec's sample types: exact where one of them holds every value, or to a requested type.

Values are looked at block by block, and converted where they are read, so that memory is that of a part.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinc.signal import DTYPES
from tinc.volumes.description import Volume
from visionkernels.checks import InputError

__all__ = ["ConvertedArray", "with_type"]

_BLOCK_SAMPLES = 1 << 20
"""Samples that are looked at together."""


@dataclass(frozen=True)
class ConvertedArray:
    """An array whose samples are converted to another type when they are read."""

    source: Any
    """Array, memory map or Zarr array."""
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return tuple(self.source.shape)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of samples."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the converted samples."""
        return self.size * self.dtype.itemsize

    def __getitem__(self, key: Any) -> np.ndarray:
        """Return a part, as the source does."""
        return _converted(np.asarray(self.source[key]), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise InputError("copy=False: a converted array cannot be used without a copy")
        return self[...].astype(self.dtype if dtype is None else dtype, copy=False)


def with_type(volume: Volume, path: Path, as_type: str | None) -> Volume:
    """Return the volume with samples of `as_type`; None keeps its type or converts exactly, with a note.

    Its array is a `ConvertedArray` where it is converted.
    """
    dtype = np.dtype(volume.array.dtype)
    name = dtype.newbyteorder("=").name
    if name == as_type or (as_type is None and name in DTYPES):
        return volume
    if dtype.kind not in "biuf":
        raise TypeError(f"volume {path} holds {dtype}; it must hold a number for each voxel: {', '.join(DTYPES)}")
    if as_type is not None:
        _check_values(volume.array, as_type, path)
        how = f"{name} values are rounded to {as_type}"
    else:
        as_type = _exact_type(volume.array, path)
        how = f"{name} values are kept as {as_type}, which holds them exactly"
    note = how if volume.note is None else f"{volume.note}; {how}"
    array = ConvertedArray(volume.array, np.dtype(as_type))
    return replace(volume, array=array, metadata=volume.metadata | {"source_dtype": name}, note=note)


def _blocks(array: Any) -> Iterator[np.ndarray]:
    """Yield all of an array in blocks, each of whole chunks of a chunked array."""
    # the axes of an array in Fortran order are read from the last one on
    strides = getattr(array, "strides", None) or range(len(array.shape), 0, -1)
    chunks = getattr(array, "chunks", None) or (1,) * len(array.shape)
    sizes = [min(*pair) for pair in zip(chunks, array.shape, strict=True)]
    for axis in sorted(range(len(sizes)), key=lambda axis: abs(strides[axis])):
        others = math.prod(sizes) // max(sizes[axis], 1)
        fitting = _BLOCK_SAMPLES // max(others, 1) // max(chunks[axis], 1) * chunks[axis]
        sizes[axis] = min(max(fitting, sizes[axis]), array.shape[axis])
    steps = (range(0, whole, max(size, 1)) for whole, size in zip(array.shape, sizes, strict=True))
    for place in itertools.product(*steps):
        yield np.asarray(array[tuple(slice(start, start + size) for start, size in zip(place, sizes, strict=True))])


def _exact_type(array: Any, path: Path) -> str:
    candidates: Sequence[str] = ("float32",) if array.dtype.kind == "f" else DTYPES
    for candidate in candidates:
        if all(_is_exact(block, candidate) for block in _blocks(array)):
            return candidate
    raise TypeError(
        f"volume {path} holds {array.dtype} values that none of {', '.join(DTYPES)} holds exactly; "
        "pass --as float32, or --as uint16 if they are counts"
    )


def _is_exact(samples: np.ndarray, candidate: str) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        converted = samples.astype(candidate)
        # one comparison misses values that wrap around, the other large integers, which compare as float64
        sides = (converted, converted.astype(samples.dtype))
        return all(np.array_equal(side, samples, equal_nan=samples.dtype.kind == "f") for side in sides)


def _check_values(array: Any, as_type: str, path: Path) -> None:
    """Raise ValueError unless the values, rounded, are finite where the type requires it, and in its range."""
    limits: Any = np.finfo(as_type) if as_type == "float32" else np.iinfo(as_type)
    count, extremes = 0, []
    for samples in _blocks(array):
        finite = np.isfinite(samples)
        count += int(samples.size - finite.sum())
        inside = _rounded(samples, np.dtype(as_type))[finite]
        extremes += [inside.min(), inside.max()] if inside.size else []
    if as_type != "float32" and count:
        raise InputError(f"as_type={as_type!r}: volume {path} has {count} values that are not finite")
    if extremes and not limits.min <= min(extremes) <= max(extremes) <= limits.max:
        raise InputError(
            f"as_type={as_type!r} holds values in [{limits.min}, {limits.max}]; volume {path} has "
            f"[{min(extremes)}, {max(extremes)}]: rescale them first"
        )


def _rounded(samples: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    return np.rint(samples) if dtype.kind != "f" and samples.dtype.kind == "f" else samples


def _converted(samples: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    # infinities and NaN convert without a warning
    with np.errstate(over="ignore", invalid="ignore"):
        return _rounded(samples, dtype).astype(dtype)
