"""Conversion of sample types part by part: results, and memory of a part."""

import tracemalloc
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
import zarr

import tinc.zarr_codec  # noqa: F401 - registers the codec
from tinc.cli import main
from tinc.volumes import open_volume, read_volume
from tinc.volumes.conversion import _blocks
from visionkernels.checks import InputError

SIZE = 400


def sparse(path: Path, dtype: str) -> Path:
    """Write an array of 400 x 400 x 400 zeros and few other values, whose file takes few blocks of the disk."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(SIZE,) * 3)
    array[5, 6, 7], array[-1, -1, -1] = 300, -2
    return path


@pytest.mark.parametrize(("dtype", "as_type"), [("int32", None), ("float64", "int16")])
def test_memory(tmp_path: Path, dtype: str, as_type: str | None) -> None:
    """The peak is that of chunks of 4 MiB and blocks, of an array of 256 or 512 MiB."""
    path = sparse(tmp_path / "x.npy", dtype)
    options = [] if as_type is None else ["--as", as_type]
    tracemalloc.start()
    assert main(["chunk", str(path), str(tmp_path / "o.zarr"), "--size", "100", "100", "100", *options]) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < SIZE**3 * np.dtype(dtype).itemsize / 4
    stored = zarr.open_array(str(tmp_path / "o.zarr"), mode="r")
    assert stored.dtype == "int16"
    assert stored[5, 6, 7] == 300 and stored[-1, -1, -1] == -2 and not stored[100:200].any()


def test_processes(tmp_path: Path) -> None:
    """Processes map the file by its name."""
    values = np.arange(-60, 60).reshape(4, 5, 6)
    for suffix in ("npy", "zarr"):
        path = write(tmp_path / f"y.{suffix}", values)
        command = ["chunk", str(path), str(tmp_path / f"{suffix}.out.zarr"), "--size", "4", "5", "3", "--jobs", "2"]
        assert main(command) == 0
        assert np.array_equal(zarr.open_array(str(tmp_path / f"{suffix}.out.zarr"))[:], values)


def write(path: Path, values: np.ndarray) -> Path:
    match path.suffix:
        case ".npy":
            np.save(path, values)
        case ".zarr":
            zarr.create_array(str(path), data=values, chunks=(3, 4, 2))
        case ".nii":
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4), dtype=values.dtype), path)
        case ".tif":
            tifffile.imwrite(path, values, photometric="minisblack")
    return path


@pytest.mark.parametrize("suffix", [".npy", ".zarr", ".nii", ".tif"])
@pytest.mark.parametrize(
    ("dtype", "as_type"),
    [("int32", None), (">i4", "float32"), ("int8", None), ("float64", None), ("float64", "uint8"), ("uint32", "uint8")],
)
def test_parts(tmp_path: Path, suffix: str, dtype: str, as_type: str | None) -> None:
    """Parts, and the whole, have the values of the array that is converted at once."""
    values = np.random.default_rng(0).integers(0, 120, (5, 7, 6)).astype(dtype)
    volume = open_volume(write(tmp_path / f"x{suffix}", values), as_type=as_type)
    whole = read_volume(tmp_path / f"x{suffix}", as_type=as_type)
    array, expected = volume.array, whole.array
    assert isinstance(expected, np.ndarray) and array.dtype == expected.dtype and array.dtype.isnative
    assert (volume.note, volume.metadata) == (whole.note, whole.metadata)
    assert (array.shape, array.ndim, array.size, array.nbytes) == (
        expected.shape, expected.ndim, expected.size, expected.nbytes,
    )  # fmt: skip
    assert np.array_equal(expected, values.astype(array.dtype))
    for key in (np.s_[1:3, :, 2:], np.s_[4], ...):
        assert np.array_equal(array[key], expected[key]) and array[key].dtype == array.dtype
    with pytest.raises(ValueError, match="copy=False"):
        np.array(array, copy=False)


@pytest.mark.parametrize("samples", [1, 7, 60, 1 << 20])
@pytest.mark.parametrize("order", ["C", "F", "zarr"])
def test_blocks(monkeypatch: pytest.MonkeyPatch, samples: int, order: Any) -> None:
    """Blocks cover the array once, with at most so many samples or one chunk."""
    monkeypatch.setattr("tinc.volumes.conversion._BLOCK_SAMPLES", samples)
    for shape in ((4, 5, 6), (1, 1, 9), (7,), (3, 0, 2)):
        values = np.arange(np.prod(shape)).reshape(shape)
        chunks = tuple(min(3, max(size, 1)) for size in shape)
        array = zarr.create_array({}, data=values, chunks=chunks) if order == "zarr" else values.copy(order)
        blocks = [np.array(block) for block in _blocks(array)]
        assert sorted(np.concatenate([block.ravel() for block in blocks] or [values.ravel()])) == list(values.ravel())
        assert all(block.size <= max(samples, np.prod(chunks) if order == "zarr" else 1) for block in blocks)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentences name all of the array, of whatever block a value is."""
    monkeypatch.setattr("tinc.volumes.conversion._BLOCK_SAMPLES", 4)
    values = np.array([[0.5, 300.1, 7], [-1.25, 2, 9]])
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(InputError, match=r"as_type='uint8' holds values in \[0, 255\].*has \[-1.0, 300.0\]: rescale"):
        open_volume(tmp_path / "x.npy", as_type="uint8")
    np.save(tmp_path / "x.npy", np.where(values < 3, np.nan, values))
    with pytest.raises(InputError, match="has 3 values that are not finite"):
        open_volume(tmp_path / "x.npy", as_type="uint8")
    np.save(tmp_path / "x.npy", np.array([[0, 1, 2, 3], [0, 0, 0, 2**24 + 1]]))
    with pytest.raises(TypeError, match=r"holds int64 values that none of uint8, .* holds exactly; pass --as float32"):
        open_volume(tmp_path / "x.npy")
