"""Metrics compared with their definitions; test_parity has the official numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinc import metrics


def noisy(shape: tuple[int, ...], dtype: str = "uint16", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    original = random.integers(0, 200, shape)
    return original.astype(dtype), (original + random.integers(0, 50, shape)).astype(dtype)


class TestPsnr:
    def test_reference(self) -> None:
        original, decoded = noisy((3, 5, 7, 2))
        error = np.mean((original.astype(float) - decoded) ** 2)
        span = float(original.max() - original.min())
        for data_range, limit in (("dtype", 65535), ("values", span), (4095, 4095)):
            wanted = 10 * math.log10(limit**2 / error)
            assert metrics.psnr(original, decoded, data_range=data_range) == pytest.approx(wanted, rel=1e-12)

    def test_unsigned_differences_do_not_wrap(self) -> None:
        zeros, ones = np.zeros((2, 2), np.uint8), np.ones((2, 2), np.uint8)
        assert metrics.psnr(zeros, ones) == metrics.psnr(ones, zeros) == pytest.approx(20 * math.log10(255))

    @given(hnp.arrays(st.sampled_from(["u1", "u2", ">i2", "f4"]), hnp.array_shapes(min_dims=2, max_dims=5, max_side=4),
                      elements=st.integers(0, 100)))  # fmt: skip
    def test_identical(self, volume: np.ndarray) -> None:
        for data_range in ("dtype", "values", 7.0):
            assert metrics.psnr(volume, volume.copy(), data_range=data_range) == math.inf
        assert metrics.ssim(volume, volume.copy()) == pytest.approx(1)

    def test_accumulates_in_float64(self) -> None:
        volume = np.full((40, 100, 100), 60000, np.float32)
        assert metrics.psnr(volume, volume + 1) == pytest.approx(20 * math.log10(65535), abs=1e-9)

    def test_errors(self) -> None:
        volume = np.zeros((2, 3), np.uint8)
        with pytest.raises(ValueError, match=r"decoded has shape \(3, 2\), the original \(2, 3\)"):
            metrics.psnr(volume, volume.T)
        with pytest.raises(ValueError, match="not defined for int32; give 'values' or a number"):
            metrics.psnr(volume.astype(np.int32), volume + 1)
        with pytest.raises(ValueError, match="the original is constant"):
            metrics.psnr(volume, volume + 1, data_range="values")
        with pytest.raises(ValueError, match="data_range=0 must be"):
            metrics.psnr(volume, volume + 1, data_range=0)
        with pytest.raises(ValueError, match="data_range='type' must be"):
            metrics.psnr(volume, volume + 1, data_range="type")
        with pytest.raises(TypeError, match="decoded has dtype complex128"):
            metrics.psnr(volume, volume.astype(complex))
        with pytest.raises(ValueError, match=r"shape \(0, 3\)"):
            metrics.psnr(volume[:0], volume[:0])
        with pytest.raises(ValueError, match=r"shape \(2,\)"):
            metrics.psnr(volume[:, 0], volume[:, 0])


def reference_ssim(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Return the SSIM of one image by its definition, window by window."""
    places = np.arange(11) - 5
    window = np.exp(-(places[:, None] ** 2 + places**2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * limit) ** 2, (0.03 * limit) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = (item[i : i + 11, j : j + 11].astype(float) for item in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            values.append(
                (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )  # fmt: skip
    return float(np.mean(values))


class TestSsim:
    def test_reference(self) -> None:
        original, decoded = noisy((3, 14, 12))
        wanted = np.mean([reference_ssim(x, y, 255) for x, y in zip(original, decoded, strict=True)])
        assert metrics.ssim(original, decoded, data_range=255) == pytest.approx(wanted, abs=1e-9)

    def test_channels_are_slices(self) -> None:
        original, decoded = noisy((2, 13, 15, 3))
        moved = [np.ascontiguousarray(np.moveaxis(item, -1, 0)) for item in (original, decoded)]
        assert metrics.ssim(original, decoded, channel_axis=-1) == pytest.approx(metrics.ssim(*moved), abs=1e-12)
        assert metrics.ssim(*moved, channel_axis=0) == pytest.approx(metrics.ssim(*moved), abs=1e-12)

    def test_short_axis_is_not_smoothed(self) -> None:
        original, decoded = noisy((1, 1))
        x, y = float(original[0, 0]), float(decoded[0, 0])
        c1 = (0.01 * 255) ** 2
        wanted = (2 * x * y + c1) / (x * x + y * y + c1)
        assert metrics.ssim(original, decoded, data_range=255) == pytest.approx(wanted)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="no axis of channels"):
            metrics.ssim(np.zeros((12, 12)), np.ones((12, 12)), channel_axis=-1)
        with pytest.raises(ValueError, match="slices of 160 x 200 are too small; a side must exceed 160"):
            metrics.ms_ssim(np.zeros((1, 160, 200)), np.ones((1, 160, 200)))

    def test_ms_ssim_falls_with_noise(self) -> None:
        original, decoded = noisy((1, 161, 162))
        worse = np.where(np.arange(162) % 2, 0, decoded).astype(np.uint16)
        result = [metrics.ms_ssim(original, item, data_range=255) for item in (original, decoded, worse)]
        assert result[0] == pytest.approx(1) and 1 > result[1] > result[2] >= 0


class TestThreshold:
    def test_reference(self) -> None:
        original = np.array([[0, 5, 5, 9]], np.uint8)
        decoded = np.array([[5, 5, 0, 4]], np.uint8)
        # at or above 5: once in both, once in decoded alone, twice in original alone
        assert metrics.accuracy(original, decoded, threshold=5) == 0.25
        assert metrics.iou(original, decoded, threshold=5) == 0.25
        assert metrics.precision(original, decoded, threshold=5) == 0.5

    def test_nothing_above(self) -> None:
        zeros = np.zeros((3, 3), np.uint8)
        assert metrics.accuracy(zeros, zeros, threshold=1) == 1
        assert math.isnan(metrics.iou(zeros, zeros, threshold=1))
        assert math.isnan(metrics.precision(zeros, zeros, threshold=1))
