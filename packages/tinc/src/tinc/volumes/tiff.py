"""TIFF, OME-TIFF and TIFF of ImageJ."""

import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from tinc.volumes.description import SYMBOLS, Layout, Volume, check_claim, damage_named, described, is_number
from visionkernels.checks import InputError

__all__ = ["read_tiff", "write_tiff"]


def read_tiff(path: Path) -> Volume:
    """Read the first series of a TIFF file; uncompressed samples are mapped into memory."""
    with damage_named(path), tifffile.TiffFile(path) as tif:
        _check_directories(tif)
        series = tif.series[0]
        metadata = _tiff_metadata(tif, series.axes)
        is_mapped = series.dataoffset is not None and math.prod(series.shape) > 0
        if not is_mapped:
            _check_segments(tif, series)
        array = tifffile.memmap(path, series=0, mode="r") if is_mapped else series.asarray()
        # tifffile returns the pixels that a truncated file has
        if array.shape != series.shape:
            raise InputError(f"it has pixels for the shape {array.shape} instead of {series.shape}")
        note = f"the first of {len(tif.series)} series is read" if len(tif.series) > 1 else None
        axis = max(series.axes.find("S"), -1 if "S" in series.axes else series.axes.find("C"))
    return Volume(array, None if axis < 0 else axis, metadata, note)


_MAX_RATIO = 1 << 16
"""Most bytes that a byte of a compressed or sparse file may stand for."""
_MIN_LIMIT = 1 << 28
"""Bytes of samples that a file of any size may state."""
_MAX_PLANES = 1 << 20


def _check_directories(tif: tifffile.TiffFile) -> None:
    """Raise ValueError for directories that overlap or form a loop, and for OME-XML of absurdly many planes."""
    tiff, file = tif.tiff, tif.filehandle
    left, place = file.size, tif.pages.first.offset
    # of each, the count of its entries and the place of the next one; tifffile leaves out those that are not there
    while 0 < place <= file.size - tiff.tagnosize:
        file.seek(place)
        (count,) = struct.unpack(tiff.tagnoformat, file.read(tiff.tagnosize))
        following = place + tiff.tagnosize + count * tiff.tagsize
        if following > file.size - tiff.offsetsize:
            break
        left -= following - place
        if left < 0:
            raise InputError("its directories overlap, or form a loop")
        file.seek(following)
        (place,) = struct.unpack(tiff.offsetformat, file.read(tiff.offsetsize))
    if tif.is_ome and tif.ome_metadata:
        for pixels in _pixels(tif.ome_metadata):
            planes = math.prod(int(pixels.get(f"Size{letter}", 1)) for letter in "ZCT")
            if planes > max(_MAX_PLANES, tif.filehandle.size):
                raise InputError(f"its OME-XML states {planes} planes")


def _check_segments(tif: tifffile.TiffFile, series: Any) -> None:
    """Raise ValueError for samples, strips or tiles of which the file can hold only a part."""
    size = tif.filehandle.size
    most = max(_MIN_LIMIT, _MAX_RATIO * size)
    check_claim(math.prod(series.shape) * series.dtype.itemsize, most)
    keyframe = series.keyframe
    check_claim(math.prod(keyframe.shaped) * keyframe.dtype.itemsize, most)
    check_claim(math.prod(keyframe.chunks) * keyframe.dtype.itemsize, most)
    if math.prod(keyframe.chunked) > size:
        raise InputError(f"it states {math.prod(keyframe.chunked)} strips or tiles")
    for page in series.pages:
        if page is not None and max(page.databytecounts, default=0) > page.parent.filehandle.size:
            raise InputError(f"it states a strip or tile of {max(page.databytecounts)} bytes")


def _tiff_metadata(tif: tifffile.TiffFile, axes: str) -> dict[str, Any]:
    if tif.is_ome and tif.ome_metadata:
        return _ome_metadata(tif.ome_metadata, axes)
    if tif.is_imagej:
        details = tif.imagej_metadata or {}
        unit = details.get("unit")
        spacing = {"Z": details.get("spacing"), "T": details.get("finterval")}
        for letter, name in (("X", "XResolution"), ("Y", "YResolution")):
            tag = tif.pages.first.tags.get(name)
            value = (0, 0) if tag is None else tag.value
            is_rational = isinstance(value, tuple) and len(value) == 2 and all(map(is_number, value))
            if is_rational and unit not in (None, "", "pixel") and value[0] > 0:
                spacing[letter] = value[1] / value[0]
        return described("imagej", axes, spacing, {"X": unit, "Y": unit, "Z": unit, "T": "s"})
    kept = (tif.shaped_metadata or [{}])[0]
    metadata = described("tiff", axes, {}, {})
    known: dict[str, Callable[[Any], bool]] = {
        "spacing": lambda step: is_number(step) and step > 0,
        "units": lambda unit: isinstance(unit, str),
        "origin": is_number,
    }
    for name, is_known in known.items():
        if isinstance(kept.get(name), list | tuple) and len(kept[name]) == len(axes):
            metadata[name] = [value if is_known(value) else None for value in kept[name]]
    return metadata


def _pixels(xml: str) -> Iterator[ElementTree.Element]:
    return (node for node in ElementTree.fromstring(xml).iter() if node.tag.endswith("}Pixels"))


def _ome_metadata(xml: str, axes: str) -> dict[str, Any]:
    pixels = next(_pixels(xml), None)
    if pixels is None:
        return described("ome", axes, {}, {})
    values = pixels.attrib
    spacing = {letter: float(values.get(f"PhysicalSize{letter}", "nan")) for letter in "XYZ"}
    spacing["T"] = float(values.get("TimeIncrement", "nan"))
    units = {letter: values.get(f"PhysicalSize{letter}Unit", "µm") for letter in "XYZ"}
    units["T"] = values.get("TimeIncrementUnit", "s")
    metadata = described("ome", axes, spacing, units)
    names = [node.get("Name") for node in pixels if node.tag.endswith("}Channel")]
    if any(names):
        metadata["channels"] = names
    return metadata


def write_tiff(path: Path, array: np.ndarray, layout: Layout, *, is_ome: bool) -> None:
    """Write a TIFF file as OME-TIFF, as ImageJ does, or with a plain description, as the metadata suggest."""
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
    elif any(step is not None for step in layout.spacing):
        description |= {"spacing": layout.spacing, "units": layout.units}
        description |= {"origin": layout.origin} if any(layout.origin) else {}
    try:
        tifffile.imwrite(path, array, ome=is_ome, metadata=description, **options)
    except (ValueError, TypeError, LookupError, tifffile.OmeXmlError) as error:
        raise InputError(f"a TIFF cannot hold {array.dtype} {array.shape} with axes {layout.axes}: {error}") from error


def _ome_description(layout: Layout) -> dict[str, Any]:
    description: dict[str, Any] = {}
    for letter in "XYZT":
        step, unit = layout.spacing_of(letter)
        if step is not None:
            key = "TimeIncrement" if letter == "T" else f"PhysicalSize{letter}"
            description[key] = step
            if unit is not None:
                description[f"{key}Unit"] = SYMBOLS.get(unit, unit)
    names = layout.metadata.get("channels")
    if names and "C" in layout.axes:
        description["Channel"] = {"Name": names}
    return description


def _imagej_options(layout: Layout, description: dict[str, Any]) -> dict[str, Any]:
    steps = {letter: layout.spacing_of(letter) for letter in "XYZT"}
    if steps["Z"][0] is not None:
        description["spacing"] = steps["Z"][0]
    if steps["T"][0] is not None:
        description["finterval"] = steps["T"][0]
    options: dict[str, Any] = {"imagej": True}
    across, down = steps["X"][0], steps["Y"][0]
    unit = next((unit for _, unit in (steps["X"], steps["Z"]) if unit), None)
    if unit:
        description["unit"] = "um" if unit == "micrometer" else SYMBOLS.get(unit, unit)
    if across is not None and down is not None:
        options["resolution"] = (1 / across, 1 / down)
    return options
