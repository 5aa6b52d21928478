"""Volumes as files: TIFF, OME-TIFF, NIfTI, NumPy, Zarr and PNG, with what they say of axes, spacing and units.

Metadata are JSON values in one form for all formats: `axes` (a letter an axis), `spacing` and `units` (a list with an
entry an axis, None where unknown; units as OME-Zarr spells them), and what one format alone has under its name.
"""

import gzip
import math
import os
import shutil
import struct
import tempfile
import tokenize
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile
from PIL import Image

from tinc.signal import DTYPES
from visionkernels.extras import require
from visionkernels.files import CorruptFileError, replace_file

__all__ = ["SUFFIXES", "Volume", "move_folder", "read_volume", "refuse_folder", "write_volume"]

SUFFIXES = (".ome.tif", ".ome.tiff", ".tif", ".tiff", ".npy", ".nii", ".nii.gz", ".zarr", ".png")


@dataclass(frozen=True)
class Volume:
    """An array and what its file says about it."""

    array: Any
    """A NumPy array, a memory map, or a Zarr array that is read where it is indexed."""
    channel_axis: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    """JSON values; see the module."""
    note: str | None = None
    """What a user should hear: a conversion, a part that was not read."""


def read_volume(path: str | Path, *, as_type: str | None = None) -> Volume:
    """Read a volume by the suffix of its path.

    Uncompressed TIFF, .npy and .nii files are memory-mapped and Zarr arrays stay where they are. Of a TIFF the first
    series is read, of a Zarr group the finest level of its first picture, else its first array. NIfTI gives the
    integers of the file, not scaled; slope and intercept are in `metadata["nifti"]`.

    Arrays of a type that `tinc.compress` does not take are converted where another type holds every value exactly
    (bool and integers to the smallest, float16 and float64 to float32), with a `note`. `as_type` ("uint8", "uint16",
    "int16", "float32") converts in any case: values are rounded, and must be in the type's range.

    Raises FileNotFoundError, ImportError for a missing extra, CorruptFileError (a ValueError) for a damaged file,
    ValueError for another suffix or kind of picture or values beyond `as_type`, TypeError for types with no way.
    """
    path = Path(path)
    format = _format_of(path)
    if as_type is not None and as_type not in DTYPES:
        raise ValueError(f"as_type={as_type!r} must be one of {', '.join(DTYPES)}")
    if not path.exists():
        raise FileNotFoundError(f"volume {path} does not exist")
    readers = {"ome": _read_tiff, "tiff": _read_tiff, "npy": _read_npy, "nifti": _read_nifti, "zarr": _read_zarr}
    volume = readers.get(format, _read_png)(path)
    return _with_type(volume, path, as_type)


def write_volume(
    path: str | Path,
    array: np.ndarray,
    *,
    metadata: dict[str, Any] | None = None,
    channel_axis: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a volume in the format of the path's suffix, whole or not at all.

    `metadata` is that of `read_volume`. .ome.tif has Y and X last and NIfTI the order XYZTC, so an array with
    other axes is transposed; the others keep the order. .npy and .png have no place for metadata.

    Raises FileExistsError, ImportError for a missing extra, ValueError for another suffix, for metadata that do not fit
    the array, and for arrays that the format cannot hold.
    """
    path = Path(path)
    format = _format_of(path)
    array = np.asarray(array)
    layout = _layout(array.ndim, dict(metadata or {}), channel_axis)
    if format == "zarr":
        _write_zarr(path, array, layout, overwrite)
        return
    if format == "png":
        _check_png(path, array, channel_axis)
    with replace_file(path, overwrite=overwrite) as temporary:
        if format == "npy":
            np.save(temporary, array, allow_pickle=False)
        elif format == "png":
            Image.fromarray(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))).save(temporary)
        elif format == "nifti":
            _write_nifti(temporary, array, layout)
        else:
            _write_tiff(temporary, array, layout, is_ome=format == "ome")


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
    raise ValueError(f"volume {path} has the suffix {path.suffix!r}; known are {', '.join(SUFFIXES)}")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn what libraries raise on damaged files into one line with the file's name."""
    try:
        yield
    except (ImportError, PermissionError):
        raise
    except (
        ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError, OSError, SyntaxError,
        RuntimeError, struct.error, tokenize.TokenError, zlib.error, tifffile.TiffFileError,
        Image.DecompressionBombError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        if "imagecodecs" in reason:
            raise ImportError(f"{path}: {reason}; run: pip install imagecodecs") from error
        raise CorruptFileError(f"volume {path} is damaged or of another format: {reason[:200]}") from error


# --- axes, spacing and units

_UNITS = {
    "m": "meter", "cm": "centimeter", "mm": "millimeter", "µm": "micrometer", "μm": "micrometer", "um": "micrometer",
    "\\u00B5m": "micrometer", "micron": "micrometer", "nm": "nanometer", "pm": "picometer", "Å": "angstrom",
    "s": "second", "sec": "second", "ms": "millisecond", "msec": "millisecond", "µs": "microsecond",
    "usec": "microsecond", "inch": "inch",
}  # fmt: skip
_SYMBOLS = {"micrometer": "µm", "second": "s", "millisecond": "ms", "microsecond": "µs"} | {
    name: symbol for symbol, name in _UNITS.items() if symbol in ("m", "cm", "mm", "nm", "pm", "Å")
}


@dataclass(frozen=True)
class _Layout:
    """What is known of an array's axes, for a writer."""

    axes: str
    spacing: list[float | None]
    units: list[str | None]
    channel_axis: int | None
    metadata: dict[str, Any]

    def moved(self, array: np.ndarray, order: str) -> tuple[np.ndarray, "_Layout"]:
        """Return the array with its axes sorted as in `order`; letters that it lacks go first."""
        places = sorted(range(array.ndim), key=lambda axis: order.find(self.axes[axis]))
        channel_axis = None if self.channel_axis is None else places.index(self.channel_axis)
        axes = "".join(self.axes[axis] for axis in places)
        spacing, units = [self.spacing[axis] for axis in places], [self.units[axis] for axis in places]
        return array.transpose(places), _Layout(axes, spacing, units, channel_axis, self.metadata)

    def spacing_of(self, letter: str) -> tuple[float | None, str | None]:
        """Return spacing and unit of an axis, None if it has none."""
        axis = self.axes.find(letter)
        return (None, None) if axis < 0 else (self.spacing[axis], self.units[axis])


def _layout(ndim: int, metadata: dict[str, Any], channel_axis: int | None) -> _Layout:
    if channel_axis is not None:
        if not -ndim <= channel_axis < ndim:
            raise ValueError(f"channel_axis={channel_axis} must be in [{-ndim}, {ndim})")
        channel_axis %= ndim
    spatial = ndim - (channel_axis is not None)
    default = "QTZYX"[max(5 - spatial, 0) :].rjust(spatial, "Q")
    if channel_axis is not None:
        default = default[:channel_axis] + ("S" if channel_axis == ndim - 1 else "C") + default[channel_axis:]
    axes = metadata.get("axes") or default
    spacing, units = metadata.get("spacing") or [None] * ndim, metadata.get("units") or [None] * ndim
    if not len(axes) == len(spacing) == len(units) == ndim:
        raise ValueError(f"metadata are of {len(axes)} axes ({axes}); the array has {ndim}")
    return _Layout(str(axes), list(spacing), list(units), channel_axis, metadata)


def _described(
    format: str, axes: str, spacing: Mapping[str, float | None], units: Mapping[str, str | None]
) -> dict[str, Any]:
    """Return metadata; spacing that is no positive number is unknown."""
    steps = [spacing.get(letter) for letter in axes]
    known = [step if step is not None and math.isfinite(step) and step > 0 else None for step in steps]
    metadata: dict[str, Any] = {"format": format, "axes": axes}
    if any(known):
        names = [units.get(letter) if step else None for letter, step in zip(axes, known, strict=True)]
        metadata |= {"spacing": known, "units": [None if name is None else _UNITS.get(name, name) for name in names]}
    return metadata


# --- TIFF


def _read_tiff(path: Path) -> Volume:
    with _damage_named(path), tifffile.TiffFile(path) as tif:
        series = tif.series[0]
        metadata = _tiff_metadata(tif, series.axes)
        is_mapped = series.dataoffset is not None and math.prod(series.shape) > 0
        array = tifffile.memmap(path, series=0, mode="r") if is_mapped else series.asarray()
        # of a file that was cut off, tifffile gives what there is
        if array.shape != series.shape:
            raise ValueError(f"it has pixels for {array.shape} of {series.shape}")
        note = f"the first of {len(tif.series)} series is read" if len(tif.series) > 1 else None
        axis = max(series.axes.find("S"), -1 if "S" in series.axes else series.axes.find("C"))
    return Volume(array, None if axis < 0 else axis, metadata, note)


def _tiff_metadata(tif: tifffile.TiffFile, axes: str) -> dict[str, Any]:
    if tif.is_ome and tif.ome_metadata:
        return _ome_metadata(tif.ome_metadata, axes)
    if tif.is_imagej:
        found = tif.imagej_metadata or {}
        unit = found.get("unit")
        spacing = {"Z": found.get("spacing"), "T": found.get("finterval")}
        for letter, name in (("X", "XResolution"), ("Y", "YResolution")):
            tag = tif.pages.first.tags.get(name)
            if tag is not None and unit not in (None, "", "pixel") and tag.value[0] > 0:
                spacing[letter] = tag.value[1] / tag.value[0]
        return _described("imagej", axes, spacing, {"X": unit, "Y": unit, "Z": unit, "T": "s"})
    kept = (tif.shaped_metadata or [{}])[0]
    metadata = _described("tiff", axes, {}, {})
    for name in ("spacing", "units"):
        if isinstance(kept.get(name), list | tuple) and len(kept[name]) == len(axes):
            metadata[name] = list(kept[name])
    return metadata


def _ome_metadata(xml: str, axes: str) -> dict[str, Any]:
    root = ElementTree.fromstring(xml)
    pixels = next((node for node in root.iter() if node.tag.endswith("}Pixels")), None)
    if pixels is None:
        return _described("ome", axes, {}, {})
    values = pixels.attrib
    spacing = {each: float(values.get(f"PhysicalSize{each}", "nan")) for each in "XYZ"}
    spacing["T"] = float(values.get("TimeIncrement", "nan"))
    units = {each: values.get(f"PhysicalSize{each}Unit", "µm") for each in "XYZ"}
    units["T"] = values.get("TimeIncrementUnit", "s")
    metadata = _described("ome", axes, spacing, units)
    names = [node.get("Name") for node in pixels if node.tag.endswith("}Channel")]
    if any(names):
        metadata["channels"] = names
    return metadata


def _write_tiff(path: Path, array: np.ndarray, layout: _Layout, *, is_ome: bool) -> None:
    if is_ome:
        array, layout = layout.moved(array, "YXS")
    is_colour = layout.axes.endswith("S") and array.shape[-1] in (3, 4) and array.dtype.kind == "u"
    options: dict[str, Any] = {"photometric": "rgb" if is_colour else "minisblack"}
    if layout.axes.endswith("S"):
        options["planarconfig"] = "contig"
    description: dict[str, Any] = {"axes": layout.axes}
    is_imagej = layout.metadata.get("format") == "imagej" and array.dtype.name in ("uint8", "uint16", "float32")
    if is_ome:
        description |= _ome_description(layout)
    elif is_imagej and set(layout.axes) <= set("TZCYXS"):
        array, layout = layout.moved(array, "TZCYXS")
        description["axes"] = layout.axes
        options |= _imagej_options(layout, description)
    elif any(layout.spacing):
        description |= {"spacing": layout.spacing, "units": layout.units}
    try:
        tifffile.imwrite(path, array, ome=is_ome, metadata=description, **options)
    except (ValueError, TypeError, LookupError, tifffile.OmeXmlError) as error:
        raise ValueError(f"a TIFF cannot hold {array.dtype} {array.shape} with axes {layout.axes}: {error}") from error


def _ome_description(layout: _Layout) -> dict[str, Any]:
    description: dict[str, Any] = {}
    for letter in "XYZT":
        step, unit = layout.spacing_of(letter)
        if step is not None:
            key = "TimeIncrement" if letter == "T" else f"PhysicalSize{letter}"
            description[key] = step
            if unit is not None:
                description[f"{key}Unit"] = _SYMBOLS.get(unit, unit)
    names = layout.metadata.get("channels")
    if names and "C" in layout.axes:
        description["Channel"] = {"Name": names}
    return description


def _imagej_options(layout: _Layout, description: dict[str, Any]) -> dict[str, Any]:
    steps = {letter: layout.spacing_of(letter) for letter in "XYZT"}
    if steps["Z"][0]:
        description["spacing"] = steps["Z"][0]
    if steps["T"][0]:
        description["finterval"] = steps["T"][0]
    options: dict[str, Any] = {"imagej": True}
    across, down = steps["X"][0], steps["Y"][0]
    unit = next((unit for _, unit in (steps["X"], steps["Z"]) if unit), None)
    if unit:
        description["unit"] = "um" if unit == "micrometer" else _SYMBOLS.get(unit, unit)
    if across and down:
        options["resolution"] = (1 / across, 1 / down)
    return options


# --- NumPy and PNG


def _read_npy(path: Path) -> Volume:
    with _damage_named(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive of several arrays")
    return Volume(array, None, {"format": "npy"})


def _read_png(path: Path) -> Volume:
    with _damage_named(path), Image.open(path, formats=["PNG"]) as image:
        mode = image.mode
        with path.open("rb") as file:
            depth = file.read(25)[24]
        pixels = np.array(image)
    if mode in ("L", "I;16", "I"):
        return Volume(pixels.astype(np.uint16) if mode == "I" else pixels, None, {"format": "png", "axes": "YX"})
    # Pillow halves the depth of colour pictures
    if mode in ("RGB", "RGBA") and depth == 8:
        return Volume(pixels, 2, {"format": "png", "axes": "YXS"})
    raise ValueError(
        f"volume {path} is a PNG of mode {mode}, {depth} bits; read are grey of 8 and 16 bits and RGB of 8: convert "
        "it, or save it as .tif"
    )


def _check_png(path: Path, array: np.ndarray, channel_axis: int | None) -> None:
    is_grey = array.ndim == 2 and channel_axis is None and array.dtype.name in ("uint8", "uint16")
    is_colour = array.ndim == 3 and channel_axis in (2, -1) and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if not is_grey and not is_colour:
        channels = "" if channel_axis is None else f" with channels along axis {channel_axis}"
        raise ValueError(
            f"{path} cannot hold {array.dtype} {array.shape}{channels}; a PNG holds uint8 or uint16 of 2 axes, or "
            "uint8 with 3 or 4 channels last: write .tif or .npy"
        )


# --- NIfTI


def _read_nifti(path: Path) -> Volume:
    nibabel = require("nibabel", "tinc-vision[nifti]")
    problems = (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError)
    with _damage_named(path):
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
        metadata = _described("nifti", axes, {each: zooms.get(each) for each in "XYZT"}, units)
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


def _write_nifti(path: Path, array: np.ndarray, layout: _Layout) -> None:
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


def _set_geometry(header: Any, array: np.ndarray, layout: _Layout) -> None:
    kept = layout.metadata.get("nifti", {})
    steps = [layout.spacing_of(letter)[0] or 1.0 for letter in "XYZ"]
    header.set_zooms([*steps, layout.spacing_of("T")[0] or 1.0, 1.0][: array.ndim])
    names = [layout.spacing_of(letter)[1] for letter in "XT"]
    known = {"meter": "mm", "millimeter": "mm", "micrometer": "micron", "second": "sec", "millisecond": "msec"}
    known |= {"meter": "meter", "microsecond": "usec"}
    header.set_xyzt_units(*(known.get(name or "", "unknown") for name in names))
    # it may tell a unit of an axis that the array lacks
    header["xyzt_units"] = kept.get("xyzt_units", header["xyzt_units"])
    whole = {name: np.array([*kept[name], [0, 0, 0, 1]]) for name in ("sform", "qform", "affine") if name in kept}
    affine = whole.get("affine", np.diag([*steps, 1.0]))
    if "sform" in whole or "qform" not in whole:
        header.set_sform(whole.get("sform", affine), kept.get("sform_code", 0 if "affine" in kept else 1))
    if "qform" in whole:
        header.set_qform(whole["qform"], kept["qform_code"])


# --- Zarr


def _read_zarr(path: Path) -> Volume:
    zarr = require("zarr", "tinc-vision[zarr]")
    with _damage_named(path):
        node = zarr.open(str(path), mode="r")
        attributes: dict[str, Any] = dict(node.attrs)
        inside: dict[str, Any] = {}
        while not hasattr(node, "shape"):
            inside = _multiscale(attributes) or inside
            with warnings.catch_warnings():
                # some writers put folders of their own beside the arrays
                warnings.filterwarnings("ignore", message="Object at .* is not recognized")
                names = sorted(name for name, _ in node.members())
            if not names:
                raise ValueError("it holds no array")
            # the finest level comes first in the list of an OME-Zarr
            node = node[inside["datasets"][0]["path"] if _multiscale(attributes) else names[0]]
            attributes = dict(node.attrs)
        return _zarr_volume(node, attributes, inside)


def _multiscale(attributes: dict[str, Any]) -> dict[str, Any]:
    found = attributes.get("ome", attributes).get("multiscales") or [{}]
    return dict(found[0])


def _zarr_volume(array: Any, attributes: dict[str, Any], multiscale: dict[str, Any]) -> Volume:
    if not multiscale:
        kept = attributes.get("tinc", {})
        named = "".join(str(name or "?")[0].upper() for name in getattr(array.metadata, "dimension_names", None) or [])
        metadata = dict(kept.get("metadata", {}))
        if "axes" not in metadata and len(set(named) - {"?"}) == array.ndim:
            metadata["axes"] = named
        return Volume(array, kept.get("channel_axis"), {"format": "zarr"} | metadata)
    axes = [each if isinstance(each, dict) else {"name": each} for each in multiscale.get("axes", [])]
    letters = "".join(str(each["name"])[0].upper() for each in axes)
    if len(letters) != array.ndim:
        letters = "TCZYX"[-array.ndim :]
    scale = [1.0] * array.ndim
    transforms = [*multiscale["datasets"][0].get("coordinateTransformations", ())]
    for each in [*transforms, *multiscale.get("coordinateTransformations", ())]:
        if each.get("type") == "scale":
            scale = [a * b for a, b in zip(scale, each["scale"], strict=True)]
    has_scale = any(each.get("type") == "scale" for each in transforms)
    spacing = dict(zip(letters, scale, strict=True)) if has_scale else {}
    spacing.pop("C", None)
    units = {str(each["name"])[0].upper(): each.get("unit") for each in axes}
    channel_axis = letters.find("C")
    return Volume(array, None if channel_axis < 0 else channel_axis, _described("zarr", letters, spacing, units))


def zarr_attributes(metadata: dict[str, Any], channel_axis: int | None) -> dict[str, Any]:
    """Return the attributes of a Zarr array from which `read_volume` takes metadata and channels."""
    return {"tinc": {"metadata": metadata, "channel_axis": channel_axis}}


def _write_zarr(path: Path, array: np.ndarray, layout: _Layout, overwrite: bool) -> None:
    zarr = require("zarr", "tinc-vision[zarr]")
    refuse_folder(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".zarr"))
    try:
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        attributes = zarr_attributes(layout.metadata, layout.channel_axis)
        zarr.create_array(str(temporary), data=native, attributes=attributes, overwrite=True)
        temporary.chmod(path.parent.stat().st_mode & 0o777)
        move_folder(temporary, path, overwrite=overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def refuse_folder(path: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError if `path` is there and may not be replaced: without `overwrite`, or being no Zarr."""
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists; pass --overwrite to replace it")
    if not any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup")):
        raise FileExistsError(f"{path} exists and is no Zarr folder; remove it yourself")


def move_folder(new: Path, path: Path, *, overwrite: bool) -> None:
    """Rename the finished folder `new` to `path`, and remove what was there. Raises FileExistsError."""
    refuse_folder(path, overwrite=overwrite)
    old = path.with_name(f".{path.name}-{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


# --- types


def _with_type(volume: Volume, path: Path, as_type: str | None) -> Volume:
    dtype = np.dtype(volume.array.dtype)
    name = dtype.newbyteorder("=").name
    if name == as_type or (as_type is None and name in DTYPES):
        return volume
    if dtype.kind not in "biuf":
        raise TypeError(f"volume {path} holds {dtype}; it must hold numbers, one a voxel: {', '.join(DTYPES)}")
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
            # values that wrapped come back, large integers compare as float64: each test alone would miss one
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
        raise ValueError(f"as_type={as_type!r}: volume {path} has {count} values that are not finite")
    limits: Any = np.finfo(as_type) if as_type == "float32" else np.iinfo(as_type)
    values = np.rint(samples) if as_type != "float32" and samples.dtype.kind == "f" else samples
    inside = values[finite]
    if inside.size and not limits.min <= inside.min() <= inside.max() <= limits.max:
        raise ValueError(
            f"as_type={as_type!r} holds values in [{limits.min}, {limits.max}]; volume {path} has "
            f"[{inside.min()}, {inside.max()}]: rescale them first"
        )
    return values.astype(as_type)
