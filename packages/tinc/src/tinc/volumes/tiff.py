"""TIFF, OME-TIFF and TIFF of ImageJ."""

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from tinc.volumes.description import SYMBOLS, Layout, Volume, damage_named, described
from visionkernels.checks import InputError

__all__ = ["read_tiff", "write_tiff"]


def read_tiff(path: Path) -> Volume:
    """Read the first series of a TIFF file; uncompressed samples are mapped into memory."""
    with damage_named(path), tifffile.TiffFile(path) as tif:
        series = tif.series[0]
        metadata = _tiff_metadata(tif, series.axes)
        is_mapped = series.dataoffset is not None and math.prod(series.shape) > 0
        array = tifffile.memmap(path, series=0, mode="r") if is_mapped else series.asarray()
        # tifffile returns the pixels that a truncated file has
        if array.shape != series.shape:
            raise InputError(f"it has pixels for the shape {array.shape} instead of {series.shape}")
        note = f"the first of {len(tif.series)} series is read" if len(tif.series) > 1 else None
        axis = max(series.axes.find("S"), -1 if "S" in series.axes else series.axes.find("C"))
    return Volume(array, None if axis < 0 else axis, metadata, note)


def _tiff_metadata(tif: tifffile.TiffFile, axes: str) -> dict[str, Any]:
    if tif.is_ome and tif.ome_metadata:
        return _ome_metadata(tif.ome_metadata, axes)
    if tif.is_imagej:
        details = tif.imagej_metadata or {}
        unit = details.get("unit")
        spacing = {"Z": details.get("spacing"), "T": details.get("finterval")}
        for letter, name in (("X", "XResolution"), ("Y", "YResolution")):
            tag = tif.pages.first.tags.get(name)
            if tag is not None and unit not in (None, "", "pixel") and tag.value[0] > 0:
                spacing[letter] = tag.value[1] / tag.value[0]
        return described("imagej", axes, spacing, {"X": unit, "Y": unit, "Z": unit, "T": "s"})
    kept = (tif.shaped_metadata or [{}])[0]
    metadata = described("tiff", axes, {}, {})
    for name in ("spacing", "units", "origin"):
        if isinstance(kept.get(name), list | tuple) and len(kept[name]) == len(axes):
            metadata[name] = list(kept[name])
    return metadata


def _ome_metadata(xml: str, axes: str) -> dict[str, Any]:
    root = ElementTree.fromstring(xml)
    pixels = next((node for node in root.iter() if node.tag.endswith("}Pixels")), None)
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
