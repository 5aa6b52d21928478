"""The two volumes of tables, pictures and benches: one of nibabel's data, and that of the official repository."""

import os
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

from visionkernels.extras import require

__all__ = ["has_official_volume", "official_path", "official_volume", "sample_volume"]


@cache
def sample_volume() -> np.ndarray:
    """Return a brain volume from nibabel's test data as uint16 [24, 128, 96]."""
    nibabel = require("nibabel", "tinc-vision[samples]")
    with as_file(files("nibabel") / "tests" / "data" / "example4d.nii.gz") as path:
        series = np.asarray(nibabel.load(path).dataobj)
    return np.ascontiguousarray(series[..., 0].transpose(2, 0, 1)).astype(np.uint16) * 56


def has_official_volume() -> bool:
    """Return whether the folder TINC_DATA holds test.tif."""
    return "TINC_DATA" in os.environ and _path().is_file()


def official_path() -> Path:
    """Return the path of test.tif of the official repository. Raises FileNotFoundError without it."""
    if not has_official_volume():
        raise FileNotFoundError("set TINC_DATA to the folder of test.tif, the volume of the official repository")
    return _path()


@cache
def official_volume() -> np.ndarray:
    """Return the samples of `official_path` as uint16 [8, 128, 128]."""
    from tinc.volumes import read_volume

    return np.ascontiguousarray(np.squeeze(np.asarray(read_volume(official_path()).array)))


def _path() -> Path:
    return Path(os.environ["TINC_DATA"]) / "test.tif"
