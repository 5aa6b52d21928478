"""Input whose meaning would be lost in silence: boolean indices, masked arrays, Zarr groups of several arrays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import zarr

import tinc
from tinc import metrics, rivals
from tinc.chunks import ChunkOptions, TincChunks
from tinc.cli import main
from tinc.official.volume import with_channels
from tinc.parallel import compress_chunks
from tinc.volumes import read_volume, write_volume
from visionkernels.checks import InputError
from visionkernels.sweeps import SweepError

VALUES = np.arange(4 * 6 * 8, dtype=np.uint16).reshape(4, 6, 8)
MASKED = np.ma.masked_greater(VALUES, 100)


class TestIndex:
    @pytest.mark.parametrize(
        "key",
        [True, False, np.True_, np.array(True), (True,), (0, False), (..., True), [True, False], None, [0, 1], 1.0, "a",
         np.ones(2, dtype=bool), (slice(None), np.zeros(3, dtype=bool)), (1, None)],
    )  # fmt: skip
    def test_kinds(self, examples: dict[str, tinc.TincFile], key: Any) -> None:
        """What NumPy would take for a mask or a new axis is refused as wrong input, and as NumPy's error."""
        for read in (examples["tiles"].__getitem__, examples["tiles"].metadata_of):
            with pytest.raises(
                InputError, match=r"must be an integer, a slice or an ellipsis; masks.*file\.decode\(\)"
            ):
                read(key)
            with pytest.raises(IndexError):
                read(key)

    def test_other_booleans(self, examples: dict[str, tinc.TincFile], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="level=True must be in"):
            examples["tiles"].decode(level=True)
        for channel_axis in (True, False):
            with pytest.raises(InputError, match=f"channel_axis={channel_axis} must be in"):
                tinc.compress(VALUES, lossless=True, channel_axis=channel_axis)
            with pytest.raises(InputError, match=f"channel_axis={channel_axis} must be in"):
                write_volume(tmp_path / "o.tif", VALUES, channel_axis=channel_axis)


class TestMaskedArrays:
    @pytest.mark.parametrize(
        ("name", "call"),
        [("array", lambda array, _: tinc.compress(array, lossless=True)),
         ("array", lambda array, _: tinc.compress(array[:, ::-1], bytes=200, preset="fast")),
         ("array", lambda array, _: tinc.compress(np.ma.array(array.data), psnr=30)),
         ("array", lambda array, _: tinc.compress(dask.array.from_array(array), lossless=True)),
         ("array", lambda array, out: write_volume(out / "o.tif", array)),
         ("array", lambda array, out: write_volume(out / "o.zarr", array)),
         ("buf", lambda array, _: TincChunks(lossless=True).encode(array)),
         ("chunk", lambda array, _: ChunkOptions().encode_chunk(array)),
         ("source", lambda array, out: compress_chunks(array, out / "o.zarr", chunk=(4, 4, 4), jobs=1)),
         ("source", lambda array, _: next(iter(rivals.compare(array, [4.0])))),
         ("original", lambda array, _: metrics.psnr(array, VALUES)),
         ("original", lambda array, _: metrics.accuracy(array, VALUES, threshold=3)),
         ("decoded", lambda array, _: metrics.compare(VALUES, array)),
         ("volume", lambda array, _: with_channels(array))],
    )  # fmt: skip
    def test_refused(self, tmp_path: Path, name: str, call: Callable[[Any, Path], object]) -> None:
        message = rf"{name} is a masked array, and its mask would be lost: fill it first, e\.g\. {name}\.filled\(0\)"
        with pytest.raises(InputError, match=message):
            call(MASKED, tmp_path)
        assert not list(tmp_path.iterdir())

    def test_boxes(self, tmp_path: Path) -> None:
        """A source that returns masked boxes, as netCDF4 does, is refused at the first chunk."""

        class Variable:
            shape, dtype = VALUES.shape, VALUES.dtype

            def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
                return MASKED[box]

        with pytest.raises((InputError, SweepError), match="source is a masked array"):
            compress_chunks(Variable(), tmp_path / "o.zarr", chunk=(4, 6, 8), jobs=1)
        assert not (tmp_path / "o.zarr").exists()

    def test_filled(self) -> None:
        assert np.array_equal(tinc.compress(MASKED.filled(7), lossless=True).decode(), MASKED.filled(7))


class TestZarrGroups:
    @pytest.fixture(params=[2, 3])
    def group(self, tmp_path: Path, request: pytest.FixtureRequest) -> zarr.Group:
        return zarr.open_group(str(tmp_path / "in.zarr"), mode="w", zarr_format=request.param)

    def test_several(self, tmp_path: Path, group: zarr.Group, capsys: pytest.CaptureFixture[str]) -> None:
        """Neither order nor name tells which of several arrays is the volume."""
        group.create_array("b", data=VALUES)
        group.create_group("deep").create_array("x", data=VALUES + 1)
        path = tmp_path / "in.zarr"
        message = (
            r"in\.zarr is a Zarr group without multiscales that holds b, deep/x; give the path of one, such as .*/b$"
        )
        with pytest.raises(InputError, match=message):
            read_volume(path)
        assert main(["compress", str(path), str(tmp_path / "o.tinc"), "--lossless"]) == 2
        assert "without multiscales" in capsys.readouterr().err and not (tmp_path / "o.tinc").exists()
        assert main(["compress", str(path / "deep/x"), str(tmp_path / "o.tinc"), "--lossless"]) == 0
        assert np.array_equal(tinc.open(tmp_path / "o.tinc").decode(), VALUES + 1)
        volume = read_volume(path / "deep")
        assert volume.note == "the group's one volume is read, x" and np.array_equal(volume.array[:], VALUES + 1)

    def test_many(self, tmp_path: Path, group: zarr.Group) -> None:
        for number in range(8):
            group.create_array(f"a{number}", data=VALUES)
        with pytest.raises(InputError, match=r"holds a0, a1, a2, a3, a4, \.\.\.; give"):
            read_volume(tmp_path / "in.zarr")

    def test_one(self, tmp_path: Path, group: zarr.Group, capsys: pytest.CaptureFixture[str]) -> None:
        """A group of one array leaves no choice; a note names it."""
        group.create_group("a")
        group.create_group("b").create_array("x", data=VALUES)
        path = tmp_path / "in.zarr"
        volume = read_volume(path)
        assert np.array_equal(volume.array[:], VALUES) and volume.note == "the group's one volume is read, b/x"
        capsys.readouterr()
        main(["compress", str(path), str(tmp_path / "o.tinc"), "--lossless"])
        for command in (["chunk", str(path), str(tmp_path / "o.zarr"), "--size", "4", "6", "8"],
                        ["batch", str(path), "--out", str(tmp_path / "out")],
                        ["eval", str(path), str(tmp_path / "o.tinc")]):  # fmt: skip
            assert main(command) == 0
        assert capsys.readouterr().err.count("one volume is read, b/x") == 4

    @pytest.mark.parametrize("images", [1, 2, 11])
    @pytest.mark.parametrize("is_bioformats", [True, False])
    def test_images(self, tmp_path: Path, group: zarr.Group, images: int, is_bioformats: bool) -> None:
        for number in range(images):
            image = group.create_group(str(number))
            image.create_array("s0", data=VALUES + number)
            image.create_array("s1", data=VALUES[:, ::2])
            levels = [{"path": f"s{level}"} for level in range(2)]
            image.attrs["multiscales"] = [{"axes": ["z", "y", "x"], "datasets": levels}]
        if is_bioformats:
            group.attrs["bioformats2raw.layout"] = 3
            group.create_group("OME").attrs["series"] = [str(number) for number in range(images)]
        elif images > 1:
            with pytest.raises(InputError, match=r"that holds 0, 1.*; give the path of one, such as .*in\.zarr/0"):
                read_volume(tmp_path / "in.zarr")
            assert np.array_equal(read_volume(tmp_path / "in.zarr/1").array[:], VALUES + 1)
            return
        volume = read_volume(tmp_path / "in.zarr")
        assert np.array_equal(volume.array[:], VALUES) and volume.metadata["axes"] == "ZYX"
        if is_bioformats:
            assert volume.note == ("the first of several images is read, 0" if images > 1 else None)

    def test_paths(self, tmp_path: Path, group: zarr.Group) -> None:
        """A path within a .zarr folder is a source, but no output."""
        group.create_array("a", data=VALUES)
        with pytest.raises(InputError, match="has the suffix"):
            write_volume(tmp_path / "in.zarr/b", VALUES)
        for name in ("none", "a/none", "zarr.txt"):
            with pytest.raises((InputError, FileNotFoundError)):
                read_volume(tmp_path / "in.zarr" / name)
