"""Volumes in the form of the official code: four axes, scaled to a range of float32, and converted back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tinc.signal import refuse_mask
from tinc.volumes.plain import read_npy
from tinc.volumes.tiff import read_tiff
from visionkernels.checks import InputError, check, check_choice

__all__ = ["Rounding", "SideInfo", "denormalise", "normalise", "read_volume", "with_channels"]

Rounding = Literal["truncate", "nearest"]


@dataclass(frozen=True, kw_only=True)
class SideInfo:
    """Facts about the volume that a decoder needs besides the weights; official folders lack them."""

    shape: tuple[int, int, int, int]
    """Depth, height, width, channels."""
    dtype: str
    """Sample type of the source, in native byte order, e.g. "uint16"."""
    data_min: float
    data_max: float
    scale_min: float = 0.0
    scale_max: float = 100.0
    """Range of the values that the networks are trained on, from `scale_min` on."""

    def __post_init__(self) -> None:
        sizes = len(self.shape) == 4 and all(isinstance(size, int) and size >= 1 for size in self.shape)
        check(sizes, "shape", self.shape, "depth, height, width and channels, each at least 1")
        try:
            dtype: np.dtype[Any] | None = np.dtype(self.dtype)
        except TypeError:
            dtype = None
        check(dtype is not None and dtype.kind in "iuf", "dtype", self.dtype, "an integer or floating type of numpy")
        check(self.data_min < self.data_max, "data_min, data_max", (self.data_min, self.data_max), "rising")
        check(self.scale_min < self.scale_max, "scale_min, scale_max", (self.scale_min, self.scale_max), "rising")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SideInfo":
        """Return the side info of plain data, e.g. of JSON."""
        return cls(**{**values, "shape": tuple(values["shape"])})


def read_volume(path: str | Path) -> np.ndarray:
    """Read a .tif or .npy file as an array of depth, height, width, channels; a file of three axes has one channel.

    Raises FileNotFoundError, CorruptFileError (a ValueError) for a damaged file, and ValueError for other suffixes and
    shapes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"volume {path} is not a file")
    readers = {".tif": read_tiff, ".tiff": read_tiff, ".npy": read_npy}
    if path.suffix.lower() not in readers:
        raise InputError(f"volume {path} has the suffix {path.suffix!r}; the official procedure reads .tif and .npy")
    return with_channels(readers[path.suffix.lower()](path).array)


def with_channels(volume: np.ndarray) -> np.ndarray:
    """Return `volume` with four axes: depth, height, width, channels.

    Raises TypeError for a type that is neither integer nor floating, ValueError for another number of axes, no
    elements, or a masked array.
    """
    refuse_mask(volume, "volume")
    if volume.dtype.kind not in "iuf":
        raise TypeError(f"volume has dtype {volume.dtype}; it must hold integers or real floating-point numbers")
    if volume.ndim not in (3, 4):
        raise InputError(
            f"volume has shape {volume.shape}; an octree needs depth, height, width, and channels if there are several"
        )
    if volume.size == 0:
        raise InputError(f"volume has shape {volume.shape}: it is empty")
    return volume if volume.ndim == 4 else volume[..., None]


def normalise(volume: np.ndarray, *, scale_min: float = 0.0, scale_max: float = 100.0) -> tuple[np.ndarray, SideInfo]:
    """Map the range of all channels together to [scale_min, scale_max], in float32 throughout.

    y = (x - min) / (max - min) * (scale_max - scale_min) + scale_min. Raises ValueError for NaN and infinities, with
    their number, and for a constant volume, whose range is empty.
    """
    volume = with_channels(volume)
    with np.errstate(over="ignore"):  # values beyond float32 are counted below
        values = volume.astype(np.float32)
    if volume.dtype.kind == "f":
        num_bad = int(values.size - np.isfinite(values).sum())
        if num_bad:
            raise InputError(f"volume holds {num_bad} values that are NaN or infinite in float32; replace them first")
    low, high = values.min(), values.max()
    if low == high:
        raise InputError(f"volume is constant, every voxel is {low:.7g}: there is nothing for a network to learn")
    with np.errstate(over="ignore"):
        if not np.isfinite(high - low):
            raise InputError(f"volume reaches from {low:.7g} to {high:.7g}, a range beyond float32; scale it first")
    side_info = SideInfo(
        shape=volume.shape, dtype=volume.dtype.name, data_min=float(low), data_max=float(high),
        scale_min=float(scale_min), scale_max=float(scale_max),
    )  # fmt: skip
    values -= low
    values /= high - low
    values *= np.float32(scale_max - scale_min)
    values += np.float32(scale_min)
    return values, side_info


def denormalise(values: np.ndarray, side_info: SideInfo, *, rounding: Rounding = "truncate") -> np.ndarray:
    """Clip to the trained range, invert `normalise` in float32, and convert to the source's type.

    `rounding` applies to integers: "truncate" rounds towards zero as the official code does, half a count low on
    average; "nearest" rounds ties to even.
    """
    check_choice("rounding", rounding, Rounding)
    low, high = np.float32(side_info.scale_min), np.float32(side_info.scale_max)
    data_min, data_max = np.float32(side_info.data_min), np.float32(side_info.data_max)
    # in place, to save memory on whole volumes
    scaled = np.clip(values.astype(np.float32, copy=False), low, high)
    scaled -= low
    scaled /= high - low
    scaled *= data_max - data_min
    scaled += data_min
    dtype = np.dtype(side_info.dtype)
    if dtype.kind == "f":
        return scaled.astype(dtype)
    if rounding == "nearest":
        np.rint(scaled, out=scaled)
    bounds = np.iinfo(dtype)
    # in float64, since float32 does not hold the largest 32-bit integers
    wide = scaled if dtype.itemsize <= 2 else scaled.astype(np.float64)
    most = float(bounds.max)
    # the float64 nearest to the largest 64-bit integer is above it
    most = most if most <= bounds.max else float(np.nextafter(most, 0))
    return np.clip(wide, float(bounds.min), most, out=wide).astype(dtype)
