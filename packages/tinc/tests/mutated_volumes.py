"""Mutated files of volumes for `test_mutated_files.py`: their bytes, and the fields of their headers before packing."""

import contextlib
import gzip
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any

import nibabel
import numpy as np
import tifffile
import zarr
from numcodecs import Zlib
from PIL import Image

from tinc.volumes import essential_metadata, part_of, read_volume, write_volume
from tinc.volumes.description import layout_of
from tinc.zarr_codec import TincCodec
from visionkernels.checks import InputError
from visionkernels.testing.mutations import MutatedReader, mutated, mutated_json

__all__ = ["VOLUME_READERS"]

SHAPE = (4, 5, 6)
VALUES = (np.arange(120).reshape(SHAPE) * 531).astype(np.uint16)
METADATA = {"axes": "ZYX", "spacing": [0.5, 2.0, 0.25], "units": ["micrometer"] * 3, "origin": [1.0, 2.0, 3.0]}
Parts = dict[str, bytes]


def read_and_use(path: Path) -> None:
    """Read a volume, and all that is done with one; its metadata must be JSON and fit the array."""
    volume = read_volume(path)
    ndim = volume.array.ndim
    json.dumps(volume.metadata, allow_nan=False)
    try:
        layout_of(ndim, volume.metadata, volume.channel_axis)
    except InputError as error:
        raise AssertionError("metadata that do not fit their array are returned") from error
    if volume.array.size and ndim:
        part = part_of(volume, (slice(0, 2),) * ndim)
        essential_metadata(volume.metadata, ndim, volume.channel_axis, 4096)
        for name in ("part.nii", "part.ome.tif", "part.tif"):
            # not every format holds every array
            with contextlib.suppress(InputError):
                write_volume(
                    path.with_name(name), np.asarray(part.array), metadata=part.metadata,
                    channel_axis=part.channel_axis, overwrite=True,
                )  # fmt: skip
    if volume.array.nbytes <= 1 << 22:
        np.asarray(volume.array)


@cache
def written(name: str) -> bytes:
    """Return the content of a small volume in the format of this name."""
    folder = Path(mkdtemp())
    try:
        _write(folder / name)
        return (folder / name).read_bytes()
    finally:
        shutil.rmtree(folder)


def _write(path: Path) -> None:
    options: dict[str, dict[str, Any]] = {
        "big.tif": {"bigtiff": True, "compression": "zlib"},
        "tiled.tif": {"tile": (16, 16), "compression": "lzw", "predictor": True},
        "pages.tif": {"metadata": None, "rowsperstrip": 2, "resolution": (3, 4)},
        "zstd.tif": {"compression": "zstd"},
        "packed.tif": {"compression": "packbits", "byteorder": ">"},
        "imagej.tif": {
            "imagej": True, "resolution": (2.0, 4.0), "metadata": {"axes": "ZYX", "unit": "um", "spacing": 3.0},
        },
    }  # fmt: skip
    metadata = {name: METADATA[name] for name in ("axes", "spacing", "units")}
    if path.name in options:
        tifffile.imwrite(path, VALUES, photometric="minisblack", **options[path.name])
    elif path.name == "extended.nii":
        image = nibabel.Nifti1Image(VALUES.astype(np.int16), np.diag([2.0, 3.0, 4.0, 1.0]))
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"a comment"))
        image.header.set_slope_inter(2.0, 1.0)
        image.header.set_xyzt_units("mm", "sec")
        nibabel.save(image, path)
    elif path.name == "second.nii":
        nibabel.save(nibabel.Nifti2Image(VALUES.astype(np.float32), np.eye(4)), path)
    elif path.name == "grey.png":
        Image.fromarray(VALUES[0]).save(path)
    elif path.name == "colour.png":
        Image.fromarray(VALUES.astype(np.uint8).reshape(8, 5, 3)).save(path)
    else:
        values = VALUES.astype(np.float64) if path.name == "wide.npy" else VALUES
        write_volume(path, values, metadata=metadata | {"axes": "XYZ"} if ".nii" in path.name else metadata)


def of_bytes(names: tuple[str, ...], suffix: str) -> Callable[[Path, Random], Path]:
    """Return a function that writes mutated bytes of one of the files."""

    def write(folder: Path, random: Random) -> Path:
        path = folder / f"x{suffix}"
        path.write_bytes(mutated(written(random.choice(names)), random))
        return path

    return write


def zipped_nifti(folder: Path, random: Random) -> Path:
    content = mutated(gzip.decompress(written("x.nii.gz")), random)
    (folder / "x.nii.gz").write_bytes(gzip.compress(content, 1))
    return folder / "x.nii.gz"


ODD_REALS = (0.0, -0.0, -1.0, 1.0, 1e-45, 3e38, float("nan"), float("inf"), -float("inf"))
ODD_INTEGERS = (0, 1, 2, 3, 4, 5, 7, 8, -1, -3, 255, 32767, -32768, 2**31 - 1, -(2**31), 2**63 - 1)


def nifti_fields(folder: Path, random: Random) -> Path:
    """Fields of the header with odd values, and extensions of odd sizes."""
    name = random.choice(("x.nii", "extended.nii", "second.nii", "x.nii.gz"))
    content = written(name)
    content = bytearray(gzip.decompress(content) if name.endswith(".gz") else content)
    kind = nibabel.Nifti2Header if name == "second.nii" else nibabel.Nifti1Header
    fields = kind.template_dtype
    for _ in range(random.choice((1, 1, 2, 4))):
        field = random.choice(list(fields.names))
        inner, offset = fields.fields[field][:2]
        place = offset + inner.base.itemsize * random.randrange(max(inner.itemsize // inner.base.itemsize, 1))
        if inner.base.kind == "S":
            content[place : place + 4] = random.randbytes(4)
            continue
        odd = random.choice(ODD_REALS if inner.base.kind == "f" else ODD_INTEGERS)
        with np.errstate(all="ignore"):
            new = np.array(odd).astype(np.int64 if inner.base.kind != "f" else float).astype(inner.base).tobytes()
        content[place : place + len(new)] = new
    if name == "extended.nii" and random.random() < 0.5:
        struct.pack_into("<ii", content, 352, random.choice(ODD_INTEGERS[:-1]), random.choice((0, 2, 4, 6, 44, -1)))
    path = folder / f"x.{'nii.gz' if name.endswith('.gz') else 'nii'}"
    path.write_bytes(gzip.compress(bytes(content), 1) if name.endswith(".gz") else bytes(content))
    return path


TIFFS = ("x.tif", "x.ome.tif", "big.tif", "tiled.tif", "pages.tif", "zstd.tif", "packed.tif", "imagej.tif")
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 12: 8, 16: 8}


def tiff_tags(folder: Path, random: Random) -> Path:
    """Tags with odd codes, types, counts and values, and directories that end elsewhere."""
    content = bytearray(written(random.choice(TIFFS)))
    order = "<" if content[:2] == b"II" else ">"
    is_big = struct.unpack_from(f"{order}H", content, 2)[0] == 43
    long, size, number = ("Q", 20, "Q") if is_big else ("I", 12, "H")
    places, (place,) = [], struct.unpack_from(f"{order}{long}", content, 8 if is_big else 4)
    directories = []
    while place and len(directories) < 8:
        (count,) = struct.unpack_from(f"{order}{number}", content, place)
        first = place + struct.calcsize(number)
        places += [first + size * index for index in range(count)]
        directories.append(first + size * count)
        (place,) = struct.unpack_from(f"{order}{long}", content, directories[-1])
    for _ in range(random.choice((1, 1, 2, 4))):
        entry = random.choice(places)
        code, kind = struct.unpack_from(f"{order}HH", content, entry)
        value = entry + 4 + struct.calcsize(long)
        odd = random.choice((0, 1, 2, 3, 8, 16, 64, 255, 65535, 2**31 - 1, 2**32 - 1))
        match random.randrange(6):
            case 0:
                struct.pack_into(f"{order}H", content, entry, random.choice((code ^ 1, 254, 256, 258, 270, 282, 339)))
            case 1:
                struct.pack_into(f"{order}H", content, entry + 2, random.choice((*range(19), 65535)))
            case 2:
                struct.pack_into(f"{order}{long}", content, entry + 4, odd)
            case 3 if SIZES.get(kind) in (2, 4):
                kind_of = "H" if SIZES[kind] == 2 else "I"
                struct.pack_into(f"{order}{kind_of}", content, value, odd & (1 << 8 * SIZES[kind]) - 1)
            case 4:
                struct.pack_into(f"{order}{long}", content, random.choice(directories), random.choice((8, 16, odd)))
            case _:  # values of tags that stand elsewhere: resolutions, offsets, descriptions
                (where,) = struct.unpack_from(f"{order}{long}", content, value)
                if 0 < where < len(content) - 8:
                    struct.pack_into(f"{order}I", content, where + random.choice((0, 4)), odd)
    (folder / "x.tif").write_bytes(content)
    return folder / "x.tif"


OME = (
    '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
    'UUID="urn:uuid:0b5b5a1c-0000-11ef-9d5d-000000000000"><Image ID="Image:0" Name="x"><Pixels ID="Pixels:0" '
    'DimensionOrder="XYZCT" Type="uint16" SizeX="6" SizeY="5" SizeZ="4" SizeC="1" SizeT="1" PhysicalSizeX="0.25" '
    'PhysicalSizeXUnit="mm" PhysicalSizeZ="2" TimeIncrement="1.5"><Channel ID="Channel:0:0" Name="a" '
    'SamplesPerPixel="1"/><TiffData IFD="0" FirstZ="0" FirstC="0" FirstT="0" PlaneCount="4"/></Pixels></Image></OME>'
)
IMAGEJ = "ImageJ=1.11a\nimages=4\nslices=4\nhyperstack=true\nunit=um\nspacing=3.0\nfinterval=0.5\nloop=false\n"
SHAPED = '{"shape": [4, 5, 6], "axes": "ZYX", "spacing": [0.5, 2.0, 0.25], "units": ["mm", null, "um"], "origin": [0]}'
WORDS = (
    "0", "-1", "nan", "inf", "1e400", "4", "5", "99999", "2147483648", "1" * 5000, "x", "", "µ", "T", "XYCZT", "XYZ",
    "uint8", "float", "complex", "bit", "null", "[]", "{}", '"', "<", "&lolz;", "\0", "\n",
)  # fmt: skip


def tiff_texts(folder: Path, random: Random) -> Path:
    """OME-XML, ImageJ's description and tifffile's own, with odd words in the place of values."""
    text = random.choice((OME, OME, IMAGEJ, SHAPED))
    for _ in range(random.choice((1, 1, 2, 4))):
        marks = '"' if text.startswith("<") else "=\n" if text.startswith("Im") else ' ,:[]"'
        ends = [place for place, letter in enumerate(text) if letter in marks] or [0]
        match random.randrange(4):
            case 0:
                text = mutated(text.encode(), random).decode("latin-1")
            case _:
                start = random.choice(ends)
                end = min((place for place in ends if place > start), default=len(text))
                text = text[: start + 1] + random.choice(WORDS) + text[end:]
    description = text.encode("utf-8", "replace").replace(b"\0", b"") or b"x"
    tifffile.imwrite(
        folder / "x.ome.tif", VALUES, photometric="minisblack", description=description, metadata=None,
        resolution=random.choice(((1, 1), (2.0, 4.0))),
    )  # fmt: skip
    return folder / "x.ome.tif"


TYPES = ("'<f8'", "'>i4'", "'|O'", "'V3'", "'<M8[s]'", "'<U9'", "[('a','<u2')]", "'<u2'*9", "'<f2'", "'<c8'", "'|b1'")
SHAPES = (
    "()", "(0,)", "(120,)", "(-1,)", "(1099511627776,)", f"({2**62},)", f"({2**31}, {2**31}, 4)", "[3]", "(0, 5, 6)",
    f"({'1,' * 70})", "(True,)", "(4.0,)", "('a',)", "(" * 300, "9" * 6000, f"(0, {2**63})", "(4, 5, 6, 1, 1)",
)  # fmt: skip


def npy_header(folder: Path, random: Random) -> Path:
    """The text of the header, with its length right."""
    fields = {"'descr'": "'<u2'", "'fortran_order'": "False", "'shape'": "(4, 5, 6)"}
    for _ in range(random.choice((1, 1, 2))):
        name = random.choice(list(fields))
        fields[name] = random.choice({"'descr'": TYPES, "'shape'": SHAPES}.get(name, ("True", "0", "None")))
    text = ("{" + ", ".join(": ".join(pair) for pair in fields.items()) + "}").encode()
    raw = (mutated(text, random) if random.random() < 0.3 else text) + b"\n"
    version = random.choice(((1, 0), (2, 0), (3, 0)))
    length = struct.pack("<H" if version == (1, 0) else "<I", len(raw) & 0xFFFF)
    (folder / "x.npy").write_bytes(b"\x93NUMPY" + bytes(version) + length + raw + VALUES.tobytes())
    return folder / "x.npy"


def png_chunks(folder: Path, random: Random) -> Path:
    """Chunks with right checksums, and mutated contents."""
    content = written(random.choice(("grey.png", "colour.png")))
    result, place = bytearray(content[:8]), 8
    while place < len(content):
        (length,) = struct.unpack_from(">I", content, place)
        name, data = content[place + 4 : place + 8], content[place + 8 : place + 8 + length]
        data = mutated(data, random) if random.random() < 0.4 else data
        result += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        place += 12 + length
    (folder / "x.png").write_bytes(result)
    return folder / "x.png"


@cache
def stored(kind: str) -> Parts:
    """Return the files of a small Zarr folder by their names."""
    folder = Path(mkdtemp())
    try:
        path = str(folder / "x.zarr")
        options: dict[str, Any] = {"data": VALUES, "chunks": (2, 5, 4)}
        match kind:
            case "plain":
                write_volume(path, VALUES, metadata=METADATA)
            case "second":
                zarr.create_array(path, zarr_format=2, compressors=Zlib(), **options)
            case "tinc":
                zarr.create_array(path, serializer=TincCodec(ratio=8), compressors=None, **options)
            case "shards":
                zarr.create_array(path, shards=(4, 5, 8), **options)
            case "image":
                group = zarr.open_group(path, mode="w")
                group.create_array("0", data=VALUES, chunks=(2, 5, 4))
                scale, move = [1.0, 0.5, 0.25], [3.0, 0.0, 1.0]
                transforms = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": move}]
                level = {"path": "0", "coordinateTransformations": transforms}
                axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"]
                group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [level]}]}
        root = folder / "x.zarr"
        return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
    finally:
        shutil.rmtree(folder)


def zarr_folder(folder: Path, random: Random) -> Path:
    """The JSON of arrays and groups with odd values, and the bytes of chunks."""
    parts = dict(stored(random.choice(("plain", "second", "tinc", "shards", "image"))))
    for _ in range(random.choice((1, 1, 2))):
        texts = [name for name in parts if name.endswith((".json", ".zarray", ".zattrs"))]
        name = random.choice(texts if random.random() < 0.7 else list(parts))
        try:
            odd = json.loads(parts[name])
            parts[name] = json.dumps(mutated_json(odd, random)).encode()
        except ValueError:
            parts[name] = mutated(parts[name], random)
    if random.random() < 0.1:
        del parts[random.choice(list(parts))]
    for name, content in parts.items():
        (folder / "x.zarr" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "x.zarr" / name).write_bytes(content)
    (folder / "x.zarr").mkdir(exist_ok=True)
    return folder / "x.zarr"


DOCUMENTED = ((TypeError, "^volume .* holds "),)
VOLUME_READERS = [
    MutatedReader(name, write, read_and_use, DOCUMENTED)
    for name, write in {
        "nifti bytes": of_bytes(("x.nii", "extended.nii", "second.nii"), ".nii"),
        "nifti gzip bytes": of_bytes(("x.nii.gz",), ".nii.gz"),
        "nifti zipped": zipped_nifti,
        "nifti fields": nifti_fields,
        "tiff bytes": of_bytes(TIFFS, ".tif"),
        "tiff tags": tiff_tags,
        "tiff texts": tiff_texts,
        "npy bytes": of_bytes(("x.npy", "wide.npy"), ".npy"),
        "npy header": npy_header,
        "png bytes": of_bytes(("grey.png", "colour.png"), ".png"),
        "png chunks": png_chunks,
        "zarr": zarr_folder,
    }.items()
]
