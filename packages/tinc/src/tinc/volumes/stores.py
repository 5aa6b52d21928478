"""Zarr arrays and OME-Zarr groups in folders."""

import itertools
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tinc.volumes.description import Layout, Volume, damage_named, described, layout_of
from visionkernels.checks import InputError
from visionkernels.extras import require

__all__ = ["move_folder", "read_zarr", "refuse_folder", "write_zarr", "zarr_attributes"]


def read_zarr(path: Path) -> Volume:
    """Open a Zarr array, or the finest level of an OME-Zarr image, or the one array or image in a group.

    Raises ValueError for a group of several; of the images of a bioformats2raw folder the first is opened.
    """
    zarr = require("zarr", "tinc-vision[zarr]")
    with damage_named(path):
        node = zarr.open(str(path), mode="r")
        places, note = [""], None
        if not _is_volume(node):
            places = list(itertools.islice(_volumes_in(node), 6))
            if not places:
                raise InputError("it contains no array")
            if "bioformats2raw.layout" in _ome(node):
                note = f"the first of several images is read, {places[0]}" if len(places) > 1 else None
                del places[1:]
            elif len(places) == 1:
                note = f"the group's one volume is read, {places[0]}"
        if len(places) == 1:
            node = node[places[0]] if places[0] else node
            multiscale = {} if hasattr(node, "shape") else _multiscale(node)
            # the first level is the finest
            array = node[multiscale["datasets"][0]["path"]] if multiscale else node
            if not hasattr(array, "shape"):
                raise InputError(f"its level {array.path} is no array")
            if math.prod(array.shape) * array.dtype.itemsize >= 1 << 63:
                raise InputError(f"it states the shape {array.shape}")
            volume = _zarr_volume(array, dict(array.attrs), multiscale)
            layout_of(array.ndim, volume.metadata, volume.channel_axis)
            json.dumps(volume.metadata, allow_nan=False)
            # a module that imports zarr
            from tinc.volumes.stored import StoredArray

            return replace(volume, array=StoredArray(array.async_array), note=note)
    names = ", ".join(places[:5]) + (", ..." if len(places) > 5 else "")
    raise InputError(
        f"volume {path} is a Zarr group without multiscales that holds {names}; give the path of one, such as "
        f"{path / places[0]}"
    )


def _is_volume(node: Any) -> bool:
    return hasattr(node, "shape") or bool(_multiscale(node))


def _volumes_in(group: Any) -> Iterator[str]:
    """Yield the paths of arrays and images in a group, by name; numbers come in their order."""
    with warnings.catch_warnings():
        # some writers add other folders to a group
        warnings.filterwarnings("ignore", message="Object at .* is not recognized")
        members = sorted(group.members(), key=lambda member: member[0].zfill(8) if member[0].isdigit() else member[0])
    for name, node in members:
        if _is_volume(node):
            yield name
        else:
            yield from (f"{name}/{inner}" for inner in _volumes_in(node))


def _ome(group: Any) -> dict[str, Any]:
    attributes = dict(group.attrs)
    return dict(attributes.get("ome", attributes))


def _multiscale(group: Any) -> dict[str, Any]:
    return dict((_ome(group).get("multiscales") or [{}])[0])


def _zarr_volume(array: Any, attributes: dict[str, Any], multiscale: dict[str, Any]) -> Volume:
    if not multiscale:
        kept = attributes.get("tinc", {})
        named = "".join(str(name or "?")[0].upper() for name in getattr(array.metadata, "dimension_names", None) or [])
        metadata = dict(kept.get("metadata", {}))
        if "axes" not in metadata and len(set(named) - {"?"}) == array.ndim:
            metadata["axes"] = named
        return Volume(array, kept.get("channel_axis"), {"format": "zarr"} | metadata)
    axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in multiscale.get("axes", [])]
    letters = "".join(str(axis["name"])[0].upper() for axis in axes)
    if len(letters) != array.ndim:
        letters = "TCZYX"[-array.ndim :]
    scale, origin = [1.0] * array.ndim, [0.0] * array.ndim
    transforms = [*multiscale["datasets"][0].get("coordinateTransformations", ())]
    for transform in [*transforms, *multiscale.get("coordinateTransformations", ())]:
        if transform.get("type") == "scale":
            scale = [a * b for a, b in zip(scale, transform["scale"], strict=True)]
            origin = [a * b for a, b in zip(origin, transform["scale"], strict=True)]
        elif transform.get("type") == "translation":
            origin = [a + b for a, b in zip(origin, transform["translation"], strict=True)]
    has_scale = any(transform.get("type") == "scale" for transform in transforms)
    spacing = dict(zip(letters, scale, strict=True)) if has_scale else {}
    spacing.pop("C", None)
    units = {str(axis["name"])[0].upper(): axis.get("unit") for axis in axes}
    channel_axis = letters.find("C")
    metadata = described("zarr", letters, spacing, units)
    if has_scale and any(origin):
        metadata["origin"] = [a if letter in spacing else None for a, letter in zip(origin, letters, strict=True)]
    return Volume(array, None if channel_axis < 0 else channel_axis, metadata)


def zarr_attributes(metadata: dict[str, Any], channel_axis: int | None) -> dict[str, Any]:
    """Return the attributes of a Zarr array in which `read_volume` finds metadata and the axis of channels."""
    return {"tinc": {"metadata": metadata, "channel_axis": channel_axis}}


def write_zarr(path: Path, array: np.ndarray, layout: Layout, overwrite: bool) -> None:
    """Write a Zarr array with its metadata, whole or not at all."""
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
    """Raise FileExistsError if `path` exists, unless it is a Zarr folder and `overwrite` is given."""
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists; pass --overwrite to replace it")
    if not any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup")):
        raise FileExistsError(f"{path} exists and is not a Zarr folder; remove it yourself")


def move_folder(new: Path, path: Path, *, overwrite: bool) -> None:
    """Rename the finished folder `new` to `path`, and remove a folder that it replaces. Raises FileExistsError."""
    refuse_folder(path, overwrite=overwrite)
    old = path.with_name(f".{path.name}-{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)
