"""Quality of a decoded volume: PSNR, SSIM, and the agreement with the original after a threshold.

Volumes are NumPy arrays of the same shape with two to four axes, e.g. depth, height, width, channels. Sums are float64,
a slice at a time.
"""

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tinc.signal import refuse_mask
from visionkernels.checks import InputError

__all__ = ["TYPE_RANGES", "DataRange", "accuracy", "compare", "iou", "ms_ssim", "precision", "psnr", "ssim"]

DataRange = Literal["dtype", "values"] | float
"""The largest possible difference.

"dtype": 255 for uint8, else 65535 (uint16, int16, float32, float64), the convention of TINC, which favours data that
use a part of the range; "values": largest minus smallest value of the original; or a number."""

TYPE_RANGES = {"uint8": 255.0, "uint16": 65535.0, "int16": 65535.0, "float32": 65535.0, "float64": 65535.0}

_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_PIXELS_AT_ONCE = 1 << 20


def psnr(original: np.ndarray, decoded: np.ndarray, *, data_range: DataRange = "dtype") -> float:
    """Return the peak signal-to-noise ratio in decibels: -10 log10(mean(((x - y) / R)^2)) with the range R.

    Identical volumes have an infinite ratio. Raises ValueError for shapes that differ, masked arrays, and a range
    that is zero or unknown.
    """
    _check(original, decoded)
    total = sum(float(np.square(x - y).sum()) for x, y in _slices(original, decoded))
    if total == 0:
        return math.inf
    limit = _range(original, data_range)
    return 10 * math.log10(limit**2 / (total / original.size))


def ssim(
    original: np.ndarray,
    decoded: np.ndarray,
    *,
    data_range: DataRange = "dtype",
    channel_axis: int | None = None,
) -> float:
    """Return the structural similarity of the slices of the last two axes, averaged; at most 1.

    With a `channel_axis` each channel has slices of its own; height and width are then the last axes besides it.
    Windows are Gaussian, 11 wide with sigma 1.5, and lie inside the slice; an axis of less than 11 values is not
    smoothed. K1 = 0.01 and K2 = 0.03; variances are not corrected for the sample size. Raises the errors of `psnr`.
    """
    stacks = _stacked(original, decoded, channel_axis)
    limit = _range(original, data_range)
    total = sum(float(_similarity(x, y, limit)[0].sum()) for x, y in stacks)
    return total / _num_slices(original, channel_axis)


def ms_ssim(
    original: np.ndarray,
    decoded: np.ndarray,
    *,
    data_range: DataRange = "dtype",
    channel_axis: int | None = None,
) -> float:
    """Return the SSIM over five scales, each half as fine as the one before, averaged over slices; at most 1.

    It is the product of the contrasts of the four finer scales and the SSIM of the coarsest, clipped at 0, with the
    usual powers. Raises ValueError for slices of at most 160 values a side, and the errors of `ssim`.
    """
    stacks = _stacked(original, decoded, channel_axis)
    limit = _range(original, data_range)
    total = 0.0
    for x, y in stacks:
        smallest = (_WINDOW - 1) * 2 ** (len(_SCALES) - 1)
        if min(x.shape[-2:]) <= smallest:
            raise InputError(f"slices of {x.shape[-2]} x {x.shape[-1]} are too small; a side must exceed {smallest}")
        product = torch.ones(len(x), dtype=x.dtype)
        for scale, power in enumerate(_SCALES):
            whole, contrast = _similarity(x, y, limit)
            is_last = scale == len(_SCALES) - 1
            product *= (whole if is_last else contrast).clamp(min=0) ** power
            # an odd side is padded with zeros at both ends, which count in the average
            padding = [side % 2 for side in x.shape[-2:]]
            x, y = (F.avg_pool2d(image[:, None], 2, padding=padding)[:, 0] for image in (x, y))
        total += float(product.sum())
    return total / _num_slices(original, channel_axis)


def compare(original: np.ndarray, decoded: np.ndarray, *, channel_axis: int | None = None) -> dict[str, float]:
    """Return the PSNR over the range of the type and over that of the values, the SSIM, and the largest error.

    Values of the original that are not finite are left out. Raises ValueError for shapes that differ.
    """
    _check(original, decoded)
    known = np.isfinite(original)
    if not known.all():
        original, decoded = np.where(known, original, 0), np.where(known, decoded, 0)
    return {
        "psnr": psnr(original, decoded),
        "psnr_values": psnr(original, decoded, data_range="values"),
        "ssim": ssim(original, decoded, channel_axis=channel_axis),
        "largest_error": float(np.abs(original.astype(np.float64) - decoded).max()),
    }


def accuracy(original: np.ndarray, decoded: np.ndarray, *, threshold: float) -> float:
    """Return the share of values on the same side of `threshold` in both; a value equal to it counts as above."""
    _, wrong, missed = _counts(original, decoded, threshold)
    return (original.size - wrong - missed) / original.size


def iou(original: np.ndarray, decoded: np.ndarray, *, threshold: float) -> float:
    """Return the values at or above `threshold` in both / those in either; NaN without any."""
    both, wrong, missed = _counts(original, decoded, threshold)
    return _ratio(both, both + wrong + missed)


def precision(original: np.ndarray, decoded: np.ndarray, *, threshold: float) -> float:
    """Return the share of decoded values at or above `threshold` that are so in the original; NaN without any."""
    both, wrong, _ = _counts(original, decoded, threshold)
    return _ratio(both, both + wrong)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _counts(original: np.ndarray, decoded: np.ndarray, threshold: float) -> tuple[int, int, int]:
    """Count values above the threshold in both, in `decoded` alone, and in `original` alone."""
    _check(original, decoded)
    both = wrong = missed = 0
    for x, y in zip(original, decoded, strict=True):
        above, said = np.asarray(x >= threshold), np.asarray(y >= threshold)
        both += int((above & said).sum())
        wrong += int((~above & said).sum())
        missed += int((above & ~said).sum())
    return both, wrong, missed


def _check(original: np.ndarray, decoded: np.ndarray) -> None:
    refuse_mask(original, "original")
    refuse_mask(decoded, "decoded")
    if original.shape != decoded.shape:
        raise InputError(f"decoded has shape {decoded.shape}, the original {original.shape}; they must be the same")
    if not 2 <= original.ndim <= 5 or original.size == 0:
        raise InputError(
            f"volumes have shape {original.shape}; they must have 2 to 4 axes besides channels, none empty"
        )
    for name, volume in (("original", original), ("decoded", decoded)):
        if volume.dtype.kind not in "biuf":
            raise TypeError(f"{name} has dtype {volume.dtype}; it must be of integers or real floating numbers")


def _range(original: np.ndarray, data_range: DataRange) -> float:
    if data_range == "dtype":
        if original.dtype.name not in TYPE_RANGES:
            raise InputError(
                f"data_range='dtype' is not defined for {original.dtype}; give 'values' or a number (defined for: "
                f"{', '.join(TYPE_RANGES)})"
            )
        return TYPE_RANGES[original.dtype.name]
    if data_range == "values":
        limit = float(original.max()) - float(original.min())
        if not limit > 0:
            raise InputError("data_range='values' is zero: the original is constant; give a number")
        return limit
    if isinstance(data_range, str) or not data_range > 0:
        raise InputError(f"data_range={data_range!r} must be 'dtype', 'values' or a number above 0")
    return float(data_range)


def _slices(original: np.ndarray, decoded: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for x, y in zip(original, decoded, strict=True):
        yield np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)


def _stacked(original: np.ndarray, decoded: np.ndarray, channel_axis: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield stacks of slices [slices, height, width] in float64, about a million values at a time."""
    _check(original, decoded)
    if channel_axis is not None:
        if original.ndim < 3:
            raise InputError(f"volumes of shape {original.shape} have no axis of channels besides height and width")
        original, decoded = (np.moveaxis(volume, channel_axis, 0) for volume in (original, decoded))
    return _stacks(original, decoded)


def _stacks(original: np.ndarray, decoded: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    height, width = original.shape[-2:]
    if original.ndim > 3:
        for x, y in zip(original, decoded, strict=True):
            yield from _stacks(x, y)
        return
    original, decoded = (volume.reshape(-1, height, width) for volume in (original, decoded))
    many = max(1, _PIXELS_AT_ONCE // (height * width))
    for start in range(0, len(original), many):
        x, y = (torch.from_numpy(volume[start : start + many].astype(np.float64)) for volume in (original, decoded))
        yield x, y


def _num_slices(original: np.ndarray, channel_axis: int | None) -> int:
    shape = original.shape if channel_axis is None else np.moveaxis(original, channel_axis, 0).shape
    return math.prod(shape[:-2])


def _similarity(x: Tensor, y: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """Return the SSIM and its contrast factor of each slice [slices, height, width], averaged over places."""
    moments = _smooth(torch.stack([x, y, x * x, y * y, x * y]))
    mean_x, mean_y, square_x, square_y, product = moments
    var_x, var_y, covariance = square_x - mean_x**2, square_y - mean_y**2, product - mean_x * mean_y
    c1, c2 = (_K1 * limit) ** 2, (_K2 * limit) ** 2
    contrast = (2 * covariance + c2) / (var_x + var_y + c2)
    whole = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1) * contrast
    return whole.mean((-2, -1)), contrast.mean((-2, -1))


def _smooth(values: Tensor) -> Tensor:
    """Average [..., height, width] over the window along each axis that is long enough, without borders."""
    places = torch.arange(_WINDOW, dtype=values.dtype) - _WINDOW // 2
    window = torch.exp(-(places**2) / (2 * _SIGMA**2))
    window /= window.sum()
    smoothed = values.flatten(0, -3)[:, None]
    if values.shape[-2] >= _WINDOW:
        smoothed = F.conv2d(smoothed, window.view(1, 1, -1, 1))
    if values.shape[-1] >= _WINDOW:
        smoothed = F.conv2d(smoothed, window.view(1, 1, 1, -1))
    return smoothed.reshape(*values.shape[:-2], *smoothed.shape[-2:])
