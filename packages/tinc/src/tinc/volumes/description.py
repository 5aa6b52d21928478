"""Volumes and their metadata: axes, spacing and units, in one form for all formats.

Metadata are JSON values: `axes` (a letter for each axis), `spacing`, `units` and `origin` (lists with an entry for each
axis, None where unknown; units as OME-Zarr spells them; the origin is the place of the first voxel), and details of a
single format under the name of the format.
"""

import math
import struct
import tokenize
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from visionkernels.checks import InputError
from visionkernels.files import CorruptFileError

__all__ = [
    "DEFLATE_RATIO", "SYMBOLS", "UNITS", "Layout", "Volume", "as_metadata", "check_claim", "damage_named", "described",
    "is_number", "layout_of",
]  # fmt: skip


@dataclass(frozen=True)
class Volume:
    """An array and the metadata of its file."""

    array: Any
    """A NumPy array, a memory map, or a Zarr array that is read when it is indexed."""
    channel_axis: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    """JSON values, described in the module."""
    note: str | None = None
    """A message for the user, about a conversion or a part that was not read."""


UNITS = {
    "m": "meter", "cm": "centimeter", "mm": "millimeter", "µm": "micrometer", "μm": "micrometer", "um": "micrometer",
    "\\u00B5m": "micrometer", "micron": "micrometer", "nm": "nanometer", "pm": "picometer", "Å": "angstrom",
    "s": "second", "sec": "second", "ms": "millisecond", "msec": "millisecond", "µs": "microsecond",
    "usec": "microsecond", "inch": "inch",
}  # fmt: skip
SYMBOLS = {"micrometer": "µm", "second": "s", "millisecond": "ms", "microsecond": "µs"} | {
    name: symbol for symbol, name in UNITS.items() if symbol in ("m", "cm", "mm", "nm", "pm", "Å")
}


@dataclass(frozen=True)
class Layout:
    """Axes, spacing, units and origin of an array, for a writer."""

    axes: str
    spacing: list[float | None]
    units: list[str | None]
    origin: list[float | None]
    channel_axis: int | None
    metadata: dict[str, Any]

    def moved(self, array: np.ndarray, order: str) -> tuple[np.ndarray, "Layout"]:
        """Return the array with its axes sorted as in `order`; other axes come first."""
        places = sorted(range(array.ndim), key=lambda axis: order.find(self.axes[axis]))
        channel_axis = None if self.channel_axis is None else places.index(self.channel_axis)
        axes = "".join(self.axes[axis] for axis in places)
        spacing, units = [self.spacing[axis] for axis in places], [self.units[axis] for axis in places]
        origin = [self.origin[axis] for axis in places]
        return array.transpose(places), Layout(axes, spacing, units, origin, channel_axis, self.metadata)

    def spacing_of(self, letter: str) -> tuple[float | None, str | None]:
        """Return spacing and unit of an axis, None where unknown."""
        axis = self.axes.find(letter)
        return (None, None) if axis < 0 else (self.spacing[axis], self.units[axis])

    def origin_of(self, letter: str) -> float | None:
        """Return the place of the first voxel along an axis, None where unknown."""
        return self.origin[self.axes.index(letter)] if letter in self.axes else None


def as_metadata(metadata: dict[str, Any] | None) -> dict[str, Any]:
    """Return a copy of the metadata; None is an empty dict. Raises TypeError for anything but a dict."""
    if metadata is not None and not isinstance(metadata, dict):
        raise TypeError(f"metadata is of type {type(metadata).__name__}; it must be a dict of JSON values")
    return {} if metadata is None else dict(metadata)


def layout_of(ndim: int, metadata: dict[str, Any], channel_axis: int | None) -> Layout:
    """Return the layout of an array, by its metadata or with default axes. Raises ValueError if they do not fit."""
    if channel_axis is not None:
        if isinstance(channel_axis, bool) or not -ndim <= channel_axis < ndim:
            raise InputError(f"channel_axis={channel_axis} must be in [{-ndim}, {ndim})")
        channel_axis %= ndim
    spatial = ndim - (channel_axis is not None)
    default = "QTZYX"[max(5 - spatial, 0) :].rjust(spatial, "Q")
    if channel_axis is not None:
        default = default[:channel_axis] + ("S" if channel_axis == ndim - 1 else "C") + default[channel_axis:]
    given: dict[str, Any] = {"axes": default, **dict.fromkeys(("spacing", "units", "origin"), [None] * ndim)}
    given |= {name: metadata[name] for name in given if metadata.get(name) is not None}
    for name, values in given.items():
        if not isinstance(values, str if name == "axes" else list | tuple):
            raise InputError(f"metadata: {name}={values!r} must be a {'text' if name == 'axes' else 'list'}")
        if len(values) != ndim:
            raise InputError(f"metadata: {name}={values!r} has {len(values)} entries; the array has {ndim} axes")
    for step in given["spacing"]:
        if step is not None and not (is_number(step) and float(step) > 0):
            raise InputError(
                f"metadata: spacing={given['spacing']!r} must hold positive numbers, or None where it is unknown"
            )
    if not all(unit is None or isinstance(unit, str) for unit in given["units"]):
        raise InputError(f"metadata: units={given['units']!r} must hold texts, or None where they are unknown")
    if not all(place is None or is_number(place) for place in given["origin"]):
        raise InputError(f"metadata: origin={given['origin']!r} must hold numbers, or None where it is unknown")
    spacing, units, origin = (list(given[name]) for name in ("spacing", "units", "origin"))
    return Layout(str(given["axes"]), spacing, units, origin, channel_axis, metadata)


def is_number(value: Any) -> bool:
    """Whether a value is a finite real number."""
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:
        return False


def described(format: str, axes: str, spacing: Mapping[str, Any], units: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata in the common form; spacing that is not a positive number, and a unit that is no text, are
    unknown.
    """
    steps: list[Any] = [spacing.get(letter) for letter in axes]
    known = [step if is_number(step) and step > 0 else None for step in steps]
    metadata: dict[str, Any] = {"format": format, "axes": axes}
    if any(known):
        names = [units.get(letter) if step else None for letter, step in zip(axes, known, strict=True)]
        metadata |= {
            "spacing": known,
            "units": [UNITS.get(name, name) if isinstance(name, str) else None for name in names],
        }
    return metadata


DEFLATE_RATIO = 1032
"""Most bytes that a byte of deflate may stand for."""


def check_claim(claimed: int, most: int) -> None:
    """Raise ValueError for more bytes of samples than a file can hold, before memory is taken for them."""
    if claimed > most:
        raise InputError(f"it states {claimed} bytes of samples, and can hold at most {most}")


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn the errors of libraries on damaged files into CorruptFileError with the name of the file."""
    try:
        yield
    except (ImportError, PermissionError):
        raise
    except (
        ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError, OSError, SyntaxError,
        RuntimeError, AssertionError, struct.error, tokenize.TokenError, zlib.error, tifffile.TiffFileError,
        Image.DecompressionBombError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        if "imagecodecs" in reason:
            raise ImportError(f"{path}: {reason}; run: pip install imagecodecs") from error
        raise CorruptFileError(f"volume {path} is damaged or of another format: {reason[:200]}") from error
    except MemoryError as error:
        # of a size that damage has made large, or of a volume that is
        raise CorruptFileError(f"volume {path} is damaged, or larger than the memory") from error
