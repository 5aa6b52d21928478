"""Scaling of unusual volumes, and its inverse."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinc.official.volume import SideInfo, denormalise, normalise, read_volume

SHAPES = hnp.array_shapes(min_dims=3, max_dims=4, max_side=4)


class TestNormalise:
    @given(hnp.arrays("u2", SHAPES), st.sampled_from([(0, 100), (-1, 1), (3, 4)]))
    def test_round_trip(self, volume: np.ndarray, span: tuple[float, float]) -> None:
        if volume.min() == volume.max():
            return
        values, side = normalise(volume, scale_min=span[0], scale_max=span[1])
        assert values.dtype == np.float32 and values.shape == (*volume.shape, 1)[:4]
        assert values.min() == span[0] and values.max() == pytest.approx(span[1], rel=1e-6)
        nearest = denormalise(values, side, rounding="nearest")
        assert nearest.dtype == volume.dtype
        assert np.array_equal(nearest.reshape(volume.shape), volume)
        # truncation costs half a count on average
        truncated = denormalise(values, side).astype(int).reshape(volume.shape)
        assert set(np.unique(volume - truncated)) <= {0, 1}

    def test_big_endian_and_strides(self) -> None:
        volume = np.arange(-60, 60, dtype=">i2").reshape(4, 5, 6)[:, ::2]
        values, side = normalise(volume)
        assert side.dtype == "int16"
        assert np.array_equal(denormalise(values, side, rounding="nearest")[..., 0], volume)

    @pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "uint32", "int64", "float32", "float64"])
    def test_bounds(self, dtype: str) -> None:
        """A prediction beyond the range becomes an extreme of the data, without wrapping."""
        kind = np.dtype(dtype)
        low, high = (np.iinfo(kind).min, np.iinfo(kind).max) if kind.kind != "f" else (-5.5, 7.5)
        volume = np.array([[[low, high]]], kind)
        _, side = normalise(volume)
        result = denormalise(np.array([-1e9, 1e9], np.float32), side)
        assert result.dtype == kind
        assert result.astype(float) == pytest.approx([float(low), float(high)], rel=1e-6)

    def test_errors(self) -> None:
        volume = np.zeros((2, 3, 4), np.float32)
        volume[0, 0, :2] = np.nan, np.inf
        with pytest.raises(ValueError, match="holds 2 values that are NaN or infinite"):
            normalise(volume)
        with pytest.raises(ValueError, match="holds 1 values"):
            normalise(np.array([[[1e300, 0.0]]]))
        with pytest.raises(ValueError, match="constant, every voxel is 7"):
            normalise(np.full((2, 2, 2), 7))
        with pytest.raises(ValueError, match="a range beyond float32"):
            normalise(np.array([[[-3e38, 3e38]]], np.float32))
        with pytest.raises(ValueError, match=r"shape \(4, 4\); an octree needs depth, height, width"):
            normalise(np.zeros((4, 4)))
        with pytest.raises(ValueError, match="it is empty"):
            normalise(np.zeros((0, 4, 4)))
        for dtype in (complex, object, bool):
            with pytest.raises(TypeError, match="volume has dtype"):
                normalise(np.zeros((2, 2, 2), dtype))
        _, side = normalise(np.arange(8).reshape(2, 2, 2))
        with pytest.raises(ValueError, match="rounding='up' must be one of"):
            denormalise(np.zeros(3), side, rounding="up")  # type: ignore[arg-type]

    def test_says_nothing(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, side = normalise(np.array([[[0, 65535]]], np.uint16))
            denormalise(np.array([0.0, 100.0, 250.0], np.float32), side)


class TestSideInfo:
    @pytest.mark.parametrize(
        "change",
        [{"shape": (1, 2, 3)}, {"shape": (1, 2, 3, 0)}, {"dtype": "O"}, {"dtype": "text"}, {"data_max": 0.0},
         {"scale_min": 100.0}],
        ids=str,
    )  # fmt: skip
    def test_errors(self, change: dict) -> None:
        values = {"shape": (1, 2, 3, 1), "dtype": "uint8", "data_min": 0.0, "data_max": 9.0}
        SideInfo(**values)
        with pytest.raises(ValueError, match=next(iter(change)).partition("_")[0]):
            SideInfo(**{**values, **change})


class TestReadVolume:
    def test_formats(self, tmp_path: Path) -> None:
        volume = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
        np.save(tmp_path / "a.npy", volume)
        assert np.array_equal(read_volume(tmp_path / "a.npy"), volume[..., None])
        tifffile.imwrite(tmp_path / "a.tif", volume)
        assert np.array_equal(read_volume(tmp_path / "a.tif"), volume[..., None])

    def test_errors(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"none\.tif is not a file"):
            read_volume(tmp_path / "none.tif")
        (tmp_path / "a.png").write_bytes(b"png")
        with pytest.raises(ValueError, match=r"suffix '.png'; the official procedure reads .tif and .npy"):
            read_volume(tmp_path / "a.png")
        np.save(tmp_path / "o.npy", np.array([{}]), allow_pickle=True)
        with pytest.raises(ValueError, match=r"o\.npy is damaged or of another format"):
            read_volume(tmp_path / "o.npy")
        (tmp_path / "a.tif").write_bytes(b"no TIFF at all")
        with pytest.raises(ValueError, match=r"a\.tif is damaged or of another format"):
            read_volume(tmp_path / "a.tif")
