"""Damaged headers and metadata of volumes: what is left out, and what is refused before memory or time is taken."""

import contextlib
import gzip
import json
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
import zarr

from tinc.volumes import read_volume, write_volume
from tinc.volumes.description import layout_of
from visionkernels.files import CorruptFileError

VALUES = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
NAN, INF = float("nan"), float("inf")


def nifti(path: Path, **fields: Any) -> Path:
    """Write a NIfTI file whose header has these fields, unchecked."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(VALUES.shape)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    for name, value in fields.items():
        header[name] = value
    content = header.binaryblock + bytes(4) + VALUES.tobytes(order="F")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def usable(path: Path) -> dict[str, Any]:
    """Return the metadata of a volume, which must be JSON and fit the array."""
    volume = read_volume(path)
    layout_of(volume.array.ndim, volume.metadata, volume.channel_axis)
    json.dumps(volume.metadata, allow_nan=False)
    return volume.metadata


class TestNifti:
    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("step", [0, -2, NAN, INF, -INF])
    def test_spacing(self, tmp_path: Path, suffix: str, step: float) -> None:
        metadata = usable(nifti(tmp_path / f"x{suffix}", pixdim=[1, 2, step, 4, 1, 1, 1, 1]))
        # nibabel takes 0 for 1
        assert metadata["spacing"] == [2, {0: 1, -2: 2}.get(step), 4]
        assert ("affine" in metadata["nifti"]) == bool(np.isfinite(step))

    @pytest.mark.parametrize("form", ["sform", "qform"])
    @pytest.mark.parametrize("value", [NAN, INF])
    def test_affines(self, tmp_path: Path, form: str, value: float) -> None:
        field = {"sform": {"srow_y": [0, value, 0, 0]}, "qform": {"qoffset_x": value}}[form]
        metadata = usable(nifti(tmp_path / "x.nii", **{f"{form}_code": 1}, pixdim=[1] * 8, **field))
        assert form not in metadata["nifti"] and "affine" in metadata["nifti"]
        assert "not finite is left out" in str(read_volume(tmp_path / "x.nii").note)

    @pytest.mark.parametrize("slope", [0, NAN, INF])
    def test_slope(self, tmp_path: Path, slope: float) -> None:
        metadata = usable(nifti(tmp_path / "x.nii", scl_slope=slope, scl_inter=3))
        assert "slope" not in metadata["nifti"]

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize(
        "fields",
        [{"dim": [8, 3, 4, 5, 1, 1, 1, 1]}, {"dim": [3, 3, -4, 5, 1, 1, 1, 1]}, {"dim": [-1] + [1] * 7},
         {"dim": [3, 3, 4, 32767, 1, 1, 1, 1]}, {"dim": [7] + [32767] * 7}, {"vox_offset": 2e9}, {"vox_offset": NAN},
         {"vox_offset": -1}, {"scl_slope": 1, "scl_inter": NAN}, {"datatype": 999}],
        ids=str,
    )  # fmt: skip
    def test_refused(self, tmp_path: Path, suffix: str, fields: dict[str, Any]) -> None:
        path = nifti(tmp_path / f"x{suffix}", **fields)
        tracemalloc.start()
        with pytest.raises(CorruptFileError, match=r"volume .*x\.nii.* is damaged or of another format"):
            read_volume(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
        tracemalloc.stop()

    @pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
    @pytest.mark.parametrize("length", [-16, 0, 1 << 30, 2**31 - 16])
    def test_extensions(self, tmp_path: Path, suffix: str, length: int) -> None:
        path = nifti(tmp_path / "x.nii", vox_offset=384)
        content = bytearray(path.read_bytes())
        content[348:352] = b"\1\0\0\0"
        content[352:352] = struct.pack("<ii", length, 6) + bytes(24)
        path = tmp_path / f"x{suffix}"
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else bytes(content))
        message = f"it states an extension of {length} bytes"
        with pytest.raises(CorruptFileError, match=message):
            read_volume(path)
        content[:4] = bytes(4)  # nibabel puts the size of the header right
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else bytes(content))
        with pytest.raises(CorruptFileError, match=message):
            read_volume(path)
        content[:4], content[352:356] = struct.pack("<i", 348), struct.pack("<i", 32)
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else bytes(content))
        assert np.array_equal(read_volume(path).array, VALUES)


PLANES = VALUES.astype(np.uint16)
OME = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
    '<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" SizeX="5" SizeY="4" SizeZ="3" SizeC="1" SizeT="1" '
    'PhysicalSizeX="2"><Channel ID="Channel:0:0" SamplesPerPixel="1"/><TiffData/></Pixels></Image></OME>'
)


class TestTiff:
    def write(self, path: Path, description: str = "", **options: Any) -> Path:
        options = {"description": description.encode() or None, "metadata": None} | options
        tifffile.imwrite(path, PLANES, photometric="minisblack", **options)
        return path

    def set_tag(self, path: Path, name: str, value: Any) -> None:
        """Replace the value or the count of a tag of the first page."""
        with tifffile.TiffFile(path) as tif:
            tag = tif.pages.first.tags[name]
            place, kind = tag.offset, {3: "H", 4: "I"}.get(int(tag.dtype), "I")
        content = bytearray(path.read_bytes())
        struct.pack_into(f"<{kind}", content, place + 8, value)
        path.write_bytes(content)

    @pytest.mark.parametrize("name", ["ImageWidth", "ImageLength", "StripByteCounts"])
    @pytest.mark.parametrize("value", [2**31 - 1, 2**32 - 1])
    def test_sizes(self, tmp_path: Path, name: str, value: int) -> None:
        path = self.write(tmp_path / "x.tif", compression="zlib")
        with tifffile.TiffFile(path) as tif:
            value = min(value, 65535) if int(tif.pages.first.tags[name].dtype) == 3 else value
        self.set_tag(path, name, value)
        tracemalloc.start()
        with pytest.raises(CorruptFileError):
            read_volume(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
        tracemalloc.stop()

    def test_loop(self, tmp_path: Path) -> None:
        """Directories of which the last one leads back to the second; tifffile walks them for ever."""
        path = self.write(tmp_path / "x.tif")
        content = bytearray(path.read_bytes())
        (place,) = struct.unpack_from("<I", content, 4)
        places = []
        while place:
            places.append(place)
            end = place + 2 + 12 * struct.unpack_from("<H", content, place)[0]
            (place,) = struct.unpack_from("<I", content, end)
        struct.pack_into("<I", content, end, places[1])
        path.write_bytes(content)
        with pytest.raises(CorruptFileError, match="its directories overlap, or form a loop"):
            read_volume(path)
        struct.pack_into("<I", content, end, 2**31)
        path.write_bytes(content)
        assert np.array_equal(read_volume(path).array, PLANES)

    @pytest.mark.parametrize("letter", "ZCT")
    def test_planes(self, tmp_path: Path, letter: str) -> None:
        size = f'Size{letter}="{3 if letter == "Z" else 1}"'
        path = self.write(tmp_path / "x.ome.tif", OME.replace(size, f'Size{letter}="2147483648"'))
        with pytest.raises(CorruptFileError, match="its OME-XML states"):
            read_volume(path)

    @pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e999"])
    def test_ome_spacing(self, tmp_path: Path, value: str) -> None:
        metadata = usable(self.write(tmp_path / "x.ome.tif", OME.replace('SizeX="2"', f'SizeX="{value}"')))
        assert "spacing" not in metadata

    @pytest.mark.parametrize("xml", [OME[:-30], OME.replace('SizeX="5"', 'SizeX="x"'), "<OME", OME.replace("5", "")])
    def test_ome_broken(self, tmp_path: Path, xml: str) -> None:
        """Either the pixels without it, or an error of our own."""
        path = self.write(tmp_path / "x.ome.tif", xml)
        with contextlib.suppress(CorruptFileError):
            assert np.array_equal(read_volume(path).array.reshape(PLANES.shape), PLANES)

    @pytest.mark.parametrize("text", ["unit=4\nspacing=2", "unit=um\nspacing=x", "unit=um\nspacing=nan", "spacing=-3"])
    def test_imagej(self, tmp_path: Path, text: str) -> None:
        path = self.write(tmp_path / "x.tif", f"ImageJ=1.11a\nimages=3\nslices=3\n{text}\n")
        metadata = usable(path)
        assert metadata["format"] == "imagej" and metadata.get("spacing", [0])[0] in (0, None, 2)

    def test_resolution(self, tmp_path: Path) -> None:
        """A resolution of 0/0, and one of another type."""
        text = "ImageJ=1.11a\nimages=3\nslices=3\nunit=um\n"
        for change in ((), (3, 1)):
            path = self.write(tmp_path / "x.tif", text, resolution=(2.0, 4.0))
            with tifffile.TiffFile(path) as tif:
                tag = tif.pages.first.tags["XResolution"]
            content = bytearray(path.read_bytes())
            struct.pack_into("<II", content, tag.valueoffset, 0, 0)
            if change:
                struct.pack_into("<HI", content, tag.offset + 2, *change)
            path.write_bytes(content)
            assert usable(path)["spacing"] == [None, 0.25, None]

    def test_own_metadata(self, tmp_path: Path) -> None:
        kept = '"spacing": [NaN, -1, 2], "units": [3, "mm", null], "origin": ["x", 1, 2]'
        metadata = usable(self.write(tmp_path / "x.tif", f'{{"shape": [3, 4, 5], "axes": "ZYX", {kept}}}'))
        assert metadata["spacing"] == [None, None, 2] and metadata["origin"] == [None, 1, 2]
        assert metadata["units"] == [None, "mm", None]


class TestPng:
    def chunk(self, name: bytes, data: bytes, length: int | None = None) -> bytes:
        length = len(data) if length is None else length
        return struct.pack(">I", length) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def test_sizes(self, tmp_path: Path) -> None:
        """A header of 81 million pixels, and a chunk that is longer than the file."""
        header = self.chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0))
        pixels = zlib.compress(bytes(100))
        for length in (None, 2**31 - 1):
            content = header + self.chunk(b"IDAT", pixels, length) + self.chunk(b"IEND", b"")
            (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
            tracemalloc.start()
            with pytest.raises(CorruptFileError, match=r"x\.png is damaged or of another format"):
                read_volume(tmp_path / "x.png")
            assert tracemalloc.get_traced_memory()[1] < 1 << 23
            tracemalloc.stop()


class TestZarr:
    @pytest.mark.parametrize(
        "kept",
        [{"metadata": {"spacing": [NAN, 1, 1]}}, {"metadata": {"spacing": [0, 1, 1]}}, {"metadata": {"axes": "XY"}},
         {"channel_axis": 9}, {"channel_axis": True}, {"channel_axis": "x"}, {"metadata": {"note": INF}}, [1], 7],
        ids=str,
    )  # fmt: skip
    def test_metadata(self, tmp_path: Path, kept: Any) -> None:
        write_volume(tmp_path / "x.zarr", VALUES)
        path = tmp_path / "x.zarr/zarr.json"
        content = json.loads(path.read_text())
        content["attributes"]["tinc"] = kept
        path.write_text(json.dumps(content))
        with pytest.raises(CorruptFileError, match=r"x\.zarr is damaged"):
            read_volume(tmp_path / "x.zarr")

    @pytest.mark.parametrize("shape", [[10**30, 4, 5], [2**62, 4, 5], [-3, 4, 5], ["3", 4, 5], [4, 5], 3])
    def test_shapes(self, tmp_path: Path, shape: Any) -> None:
        write_volume(tmp_path / "x.zarr", VALUES)
        path = tmp_path / "x.zarr/zarr.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": shape}))
        with pytest.raises(CorruptFileError, match=r"x\.zarr is damaged"):
            read_volume(tmp_path / "x.zarr")

    def test_chunks(self, tmp_path: Path) -> None:
        """A damaged chunk is named when it is read; a wrong index stays an IndexError."""
        zarr.create_array(str(tmp_path / "x.zarr"), data=VALUES, chunks=(1, 4, 5))
        array = read_volume(tmp_path / "x.zarr").array
        (tmp_path / "x.zarr/c/1/0/0").write_bytes(b"junk")
        assert np.array_equal(array[0], VALUES[0])
        for key in (1, ..., (slice(None), 2)):
            with pytest.raises(CorruptFileError, match=r"volume .*x\.zarr is damaged"):
                array[key]
        with pytest.raises(CorruptFileError):
            np.asarray(array)
        with pytest.raises(IndexError):
            array[9]
