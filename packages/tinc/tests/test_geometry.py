"""The places of voxels in the world after crops, strides and coarser levels, in all formats."""

import contextlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import tinc
from tinc.cli import main
from tinc.parallel import compress_chunks, compress_many
from tinc.volumes import Volume, essential_metadata, part_of, read_volume, unstored_metadata, write_volume
from visionkernels.checks import InputError

TURN = nibabel.eulerangles.euler2mat(0.3, -0.2, 0.5)
AFFINE = nibabel.affines.from_matvec(TURN @ np.diag([-2, 2, 3]), [10, -20, 33])
SHAPE = (16, 24, 12)
CROPS = [np.s_[4:12, 8:20, 2:10], np.s_[::2, 1::3], np.s_[15::-1, 20:3:-2, 5:6:2], np.s_[..., 1:7]]
"""nibabel's own crops are right for these: it takes the first voxel for a start of None, and counts from it for -5."""
FIELDS = {"descrip": b"FSL5.0", "aux_file": "a" * 20, "intent_name": b"z", "intent_code": 5, "intent_p1": 2.5,
          "cal_max": 0.3, "cal_min": -7, "toffset": 1.25}  # fmt: skip
HEADERS = {"sform": (1, 0), "qform": (0, 1), "both": (2, 3), "none": (0, 0)}


def save_nifti(path: Path, array: np.ndarray, codes: tuple[int, int], *, order: str = "<", **fields: Any) -> None:
    """Write an oblique NIfTI file of 2 x 2 x 3 mm, whose qform is 1 mm off its sform."""
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(array.dtype.newbyteorder(order))
    header.set_data_shape(array.shape)
    header.set_zooms((2, 2, 3, 1.5, 1)[: array.ndim])
    header.set_xyzt_units("mm", "sec")
    if codes[1]:
        header.set_qform(AFFINE + np.eye(4, k=3), codes[1])
    if codes[0]:
        header.set_sform(AFFINE, codes[0])
    for name, value in fields.items():
        header[name] = value
    nibabel.save(nibabel.Nifti1Image(array.astype(array.dtype.newbyteorder(order)), None, header), path)


def world(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Return the first world coordinate of every voxel."""
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return nibabel.affines.apply_affine(affine, places)[..., 0]


class TestNifti:
    @pytest.mark.parametrize("axes", [3, 4])
    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize("kind", HEADERS)
    def test_crops_like_nibabel(self, tmp_path: Path, kind: str, order: str, axes: int) -> None:
        array = np.random.default_rng(0).integers(-900, 900, (*SHAPE, 5)[:axes]).astype(np.int16)
        save_nifti(tmp_path / "in.nii", array, HEADERS[kind], order=order)
        original, volume = nibabel.load(tmp_path / "in.nii"), read_volume(tmp_path / "in.nii")
        file = tinc.compress(volume.array, lossless=True, metadata=volume.metadata)
        other = nibabel.Nifti1Image(array, AFFINE + np.eye(4, k=3))
        for key in CROPS if axes == 3 else [*CROPS[:3], np.s_[1:, 2:, 3:, 2:4]]:
            write_volume(tmp_path / "out.nii", file[key], metadata=file.metadata_of(key), overwrite=True)
            part, expected = nibabel.load(tmp_path / "out.nii"), original.slicer[key]
            assert np.array_equal(part.dataobj, expected.dataobj)
            assert np.allclose(part.affine, expected.affine, atol=1e-4), key
            assert np.allclose(part.header.get_zooms(), expected.header.get_zooms(), atol=1e-5)
            codes = {name: int(part.header[f"{name}_code"]) for name in ("sform", "qform")}
            assert codes == dict(zip(codes, HEADERS[kind] if kind != "none" else (2, 0), strict=True))
            if codes["qform"]:
                assert np.allclose(part.get_qform(), other.slicer[key].affine, atol=1e-4)
            assert part.header["xyzt_units"] == original.header["xyzt_units"]

    @pytest.mark.parametrize("kind", HEADERS)
    def test_command(self, tmp_path: Path, kind: str) -> None:
        """Samples that are world coordinates keep their places, also as means of the cells of coarser levels."""
        save_nifti(tmp_path / "in.nii", np.zeros(SHAPE, dtype=np.float32), HEADERS[kind])
        affine = nibabel.load(tmp_path / "in.nii").affine
        save_nifti(tmp_path / "in.nii", world(SHAPE, affine).astype(np.float32), HEADERS[kind])
        assert main(["compress", str(tmp_path / "in.nii"), str(tmp_path / "in.tinc"), "--lossless"]) == 0
        for level, region in [
            (0, None), (1, None), (2, None), (0, "4:12,8:20,2:10"), (1, "1:8,2:11,1:6"), (2, "1:4,2:6,0:3"),
        ]:  # fmt: skip
            options = ["--level", str(level), "--overwrite", *([] if region is None else ["--region", region])]
            assert main(["decompress", str(tmp_path / "in.tinc"), str(tmp_path / "out.nii"), *options]) == 0
            part = nibabel.load(tmp_path / "out.nii")
            assert np.allclose(part.get_fdata(), world(part.shape, part.affine), atol=1e-3)
            assert np.allclose(part.header.get_zooms(), np.array([2, 2, 3]) << level)
            assert np.allclose(nibabel.affines.voxel_sizes(part.affine), part.header.get_zooms(), atol=1e-5)

    @pytest.mark.parametrize("key", [np.s_[::-1, ::-2, 3::3], np.s_[-5:, :-3, 3:-1:4], np.s_[-1:2:-3, ..., -2:]])
    def test_ends(self, tmp_path: Path, key: tuple[Any, ...]) -> None:
        """Open ends, ends that count from the last voxel, and mirrored axes."""
        values = world(SHAPE, AFFINE).astype(np.float32)
        save_nifti(tmp_path / "in.nii", values, (1, 1))
        file = tinc.compress(values, lossless=True, metadata=read_volume(tmp_path / "in.nii").metadata)
        write_volume(tmp_path / "out.nii", file[key], metadata=file.metadata_of(key))
        part = nibabel.load(tmp_path / "out.nii")
        assert np.allclose(part.get_fdata(), world(part.shape, part.affine), atol=1e-3)

    def test_times(self, tmp_path: Path) -> None:
        """The time of the first volume moves; slice times are left out with a warning where slices are cut."""
        array = np.zeros((8, 8, 6, 10), dtype=np.int16)
        fields = {"toffset": 2.0, "slice_end": 5, "slice_code": 1, "slice_duration": 0.25, "dim_info": 3 << 4}
        save_nifti(tmp_path / "in.nii", array, (1, 0), **fields)
        file = tinc.compress(array, lossless=True, metadata=read_volume(tmp_path / "in.nii").metadata)
        times = file.metadata_of(np.s_[2:, :, :, 4::2])
        assert times["nifti"]["toffset"] == 2 + 4 * 1.5 and times["spacing"] == [2, 2, 3, 3]
        assert times["nifti"]["slice_end"] == 5
        with pytest.warns(UserWarning, match="left out: nifti: slice_code, nifti: slice_duration, nifti: slice_end"):
            slices = file.metadata_of(np.s_[:, :, 1:])["nifti"]
        assert not {"slice_code", "slice_end", "slice_duration"} & set(slices) and slices["dim_info"] == 48
        write_volume(tmp_path / "out.nii", file[..., 4::2], metadata=file.metadata_of(np.s_[..., 4::2]))
        header = nibabel.load(tmp_path / "out.nii").header
        assert header["toffset"] == 8 and header["slice_end"] == 5 and header["slice_duration"] == 0.25
        with pytest.warns(UserWarning, match="left out: nifti: slice_code"):
            assert file.metadata_of(level=1)["nifti"]["toffset"] == 2 + 0.75

    @pytest.mark.parametrize(
        ("axes", "shape", "channel_axis", "expected"),
        [("TYX", (5, 4, 3), None, (3, 4, 1, 5)), ("ZX", (5, 3), None, (3, 1, 5)), ("YZ", (5, 3), None, (1, 5, 3)),
         ("TYXC", (5, 4, 3, 2), 3, (3, 4, 1, 5, 2)), ("YXS", (5, 4, 3), 2, (4, 5, 1, 1, 3)),
         ("ZYX", (5, 4, 3), 0, (3, 4, 1, 1, 5)), ("CYXS", (5, 4, 3, 2), 3, (3, 4, 1, 1, 5, 2))],
    )  # fmt: skip
    def test_missing_axes(
        self, tmp_path: Path, axes: str, shape: tuple[int, ...], channel_axis: int | None, expected: tuple[int, ...]
    ) -> None:
        """A series of images has no depth: its times are not taken for slices."""
        array = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
        spacing = [{"X": 0.5, "Y": 2.0, "Z": 3.0, "T": 7.0}.get(letter) for letter in axes]
        metadata = {"axes": axes, "spacing": spacing}
        write_volume(tmp_path / "o.nii", array, metadata=metadata, channel_axis=channel_axis)
        image = nibabel.load(tmp_path / "o.nii")
        assert image.shape == expected
        zooms = [step if size > 1 else 1 for step, size in zip((0.5, 2.0, 3.0, 7.0, 1, 1), expected, strict=False)]
        assert list(image.header.get_zooms()) == zooms

    @pytest.mark.parametrize(
        ("units", "expected", "codes"),
        [(["micrometer", "nanometer", "nanometer"], (0.25, 0.5, 2000), ("micron", "unknown")),
         (["micrometer", "micrometer", "nanometer"], (0.25, 500, 2000), ("micron", "unknown")),
         (["millimeter", "micrometer", "millimeter"], (250, 0.5, 2000), ("mm", "unknown")),
         (["mm", "um", "mm"], (250, 0.5, 2000), ("mm", "unknown")),
         (["inch"] * 3, (25.4 * 250, 25.4 * 500, 25.4 * 2000), ("mm", "unknown")),
         ([None, None, "micrometer"], (250, 500, 2000), ("micron", "unknown")),
         (["pixel"] * 3, (250, 500, 2000), ("unknown", "unknown"))],
    )  # fmt: skip
    def test_units(self, tmp_path: Path, units: list[Any], expected: tuple[float, ...], codes: tuple[str, str]) -> None:
        """NIfTI has one unit for all axes, and none below a micrometer."""
        metadata = {"axes": "ZYX", "spacing": [2000.0, 500.0, 250.0], "units": units, "origin": [4000.0, 0.0, 250.0]}
        write_volume(tmp_path / "o.nii", np.zeros((2, 3, 4), dtype=np.uint8), metadata=metadata)
        image = nibabel.load(tmp_path / "o.nii")
        assert np.allclose(image.header.get_zooms(), expected) and image.header.get_xyzt_units() == codes
        assert np.allclose(image.affine[:3, 3], [expected[0], 0, 2 * expected[2]])

    def test_not_finite(self, tmp_path: Path) -> None:
        save_nifti(tmp_path / "in.nii", np.zeros(SHAPE, dtype=np.uint8), (1, 1))
        content = bytearray((tmp_path / "in.nii").read_bytes())
        content[280:284] = np.float32(np.nan).tobytes()
        (tmp_path / "in.nii").write_bytes(content)
        volume = read_volume(tmp_path / "in.nii")
        assert "sform" not in volume.metadata["nifti"] and volume.metadata["nifti"]["qform_code"] == 1
        assert volume.note == "an affine that is not finite is left out"

    @pytest.mark.parametrize(
        "nifti",
        [{"sform": [[1, 2]], "sform_code": 1}, {"qform": "x", "qform_code": 1}, {"sform": 3}, {"intent_code": "x"}, [],
         {"descrip": 5}, {"slope": [1, 2]}, {"qform": np.eye(4)[:3].tolist()}, {"cal_max": {}}, {"dim_info": "a"},
         {"sform": np.full((3, 4), np.inf).tolist(), "sform_code": 1}, {"sform": 1e300}, {"cal_max": 1e300},
         {"sform": np.full((3, 4), 1e300).tolist(), "sform_code": 1}],
    )  # fmt: skip
    def test_foreign_fields(self, tmp_path: Path, nifti: Any) -> None:
        """Fields that do not fit a header are named; of a part they are left out with a warning, or named as well."""
        array = np.zeros((4, 4, 4), dtype=np.uint8)
        with pytest.raises(ValueError, match="metadata: a NIfTI header cannot hold nifti="):
            write_volume(tmp_path / "o.nii", array, metadata={"nifti": nifti})
        if "inf" in repr(nifti):
            return
        file = tinc.compress(array, lossless=True, metadata={"nifti": nifti})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file.metadata_of(np.s_[1:3])


class TestOtherFormats:
    @pytest.mark.parametrize("suffix", [".zarr", ".tif", ".nii"])
    @pytest.mark.parametrize("level", [0, 1, 2])
    def test_origin(self, tmp_path: Path, suffix: str, level: int) -> None:
        """Spacing and origin give each voxel of a part its place along each axis of the volume."""
        spacing, starts = [2.0, 0.5, 0.25], [10.0, -3.0, 0.0]
        metadata = {"axes": "ZYX", "spacing": spacing, "units": ["micrometer"] * 3, "origin": starts}
        grids = np.meshgrid(
            *(a + d * np.arange(n) for a, d, n in zip(starts, spacing, SHAPE, strict=True)), indexing="ij"
        )
        for axis, grid in enumerate(grids):
            file = tinc.compress(grid.astype(np.float32), lossless=True, metadata=metadata)
            file = tinc.open(file.tobytes())
            region = (slice(1, 3), slice(2, 6), slice(0, 3))
            part = file.metadata_of(region, level=level)
            assert part["spacing"] == [step * 2**level for step in spacing] and part["units"] == ["micrometer"] * 3
            path = tmp_path / f"{axis}{suffix}"
            write_volume(path, file.decode(region, level=level), metadata=part)
            volume = read_volume(path)
            values = np.asarray(volume.array)
            if suffix == ".nii":
                places = nibabel.affines.apply_affine(nibabel.load(path).affine, np.argwhere(np.ones(values.shape)))
                assert np.allclose(places[:, 2 - axis].reshape(values.shape), values)
            else:
                start, step = volume.metadata["origin"][axis], volume.metadata["spacing"][axis]
                along = np.arange(values.shape[axis]).reshape([-1 if i == axis else 1 for i in range(3)])
                assert np.allclose(start + step * along, values)

    @pytest.mark.parametrize("suffix", [".zarr", ".tif", ".npy", ".nii.gz"])
    @pytest.mark.parametrize("key", [np.s_[2:3, ::-2, 5::3], np.s_[1:-1, 3:3], np.s_[..., -4:], np.s_[:]])
    def test_part_of(self, tmp_path: Path, suffix: str, key: Any) -> None:
        """A part of a volume of any format has the samples of NumPy's index and its own metadata."""
        array = np.random.default_rng(0).integers(0, 900, (6, 8, 12)).astype(np.uint16)
        metadata = {"axes": "XYZ", "spacing": [2.0, 0.5, 0.25], "units": ["millimeter"] * 3}
        write_volume(tmp_path / f"in{suffix}", array, metadata=metadata)
        volume = read_volume(tmp_path / f"in{suffix}")
        part = part_of(volume, key)
        assert np.array_equal(np.asarray(part.array), array[key])
        whole = volume.metadata.get("spacing")
        steps = [abs(item.step or 1) for item in key] if isinstance(key, tuple) and Ellipsis not in key else []
        steps += [1] * (3 - len(steps))
        assert whole is None or part.metadata["spacing"] == [a * b for a, b in zip(whole, steps, strict=True)]
        mirrors = "::-2" in repr(key) or "None, -2" in repr(key)
        assert (part.note is not None) == (mirrors and suffix in (".zarr", ".tif", ".npy"))

    def test_only_cell(self) -> None:
        """An axis that becomes one cell has its centre, whether or not its size is that of a cell."""
        values = np.broadcast_to(np.arange(3, dtype=np.float32)[:, None], (3, 16))
        file = tinc.compress(values, lossless=True, metadata={"spacing": [2.0, 1.0], "origin": [5.0, 0.0]})
        for level, (start, step) in enumerate([(5.0, 2.0), (6.0, 4.0), (7.0, 6.0), (7.0, 6.0)]):
            part = file.metadata_of(level=level)
            assert part["spacing"] == [step, 2.0**level] and part["origin"][0] == start
        assert file.decode(level=2)[0, 0] == 1

    def test_ome_tiff(self, tmp_path: Path) -> None:
        """Channels that are left out lose their names; spacing is that of the level."""
        array = np.random.default_rng(0).integers(0, 900, (3, 6, 16, 20)).astype(np.uint16)
        details = {"axes": "CZYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 2.0,
                   "Channel": {"Name": ["a", "b", "c"]}}  # fmt: skip
        tifffile.imwrite(tmp_path / "in.ome.tif", array, ome=True, metadata=details)
        source, small, out = (str(tmp_path / name) for name in ("in.ome.tif", "in.tinc", "out.ome.tif"))
        assert main(["compress", source, small, "--ratio", "6", "--preset", "fast", "--metadata", "keep"]) == 0
        assert main(["decompress", small, out, "--region", "1:3,0:3,2:8,1:9", "--level", "1"]) == 0
        volume = read_volume(out)
        assert volume.array.shape == (2, 3, 6, 8) and volume.channel_axis == 0
        assert volume.metadata["channels"] == ["b", "c"] and volume.metadata["spacing"] == [None, 4.0, 1.0, 1.0]
        assert tinc.open(small).metadata_of(np.s_[::-1])["channels"] == ["c", "b", "a"]

    def test_imagej(self, tmp_path: Path) -> None:
        array = np.random.default_rng(0).integers(0, 255, (4, 16, 20)).astype(np.uint8)
        details = {"axes": "TYX", "finterval": 0.5, "unit": "um"}
        tifffile.imwrite(tmp_path / "in.tif", array, imagej=True, resolution=(4.0, 2.0), metadata=details)
        source, small, out = (str(tmp_path / name) for name in ("in.tif", "in.tinc", "out.tif"))
        assert main(["compress", source, small, "--lossless"]) == 0
        assert main(["decompress", small, out, "--region", ":,2:8,1:9", "--level", "1", "--overwrite"]) == 0
        assert read_volume(out).metadata["spacing"] == [1.0, 1.0, 0.5]

    @pytest.mark.parametrize("suffix", [".tif", ".ome.tif", ".zarr", ".png"])
    def test_colours(self, tmp_path: Path, suffix: str) -> None:
        """Levels halve the axes but that of the channels."""
        array = np.random.default_rng(0).integers(0, 255, (16, 20, 3)).astype(np.uint8)
        metadata = {"axes": "YXS", "spacing": [2.0, 3.0, None], "units": ["micrometer", "micrometer", None]}
        file = tinc.compress(array, bytes=400, preset="fast", channel_axis=2, metadata=metadata)
        part = file.metadata_of(np.s_[2:8, 1:9], level=1)
        assert part["spacing"] == [4.0, 6.0, None] and part["origin"] == [9.0, 7.5, None]
        values = file.decode((slice(2, 8), slice(1, 9), slice(None)), level=1)
        write_volume(tmp_path / f"o{suffix}", values, metadata=part, channel_axis=2)
        volume = read_volume(tmp_path / f"o{suffix}")
        assert volume.channel_axis == 2 and np.array_equal(np.asarray(volume.array), values)
        assert suffix == ".png" or volume.metadata["spacing"] == [4.0, 6.0, None]

    def test_translation_of_ome_zarr(self, tmp_path: Path) -> None:
        """Scales and translations of the level and of the image apply in their order."""
        group = zarr.open_group(str(tmp_path / "in.zarr"), mode="w")
        group.create_array("0", data=np.zeros((2, 8, 8), dtype=np.uint16))
        transforms = [{"type": "scale", "scale": [1, 2, 2]}, {"type": "translation", "translation": [0, 3, 5]}]
        outer = [{"type": "scale", "scale": [1, 10, 10]}]
        axes = [{"name": "c", "type": "channel"}, {"name": "y"}, {"name": "x"}]
        levels = [{"path": "0", "coordinateTransformations": transforms}]
        image = {"axes": axes, "datasets": levels, "coordinateTransformations": outer}
        group.attrs["ome"] = {"multiscales": [image], "version": "0.5"}
        volume = read_volume(tmp_path / "in.zarr")
        assert volume.metadata["spacing"] == [None, 20, 20] and volume.metadata["origin"] == [None, 30, 50]
        compress_chunks(
            volume.array, tmp_path / "o.zarr", chunk=(2, 4, 4), jobs=1, metadata=volume.metadata, channel_axis=0
        )
        assert read_volume(tmp_path / "o.zarr").metadata == volume.metadata

    def test_chunks_and_batches(self, tmp_path: Path) -> None:
        """Whole volumes keep the geometry of their files through chunks and batches."""
        save_nifti(tmp_path / "in.nii", np.random.default_rng(0).integers(0, 99, SHAPE).astype(np.int16), (1, 2))
        volume = read_volume(tmp_path / "in.nii")
        compress_chunks(volume.array, tmp_path / "o.zarr", chunk=(8, 8, 8), jobs=1, metadata=volume.metadata)
        assert read_volume(tmp_path / "o.zarr").metadata == volume.metadata
        compress_many([tmp_path / "in.nii"], tmp_path / "out", jobs=1, ratio=4, preset="fast")
        assert tinc.open(tmp_path / "out/in.tinc").metadata == json.loads(json.dumps(volume.metadata))


class TestMetadataOf:
    def test_whole(self, examples: dict[str, tinc.TincFile]) -> None:
        for name, file in examples.items():
            assert file.metadata_of() == file.metadata_of(()) == file.metadata, name

    def test_left_out(self) -> None:
        """Values that may state places are left out of a part with a warning; texts are kept."""
        metadata = {"name": "brain 1", "affine": [[1, 2], [3, 4]], "spacing": [1, 2], "channels": ["a"], "axes": "CX"}
        file = tinc.compress(np.zeros((4, 4), dtype=np.uint8), lossless=True, metadata=metadata)
        assert file.metadata_of(np.s_[:, ::1]) == metadata
        with pytest.warns(UserWarning, match="the file: metadata that cannot be .*is left out: affine, channels$"):
            part = file.metadata_of(np.s_[1:])
        assert part == {"name": "brain 1", "spacing": [1, 2], "axes": "CX", "origin": [1.0, 0.0]}
        with pytest.warns(UserWarning, match="direction of the axis X"):
            assert file.metadata_of(np.s_[1:, ::-1])["origin"] == [1.0, None]
        file = tinc.compress(np.zeros((4, 4), dtype=np.uint8), lossless=True, metadata={"spacing": 3, "origin": [1, 2]})
        with pytest.warns(UserWarning, match="left out: spacing, origin"):
            assert file.metadata_of(np.s_[1:]) == {}

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_foreign_metadata(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        """Any JSON values give a part, or an error in one line."""
        names = st.sampled_from([
            "axes", "spacing", "units", "origin", "channels", "nifti", "sform", "qform", "affine", "sform_code",
            "qform_code", "xyzt_units", "slope", "descrip", "toffset", "dim_info", "slice_end", "intent_code",
        ])  # fmt: skip
        plain = st.sampled_from(
            [None, True, 0, 3, -1, 0.5, 1e300, math.inf, 10**400, "", "ZYX", "mm", [1, 2, 3], AFFINE[:3].tolist()]
        )
        values = st.recursive(
            plain, lambda part: st.lists(part, max_size=4) | st.dictionaries(names, part), max_leaves=9
        )
        metadata = data.draw(st.dictionaries(names, values))
        array, path = np.zeros((4, 4, 6), dtype=np.uint8), tmp_path_factory.mktemp("o")
        key = data.draw(st.sampled_from([np.s_[1:3], np.s_[::-1, 1:], np.s_[..., ::2]]))
        part = part_of(Volume(array, None, metadata), key)
        short, _ = essential_metadata(metadata, 3, None, 1000)
        for number, (values, kept) in enumerate([(array, metadata), (part.array, part.metadata), (array, short)]):
            for suffix in (".nii", ".tif", ".ome.tif"):
                with contextlib.suppress(InputError):
                    write_volume(path / f"{number}{suffix}", values, metadata=kept)
                unstored_metadata(f"o{suffix}", kept)

    def test_unstored(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A format that cannot store what gives places and numbers their meaning is named."""
        save_nifti(tmp_path / "in.nii", np.zeros(SHAPE, dtype=np.int16), (1, 0))
        metadata = read_volume(tmp_path / "in.nii").metadata
        metadata["nifti"] |= {"slope": 2.0, "inter": -3.0}
        tinc.compress(np.zeros(SHAPE, dtype=np.int16), lossless=True, metadata=metadata).save(tmp_path / "in.tinc")
        for suffix, lost in [
            (".npy", "spacing, sform, slope, inter"),
            (".ome.tif", "sform, slope, inter"),
            (".nii", None),
        ]:
            assert main(["decompress", str(tmp_path / "in.tinc"), str(tmp_path / f"o{suffix}")]) == 0
            error = capsys.readouterr().err
            assert f"cannot store {lost}; .nii and .zarr can" in error if lost else error == ""

    def test_in_one_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tinc.compress(np.zeros((4, 4), dtype=np.uint8), lossless=True, metadata={"matrix": [1]})
        file.save(tmp_path / "in.tinc")
        assert main(["decompress", str(tmp_path / "in.tinc"), str(tmp_path / "o.npy"), "--region", "1:,:"]) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("left out: matrix")

    def test_errors(self, examples: dict[str, tinc.TincFile]) -> None:
        file = examples["residual-uint8"]
        with pytest.raises(ValueError, match="drops an axis, and its metadata with it; use a range such as 5:6"):
            file.metadata_of(3)
        with pytest.raises(IndexError):
            file.metadata_of(np.s_[:, :, :, 1:])
        with pytest.raises(ValueError, match=r"level=9 must be in \[0, "):
            file.metadata_of(level=9)


class TestSmallFiles:
    """Targets below 64 KiB, whose bytes metadata share."""

    @pytest.mark.parametrize(
        ("target", "kind", "order"),
        [(["--bytes", "1500"], kind, "<") for kind in HEADERS]
        + [(["--ratio", "9"], "both", ">"), (["--bpv", "2.5"], "none", ">"), (["--lossless"], "both", ">")],
    )
    def test_nifti(self, tmp_path: Path, wavy: Any, target: list[str], kind: str, order: str) -> None:
        values = wavy(SHAPE, "int16")
        save_nifti(tmp_path / "in.nii", values, HEADERS[kind], order=order, **FIELDS)
        content = bytearray((tmp_path / "in.nii").read_bytes())
        content[112:120] = np.array([0.7, -1400.5], dtype=f"{order}f4").tobytes()
        (tmp_path / "in.nii").write_bytes(content)
        small, out = tmp_path / "in.tinc", tmp_path / "out.nii"
        assert main(["compress", str(tmp_path / "in.nii"), str(small), "--preset", "fast", *target]) == 0
        assert target[0] == "--lossless" or small.stat().st_size <= 1500
        assert main(["decompress", str(small), str(out)]) == 0
        original, copy = nibabel.load(tmp_path / "in.nii"), nibabel.load(out)
        assert np.allclose(copy.affine, original.affine, atol=1e-5)
        assert kind == "none" or np.array_equal(copy.header["srow_x"], original.header["srow_x"])
        assert np.allclose(copy.get_qform(), original.get_qform(), atol=1e-4)
        assert np.array_equal(copy.header.get_zooms(), original.header.get_zooms())
        assert abs(copy.get_fdata().mean() - original.get_fdata().mean()) < 2
        dropped = () if target[0] == "--lossless" else ("descrip", "aux_file")
        kept = {"sform_code", "qform_code", "xyzt_units", *FIELDS} - set(dropped)
        for name in kept:
            assert copy.header[name] == original.header[name], name
        slopes = {(image.dataobj.slope, image.dataobj.inter) for image in (copy, original)}
        assert slopes == {(np.float32(0.7), -1400.5)}

    def test_cheap_texts(self, tmp_path: Path, wavy: Any, capsys: pytest.CaptureFixture[str]) -> None:
        """A description stays in a file of a hundred times its bytes; what is left out is named."""
        save_nifti(tmp_path / "in.nii", wavy((24, 30, 30), "int16", 9), (1, 1), descrip=b"FSL5.0", aux_file="a" * 20)
        source, small = str(tmp_path / "in.nii"), str(tmp_path / "in.tinc")
        assert main(["compress", source, small, "--bytes", "1900", "--preset", "fast"]) == 0
        assert "metadata left out of a small file: nifti: aux_file (--metadata keep)" in capsys.readouterr().err
        metadata = tinc.open(small).metadata
        assert metadata["nifti"]["descrip"] == "FSL5.0" and len(json.dumps(metadata)) < 500
        assert main(["compress", source, small, "--bytes", "1900", "--preset", "fast", "--metadata", "drop",
                     "--overwrite"]) == 0  # fmt: skip
        assert tinc.open(small).metadata == {} and "left out" not in capsys.readouterr().err

    @pytest.mark.parametrize("value", [0, 7])
    def test_out_of_reach(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: int) -> None:
        """A target that has no room for the metadata is refused with their size, also of a constant volume."""
        values = np.random.default_rng(0).integers(0, 900, SHAPE) if value else np.zeros(SHAPE)
        save_nifti(tmp_path / "in.nii", values.astype(np.int16), (1, 1))
        command = ["compress", str(tmp_path / "in.nii"), str(tmp_path / "o.tinc"), "--bytes", "250", "--preset", "fast"]
        assert main(command) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "out of reach" in line and "its metadata take 3" in line and "give a larger target, or leave" in line
        assert not (tmp_path / "o.tinc").exists()
        assert main([*command, "--metadata", "drop"]) == 0

    @pytest.mark.parametrize("layers", ["tree", "residual", "both"])
    @pytest.mark.usefixtures("few_steps")
    def test_layers(self, tmp_path: Path, wavy: Any, layers: str) -> None:
        save_nifti(tmp_path / "in.nii", wavy((8, 12, 9), "int16"), (1, 0))
        small = tmp_path / "o.tinc"
        assert main(["compress", str(tmp_path / "in.nii"), str(small), "--bytes", "900", "--layers", layers]) == 0
        assert small.stat().st_size <= 900 and tinc.open(small).metadata["nifti"]["sform_code"] == 1

    @pytest.mark.parametrize("suffix", [".tif", ".ome.tif", ".zarr"])
    def test_other_formats(self, tmp_path: Path, wavy: Any, suffix: str) -> None:
        """Spacing stays, and what a reader assumes without metadata takes no bytes."""
        metadata = {"axes": "ZYX", "spacing": [2.0, 0.5, 0.25], "units": ["micrometer"] * 3}
        source, small, out = (tmp_path / name for name in (f"in{suffix}", "o.tinc", f"out{suffix}"))
        write_volume(source, wavy((6, 12, 10), "uint16"), metadata=metadata)
        assert main(["compress", str(source), str(small), "--ratio", "3", "--preset", "fast"]) == 0
        assert tinc.open(small).metadata == {"spacing": [2.0, 0.5, 0.25], "units": ["micrometer"] * 3}
        assert main(["decompress", str(small), str(out)]) == 0
        assert {name: read_volume(out).metadata.get(name) for name in metadata} == metadata | (
            {"axes": None} if suffix == ".zarr" else {}
        )
        write_volume(tmp_path / f"plain{suffix}", wavy((6, 12, 10), "uint16"), metadata={"axes": "ZYX"})
        command = ["compress", str(tmp_path / f"plain{suffix}"), str(small), "--ratio", "3", "--preset", "fast"]
        assert main([*command, "--overwrite"]) == 0
        assert tinc.open(small).metadata == {}


@pytest.mark.parametrize("text", [b"plain", "µm é".encode(), b"\xe9 latin", b"cut\0garbage", b"x" * 80])
def test_texts_of_headers(tmp_path: Path, text: bytes) -> None:
    save_nifti(tmp_path / "in.nii", np.zeros(SHAPE, dtype=np.uint8), (1, 1))
    content = bytearray((tmp_path / "in.nii").read_bytes())
    content[148 : 148 + len(text)] = text
    (tmp_path / "in.nii").write_bytes(content)
    volume = read_volume(tmp_path / "in.nii")
    write_volume(tmp_path / "out.nii", volume.array, metadata=json.loads(json.dumps(volume.metadata)))
    again = read_volume(tmp_path / "out.nii").metadata["nifti"]["descrip"]
    assert again == volume.metadata["nifti"]["descrip"]
    assert again == text.split(b"\0")[0].decode("latin-1" if b"\xe9" in text else "utf-8")


def test_origin_of_others(tmp_path: Path) -> None:
    array = np.zeros((4, 4), dtype=np.uint8)
    for origin, message in [([1], r"origin=\[1\] has 1 entries"), ([1, "a"], "must hold numbers, or None")]:
        with pytest.raises(ValueError, match=f"metadata: .*{message}"):
            write_volume(tmp_path / "o.tif", array, metadata={"origin": origin})
