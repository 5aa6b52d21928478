"""Metadata of a part of a volume: of a crop, of every n-th voxel, of a mirrored axis, or of a coarser level."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinc.regions import index_region
from tinc.volumes.description import Volume, layout_of
from visionkernels.checks import InputError

__all__ = ["AxisPart", "axis_parts", "essential_metadata", "metadata_of_part", "part_of"]

_SLICE_TIMES = ("slice_code", "slice_duration", "slice_start", "slice_end")
"""Fields of a NIfTI header that number its slices."""


@dataclass(frozen=True)
class AxisPart:
    """The part of an axis that an array holds."""

    places: range
    """Indices of its voxels, or of its cells."""
    size: int
    """Number of voxels, or of cells, of the whole axis."""
    cell: int = 1
    """Voxels of a cell; a smaller cell at the end counts as a whole one."""

    @property
    def is_whole(self) -> bool:
        """Whether the part is the axis itself."""
        return self.cell == 1 and self.places == range(self.size)

    @property
    def step(self) -> int:
        """Voxels of the volume from one place to the next, negative where the axis is mirrored."""
        return self.places.step * self.cell

    @property
    def offset(self) -> float:
        """Place of the first voxel, or of the centre of the first cell, in voxels of the volume."""
        return self.places.start * self.cell + (self.cell - 1) / 2


def axis_parts(key: Any, shape: Sequence[int], cells: Sequence[int]) -> list[AxisPart]:
    """Return the part of each axis of an array of `shape` that an index selects, in cells of so many voxels.

    Raises ValueError for an index with an integer, and IndexError as NumPy does.
    """
    # the only cell of an axis has the voxels of the axis
    cells = [max(min(size, cell), 1) for size, cell in zip(shape, cells, strict=True)]
    sizes = tuple(-(-size // cell) for size, cell in zip(shape, cells, strict=True))
    region, inner = index_region(key, sizes)
    if not all(isinstance(part, slice) for part in inner):
        raise InputError(f"the index {key} drops an axis, and its metadata with it; use a range such as 5:6")
    places = [range(size)[a][b] for size, a, b in zip(sizes, region, inner, strict=True)]
    return [AxisPart(*part) for part in zip(places, sizes, cells, strict=True)]


def part_of(volume: Volume, key: Any) -> Volume:
    """Return the part `volume.array[key]` with its own metadata; what cannot be recomputed is left out, with a note.

    Raises ValueError for an index with an integer, and IndexError as NumPy does.
    """
    shape = volume.array.shape
    parts = axis_parts(key, shape, (1,) * len(shape))
    metadata, left_out = metadata_of_part(volume.metadata, parts, volume.channel_axis)
    notes = [] if volume.note is None else [volume.note]
    if left_out:
        notes.append(f"metadata that cannot be recomputed for a part is left out: {', '.join(left_out)}")
    region = tuple(slice(min(part.places, default=0), max(part.places, default=-1) + 1) for part in parts)
    # Zarr arrays take no negative steps
    array = volume.array[region][tuple(slice(None, None, part.places.step) for part in parts)]
    return replace(volume, array=array, metadata=metadata, note="; ".join(notes) or None)


def metadata_of_part(
    metadata: dict[str, Any], parts: Sequence[AxisPart], channel_axis: int | None
) -> tuple[dict[str, Any], list[str]]:
    """Return the metadata of a part of a volume, and what was left out because it cannot be recomputed.

    Spacing, origin, affines, the time of the first volume and the names of channels become those of the part. Texts of
    unknown names are kept; their other values are left out, since they may state sizes or places. `channel_axis` names
    the axes of metadata without `axes`.
    """
    if all(part.is_whole for part in parts):
        return dict(metadata), []
    axes = metadata.get("axes")
    if not isinstance(axes, str) or len(axes) != len(parts):
        axes = layout_of(len(parts), {}, channel_axis).axes
    known: dict[str, Callable[[Any], Any]] = {
        "spacing": lambda value: _scaled(value, parts),
        "channels": lambda value: _channel_names(value, axes, parts),
        "nifti": dict,
    }
    kept, left_out = {}, []
    for name, value in metadata.items():
        if name in ("origin", "units", "axes") or value is None or (name != "nifti" and isinstance(value, str | bool)):
            kept[name] = value
            continue
        try:
            kept[name] = known[name](value)
        except (ArithmeticError, LookupError, TypeError, ValueError):
            left_out.append(name)
    if "nifti" in kept:
        try:
            kept["nifti"], missing = _nifti_part(kept["nifti"], metadata.get("spacing"), axes, parts)
        except (ArithmeticError, TypeError, ValueError):
            missing = ["its fields"]
            del kept["nifti"]
        left_out += [f"nifti: {name}" for name in missing]
    has_affine = bool({"sform", "qform"} & kept.get("nifti", {}).keys())
    origin = kept.pop("origin", None)
    if "spacing" in kept and not has_affine:
        try:
            origin = _moved(origin, metadata["spacing"], parts)
        except (ArithmeticError, LookupError, TypeError, ValueError):
            left_out.append("origin")
        else:
            kept |= {"origin": origin} if any(origin) else {}
    elif origin is not None and not has_affine:
        left_out.append("origin")
    mirrored = [letter for letter, part in zip(axes, parts, strict=True) if part.step < 0]
    unstated = [letter for letter in mirrored if letter not in ("CSXYZ" if has_affine else "CS")]
    return kept, [*left_out, *(f"direction of the axis {letter}" for letter in unstated)]


def _scaled(spacing: Any, parts: Sequence[AxisPart]) -> list[float | None]:
    return [None if step is None else step * abs(part.step) for step, part in zip(spacing, parts, strict=True)]


def _moved(origin: Any, spacing: Any, parts: Sequence[AxisPart]) -> list[float | None]:
    """Return the places of the first voxels; None for axes of unknown spacing and for mirrored ones."""
    starts = [None] * len(parts) if origin is None else origin
    return [
        None if step is None or part.step < 0 else (start or 0) + part.offset * step
        for start, step, part in zip(starts, spacing, parts, strict=True)
    ]


def _channel_names(names: Any, axes: str, parts: Sequence[AxisPart]) -> list[Any]:
    if "C" not in axes:
        return list(names)
    part = parts[axes.index("C")]
    if part.cell > 1 or len(names) != part.size:
        raise ValueError
    return [names[place] for place in part.places]


def _nifti_part(
    nifti: dict[str, Any], spacing: Any, axes: str, parts: Sequence[AxisPart]
) -> tuple[dict[str, Any], list[str]]:
    by_letter = dict(zip(axes, parts, strict=True))
    to_whole = np.eye(4)
    for row, letter in enumerate("XYZ"):
        if letter in by_letter:
            to_whole[row, row], to_whole[row, 3] = by_letter[letter].step, by_letter[letter].offset
    kept, left_out = dict(nifti), []
    for name in ("sform", "qform", "affine"):
        if name not in kept:
            continue
        affine = np.array(kept.pop(name), dtype=float).reshape(3, 4) @ to_whole
        is_moved = name == "affine" and (to_whole != np.eye(4)).any()
        # a header without a code says that the centre of the array is the origin, which a part cannot say of the whole
        kept |= {"sform": affine.tolist(), "sform_code": 2} if is_moved else {name: affine.tolist()}
    times = by_letter.get("T")
    if times is not None and not times.is_whole:
        try:
            start = kept.pop("toffset", 0) + times.offset * spacing[axes.index("T")]
            kept |= {"toffset": start} if start else {}
        except (ArithmeticError, LookupError, TypeError):
            left_out += ["toffset"] * ("toffset" in nifti)
    slices = by_letter.get({1: "X", 2: "Y"}.get(nifti.get("dim_info", 0) >> 4 & 3, "Z"))
    if slices is not None and not slices.is_whole:
        left_out += [name for name in _SLICE_TIMES if kept.pop(name, None) is not None]
    return kept, left_out


def essential_metadata(
    metadata: dict[str, Any], ndim: int, channel_axis: int | None, limit: int
) -> tuple[dict[str, Any], list[str]]:
    """Return the metadata that give places and numbers their meaning, in few bytes, and the names of the others.

    Axes are left out where they are those of an array without metadata. Of NIfTI, texts are kept if each takes at most
    a hundredth of `limit` bytes, numbers have the digits that float32 needs, and a qform is left out, but for its code,
    where it is the sform.
    """
    kept: dict[str, Any] = {}
    if metadata.get("axes") not in (None, layout_of(ndim, {}, channel_axis).axes):
        kept["axes"] = metadata["axes"]
    kept |= {name: metadata[name] for name in ("spacing", "units", "origin") if metadata.get(name) is not None}
    left_out = [name for name in metadata if name not in (*kept, "axes", "format", "nifti")]
    if isinstance(metadata.get("nifti"), dict):
        nifti = dict(metadata["nifti"])
        for name in ("descrip", "aux_file"):
            if len(str(nifti.get(name, "")).encode()) * 100 > limit:
                del nifti[name]
                left_out.append(f"nifti: {name}")
        # others are refused by a writer
        with suppress(ArithmeticError, TypeError, ValueError), np.errstate(over="raise"):
            sform, qform = (np.array(nifti.get(name, []), dtype=np.float32) for name in ("sform", "qform"))
            if sform.shape == qform.shape == (3, 4) and np.allclose(sform, qform, rtol=1e-5, atol=1e-5):
                del nifti["qform"]
            elif qform.shape == (3, 4):
                # a header has its quaternion in float32
                nifti["qform"] = qform.tolist()
        kept = _short(kept | {"nifti": nifti})
    return kept, left_out


def _short(value: Any) -> Any:
    """Return JSON values with the fewest digits that give the same float32, where a number is one."""
    if isinstance(value, dict):
        return {name: _short(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_short(part) for part in value]
    if not isinstance(value, float):
        return value
    if value.is_integer() and abs(value) < 1e6:
        return int(value)
    with np.errstate(over="ignore"):
        return float(str(np.float32(value))) if np.float32(value) == value else value
