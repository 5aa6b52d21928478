"""Conversion to the codec's sample types: exact where one of them holds every value, or to a requested type."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tinc.signal import DTYPES
from tinc.volumes.description import Volume
from visionkernels.checks import InputError

__all__ = ["with_type"]


def with_type(volume: Volume, path: Path, as_type: str | None) -> Volume:
    """Return the volume with samples of `as_type`; None keeps its type or converts exactly, with a note."""
    dtype = np.dtype(volume.array.dtype)
    name = dtype.newbyteorder("=").name
    if name == as_type or (as_type is None and name in DTYPES):
        return volume
    if dtype.kind not in "biuf":
        raise TypeError(f"volume {path} holds {dtype}; it must hold a number for each voxel: {', '.join(DTYPES)}")
    samples = np.asarray(volume.array)
    if as_type is not None:
        converted, how = _converted(samples, as_type, path), f"{name} values are rounded to {as_type}"
    else:
        converted, how = _exactly_converted(samples, path), f"{name} values are kept"
        how = f"{how} as {converted.dtype}, which holds them exactly"
    note = how if volume.note is None else f"{volume.note}; {how}"
    return replace(volume, array=converted, metadata=volume.metadata | {"source_dtype": name}, note=note)


def _exactly_converted(samples: np.ndarray, path: Path) -> np.ndarray:
    candidates: Sequence[str] = ("float32",) if samples.dtype.kind == "f" else DTYPES
    for candidate in candidates:
        with np.errstate(over="ignore", invalid="ignore"):
            converted = samples.astype(candidate)
            # one comparison misses values that wrap around, the other large integers, which compare as float64
            sides = (converted, converted.astype(samples.dtype))
            if all(np.array_equal(side, samples, equal_nan=samples.dtype.kind == "f") for side in sides):
                return converted
    raise TypeError(
        f"volume {path} holds {samples.dtype} values that none of {', '.join(DTYPES)} holds exactly; "
        "pass --as float32, or --as uint16 if they are counts"
    )


def _converted(samples: np.ndarray, as_type: str, path: Path) -> np.ndarray:
    finite = np.isfinite(samples)
    if as_type != "float32" and not finite.all():
        count = int(samples.size - finite.sum())
        raise InputError(f"as_type={as_type!r}: volume {path} has {count} values that are not finite")
    limits: Any = np.finfo(as_type) if as_type == "float32" else np.iinfo(as_type)
    values = np.rint(samples) if as_type != "float32" and samples.dtype.kind == "f" else samples
    inside = values[finite]
    if inside.size and not limits.min <= inside.min() <= inside.max() <= limits.max:
        raise InputError(
            f"as_type={as_type!r} holds values in [{limits.min}, {limits.max}]; volume {path} has "
            f"[{inside.min()}, {inside.max()}]: rescale them first"
        )
    return values.astype(as_type)
