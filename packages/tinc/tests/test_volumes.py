"""Volumes in every file format, what they say of axes and spacing, and files that are damaged or of other types."""

import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

import tinc
from tinc.volumes import Volume, move_folder, read_volume, write_volume
from visionkernels.files import CorruptFileError

DTYPES = ["uint8", "uint16", "int16", "float32"]
NIFTI_DATA = Path(nibabel.__file__).parent / "tests/data"


def ramp(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    values = np.arange(np.prod(shape)).reshape(shape) * 37 - (500 if dtype in ("int16", "float32") else 0)
    return values.astype(dtype)


class TestRoundTrip:
    @pytest.mark.parametrize("suffix", [".tif", ".ome.tif", ".npy", ".nii", ".nii.gz", ".zarr", ".TIFF", ".OME.TIFF"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_formats(self, tmp_path: Path, suffix: str, dtype: str) -> None:
        axes = "XYZ" if ".nii" in suffix else "ZYX"
        array = ramp((3, 5, 7), dtype)
        metadata = {"axes": axes, "spacing": [0.5, 2.0, 0.25], "units": ["millimeter"] * 3}
        path = tmp_path / f"deep/in{suffix}"
        write_volume(path, array, metadata=metadata)
        volume = read_volume(path)
        assert volume.channel_axis is None and volume.note is None
        assert volume.array.dtype == array.dtype and volume.array.dtype.isnative
        assert np.array_equal(np.asarray(volume.array), array)
        if suffix != ".npy":
            assert {name: volume.metadata[name] for name in metadata} == metadata
        assert [each.name for each in path.parent.iterdir()] == [path.name]

    @pytest.mark.parametrize("suffix", [".tif", ".ome.tif", ".npy", ".nii", ".zarr"])
    @pytest.mark.parametrize("shape", [(6, 5), (1, 4, 5), (2, 3, 4, 5)])
    def test_axes_and_strides(self, tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
        """Two to four axes, in memory that is backward, strided and of the other byte order."""
        array = ramp(shape, "uint16").astype(">u2").repeat(2, axis=-1)[::-1, ..., ::2]
        # without metadata the axes are named from the last: X, Y, Z, T
        expected = array.transpose() if suffix == ".nii" else array
        write_volume(tmp_path / f"in{suffix}", array)
        # TIFF readers leave out axes of one
        found = np.asarray(read_volume(tmp_path / f"in{suffix}").array).reshape(expected.shape)
        assert np.array_equal(found, expected)

    @pytest.mark.parametrize(
        ("suffix", "axis", "shape"),
        [(".tif", 0, (3, 4, 5)), (".tif", 2, (4, 5, 3)), (".ome.tif", 1, (4, 2, 5, 6)), (".ome.tif", 2, (4, 5, 3)),
         (".zarr", 1, (3, 2, 5)), (".png", 2, (4, 5, 3)), (".png", -1, (4, 5, 4)), (".tif", 3, (2, 4, 5, 2))],
    )  # fmt: skip
    def test_channels(self, tmp_path: Path, suffix: str, axis: int, shape: tuple[int, ...]) -> None:
        array = ramp(shape, "uint8")
        write_volume(tmp_path / f"in{suffix}", array, channel_axis=axis)
        volume = read_volume(tmp_path / f"in{suffix}")
        assert volume.channel_axis == axis % len(shape)
        assert np.array_equal(np.asarray(volume.array), array)

    def test_nifti_channels(self, tmp_path: Path) -> None:
        array = ramp((2, 4, 5, 3), "int16")
        write_volume(tmp_path / "in.nii", array, channel_axis=0)
        volume = read_volume(tmp_path / "in.nii")
        assert volume.metadata["axes"] == "XYZTC" and volume.channel_axis == 4
        assert np.array_equal(volume.array, array.transpose(3, 2, 1, 0)[:, :, :, None])

    @pytest.mark.parametrize("dtype", ["uint8", "uint16"])
    def test_grey_png(self, tmp_path: Path, dtype: str) -> None:
        array = ramp((9, 11), dtype)[:, ::-1]
        write_volume(tmp_path / "in.png", array)
        volume = read_volume(tmp_path / "in.png")
        assert volume.array.dtype == array.dtype and np.array_equal(volume.array, array)

    def test_through_the_codec(self, tmp_path: Path) -> None:
        """A lossless file of a memory map, with its metadata, gives the volume back."""
        array = ramp((4, 6, 8), "int16")
        write_volume(
            tmp_path / "in.nii", array, metadata={"axes": "XYZ", "spacing": [1.0, 2.0, 3.0], "units": [None] * 3}
        )
        volume = read_volume(tmp_path / "in.nii")
        assert isinstance(volume.array, np.memmap)
        file = tinc.open(tinc.compress(volume.array, lossless=True, metadata=volume.metadata).tobytes())
        write_volume(tmp_path / "out.nii", file.decode(), metadata=file.metadata)
        assert (tmp_path / "out.nii").read_bytes() == (tmp_path / "in.nii").read_bytes()

    @settings(max_examples=20, deadline=None)
    @given(st.data())
    def test_properties(self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
        dtype = data.draw(st.sampled_from(DTYPES))
        array = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=2, max_dims=4, min_side=2, max_side=4)))
        suffix = data.draw(st.sampled_from([".tif", ".npy", ".nii.gz"]))
        axes = "XYZT" if suffix == ".nii.gz" else "TZYX"[-array.ndim :]
        path = tmp_path_factory.mktemp("in") / f"in{suffix}"
        write_volume(path, array, metadata={"axes": axes[: array.ndim]})
        assert np.array_equal(np.asarray(read_volume(path).array), array, equal_nan=dtype == "float32")


class TestReadVolume:
    def test_memory_maps(self, tmp_path: Path) -> None:
        array = ramp((3, 8, 8), "uint16")
        for suffix in (".tif", ".npy", ".nii"):
            write_volume(tmp_path / f"in{suffix}", array, metadata={"axes": "XYZ" if suffix == ".nii" else "ZYX"})
            found = read_volume(tmp_path / f"in{suffix}").array
            assert isinstance(found, np.memmap), suffix
            assert np.array_equal(found[1:2, 3], array[1:2, 3])

    def test_tiff_of_others(self, tmp_path: Path) -> None:
        array = ramp((3, 4, 8, 8), "uint16")
        path = tmp_path / "in.tif"
        tifffile.imwrite(path, array, byteorder=">", bigtiff=True, photometric="minisblack")
        assert np.array_equal(read_volume(path).array, array)
        tifffile.imwrite(path, array, compression="zlib", photometric="minisblack")
        assert np.array_equal(read_volume(path).array, array)
        tifffile.imwrite(path, array[0], photometric="minisblack")
        tifffile.imwrite(path, array[0, 0, :4], append=True)
        volume = read_volume(path)
        assert volume.note == "the first of 2 series is read" and np.array_equal(volume.array, array[0])

    def test_imagej(self, tmp_path: Path) -> None:
        """Fiji finds its spacing in what is written from what it wrote."""
        array = ramp((3, 2, 6, 8), "uint16")
        options: dict[str, Any] = {"imagej": True, "resolution": (4.0, 2.0)}
        details = {"axes": "ZCYX", "spacing": 1.5, "unit": "um"}
        tifffile.imwrite(tmp_path / "in.tif", array, metadata=details, **options)
        volume = read_volume(tmp_path / "in.tif")
        assert volume.channel_axis == 1 and volume.metadata["format"] == "imagej"
        assert volume.metadata["spacing"] == [1.5, None, 0.5, 0.25]
        assert volume.metadata["units"] == ["micrometer", None, "micrometer", "micrometer"]
        write_volume(tmp_path / "out.tif", volume.array, metadata=volume.metadata, channel_axis=1)
        again = read_volume(tmp_path / "out.tif")
        assert again.metadata == volume.metadata and np.array_equal(again.array, array)

    def test_ome(self, tmp_path: Path) -> None:
        array = ramp((2, 3, 6, 8), "float32")
        details = {"axes": "CZYX", "PhysicalSizeX": 0.3, "PhysicalSizeXUnit": "nm", "PhysicalSizeZ": 2.0}
        tifffile.imwrite(tmp_path / "in.tif", array, ome=True, metadata={**details, "Channel": {"Name": ["a", "b"]}})
        volume = read_volume(tmp_path / "in.tif")
        expected = {"format": "ome", "axes": "CZYX", "spacing": [None, 2.0, None, 0.3],
                    "units": [None, "micrometer", None, "nanometer"], "channels": ["a", "b"]}  # fmt: skip
        assert volume.metadata == expected and volume.channel_axis == 0
        write_volume(tmp_path / "out.ome.tif", volume.array, metadata=volume.metadata, channel_axis=0)
        assert read_volume(tmp_path / "out.ome.tif").metadata == expected

    @pytest.mark.parametrize("name", ["anatomical.nii", "functional.nii", "example4d.nii.gz"])
    def test_nifti_of_others(self, tmp_path: Path, name: str) -> None:
        """Big-endian, scaled and oriented files: the integers are kept, and scanners' numbers come back."""
        original = nibabel.load(NIFTI_DATA / name)
        volume = read_volume(NIFTI_DATA / name)
        assert np.array_equal(volume.array, original.dataobj.get_unscaled())
        write_volume(tmp_path / "out.nii", volume.array, metadata=volume.metadata)
        copy = nibabel.load(tmp_path / "out.nii")
        assert np.array_equal(copy.get_fdata(), original.get_fdata())
        assert np.allclose(copy.affine, original.affine, atol=1e-5)
        for field in ("sform_code", "qform_code", "xyzt_units"):
            assert copy.header[field] == original.header[field], field
        assert np.allclose(copy.header.get_zooms(), original.header.get_zooms())

    def test_nifti_slope(self, tmp_path: Path) -> None:
        image = nibabel.Nifti1Image(np.linspace(-3, 5, 60).reshape(3, 4, 5), np.diag([2, 2, 2, 1]))
        image.header.set_data_dtype(np.int16)
        nibabel.save(image, tmp_path / "in.nii")
        volume = read_volume(tmp_path / "in.nii")
        assert volume.array.dtype == np.int16 and volume.metadata["nifti"]["slope"] != 1
        write_volume(tmp_path / "out.nii", volume.array, metadata=volume.metadata)
        assert np.array_equal(
            nibabel.load(tmp_path / "out.nii").get_fdata(), nibabel.load(tmp_path / "in.nii").get_fdata()
        )

    def test_ome_zarr(self, tmp_path: Path) -> None:
        """The finest level is read, where it is indexed, and scales multiply."""
        group = zarr.open_group(str(tmp_path / "in.zarr"), mode="w")
        fine = ramp((2, 3, 6, 8), "uint16")
        group.create_array("full", data=fine, chunks=(1, 3, 6, 4))
        group.create_array("a_half", data=fine[..., ::2, ::2])
        axes = [{"name": "c", "type": "channel"}, *({"name": each, "unit": "micrometer"} for each in "zyx")]
        levels = [
            {"path": name, "coordinateTransformations": [{"type": "scale", "scale": [1, 2, step, step]}]}
            for name, step in (("full", 0.5), ("a_half", 1))
        ]
        group.attrs["ome"] = {"multiscales": [{"axes": axes, "datasets": levels}], "version": "0.5"}
        volume = read_volume(tmp_path / "in.zarr")
        assert isinstance(volume.array, zarr.Array) and np.array_equal(volume.array[:], fine)
        assert volume.channel_axis == 0
        assert volume.metadata["spacing"] == [None, 2, 0.5, 0.5] and volume.metadata["axes"] == "CZYX"

    def test_zarr_of_others(self, tmp_path: Path) -> None:
        group = zarr.open_group(str(tmp_path / "in.zarr"), mode="w", zarr_format=2)
        group.create_group("b").create_array("x", data=ramp((4, 5), "uint8"))
        assert np.array_equal(read_volume(tmp_path / "in.zarr").array[:], ramp((4, 5), "uint8"))
        named = zarr.create_array(str(tmp_path / "n.zarr"), data=ramp((4, 5), "uint8"), dimension_names=["y", "x"])
        assert read_volume(tmp_path / "n.zarr").metadata == {"format": "zarr", "axes": "YX"} and named.ndim == 2

    @pytest.mark.parametrize(
        ("values", "dtype", "kept_as"),
        [([0, 1], "bool", "uint8"), ([-5, 100], "int8", "int16"), ([0, 255], "int64", "uint8"),
         ([0, 70], ">i4", "uint8"), ([0, 65535], "uint64", "uint16"), ([-40000, 9], "int32", "float32"),
         ([0.5, -1e9], "float64", "float32"), ([np.nan, np.inf], "float64", "float32"), ([1, 2], "float16", "float32")],
    )  # fmt: skip
    def test_exact_conversion(self, tmp_path: Path, values: list[float], dtype: str, kept_as: str) -> None:
        array = np.array([values, values]).astype(dtype)
        np.save(tmp_path / "in.npy", array)
        volume = read_volume(tmp_path / "in.npy")
        assert volume.array.dtype == kept_as
        assert np.array_equal(volume.array, array, equal_nan=True)
        assert volume.note is not None and f"kept as {kept_as}, which holds them exactly" in volume.note
        assert volume.metadata["source_dtype"] == array.dtype.newbyteorder("=").name

    def test_as_type(self, tmp_path: Path) -> None:
        np.save(tmp_path / "in.npy", np.array([[0.5, 1.5], [-1.25, 300.1]]))
        volume = read_volume(tmp_path / "in.npy", as_type="int16")
        assert volume.array.tolist() == [[0, 2], [-1, 300]] and volume.array.dtype == np.int16
        assert volume.note == "float64 values are rounded to int16"
        assert read_volume(tmp_path / "in.npy", as_type="float32").array.dtype == np.float32
        with pytest.raises(ValueError, match=r"as_type='uint8' holds values in \[0, 255\].*\[-1.0, 300.0\]: rescale"):
            read_volume(tmp_path / "in.npy", as_type="uint8")
        np.save(tmp_path / "in.npy", np.array([[np.nan, 1.0]]))
        with pytest.raises(ValueError, match="has 1 values that are not finite"):
            read_volume(tmp_path / "in.npy", as_type="uint8")
        with pytest.raises(ValueError, match="as_type='int32' must be one of uint8, uint16"):
            read_volume(tmp_path / "in.npy", as_type="int32")

    @pytest.mark.parametrize(("values", "dtype"), [([0.1], "f8"), ([2**31 - 1], "i4"), ([2**62 + 1], "i8")])
    def test_no_exact_type(self, tmp_path: Path, values: list[float], dtype: str) -> None:
        np.save(tmp_path / "in.npy", np.array([values], dtype=dtype))
        with pytest.raises(TypeError, match=r"in\.npy holds .* values that none of uint8, .*; pass --as float32"):
            read_volume(tmp_path / "in.npy")

    @pytest.mark.parametrize("dtype", ["complex64", "U3", [("r", "u1"), ("g", "u1")], "M8[s]"])
    def test_other_types(self, tmp_path: Path, dtype: Any) -> None:
        np.save(tmp_path / "in.npy", np.zeros((2, 2), dtype=dtype))
        with pytest.raises(TypeError, match=r"in\.npy holds .*it must hold numbers, one a voxel: uint8"):
            read_volume(tmp_path / "in.npy", as_type="uint8")

    def test_errors(self, tmp_path: Path) -> None:
        for name in ("in.mrc", "in", "-", "in.tinc"):
            with pytest.raises(ValueError, match=r"has the suffix .*; known are \.ome\.tif, .*\.zarr, \.png"):
                read_volume(tmp_path / name)
        with pytest.raises(FileNotFoundError, match=r"none\.tif does not exist"):
            read_volume(tmp_path / "none.tif")
        with pytest.raises(CorruptFileError, match="holds no array"):
            zarr.open_group(str(tmp_path / "empty.zarr"), mode="w")
            read_volume(tmp_path / "empty.zarr")
        np.savez(tmp_path / "in.npz", a=np.zeros((2, 2)))
        (tmp_path / "in.npz").rename(tmp_path / "in.npy")
        with pytest.raises(CorruptFileError, match=r"in\.npy is damaged.*an archive"):
            read_volume(tmp_path / "in.npy")
        np.save(tmp_path / "in.npy", np.array([[{}]]), allow_pickle=True)
        with pytest.raises(CorruptFileError, match=r"in\.npy is damaged"):
            read_volume(tmp_path / "in.npy")
        for mode in ("P", "1", "LA"):
            Image.new(mode, (4, 4)).save(tmp_path / "in.png")
            with pytest.raises(ValueError, match=f"PNG of mode {mode}, .*read are grey of 8 and 16 bits"):
                read_volume(tmp_path / "in.png")

    def test_deep_colour_png(self, tmp_path: Path) -> None:
        """Pillow would silently halve the depth of these."""
        header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
        Image.new("RGB", (2, 2)).save(tmp_path / "in.png")
        content = bytearray((tmp_path / "in.png").read_bytes())
        content[16:29] = header
        content[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
        place = content.index(b"IDAT") - 4
        data = zlib.compress(bytes(2 * (1 + 12)))
        chunk = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
        end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
        (tmp_path / "in.png").write_bytes(bytes(content[:place]) + chunk + end)
        with pytest.raises(ValueError, match="of mode RGB, 16 bits"):
            read_volume(tmp_path / "in.png")

    @pytest.mark.parametrize("suffix", [".tif", ".ome.tif", ".npy", ".nii", ".nii.gz", ".png"])
    def test_damage(self, tmp_path: Path, suffix: str) -> None:
        """What is cut off gives one line with the name, or where the cut does not matter, the volume."""
        path, rng = tmp_path / f"in{suffix}", np.random.default_rng(0)
        array = rng.integers(0, 256, (24, 20), dtype=np.uint8)
        write_volume(path, array, metadata={"axes": "XY"} if ".nii" in suffix else None)
        content = path.read_bytes()
        for length in [*range(60), *rng.integers(60, len(content), 40).tolist()]:
            path.write_bytes(content[:length])
            self._is_refused_or(path, array)
        for place in rng.integers(0, len(content), 60).tolist():
            broken = bytearray(content)
            broken[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(broken)
            self._is_refused_or(path, None)
        path.write_bytes(rng.bytes(500))
        with pytest.raises(CorruptFileError, match=f"in{suffix} is damaged"):
            read_volume(path)

    @staticmethod
    def _is_refused_or(path: Path, array: np.ndarray | None) -> None:
        try:
            found = read_volume(path).array
        except CorruptFileError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        except (TypeError, ValueError) as error:
            # a flipped bit may tell of another type or kind of picture
            assert array is None and str(path) in str(error)
        else:
            assert array is None or np.array_equal(found, array)

    def test_damaged_zarr(self, tmp_path: Path) -> None:
        write_volume(tmp_path / "in.zarr", ramp((4, 5), "uint8"))
        for content in ("", "{", "[]", '{"zarr_format": 3}', '{"zarr_format": 9, "node_type": "array"}'):
            (tmp_path / "in.zarr/zarr.json").write_text(content)
            with pytest.raises(CorruptFileError, match=r"in\.zarr is damaged or of another format"):
                read_volume(tmp_path / "in.zarr")
        (tmp_path / "plain.zarr").mkdir()
        with pytest.raises(CorruptFileError, match=r"plain\.zarr is damaged"):
            read_volume(tmp_path / "plain.zarr")

    @pytest.mark.parametrize(("suffix", "module", "extra"), [("nii", "nibabel", "nifti"), ("zarr", "zarr", "zarr")])
    def test_missing_extra(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, module: str, extra: str
    ) -> None:
        path = tmp_path / f"in.{suffix}"
        write_volume(path, ramp((4, 5, 6), "uint8"), metadata={"axes": "XYZ"})
        # None in sys.modules is how Python knows that a module is not there
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"{module} is not installed; run: pip install 'tinc-vision\[{extra}\]'"):
            read_volume(path)


class TestWriteVolume:
    @pytest.mark.parametrize("suffix", [".tif", ".npy", ".nii.gz", ".zarr", ".png"])
    def test_existing(self, tmp_path: Path, suffix: str) -> None:
        path, first, second = tmp_path / f"o{suffix}", ramp((4, 5), "uint8"), ramp((6, 5), "uint8")
        axes = {"axes": "XY"} if ".nii" in suffix else None
        write_volume(path, first, metadata=axes)
        with pytest.raises(FileExistsError, match="--overwrite"):
            write_volume(path, second, metadata=axes)
        assert np.array_equal(np.asarray(read_volume(path).array), first)
        write_volume(path, second, metadata=axes, overwrite=True)
        assert np.array_equal(np.asarray(read_volume(path).array), second)
        assert [each.name for each in tmp_path.iterdir()] == [path.name]

    @pytest.mark.parametrize("suffix", [".tif", ".npy", ".nii", ".zarr"])
    def test_whole_or_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
        """A disk that fills up leaves the old file and nothing else."""
        write_volume(tmp_path / f"o{suffix}", ramp((4, 5), "uint8"))

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("No space left on device")

        for target in ("tifffile.imwrite", "numpy.save", "tinc.volumes.nifti._set_geometry", "zarr.create_array"):
            monkeypatch.setattr(target, fail)
        with pytest.raises(OSError, match="No space left"):
            write_volume(tmp_path / f"o{suffix}", ramp((6, 5), "uint8"), overwrite=True)
        assert [each.name for each in tmp_path.iterdir()] == [f"o{suffix}"]
        assert np.asarray(read_volume(tmp_path / f"o{suffix}").array).size == 20

    def test_between_formats(self, tmp_path: Path) -> None:
        """From a scanner's axes to a microscope's and back, spacing goes with its axis."""
        array = ramp((3, 5, 7), "int16")
        metadata = {"axes": "XYZ", "spacing": [0.5, 1.0, 2.0], "units": ["millimeter"] * 3}
        write_volume(tmp_path / "a.nii", array, metadata=metadata)
        scan = read_volume(tmp_path / "a.nii")
        write_volume(tmp_path / "b.ome.tif", scan.array, metadata=scan.metadata)
        microscope = read_volume(tmp_path / "b.ome.tif")
        assert microscope.metadata["axes"] == "ZYX" and microscope.metadata["spacing"] == [2.0, 1.0, 0.5]
        assert np.array_equal(microscope.array, array.transpose())
        write_volume(tmp_path / "c.nii", microscope.array, metadata=microscope.metadata)
        assert np.array_equal(read_volume(tmp_path / "c.nii").array, array)
        assert read_volume(tmp_path / "c.nii").metadata["spacing"] == [0.5, 1.0, 2.0]

    def test_large_axis(self, tmp_path: Path) -> None:
        """NIfTI-1 counts to 32767."""
        write_volume(tmp_path / "o.nii", ramp((40000, 2), "uint8"), metadata={"axes": "XY"})
        assert read_volume(tmp_path / "o.nii").array.shape == (40000, 2)

    def test_errors(self, tmp_path: Path) -> None:
        volume = ramp((3, 4, 5), "float32")
        with pytest.raises(ValueError, match=r"'\.mrc'; known are"):
            write_volume(tmp_path / "o.mrc", volume)
        with pytest.raises(ValueError, match=r"o\.png cannot hold float32 \(3, 4, 5\); a PNG holds"):
            write_volume(tmp_path / "o.png", volume)
        with pytest.raises(ValueError, match=r"metadata: axes='YX' has 2 entries; the array has 3 axes"):
            write_volume(tmp_path / "o.tif", volume, metadata={"axes": "YX", "spacing": [1, 1], "units": ["m", "m"]})
        for metadata, message in [
            ({"axes": ""}, "axes='' has 0 entries"), ({"spacing": []}, r"spacing=\[\] has 0"),
            ({"units": ()}, r"units=\(\) has 0"), ({"spacing": [0, 1, 1]}, r"spacing=\[0, 1, 1\] must hold positive"),
        ]:  # fmt: skip
            with pytest.raises(ValueError, match=f"metadata: {message}"):
                write_volume(tmp_path / "o.nii", volume, metadata=metadata)
        with pytest.raises(TypeError, match="metadata is of type str; it must be a dict"):
            write_volume(tmp_path / "o.tif", volume, metadata="")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"channel_axis=3 must be in \[-3, 3\)"):
            write_volume(tmp_path / "o.tif", volume, channel_axis=3)
        with pytest.raises(ValueError, match="NIfTI has the axes X, Y, Z, T and channels; the array has QYX"):
            write_volume(tmp_path / "o.nii", volume, metadata={"axes": "QYX"})
        with pytest.raises(ValueError, match="a TIFF cannot hold float32"):
            write_volume(tmp_path / "o.ome.tif", volume, metadata={"axes": "Y?X"})
        assert not list(tmp_path.iterdir())

    def test_foreign_folder(self, tmp_path: Path) -> None:
        """--overwrite removes no folder that is not a Zarr."""
        (tmp_path / "o.zarr").mkdir()
        (tmp_path / "o.zarr/thesis.txt").write_text("years of work")
        with pytest.raises(FileExistsError, match="is no Zarr folder; remove it yourself"):
            write_volume(tmp_path / "o.zarr", ramp((3, 4), "uint8"), overwrite=True)
        with pytest.raises(FileExistsError, match="is no Zarr folder"):
            move_folder(tmp_path, tmp_path / "o.zarr", overwrite=True)
        assert (tmp_path / "o.zarr/thesis.txt").exists()


def test_volume_is_plain() -> None:
    volume = Volume(np.zeros((2, 2)))
    assert volume.channel_axis is None and volume.metadata == {} and volume.note is None
