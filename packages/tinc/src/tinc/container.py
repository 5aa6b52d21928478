"""The bytes of a `.tinc` file: prefix, header with the directory of streams, streams. See docs/tinc-format.md.

A reader checks the magic, the version, the stated length against the real one, the checksum, the range of each field of
the header, and that the streams fill the rest exactly, in this order. It allocates nothing before that.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from tinc.contents import Contents, ExactSection, ResidualSection, TreeSection
from tinc.errors import TincFormatError
from tinc.residual.blocks import Blocks
from tinc.residual.quantizer import Quantizer
from tinc.signal import DTYPES, MAX_AXES, MAX_CHANNELS, SampleFormat
from tinc.tree.shape import TreeShape

__all__ = ["VERSION", "Directory", "pack", "unpack"]

MAGIC = b"TINC"
VERSION = 1
_PREFIX = struct.Struct("<4sHHQI")
_CHECKS_TILES = 1
"""Flag: the checksum of the prefix covers the header, and each stream has its own."""
TILE_CHECKS_FROM = 1 << 16
"""Bytes of all streams from which each has a checksum of its own, for readers of a part."""
MAX_TILE = 1 << 20
"""Voxels of a tile, so that a small file cannot ask for much memory at once."""
MAX_BLOCKS = 1 << 18
"""Blocks of a tile of the residual layer."""
MAX_WEIGHTS = 32
"""Weights for each byte of a tree's stream, above the first 256 bytes."""
_MAX_SIZE = 1 << 40
_MAX_BACKGROUND = 1 << 30
_MAX_REAL = 2.0**160
"""float32 ends at 2**128."""


class _Writer:
    def __init__(self) -> None:
        self.content = bytearray()

    def number(self, value: int) -> None:
        """Append a non-negative integer, seven bits a byte, the lowest first."""
        while value > 127:
            self.content.append(value & 127 | 128)
            value >>= 7
        self.content.append(value)

    def signed(self, value: int) -> None:
        self.number(2 * value if value >= 0 else -2 * value - 1)

    def real(self, value: float) -> None:
        self.content += struct.pack("<d", value)

    def raw(self, value: bytes) -> None:
        self.number(len(value))
        self.content += value


class _Reader:
    """Reads what `_Writer` wrote; every number is checked against the range that its caller allows."""

    def __init__(self, content: memoryview) -> None:
        self.content, self.place = content, 0

    def number(self, name: str, low: int = 0, high: int = _MAX_SIZE) -> int:
        value = 0
        for shift in range(0, 49, 7):
            byte = self._take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                break
        else:
            _damaged(f"{name} is no number")
        if not low <= value <= high:
            _damaged(f"{name}={value} must be in [{low}, {high}]")
        return value

    def signed(self, name: str, low: int, high: int) -> int:
        value = self.number(name, high=4 * max(abs(low), abs(high)) + 1)
        value = value >> 1 if value % 2 == 0 else -(value >> 1) - 1
        if not low <= value <= high:
            _damaged(f"{name}={value} must be in [{low}, {high}]")
        return value

    def real(self, name: str) -> float:
        (value,) = struct.unpack("<d", self._take(8))
        # NaN too
        if not abs(value) <= _MAX_REAL:
            _damaged(f"{name}={value} must be in [-{_MAX_REAL:g}, {_MAX_REAL:g}]")
        return float(value)

    def raw(self, name: str, high: int) -> bytes:
        return bytes(self._take(self.number(f"length of {name}", high=high)))

    def _take(self, count: int) -> memoryview:
        if self.place + count > len(self.content):
            _damaged("it ends early")
        self.place += count
        return self.content[self.place - count : self.place]


def _damaged(what: str) -> NoReturn:
    raise TincFormatError(f"the header is damaged: {what}")


def pack(contents: Contents, *, checks_tiles: bool | None = None) -> bytes:
    """Return the bytes of a file. Each stream has a checksum of its own if `checks_tiles`; None: from 64 KiB on."""
    if checks_tiles is None:
        checks_tiles = sum(map(len, contents.streams)) >= TILE_CHECKS_FROM
    header = _Writer()
    header.number(DTYPES.index(contents.format.dtype))
    header.number(len(contents.shape))
    for length in contents.shape:
        header.number(length)
    header.number(0 if contents.channel_axis is None else contents.channel_axis + 1)
    if contents.channel_axis is not None:
        header.number(contents.channels)
    if contents.format.is_float:
        header.real(contents.format.offset)
        header.signed(contents.format.exponent)
    parts = (contents.tree, contents.residual, contents.exact)
    header.number(sum(1 << place for place, part in enumerate(parts) if part is not None) + 8 * bool(contents.metadata))
    if contents.tree is not None:
        _write_tree(header, contents.tree)
    if contents.residual is not None:
        _write_residual(header, contents.residual)
    if contents.exact is not None:
        _write_exact(header, contents.exact, contents.format)
    if contents.metadata:
        header.raw(contents.metadata)
    for stream in contents.streams:
        header.number(len(stream))
        if checks_tiles:
            header.content += struct.pack("<I", zlib.crc32(stream))
    size = _Writer()
    size.number(len(header.content))
    head = bytes(size.content + header.content)
    body = head + b"".join(contents.streams)
    return _prefix(len(body), head if checks_tiles else body, checks_tiles) + body


def _prefix(length: int, checked: bytes | memoryview, checks_tiles: bool) -> bytes:
    start = _PREFIX.pack(MAGIC, VERSION, _CHECKS_TILES * checks_tiles, _PREFIX.size + length, 0)[:-4]
    return start + struct.pack("<I", zlib.crc32(checked, zlib.crc32(start)))


def unpack(content: memoryview, *, partial: bool = False) -> tuple[Contents, "Directory"]:
    """Return the contents of a file without its streams, and the directory of these.

    `partial` accepts a file that was cut off after its header. Raises TincFormatError.
    """
    if bytes(content[:4]) != MAGIC[: len(content)]:
        raise TincFormatError("this is no .tinc file: it does not begin with TINC")
    if len(content) < _PREFIX.size:
        raise TincFormatError(f"the file is cut off after {len(content)} bytes")
    _, version, flags, length, checksum = _PREFIX.unpack(content[: _PREFIX.size])
    if version > VERSION:
        raise TincFormatError(f"the file is of format version {version}; this program reads up to {VERSION}: update it")
    if version == 0 or flags & ~_CHECKS_TILES:
        raise TincFormatError(f"the prefix is damaged: version {version}, flags {flags}")
    if length != len(content) and not (partial and len(content) < length):
        raise TincFormatError(f"the file has {len(content)} bytes and says {length}: it is cut off or damaged")
    checks_tiles = bool(flags & _CHECKS_TILES)
    size = _Reader(content[_PREFIX.size :])
    head_end = size.number("length of the header", high=len(content)) + size.place + _PREFIX.size
    if head_end > len(content):
        _damaged("it ends early")
    if checks_tiles or not partial:
        checked = content[_PREFIX.size : head_end if checks_tiles else None]
        if zlib.crc32(checked, zlib.crc32(content[: _PREFIX.size - 4])) != checksum:
            raise TincFormatError(f"the checksum of the {'header' if checks_tiles else 'file'} is wrong: it is damaged")
    reader = _Reader(content[_PREFIX.size + size.place : head_end])
    contents = _read_header(reader)
    directory = _read_directory(reader, contents, head_end, checks_tiles)
    if reader.place != len(reader.content):
        _damaged("it has more than it says")
    if directory.offsets[-1] != length:
        _damaged("its streams do not fill the file")
    if contents.tree is not None:
        stated, weights = directory.offsets[1] - directory.offsets[0], contents.tree.shape.num_weights
        if weights > MAX_WEIGHTS * (stated + 256):
            _damaged(f"its tree has {weights} weights in {stated} bytes")
    return contents, directory


@dataclass(frozen=True)
class Directory:
    """Places of the streams, in the order tree, palette, tiles."""

    offsets: tuple[int, ...]
    """The beginning of each stream, and the end of the last one."""
    checksums: tuple[int, ...] | None

    def stream(self, content: bytes | memoryview, number: int) -> bytes:
        """Return a stream. Raises TincFormatError if it is damaged or cut off."""
        stream = bytes(content[self.offsets[number] : self.offsets[number + 1]])
        if len(stream) < self.offsets[number + 1] - self.offsets[number]:
            raise TincFormatError(f"stream {number} is cut off")
        if self.checksums is not None and zlib.crc32(stream) != self.checksums[number]:
            raise TincFormatError(f"the checksum of stream {number} is wrong: it is damaged")
        return stream


def _read_directory(reader: _Reader, contents: Contents, start: int, checks_tiles: bool) -> Directory:
    count = contents.num_streams
    if count > len(reader.content) - reader.place:
        _damaged(f"it has no room for the lengths of {count} streams")
    offsets, checksums = [start], []
    for number in range(count):
        offsets.append(offsets[-1] + reader.number(f"length of stream {number}"))
        if checks_tiles:
            checksums.append(struct.unpack("<I", reader._take(4))[0])
    return Directory(tuple(offsets), tuple(checksums) if checks_tiles else None)


def _read_header(reader: _Reader) -> Contents:
    dtype = DTYPES[reader.number("sample type", high=len(DTYPES) - 1)]
    axes = reader.number("axes", 2, MAX_AXES)
    shape = tuple(reader.number("size of an axis", 1) for _ in range(axes))
    if math.prod(shape) > _MAX_SIZE:
        _damaged(f"it says {math.prod(shape)} voxels")
    channel_axis = reader.number("channel axis", high=axes + 1) - 1
    channels = reader.number("channels", 1, MAX_CHANNELS) if channel_axis >= 0 else 1
    samples = SampleFormat(dtype)
    if samples.is_float:
        samples = SampleFormat(dtype, reader.real("offset"), reader.signed("exponent", -200, 200))
    parts = reader.number("parts", high=15)
    extent = (channels, *shape)
    tree = _read_tree(reader, shape, channels) if parts & 1 else None
    residual = _read_residual(reader, extent) if parts & 2 else None
    exact = _read_exact(reader, extent, samples) if parts & 4 else None
    if exact is not None and residual is not None:
        _damaged("it has a residual and an exact layer")
    metadata = reader.raw("metadata", 1 << 20) if parts & 8 else b""
    return Contents(
        shape, channels, None if channel_axis < 0 else channel_axis, samples, tree, residual, exact, metadata
    )


def _write_tree(header: _Writer, tree: TreeSection) -> None:
    shape = tree.shape
    header.number(len(shape.splits))
    for split, widths in zip(shape.splits[1:], shape.widths[1:], strict=True):
        for part in split:
            header.number(part)
        header.raw(bytes(widths))
    header.raw(bytes(shape.widths[0]))
    for multiplier, shift in zip(tree.multipliers, tree.shifts, strict=True):
        header.content += bytes((multiplier, shift))
    header.content += tree.spreads
    header.signed(tree.base)
    header.number(bool(shape.active))
    if shape.active:
        header.raw(np.packbits(shape.active).tobytes())


def _read_tree(reader: _Reader, extent: tuple[int, ...], channels: int) -> TreeSection:
    levels = reader.number("levels", 1, 8)
    splits, widths = [(1,) * len(extent)], []
    for _ in range(levels - 1):
        splits.append(tuple(reader.number("split", 1, 64) for _ in extent))
        widths.append(tuple(reader.raw("widths", 16)))
    widths.insert(0, tuple(reader.raw("widths", 16)))
    leaves = math.prod(math.prod(split) for split in splits)
    if leaves > 1 << 16 or not all(widths) or any(width == 0 for level in widths for width in level):
        _damaged(f"its tree has {leaves} leaves and layers {widths}")
    if widths[-1][-1] != channels:
        _damaged(f"its tree gives {widths[-1][-1]} channels of {channels}")
    parts = [math.prod(split[axis] for split in splits) for axis in range(len(extent))]
    if any(part > size for part, size in zip(parts, extent, strict=True)):
        _damaged("its tree has more leaves along an axis than there are voxels")
    layers = sum(map(len, widths))
    fixed = reader._take(2 * layers)
    spreads = bytes(reader._take(2 * layers))
    if max(spreads) >= 160 or max(fixed[1::2]) > 40 or not all(fixed[::2]):
        _damaged("its layers are out of range")
    base = reader.signed("base", -_MAX_BACKGROUND, _MAX_BACKGROUND)
    active: tuple[bool, ...] = ()
    if reader.number("active flag", high=1):
        packed = np.frombuffer(reader.raw("active leaves", leaves), dtype=np.uint8)
        if len(packed) != -(-leaves // 8):
            _damaged("its active leaves have another length")
        active = tuple((np.unpackbits(packed)[:leaves] > 0).tolist())
        if not any(active):
            _damaged("its tree has no active leaf")
    shape = TreeShape(extent, tuple(splits), tuple(widths), active)
    return TreeSection(shape, tuple(fixed[::2]), tuple(fixed[1::2]), spreads, base)


def _write_blocks(header: _Writer, blocks: Blocks) -> None:
    # channels are one to a block
    for block, tile in zip(blocks.block[1:], blocks.tile[1:], strict=True):
        header.number(block.bit_length() - 1)
        header.number(tile)
    header.number(blocks.tile[0])


def _read_blocks(reader: _Reader, extent: tuple[int, ...], *, max_block: int) -> Blocks:
    block, tile = [1], [1]
    for _ in extent[1:]:
        block.append(1 << reader.number("block", high=max_block))
        tile.append(reader.number("tile", 1, MAX_TILE))
    tile[0] = reader.number("channels of a tile", 1, extent[0])
    if math.prod(b * t for b, t in zip(block, tile, strict=True)) > MAX_TILE:
        _damaged(f"its tiles are larger than {MAX_TILE} voxels")
    if max_block and math.prod(tile) > MAX_BLOCKS:
        _damaged(f"its tiles have more than {MAX_BLOCKS} blocks")
    return Blocks(extent, tuple(block), tuple(tile))


def _write_residual(header: _Writer, residual: ResidualSection) -> None:
    _write_blocks(header, residual.blocks)
    header.number(residual.quantizer.mantissa)
    header.signed(residual.quantizer.exponent)
    for point in residual.quantizer.points:
        header.signed(point)
    header.number(residual.background is not None)
    if residual.background is not None:
        header.signed(residual.background)


def _read_residual(reader: _Reader, extent: tuple[int, ...]) -> ResidualSection:
    blocks = _read_blocks(reader, extent, max_block=5)
    mantissa = reader.number("mantissa", 1, 1023)
    exponent = reader.signed("exponent", -40, 20)
    first, second, more = (reader.signed("point", -32, 31) for _ in range(3))
    has_mask = reader.number("mask", high=1)
    background = reader.signed("background", -_MAX_BACKGROUND, _MAX_BACKGROUND) if has_mask else None
    return ResidualSection(blocks, Quantizer(mantissa, exponent, (first, second, more)), background)


_KINDS = ("step", "palette", "bits")


def _write_exact(header: _Writer, exact: ExactSection, samples: SampleFormat) -> None:
    header.number(_KINDS.index(exact.kind))
    if exact.kind == "step" and samples.is_float:
        header.real(exact.step)
        header.real(exact.offset)
    elif exact.kind == "step":
        header.number(int(exact.step))
    elif exact.kind == "palette":
        header.number(exact.palette_size)
    _write_blocks(header, exact.blocks)


def _read_exact(reader: _Reader, extent: tuple[int, ...], samples: SampleFormat) -> ExactSection:
    kind = _KINDS[reader.number("grid", high=2)]
    step, offset, palette = 1.0, 0.0, 0
    if kind == "step" and samples.is_float:
        step, offset = reader.real("step"), reader.real("offset")
        if step < 1 / _MAX_REAL:
            _damaged(f"step={step} must be in [{1 / _MAX_REAL:g}, {_MAX_REAL:g}]")
    elif kind == "step":
        step = float(reader.number("step", 1, 1 << 17))
    elif kind == "palette":
        palette = reader.number("palette", 1, 1 << 16)
    if (kind == "bits") != (kind == "bits" and samples.is_float):
        _damaged("it has bits of integers")
    return ExactSection(kind, step, offset, palette, _read_blocks(reader, extent, max_block=0))
