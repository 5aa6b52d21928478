"""Volumes larger than memory and many volumes, interrupted and resumed, on several processes."""

import json
import math
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import tinc
from tinc.file import TincFile
from tinc.metrics import psnr
from tinc.parallel import ChunksReport, ManyReport, compress_chunks, compress_many
from tinc.volumes import read_volume, write_volume
from visionkernels.sweeps import SweepError

SHAPE = (10, 13, 9)
VALUES = (np.add.outer(np.arange(10), np.add.outer(np.arange(13) * 5, np.arange(9) * 3)) * 11 % 251).astype(np.uint8)


class Recorder:
    """An array that is made where it is looked at, and remembers where that was."""

    def __init__(self, shape: tuple[int, ...], dtype: str, fails_after: int = 1 << 30) -> None:
        self.shape, self.dtype, self.fails_after = shape, np.dtype(dtype), fails_after
        self.boxes: list[tuple[slice, ...]] = []

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        if len(self.boxes) == self.fails_after:
            raise OSError("the disk is gone")
        self.boxes.append(box)
        sizes = [part.stop - part.start for part in box]
        # the first box has one value, the others are empty
        return np.broadcast_to(np.array(7 if len(self.boxes) == 1 else 0, self.dtype), sizes)


class TestCompressChunks:
    @pytest.mark.parametrize("dtype", ["uint8", ">u2", "int16", "float32"])
    def test_round_trip(self, tmp_path: Path, dtype: str) -> None:
        values = VALUES.astype(dtype)
        report = compress_chunks(values, tmp_path / "o.zarr", chunk=(4, 8, 8), jobs=1)
        found = zarr.open_array(str(tmp_path / "o.zarr"), mode="r")
        assert np.array_equal(found[:], values) and found.chunks == (4, 8, 8)
        assert report.num_chunks == 12 and report.psnr == math.inf and report.raw_bytes == values.nbytes
        written = sum(each.stat().st_size for each in (tmp_path / "o.zarr").rglob("*") if each.is_file())
        assert report.bytes == written and report.ratio == values.nbytes / written
        assert [each.name for each in tmp_path.iterdir()] == ["o.zarr"]

    @pytest.mark.parametrize("dtype", ["uint8", "float32"])
    def test_report(self, tmp_path: Path, dtype: str) -> None:
        """The PSNR of the report is that of the volume, over the type's range or the volume's own."""
        values = VALUES.astype(dtype)
        report = compress_chunks(values, tmp_path / "o.zarr", chunk=(5, 13, 9), jobs=1, max_error=4)
        found = zarr.open_array(str(tmp_path / "o.zarr"), mode="r")[:]
        assert 0 < np.abs(found.astype(float) - values).max() <= 4
        expected = psnr(values, found, data_range="dtype" if dtype == "uint8" else "values")
        assert report.psnr == pytest.approx(expected)

    def test_sources(self, tmp_path: Path) -> None:
        """Memory maps, views of them and Zarr arrays, which also pickle."""
        np.save(tmp_path / "in.npy", VALUES)
        mapped = np.load(tmp_path / "in.npy", mmap_mode="r")
        stored = zarr.create_array(str(tmp_path / "in.zarr"), data=VALUES, chunks=(3, 5, 4))
        for number, source in enumerate([mapped, mapped[2:, ::-1, 1:], stored]):
            travelled = pickle.loads(pickle.dumps(source))
            compress_chunks(travelled, tmp_path / f"{number}.zarr", chunk=(8, 8, 8), jobs=1)
            assert np.array_equal(zarr.open_array(str(tmp_path / f"{number}.zarr"))[:], source[:])

    def test_processes(self, tmp_path: Path) -> None:
        """joblib sends memory maps to processes by name, and would shift this one, whose strides are negative."""
        np.save(tmp_path / "in.npy", VALUES)
        view = np.load(tmp_path / "in.npy", mmap_mode="r")[2:, ::-1, 1:]
        # one chunk, so that one process imports what it needs
        compress_chunks(view, tmp_path / "o.zarr", chunk=view.shape, jobs=2)
        assert np.array_equal(zarr.open_array(str(tmp_path / "o.zarr"))[:], view)

    def test_edges(self, tmp_path: Path) -> None:
        """A target of size counts what is inside, and the padding costs next to nothing."""
        rng = np.random.default_rng(0)
        values = rng.integers(0, 255, (18, 16, 16), dtype=np.uint8)
        report = compress_chunks(values, tmp_path / "o.zarr", chunk=(16, 16, 16), jobs=1, ratio=4)
        sizes = {each.parts[-3]: each.stat().st_size for each in (tmp_path / "o.zarr/c").rglob("*") if each.is_file()}
        assert sizes["0"] <= 4096 / 4 and sizes["1"] <= 512 / 4
        assert report.bytes == sum(sizes.values()) + (tmp_path / "o.zarr/zarr.json").stat().st_size

    def test_zeros(self, tmp_path: Path) -> None:
        """Chunks of zeros are not written; a negative zero is not lost."""
        values = np.zeros((8, 8), dtype=np.float32)
        values[0, 0], values[7, 7] = 1, -0.0
        report = compress_chunks(values, tmp_path / "o.zarr", chunk=(4, 4), jobs=1)
        assert report.num_chunks == 4
        assert sorted(str(each.relative_to(tmp_path)) for each in tmp_path.rglob("c/*/*")) == [
            "o.zarr/c/0/0", "o.zarr/c/1/1",
        ]  # fmt: skip
        assert zarr.open_array(str(tmp_path / "o.zarr"))[:].tobytes() == values.tobytes()

    def test_not_finite(self, tmp_path: Path) -> None:
        values = VALUES.astype(np.float32)
        values[0, 0, 0] = np.nan
        report = compress_chunks(values, tmp_path / "o.zarr", chunk=(5, 13, 9), jobs=1, max_error=2)
        found = zarr.open_array(str(tmp_path / "o.zarr"))[:]
        assert np.isnan(found[0, 0, 0]) and math.isfinite(report.psnr)
        assert np.nanmax(np.abs(found - values)) <= 2

    def test_metadata(self, tmp_path: Path) -> None:
        metadata = {"axes": "CYX", "spacing": [None, 0.5, 0.5], "units": [None, "micrometer", "micrometer"]}
        compress_chunks(VALUES, tmp_path / "o.zarr", chunk=SHAPE, jobs=1, metadata=metadata, channel_axis=0)
        volume = read_volume(tmp_path / "o.zarr")
        assert volume.channel_axis == 0 and volume.metadata == {"format": "zarr"} | metadata
        assert volume.array.metadata.dimension_names == ("c", "y", "x")
        assert np.array_equal(volume.array[:], VALUES)

    def test_larger_than_memory(self, tmp_path: Path) -> None:
        """1.3 GB, a chunk of 4 MB at a time; most of it is empty."""
        source = Recorder((20, 4096, 8192), "uint16")
        tracemalloc.start()
        report = compress_chunks(source, tmp_path / "o.zarr", chunk=(4, 512, 1024), jobs=1)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert report.raw_bytes == 20 * 4096 * 8192 * 2 and report.num_chunks == len(source.boxes) == 320
        assert peak < 200 << 20
        found = zarr.open_array(str(tmp_path / "o.zarr"), mode="r")
        assert found[3, 511, 1023] == 7 and found[19, 4095, 8191] == 0
        assert len(list((tmp_path / "o.zarr/c").glob("*/*/*"))) == 1

    def test_resume(self, tmp_path: Path) -> None:
        """A call that failed goes on where it was, and says where it is until then."""
        with pytest.raises(SweepError, match="the disk is gone"):
            compress_chunks(Recorder((8, 40), "int16", fails_after=3), tmp_path / "o.zarr", chunk=(8, 8), jobs=1)
        assert not (tmp_path / "o.zarr").exists() and (tmp_path / "o.zarr.partial").is_dir()
        source = Recorder((8, 40), "int16")
        report = compress_chunks(source, tmp_path / "o.zarr", chunk=(8, 8), jobs=1)
        assert [box[1].start for box in source.boxes] == [24, 32] and report.num_chunks == 5
        assert [each.name for each in tmp_path.iterdir()] == ["o.zarr"]
        assert not list((tmp_path / "o.zarr").glob("done*"))
        assert (zarr.open_array(str(tmp_path / "o.zarr"))[:, :8] == 7).all()

    def test_other_partial(self, tmp_path: Path) -> None:
        """What another call left is not mixed in."""
        with pytest.raises(SweepError):
            compress_chunks(Recorder((8, 40), "int16", fails_after=2), tmp_path / "o.zarr", chunk=(8, 8), jobs=1)
        others: list[dict[str, Any]] = [{"chunk": (8, 10)}, {"chunk": (8, 8), "max_error": 1}]
        for other in others:
            with pytest.raises(ValueError, match=r"o\.zarr\.partial holds the beginning of another call"):
                compress_chunks(Recorder((8, 40), "int16"), tmp_path / "o.zarr", jobs=1, **other)
        source = Recorder((8, 40), "int16")
        compress_chunks(source, tmp_path / "o.zarr", jobs=1, overwrite=True, **others[0])
        assert len(source.boxes) == 4

    def test_existing(self, tmp_path: Path) -> None:
        compress_chunks(VALUES, tmp_path / "o.zarr", chunk=(8, 8, 8), jobs=1)
        with pytest.raises(FileExistsError, match="pass --overwrite"):
            compress_chunks(VALUES[:4], tmp_path / "o.zarr", chunk=(8, 8, 8), jobs=1)
        compress_chunks(VALUES[:4], tmp_path / "o.zarr", chunk=(8, 8, 8), jobs=1, overwrite=True)
        assert zarr.open_array(str(tmp_path / "o.zarr")).shape == (4, 13, 9)
        assert [each.name for each in tmp_path.iterdir()] == ["o.zarr"]

    def test_errors(self, tmp_path: Path) -> None:
        cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
            (VALUES, {"chunk": (4, 4)}, ValueError, r"chunk=\(4, 4\) must give 3 sizes of at least 1"),
            (VALUES, {"chunk": (4, 0, 4)}, ValueError, r"chunk=\(4, 0, 4\) must give"),
            (VALUES[:0], {"chunk": (4, 4, 4)}, ValueError, r"source of shape \(0, 13, 9\)"),
            (VALUES.astype(float), {"chunk": (4, 4, 4)}, TypeError, "dtype=float64"),
            (VALUES, {"chunk": (4, 4, 4), "ratio": 0.5}, ValueError, "ratio=0.5"),
            (VALUES, {"chunk": (4, 4, 4), "rate": 2}, TypeError, "unexpected keyword argument 'rate'"),
        ]
        for source, options, error, message in cases:
            with pytest.raises(error, match=message):
                compress_chunks(source, tmp_path / "o.zarr", jobs=1, **options)
        assert not list(tmp_path.iterdir())


class TestCompressMany:
    def test_folder(self, tmp_path: Path) -> None:
        """Formats of all kinds; a damaged file is reported."""
        write_volume(tmp_path / "a.tif", VALUES, channel_axis=0)
        write_volume(tmp_path / "b.nii.gz", VALUES, metadata={"axes": "XYZ", "spacing": [1, 2, 3], "units": ["mm"] * 3})
        write_volume(tmp_path / "c.zarr", VALUES)
        (tmp_path / "d.npy").write_bytes(b"nothing")
        paths = [tmp_path / name for name in ("a.tif", "b.nii.gz", "c.zarr", "d.npy")]
        report = compress_many(paths, tmp_path / "out", jobs=1, lossless=True, preset="fast")
        assert [Path(each["out"]).name for each in report.files] == ["a.tinc", "b.tinc", "c.tinc"]
        for each in report.files:
            assert np.array_equal(tinc.open(each["out"]).decode(), VALUES)
            assert each["psnr"] is None and each["bytes"] == Path(each["out"]).stat().st_size
        assert tinc.open(tmp_path / "out/a.tinc").info()["channel_axis"] == 0
        assert tinc.open(tmp_path / "out/b.tinc").metadata["spacing"] == [1, 2, 3]
        assert list(report.failures) == [str(paths[3])] and "d.npy is damaged" in report.failures[str(paths[3])]
        assert report.ratio == pytest.approx(3 * VALUES.nbytes / sum(each["bytes"] for each in report.files))

    def test_lossy(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", VALUES)
        (found,) = compress_many([tmp_path / "a.npy"], tmp_path, jobs=1, max_error=5, keep_metadata=False).files
        file = tinc.open(tmp_path / "a.tinc")
        assert file.metadata == {} and found["ratio"] == file.ratio
        assert found["psnr"] == pytest.approx(psnr(VALUES, file.decode()))

    def test_types(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", VALUES.astype(float))
        np.save(tmp_path / "b.npy", VALUES + 0.3)
        paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
        report = compress_many(paths, tmp_path / "1", jobs=1, lossless=True)
        assert "kept as float32" in report.files[0]["note"] and "pass --as" in report.failures[str(paths[1])]
        report = compress_many(paths, tmp_path / "2", jobs=1, lossless=True, as_type="uint8")
        assert not report.failures and np.array_equal(tinc.decompress(tmp_path / "2/b.tinc"), VALUES)

    def test_resume(self, tmp_path: Path) -> None:
        paths, done = [tmp_path / "a.npy", tmp_path / "b.npy"], tmp_path / "done.jsonl"
        np.save(paths[0], VALUES)
        first = compress_many(paths, tmp_path / "out", jobs=1, done=done, lossless=True)
        assert list(first.failures) == [str(paths[1])]
        stamp = (tmp_path / "out/a.tinc").stat().st_mtime_ns
        np.save(paths[1], VALUES)
        # written before the crash, but not noted
        (tmp_path / "out/b.tinc").write_bytes(b"torn")
        second = compress_many(paths, tmp_path / "out", jobs=1, done=done, lossless=True)
        assert not second.failures and second.files[0] == first.files[0]
        assert (tmp_path / "out/a.tinc").stat().st_mtime_ns == stamp
        assert np.array_equal(tinc.decompress(tmp_path / "out/b.tinc"), VALUES)
        assert len([json.loads(line) for line in done.read_text().splitlines()]) == 2

    def test_errors(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", VALUES)
        with pytest.raises(ValueError, match=r"several volumes would become a\.tinc"):
            compress_many([tmp_path / "a.npy", tmp_path / "x/a.nii.gz"], tmp_path, jobs=1, lossless=True)
        with pytest.raises(ValueError, match="unknown options callback, rate"):
            compress_many([tmp_path / "a.npy"], tmp_path, jobs=1, rate=1, callback=print)
        (tmp_path / "a.tinc").write_bytes(b"mine")
        with pytest.raises(FileExistsError, match=r"a\.tinc exists; pass --overwrite"):
            compress_many([tmp_path / "a.npy"], tmp_path, jobs=1, lossless=True)
        assert (tmp_path / "a.tinc").read_bytes() == b"mine"
        assert not compress_many([tmp_path / "a.npy"], tmp_path, jobs=1, lossless=True, overwrite=True).failures
        assert math.isnan(compress_many([], tmp_path, lossless=True).ratio)


def test_reports() -> None:
    assert ChunksReport(1, 100, 50, 30.0).ratio == 2
    assert ManyReport([{"raw_bytes": 9, "bytes": 3}]).ratio == 3 and TincFile is not None
