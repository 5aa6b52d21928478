"""NIfTI, with its orientation."""

import gzip
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tinc.volumes.description import (
    DEFLATE_RATIO,
    UNITS,
    Layout,
    Volume,
    check_claim,
    damage_named,
    described,
)
from visionkernels.checks import InputError
from visionkernels.extras import require

__all__ = ["read_nifti", "write_nifti"]

_TEXTS = {"descrip": 80, "aux_file": 24, "intent_name": 16}
"""Texts of a header, and their bytes."""
_NUMBERS = (
    "intent_code", "intent_p1", "intent_p2", "intent_p3", "cal_max", "cal_min", "toffset", "dim_info", "slice_code",
    "slice_duration", "slice_start", "slice_end",
)  # fmt: skip


_LENGTHS: dict[str | None, float] = {
    "picometer": 1e-6, "angstrom": 1e-4, "nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4,
    "inch": 25400.0, "meter": 1e6,
}  # fmt: skip
_TIMES: dict[str | None, float] = {
    "microsecond": 1.0, "millisecond": 1e3, "second": 1e6, "minute": 6e7, "min": 6e7, "hour": 3.6e9, "h": 3.6e9,
}  # fmt: skip
_CODES: dict[str | None, str] = {
    "meter": "meter", "millimeter": "mm", "micrometer": "micron", "second": "sec", "millisecond": "msec",
    "microsecond": "usec", None: "unknown",
}  # fmt: skip
"""Units of NIfTI, as nibabel names them."""


def read_nifti(path: Path) -> Volume:
    """Read a NIfTI file, without scaling its samples."""
    nibabel = require("nibabel", "tinc-vision[nifti]")
    problems = (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError)
    with damage_named(path):
        try:
            size = path.stat().st_size
            most = DEFLATE_RATIO * size if path.suffix.lower() == ".gz" else size
            _check_extensions(nibabel, path, most)
            image = nibabel.load(path)
            header = image.header
            if not hasattr(header, "get_sform"):
                raise InputError(f"it is of the kind {type(image).__name__}")
            samples = image.dataobj
            check_claim(samples.offset + math.prod(samples.shape) * samples.dtype.itemsize, most)
            array = samples.get_unscaled()
        except problems as error:
            raise InputError(str(error)) from error
        axes = "XYZTC"[: array.ndim].ljust(array.ndim, "Q")
        space, time = header.get_xyzt_units()
        units = dict.fromkeys("XYZ", None if space == "unknown" else space)
        units["T"] = None if time == "unknown" else time
        zooms = dict(zip(axes, map(float, header.get_zooms()), strict=False))
        metadata = described("nifti", axes, {letter: zooms.get(letter) for letter in "XYZT"}, units)
        affines = _orientation(header)
        metadata["nifti"] = affines | {"xyzt_units": int(header["xyzt_units"])}
        if (image.dataobj.slope, image.dataobj.inter) != (1, 0):
            metadata["nifti"] |= {"slope": float(image.dataobj.slope), "inter": float(image.dataobj.inter)}
        metadata["nifti"] |= _details(header)
    has_lost = any(header[f"{form}_code"] > 0 and form not in affines for form in ("sform", "qform"))
    note = "an affine that is not finite is left out" if has_lost else None
    return Volume(array, 4 if array.ndim == 5 else None, metadata, note)


class _Bounded:
    """A stream that takes no memory for an extension whose stated size the file cannot hold."""

    def __init__(self, stream: Any, most: int) -> None:
        self.stream, self.most, self.tell = stream, most, stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.most:
            raise InputError(f"it states an extension of {size + 8} bytes")
        content: bytes = self.stream.read(size)
        return content


def _check_extensions(nibabel: Any, path: Path, most: int) -> None:
    """Raise ValueError for an extension that is larger than the file, before nibabel takes memory for it."""
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        if kind.path_maybe_image(path)[0]:
            with nibabel.openers.ImageOpener(path) as file:
                kind.header_class.from_fileobj(_Bounded(file, most), check=False)


def _orientation(header: Any) -> dict[str, Any]:
    """Return the affines [3, 4] that have a code, or else the default affine."""
    affines: dict[str, Any] = {}
    for name, (affine, code) in (("sform", header.get_sform(coded=True)), ("qform", header.get_qform(coded=True))):
        if affine is not None and code > 0 and np.isfinite(affine).all():
            affines |= {name: affine[:3].tolist(), f"{name}_code": int(code)}
    base = header.get_base_affine()[:3]
    return affines or ({"affine": base.tolist()} if np.isfinite(base).all() else {})


def _details(header: Any) -> dict[str, Any]:
    """Return the fields about intent, display, times and slices that are set."""
    texts = {name: bytes(header[name][()]).split(b"\0")[0] for name in _TEXTS}
    details: dict[str, Any] = {name: _decoded(text) for name, text in texts.items() if text}
    for name in _NUMBERS:
        value = header[name][()]
        if np.isfinite(value) and value != 0:
            # the shortest text of a float32
            details[name] = float(str(value)) if value.dtype.kind == "f" else int(value)
    return details


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text.decode("latin-1")


def write_nifti(path: Path, array: np.ndarray, layout: Layout) -> None:
    """Write a NIfTI file, with the orientation of the file that the metadata come from."""
    nibabel = require("nibabel", "tinc-vision[nifti]")
    if layout.channel_axis is not None and layout.axes[layout.channel_axis] not in "CS":
        axes = layout.axes[: layout.channel_axis] + "C" + layout.axes[layout.channel_axis + 1 :]
        layout = replace(layout, axes=axes)
    if not set(layout.axes) <= set("XYZTCS") or len(set(layout.axes)) < len(layout.axes):
        raise InputError(f"NIfTI has the axes X, Y, Z, T and channels; the array has {layout.axes}")
    array, layout = layout.moved(array, "XYZTCS")
    # axes before those of the array that it lacks have one voxel
    order = "XYZT" + "".join(letter for letter in "CS" if letter in layout.axes)
    sizes = dict(zip(layout.axes, array.shape, strict=True))
    array = array.reshape([sizes.get(letter, 1) for letter in order[: order.index(layout.axes[-1]) + 1]])
    header = (nibabel.Nifti1Header if max(array.shape) < 1 << 15 else nibabel.Nifti2Header)(endianness="<")
    try:
        header.set_data_dtype(array.dtype)
        header.set_data_shape(array.shape)
    except nibabel.spatialimages.HeaderDataError as error:
        raise InputError(f"NIfTI cannot hold {array.dtype} {array.shape}: {error}") from error
    kept = layout.metadata.get("nifti", {})
    try:
        with np.errstate(over="raise"):
            _set_geometry(header, array, layout)
            _set_details(header, {"toffset": layout.origin_of("T") or 0} | kept)
    except (
        ArithmeticError, AttributeError, LookupError, TypeError, ValueError, nibabel.spatialimages.HeaderDataError,
    ) as error:  # fmt: skip
        values = f"nifti={kept!r}, spacing={layout.spacing!r}"
        raise InputError(f"metadata: a NIfTI header cannot hold {values}: {error}") from error
    header.set_data_offset(header.single_vox_offset)
    header["magic"] = header.single_magic
    dtype = array.dtype.newbyteorder("<")
    # nibabel's level; a fixed time makes files of equal content equal
    with path.open("wb") as raw:
        file: Any = gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix.lower() == ".gz" else raw
        header.write_to(file)
        file.write(bytes(header.single_vox_offset - file.tell()))
        # slab by slab, since the order of the file differs from that of most arrays
        for slab in range(array.shape[-1]):
            file.write(array[..., slab].astype(dtype, copy=False).tobytes(order="F"))
        if file is not raw:
            file.close()


def _set_geometry(header: Any, array: np.ndarray, layout: Layout) -> None:
    kept = layout.metadata.get("nifti", {})
    space, scales = _common_unit(layout, "XYZ", _LENGTHS)
    time, time_scales = _common_unit(layout, "T", _TIMES)
    scales += time_scales
    spacing = [layout.spacing_of(letter)[0] for letter in "XYZT"]
    zooms = [*(1.0 if step is None else step * scale for step, scale in zip(spacing, scales, strict=True)), 1.0, 1.0]
    header.set_zooms(zooms[: array.ndim])
    header.set_xyzt_units(_CODES[space], _CODES[time])
    # the code of the original file may include the unit of an axis that the array lacks
    header["xyzt_units"] = kept.get("xyzt_units", header["xyzt_units"])
    if "qform_code" in kept and "sform" in kept:
        kept = {"qform": kept["sform"]} | kept
    whole = {name: np.array([*kept[name], [0, 0, 0, 1]]) for name in ("sform", "qform", "affine") if name in kept}
    affine = np.diag([*zooms[:3], 1.0])
    affine[:3, 3] = [(layout.origin_of(letter) or 0) * scale for letter, scale in zip("XYZ", scales, strict=False)]
    if not all(np.isfinite(matrix).all() for matrix in whole.values()):
        raise ValueError("an affine is not finite")
    affine = whole.get("affine", affine)
    if "sform" in whole or "qform" not in whole:
        header.set_sform(whole.get("sform", affine), kept.get("sform_code", 0 if "affine" in kept else 1))
    if "qform" in whole:
        header.set_qform(whole["qform"], kept["qform_code"])


def _common_unit(layout: Layout, letters: str, sizes: dict[str | None, float]) -> tuple[str | None, list[float]]:
    """Return a unit of NIfTI for axes, and the factors that convert their spacing; None and 1 for unknown units."""
    units = [UNITS.get(unit or "", unit) for unit in (layout.spacing_of(letter)[1] for letter in letters)]
    known = [unit for unit in units if unit in sizes]
    if not known:
        return None, [1.0] * len(letters)
    unit = known[0]
    if unit not in _CODES:
        # the largest below it, or the smallest: nanometers become micrometers
        smaller = [name for name in _CODES if sizes.get(name, math.inf) < sizes[unit]]
        unit = max(smaller, key=lambda name: sizes[name], default="micrometer")
    return unit, [sizes.get(name, sizes[unit]) / sizes[unit] for name in units]


def _set_details(header: Any, kept: dict[str, Any]) -> None:
    header["scl_slope"], header["scl_inter"] = kept.get("slope", 1), kept.get("inter", 0)
    for name, size in _TEXTS.items():
        header[name] = kept.get(name, "").encode()[:size]
    for name in _NUMBERS:
        header[name] = kept.get(name, 0)
