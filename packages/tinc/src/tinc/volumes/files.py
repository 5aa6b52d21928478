"""Reading and writing of volumes, in the format of the path's suffix."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tinc.signal import DTYPES, refuse_mask
from tinc.volumes.conversion import ConvertedArray, with_type
from tinc.volumes.description import Volume, as_metadata, layout_of
from tinc.volumes.nifti import read_nifti, write_nifti
from tinc.volumes.plain import check_png, read_npy, read_png
from tinc.volumes.stores import read_zarr, write_zarr
from tinc.volumes.tiff import read_tiff, write_tiff
from visionkernels.checks import InputError
from visionkernels.files import replace_file

__all__ = ["SUFFIXES", "open_volume", "read_volume", "unstored_metadata", "write_volume"]

SUFFIXES = (".ome.tif", ".ome.tiff", ".tif", ".tiff", ".npy", ".nii", ".nii.gz", ".zarr", ".png")


def read_volume(path: str | Path, *, as_type: str | None = None) -> Volume:
    """Read a volume by the suffix of its path; see `open_volume`, but samples are converted here, in memory."""
    volume = open_volume(path, as_type=as_type)
    if isinstance(volume.array, ConvertedArray):
        volume = replace(volume, array=np.asarray(volume.array))
    return volume


def open_volume(path: str | Path, *, as_type: str | None = None) -> Volume:
    """Open a volume by the suffix of its path.

    Uncompressed TIFF, .npy and .nii files are memory-mapped, and Zarr arrays are read when they are indexed. The first
    series of a TIFF is read, and the finest level of an OME-Zarr image; another Zarr group must hold one array, and a
    path within a .zarr folder selects one of several. Samples of NIfTI are the integers of the file, not scaled; slope
    and intercept are in `metadata["nifti"]`.

    Arrays of other types than those of `tinc.compress` are converted if one of these holds every value exactly (bool
    and integers to the smallest, float16 and float64 to float32), with a `note`. `as_type` ("uint8", "uint16", "int16",
    "float32") converts any numbers: values are rounded, and must be in the type's range. All values are looked at, part
    by part, and converted when they are indexed.

    Raises FileNotFoundError, ImportError for a missing extra, CorruptFileError (a ValueError) for a damaged file,
    ValueError for another suffix, another kind of image, several arrays in a Zarr group and values beyond `as_type`,
    and TypeError for types without a conversion.
    """
    path = Path(path)
    is_inside = path.is_dir() and any(parent.suffix.lower() == ".zarr" for parent in path.parents)
    format = "zarr" if is_inside else _format_of(path)
    if as_type is not None and as_type not in DTYPES:
        raise InputError(f"as_type={as_type!r} must be one of {', '.join(DTYPES)}")
    if not path.exists():
        raise FileNotFoundError(f"volume {path} does not exist")
    readers = {"ome": read_tiff, "tiff": read_tiff, "npy": read_npy, "nifti": read_nifti, "zarr": read_zarr}
    volume = readers.get(format, read_png)(path)
    return with_type(volume, path, as_type)


def write_volume(
    path: str | Path,
    array: np.ndarray,
    *,
    metadata: dict[str, Any] | None = None,
    channel_axis: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a volume in the format of the path's suffix, whole or not at all.

    An array is transposed for .ome.tif, where Y and X come last, and for NIfTI, whose order is XYZTC; other formats
    keep the order of the axes.

    Args:
        path: the file
        array: the samples
        metadata: those of `read_volume`, `part_of` and `TincFile.metadata_of`; .npy and .png cannot store them
        channel_axis: axis of the channels; None without channels
        overwrite: replace an existing file

    Raises FileExistsError, ImportError for a missing extra, TypeError for metadata that are not a dict, and ValueError
    for another suffix, for metadata that do not fit the array, for masked arrays, and for arrays that the format cannot
    hold.
    """
    path = Path(path)
    format = _format_of(path)
    refuse_mask(array, "array")
    array = np.asarray(array)
    layout = layout_of(array.ndim, as_metadata(metadata), channel_axis)
    if format == "zarr":
        write_zarr(path, array, layout, overwrite)
        return
    if format == "png":
        check_png(path, array, channel_axis)
    with replace_file(path, overwrite=overwrite) as temporary:
        if format == "npy":
            np.save(temporary, array, allow_pickle=False)
        elif format == "png":
            Image.fromarray(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))).save(temporary)
        elif format == "nifti":
            write_nifti(temporary, array, layout)
        else:
            write_tiff(temporary, array, layout, is_ome=format == "ome")


def unstored_metadata(path: str | Path, metadata: dict[str, Any]) -> list[str]:
    """Return the names of metadata about places and numbers that the format of the path cannot store."""
    format = _format_of(Path(path))
    if format in ("nifti", "zarr"):
        return []
    kinds = {"npy": ("spacing", "origin"), "png": ("spacing", "origin"), "ome": ("origin",), "tiff": ()}
    names = [name for name in kinds[format] if metadata.get(name) is not None]
    nifti = metadata.get("nifti")
    if not isinstance(nifti, dict):
        return names
    return names + [name for name in ("sform", "qform", "affine", "slope", "inter") if name in nifti]


def _format_of(path: Path) -> str:
    name = path.name.lower()
    for format, endings in (
        ("ome", (".ome.tif", ".ome.tiff")),
        ("tiff", (".tif", ".tiff")),
        ("nifti", (".nii", ".nii.gz")),
        ("npy", (".npy",)),
        ("zarr", (".zarr",)),
        ("png", (".png",)),
    ):
        if name.endswith(endings):
            return format
    raise InputError(f"volume {path} has the suffix {path.suffix!r}; known: {', '.join(SUFFIXES)}")
