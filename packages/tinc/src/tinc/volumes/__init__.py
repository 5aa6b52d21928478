"""Files of volumes: TIFF, OME-TIFF, NIfTI, NumPy, Zarr and PNG, with their metadata of axes, spacing and units."""

from tinc.volumes.description import Volume, as_metadata
from tinc.volumes.files import SUFFIXES, open_volume, read_volume, unstored_metadata, write_volume
from tinc.volumes.geometry import essential_metadata, part_of
from tinc.volumes.stores import move_folder, refuse_folder, zarr_attributes

__all__ = [
    "SUFFIXES",
    "Volume",
    "as_metadata",
    "essential_metadata",
    "move_folder",
    "open_volume",
    "part_of",
    "read_volume",
    "refuse_folder",
    "unstored_metadata",
    "write_volume",
    "zarr_attributes",
]
