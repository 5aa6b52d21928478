"""NIfTI, with its orientation."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from tinc.volumes.description import Layout, Volume, damage_named, described
from visionkernels.extras import require

__all__ = ["read_nifti", "write_nifti"]


def read_nifti(path: Path) -> Volume:
    nibabel = require("nibabel", "tinc-vision[nifti]")
    problems = (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError)
    with damage_named(path):
        try:
            image = nibabel.load(path)
            header = image.header
            if not hasattr(header, "get_sform"):
                raise ValueError(f"it is {type(image).__name__}")
            array = image.dataobj.get_unscaled()
        except problems as error:
            raise ValueError(str(error)) from error
        axes = "XYZTC"[: array.ndim].ljust(array.ndim, "Q")
        space, time = header.get_xyzt_units()
        units = dict.fromkeys("XYZ", None if space == "unknown" else space)
        units["T"] = None if time == "unknown" else time
        zooms = dict(zip(axes, map(float, header.get_zooms()), strict=False))
        metadata = described("nifti", axes, {each: zooms.get(each) for each in "XYZT"}, units)
        metadata["nifti"] = _orientation(header) | {"xyzt_units": int(header["xyzt_units"])}
        if (image.dataobj.slope, image.dataobj.inter) != (1, 0):
            metadata["nifti"] |= {"slope": float(image.dataobj.slope), "inter": float(image.dataobj.inter)}
    return Volume(array, 4 if array.ndim == 5 else None, metadata)


def _orientation(header: Any) -> dict[str, Any]:
    """Return the affines [3, 4] that have a code, else the affine that stands in for them."""
    found: dict[str, Any] = {}
    for name, (affine, code) in (("sform", header.get_sform(coded=True)), ("qform", header.get_qform(coded=True))):
        if affine is not None and code > 0:
            found |= {name: affine[:3].tolist(), f"{name}_code": int(code)}
    return found or {"affine": header.get_best_affine()[:3].tolist()}


def write_nifti(path: Path, array: np.ndarray, layout: Layout) -> None:
    nibabel = require("nibabel", "tinc-vision[nifti]")
    if not set(layout.axes) <= set("XYZTCS") or len(set(layout.axes)) < len(layout.axes):
        raise ValueError(f"NIfTI has the axes X, Y, Z, T and channels; the array has {layout.axes}")
    array, layout = layout.moved(array, "XYZTCS")
    if layout.channel_axis is not None:
        array = array.reshape(*array.shape[:-1], *(1,) * (5 - array.ndim), array.shape[-1])
    header = (nibabel.Nifti1Header if max(array.shape) < 1 << 15 else nibabel.Nifti2Header)(endianness="<")
    try:
        header.set_data_dtype(array.dtype)
        header.set_data_shape(array.shape)
    except nibabel.spatialimages.HeaderDataError as error:
        raise ValueError(f"NIfTI cannot hold {array.dtype} {array.shape}: {error}") from error
    _set_geometry(header, array, layout)
    header["scl_slope"] = layout.metadata.get("nifti", {}).get("slope", 1)
    header["scl_inter"] = layout.metadata.get("nifti", {}).get("inter", 0)
    header.set_data_offset(header.single_vox_offset)
    header["magic"] = header.single_magic
    dtype = array.dtype.newbyteorder("<")
    # the level is nibabel's; a fixed time keeps files of equal content equal
    with path.open("wb") as raw:
        file: Any = gzip.GzipFile("", "wb", 6, raw, mtime=0) if path.suffix.lower() == ".gz" else raw
        header.write_to(file)
        file.write(bytes(header.single_vox_offset - file.tell()))
        # slab by slab, since the file's order is not that of most arrays
        for slab in range(array.shape[-1]):
            file.write(array[..., slab].astype(dtype, copy=False).tobytes(order="F"))
        if file is not raw:
            file.close()


def _set_geometry(header: Any, array: np.ndarray, layout: Layout) -> None:
    kept = layout.metadata.get("nifti", {})
    spacing = [layout.spacing_of(letter)[0] for letter in "XYZT"]
    zooms = [*(1.0 if step is None else step for step in spacing), 1.0]
    header.set_zooms(zooms[: array.ndim])
    names = [layout.spacing_of(letter)[1] for letter in "XT"]
    known = {"meter": "mm", "millimeter": "mm", "micrometer": "micron", "second": "sec", "millisecond": "msec"}
    known |= {"meter": "meter", "microsecond": "usec"}
    header.set_xyzt_units(*("unknown" if name is None else known.get(name, "unknown") for name in names))
    # it may tell a unit of an axis that the array lacks
    header["xyzt_units"] = kept.get("xyzt_units", header["xyzt_units"])
    whole = {name: np.array([*kept[name], [0, 0, 0, 1]]) for name in ("sform", "qform", "affine") if name in kept}
    affine = whole.get("affine", np.diag([*zooms[:3], 1.0]))
    if "sform" in whole or "qform" not in whole:
        header.set_sform(whole.get("sform", affine), kept.get("sform_code", 0 if "affine" in kept else 1))
    if "qform" in whole:
        header.set_qform(whole["qform"], kept["qform_code"])
