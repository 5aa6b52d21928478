"""Headers and whole files that are damaged: each decodes, or raises TincFormatError, soon and in little memory."""

import resource
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinc
from tinc import TincFile, TincFormatError
from tinc.container import _read_header, _Reader, _Writer, pack, unpack
from tinc.contents import Contents, ExactSection, ResidualSection, TreeSection
from tinc.entropy import BitWriter
from tinc.exact import encode_box, encode_palette
from tinc.residual.blocks import Blocks
from tinc.residual.coefficients import CoefficientCoder
from tinc.residual.quantizer import Quantizer
from tinc.signal import SampleFormat
from tinc.tree.shape import TreeShape

SMALL = ("tiles", "both", "constant-leaves", "palette-tree", "step-float32", "channels", "bits", "mask", "constant")


def number(value: int) -> bytes:
    writer = _Writer()
    writer.number(value)
    return bytes(writer.content)


def repaired(content: bytes) -> bytes:
    """Return a file with the length and the checksum that it should have."""
    if len(content) < 21:
        return content
    body = bytearray(content)
    body[8:16] = struct.pack("<Q", len(body))
    end = len(body)
    if body[6] & 1:
        size, place = 0, 0
        while 20 + place < len(body) and place < 7:
            size |= (body[20 + place] & 127) << 7 * place
            place += 1
            if body[19 + place] < 128:
                break
        end = min(len(body), 20 + place + size)
    body[16:20] = struct.pack("<I", zlib.crc32(bytes(body[20:end]), zlib.crc32(bytes(body[:16]))))
    return bytes(body)


def taken_apart(file: TincFile) -> tuple[bytes, list[bytes], int]:
    """Return the header without its directory, the streams, and the flags."""
    content, offsets = file.tobytes(), file._directory.offsets
    streams = [content[a:b] for a, b in pairwise(offsets)]
    reader = _Reader(memoryview(content)[20:])
    size = reader.number("length")
    directory = sum(len(number(len(stream))) + 4 * content[6] for stream in streams)
    return content[20 + reader.place : 20 + reader.place + size - directory], streams, content[6]


def assembled(header: bytes, streams: list[bytes], flags: int) -> bytes:
    """Return a file whose directory and checksums are right."""
    for stream in streams:
        header += number(len(stream)) + (struct.pack("<I", zlib.crc32(stream)) if flags else b"")
    return repaired(struct.pack("<4sHHQI", b"TINC", 1, flags, 0, 0) + number(len(header)) + header + b"".join(streams))


def damaged_bytes(rng: np.random.Generator, files: list[TincFile]) -> bytes:
    """Return a file with bytes changed, put in, left out, cut off, or taken from another file."""
    content = bytearray(files[rng.integers(len(files))].tobytes())
    for _ in range(rng.integers(1, 4)):
        # headers are more fragile than streams
        at = int(rng.integers(0, min(len(content), 100) if rng.random() < 0.7 else len(content)))
        match rng.integers(0, 8):
            case 0:
                content[at] ^= 1 << rng.integers(0, 8)
            case 1:
                content[at] = rng.integers(0, 256)
            case 2:
                del content[at]
            case 3:
                content[at:at] = rng.bytes(rng.integers(1, 9))
            case 4:
                del content[max(at, 4) :]
            case 5:
                content[at : at + 1] = number(int(2 ** rng.uniform(0, 48)))
            case 6:
                content[at : at + 8] = struct.pack("<d", rng.choice([-1, 1]) * 10 ** rng.uniform(-320, 308))
            case _:
                other = files[rng.integers(len(files))].tobytes()
                content[at:] = other[rng.integers(len(other)) :]
        content = content or bytearray(b"T")
    return repaired(bytes(content)) if rng.random() < 0.8 else bytes(content)


def damaged_parts(rng: np.random.Generator, files: list[TincFile]) -> bytes:
    """Return a file whose lengths and checksums are right, with other fields and other streams."""
    header, streams, flags = taken_apart(files[rng.integers(len(files))])
    head = bytearray(header)
    for _ in range(rng.integers(0, 3)):
        at = int(rng.integers(len(head)))
        match rng.integers(0, 5):
            case 0:
                head[at] ^= 1 << rng.integers(0, 8)
            case 1:
                head[at] = rng.integers(0, 20)
            case 2:
                head[at : at + 1] = number(int(2 ** rng.uniform(0, 48)))
            case 3:
                head[at : at + 1] = number(int(2 ** rng.uniform(0, 9)))
            case _:
                head[at : at + 8] = struct.pack("<d", rng.choice([-1, 1]) * 10 ** rng.uniform(-320, 308))
    for place, stream in enumerate(streams):
        changed, kind = bytearray(stream), rng.random()
        if kind < 0.3 and stream:
            for _ in range(rng.integers(1, 4)):
                changed[rng.integers(len(stream))] = rng.integers(0, 256)
        elif kind < 0.4:
            del changed[rng.integers(len(stream) + 1) :]
        elif kind < 0.5:
            changed = bytearray(rng.bytes(rng.integers(0, 300)))
        streams[place] = bytes(changed)
    try:
        wanted = _read_header(_Reader(memoryview(bytes(head)))).num_streams
    except TincFormatError:
        wanted = len(streams)
    if wanted < 500:
        streams = (streams + [b""] * wanted)[:wanted]
    return assembled(bytes(head), streams, flags)


def attack(content: bytes) -> bool:
    """Open, decode and describe a file; return whether that went well. Anything but TincFormatError is raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            file = tinc.open(content)
            if file.size <= 1 << 22:
                file.decode()
            corner = tuple(slice(0, min(3, n)) for n in file.shape)
            file.decode(corner)
            if file.levels:
                file.decode(tuple(slice(0, 1) for _ in file.shape), level=1)
            file.info()
    except TincFormatError:
        return False
    return True


def attack_many(make: Callable[..., bytes], files: list[TincFile], seeds: range) -> None:
    decoded, crashes, slowest = 0, [], 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        content = make(np.random.default_rng(seed), files)
        start = time.process_time()
        try:
            decoded += attack(content)
        except Exception as error:
            crashes.append(f"{seed}: {type(error).__name__}: {error}; {content.hex()[:2000]}")
        slowest = max(slowest, time.process_time() - start)
    assert not crashes, f"{len(crashes)} crashes; the first ones: {crashes[:3]}"
    assert slowest < 2  # of a machine that may be busy; nothing that is large takes longer than a second
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10
    assert decoded < len(seeds)


class TestFuzz:
    """20,000 damaged files, the same in each run; 1000 of them in the fast tests."""

    def test_bytes(self, examples: dict[str, TincFile]) -> None:
        attack_many(damaged_bytes, list(examples.values()), range(500))

    def test_parts(self, examples: dict[str, TincFile]) -> None:
        attack_many(damaged_parts, list(examples.values()), range(500))

    @pytest.mark.slow
    @pytest.mark.parametrize(("start", "stop"), [(500, 4000), (4000, 7000), (7000, 10_000)])
    def test_more_bytes(self, examples: dict[str, TincFile], start: int, stop: int) -> None:
        attack_many(damaged_bytes, list(examples.values()), range(start, stop))

    @pytest.mark.slow
    @pytest.mark.parametrize(("start", "stop"), [(500, 4000), (4000, 7000), (7000, 10_000)])
    def test_more_parts(self, examples: dict[str, TincFile], start: int, stop: int) -> None:
        attack_many(damaged_parts, list(examples.values()), range(start, stop))


class TestEveryByte:
    def test_truncated(self, example: TincFile) -> None:
        content = example.tobytes()
        for length in range(len(content)):
            with pytest.raises(TincFormatError):
                tinc.open(content[:length])

    def test_truncated_and_repaired(self, example: TincFile) -> None:
        """Where length and checksum agree with what is left, the directory does not."""
        content = example.tobytes()
        for length in range(21, len(content)):
            with pytest.raises(TincFormatError):
                tinc.open(repaired(content[:length]))

    @pytest.mark.parametrize("name", SMALL)
    def test_flipped(self, examples: dict[str, TincFile], name: str) -> None:
        """Every bit of a header counts, and of the streams one of three bytes."""
        content = bytearray(examples[name].tobytes())
        header = examples[name].info()["header_bytes"]
        for place in range(len(content)):
            for bit in range(8) if place < header else [place % 8] * (place % 3 == 0):
                content[place] ^= 1 << bit
                with pytest.raises(TincFormatError):
                    tinc.open(bytes(content)).verify()
                content[place] ^= 1 << bit

    @pytest.mark.slow
    @pytest.mark.parametrize("name", SMALL)
    def test_all_flipped(self, examples: dict[str, TincFile], name: str) -> None:
        content = examples[name].tobytes()
        for bit in range(8 * len(content)):
            flipped = (int.from_bytes(content, "little") ^ (1 << bit)).to_bytes(len(content), "little")
            with pytest.raises(TincFormatError):
                tinc.open(flipped).verify()

    def test_longer(self, example: TincFile) -> None:
        for more in (b"\0", example.tobytes()):
            with pytest.raises(TincFormatError, match="cut off or damaged"):
                tinc.open(example.tobytes() + more)
            with pytest.raises(TincFormatError, match="do not fill the file"):
                tinc.open(repaired(example.tobytes() + more))


def simple(**changes: Any) -> Contents:
    return replace(Contents((4, 4), 1, None, SampleFormat("uint8")), **changes)


class TestPrefix:
    @pytest.mark.parametrize("content", [b"GIF89a" + bytes(30), b"tinc" + bytes(30), bytes(40), b"TIN\0" + bytes(30)])
    def test_magic(self, content: bytes) -> None:
        with pytest.raises(TincFormatError, match=r"no \.tinc file: it does not begin with TINC"):
            tinc.open(content)

    @pytest.mark.parametrize("length", [0, 1, 3])
    def test_too_short(self, length: int) -> None:
        with pytest.raises(TincFormatError, match="cut off"):
            tinc.open(b"TINC"[:length])

    def test_cut_prefix(self) -> None:
        with pytest.raises(TincFormatError, match="cut off"):
            tinc.open(pack(simple(), checks_tiles=False)[:12])

    @pytest.mark.parametrize("version", [2, 65535])
    def test_future(self, version: int) -> None:
        content = bytearray(pack(simple(), checks_tiles=False))
        content[4:6] = struct.pack("<H", version)
        with pytest.raises(TincFormatError, match=rf"version {version}; this program reads up to 1"):
            tinc.open(bytes(content))

    @pytest.mark.parametrize(("version", "flags"), [(0, 0), (1, 2), (1, 0x8000)])
    def test_strange(self, version: int, flags: int) -> None:
        content = bytearray(pack(simple(), checks_tiles=False))
        content[4:8] = struct.pack("<HH", version, flags)
        with pytest.raises(TincFormatError, match=f"version {version}, flags {flags}"):
            tinc.open(repaired(bytes(content)))

    @pytest.mark.parametrize(("checks", "what"), [(False, "file"), (True, "header")])
    def test_checksum(self, checks: bool, what: str) -> None:
        content = bytearray(pack(simple(), checks_tiles=checks))
        content[17] ^= 4
        with pytest.raises(TincFormatError, match=f"the checksum of the {what} is wrong"):
            tinc.open(bytes(content))


BLOCKS = Blocks((1, 4, 4), (1, 4, 4), (1, 1, 1))
SINGLES = Blocks((1, 4, 4), (1, 1, 1), (1, 4, 4))
QUANTIZER = Quantizer(512, -10)
SINGLE_TILES = Blocks((1, 4, 4), (1, 1, 1), (1, 1, 1))
TREE = TreeSection(TreeShape((4, 4), ((1, 1), (2, 2)), ((3,), (1,))), (1, 1), (3, 3), bytes(4), 0)


def other_tree(splits: Any, widths: Any, active: tuple[bool, ...] = ()) -> TreeSection:
    layers = sum(map(len, widths))
    return TreeSection(TreeShape((4, 4), splits, widths, active), (1,) * layers, (1,) * layers, bytes(2 * layers), 0)


class TestHeader:
    @pytest.mark.parametrize(
        ("contents", "message"),
        [
            (simple(shape=(4,)), "axes=1 must be in"),
            (simple(shape=(4, 0)), "size of an axis=0"),
            (simple(shape=(1 << 30, 1 << 30)), "voxels"),
            (simple(shape=(1 << 41, 1)), "size of an axis=2199023255552"),
            (simple(shape=(2,) * 5), "axes=5"),
            (simple(channel_axis=3, channels=2), "channel axis=4"),
            (simple(channel_axis=0, channels=65), "channels=65"),
            (simple(format=SampleFormat("float32", 0.0, 201)), "exponent=201"),
            (simple(format=SampleFormat("float32", float("nan"), 0)), r"offset=nan must be in \["),
            (simple(residual=ResidualSection(BLOCKS, Quantizer(0, 0))), "mantissa=0"),
            (simple(residual=ResidualSection(BLOCKS, Quantizer(1024, 0))), "mantissa=1024"),
            (simple(residual=ResidualSection(BLOCKS, Quantizer(1, 31))), "exponent=31"),
            (simple(residual=ResidualSection(BLOCKS, Quantizer(1, 0, (0, 40, 0)))), "point=40"),
            (simple(residual=ResidualSection(BLOCKS, QUANTIZER, 1 << 31)), "background="),
            (simple(residual=ResidualSection(replace(BLOCKS, block=(1, 64, 4)), QUANTIZER)), "block=6"),
            (simple(residual=ResidualSection(replace(BLOCKS, tile=(1, 0, 1)), QUANTIZER)), "tile=0"),
            (simple(residual=ResidualSection(replace(BLOCKS, tile=(2, 1, 1)), QUANTIZER)), "channels of a tile=2"),
            (simple(residual=ResidualSection(replace(BLOCKS, tile=(1, 512, 512)), QUANTIZER)), "tiles are larger"),
            (simple(exact=ExactSection("step", 0, 0, 0, SINGLES)), "step=0"),
            (simple(exact=ExactSection("step", 1 << 20, 0, 0, SINGLES)), "step=1048576"),
            (simple(exact=ExactSection("palette", 1, 0, 0, SINGLES)), "palette=0"),
            (simple(exact=ExactSection("palette", 1, 0, 1 << 17, SINGLES)), "palette=131072"),
            (simple(exact=ExactSection("bits", 1, 0, 0, SINGLES)), "bits of integers"),
            (
                simple(
                    exact=ExactSection("step", 1, 0, 0, SINGLES), residual=ResidualSection(BLOCKS, QUANTIZER)
                ), "a residual and an exact",
            ),
            (simple(tree=replace(TREE, spreads=bytes([160] * 4))), "layers are out of range"),
            (simple(tree=replace(TREE, shifts=(3, 41))), "layers are out of range"),
            (simple(tree=replace(TREE, multipliers=(0, 1))), "layers are out of range"),
            (simple(tree=other_tree(((1, 1), (5, 1)), ((3,), (1,)))), "more leaves along an axis"),
            (simple(tree=other_tree(((1, 1), (2, 2)), ((3,), (2,)))), "gives 2 channels of 1"),
            (simple(tree=other_tree(((1, 1), (2, 2)), ((0,), (1,)))), "leaves and layers"),
            (simple(tree=other_tree(((1, 1), (2, 2)), ((3,), (1,)), (False,) * 4)), "no active leaf"),
            (simple(tree=other_tree(((1, 1),) * 9, ((1,),) * 9)), "levels=9"),
            (simple(residual=ResidualSection(SINGLE_TILES, QUANTIZER)), "no room for the lengths of 16 streams"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )  # fmt: skip
    def test_fields(self, contents: Contents, message: str) -> None:
        """Every field has a range, and what is outside is named."""
        with pytest.raises(TincFormatError, match=message):
            tinc.open(pack(contents, checks_tiles=False))

    def test_terabytes(self) -> None:
        """Large volumes of nothing open, cost nothing, and give their corners."""
        shape = (1 << 20, 1 << 20)
        tree = replace(TREE, shape=replace(TREE.shape, extent=shape))
        for contents in (simple(shape=shape), simple(shape=shape, tree=tree, streams=(b"",))):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            file = tinc.open(pack(contents, checks_tiles=False))
            assert file.shape == (1 << 20, 1 << 20)
            assert file[-3:, :2].shape == (3, 2) and file[0, 0] == 0
            assert file.info()["levels"] >= 0 and file.chunks
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10

    def test_terabytes_of_tiles(self) -> None:
        blocks = Blocks((1, 1 << 20, 1 << 20), (1, 32, 32), (1, 1, 1))
        with pytest.raises(TincFormatError, match="no room for the lengths of 1073741824 streams"):
            tinc.open(
                pack(simple(shape=(1 << 20, 1 << 20), residual=ResidualSection(blocks, QUANTIZER)), checks_tiles=False)
            )

    def test_many_weights(self) -> None:
        shape = TreeShape((64, 64, 64), ((1, 1, 1), (64, 64, 16)), ((9,), (1,)))
        tree = TreeSection(shape, (1, 1), (1, 1), bytes(4), 0)
        with pytest.raises(TincFormatError, match="its tree has 655396 weights in 9 bytes"):
            tinc.open(pack(simple(shape=(64, 64, 64), tree=tree, streams=(bytes(9),)), checks_tiles=False))

    @given(st.binary(max_size=60))
    @settings(max_examples=300, deadline=None, derandomize=True)
    def test_any_header(self, body: bytes) -> None:
        content = struct.pack("<4sHHQI", b"TINC", 1, 0, 0, 0) + number(len(body)) + body
        attack(repaired(content))

    def test_long_number(self) -> None:
        with pytest.raises(TincFormatError, match="is no number"):
            tinc.open(repaired(struct.pack("<4sHHQI", b"TINC", 1, 0, 0, 0) + b"\xff" * 20))

    def test_round_trip(self, example: TincFile) -> None:
        """What is read is what was written."""
        contents, _ = unpack(memoryview(example.tobytes()))
        header, streams, flags = taken_apart(example)
        assert assembled(header, streams, flags) == example.tobytes()
        assert pack(replace(contents, streams=tuple(streams)), checks_tiles=bool(flags)) == example.tobytes()


def levels_stream(levels: np.ndarray) -> bytes:
    writer = BitWriter()
    CoefficientCoder(levels.shape[:3], levels.shape[3:]).write(writer, levels)
    return writer.finish()


HUGE = np.random.default_rng(0).integers(-(1 << 37), 1 << 37, (1, 4, 4))
LEVELS = np.random.default_rng(0).integers(-(1 << 24), 1 << 24, (1, 1, 1, 1, 4, 4))
INFINITE = encode_box(np.array([0x7F800000, -0x7F800001], dtype=np.int64)[np.indices((1, 4, 4))[2] % 2])


class TestHostile:
    """Files that are right in every field and every checksum, with contents that no encoder makes."""

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
    @pytest.mark.parametrize("step", [1, 1 << 17])
    def test_integer_steps(self, dtype: str, step: int) -> None:
        exact = ExactSection("step", step, 0, 0, SINGLES)
        assert attack(
            pack(simple(format=SampleFormat(dtype), exact=exact, streams=(encode_box(HUGE),)), checks_tiles=False)
        )

    @pytest.mark.parametrize("step", [1e308, 1e300, 1e30])
    def test_real_steps(self, step: float) -> None:
        exact = ExactSection("step", step, -1e308, 0, SINGLES)
        contents = simple(format=SampleFormat("float32"), exact=exact, streams=(encode_box(HUGE),))
        attack(pack(contents, checks_tiles=False))

    def test_steps_beside_a_tree(self) -> None:
        exact = ExactSection("step", 1e-300, 1e30, 0, SINGLES)
        streams = (bytes(9), encode_box(HUGE))
        contents = simple(format=SampleFormat("float32"), tree=TREE, exact=exact, streams=streams)
        attack(pack(contents, checks_tiles=False))

    @pytest.mark.parametrize(("offset", "exponent"), [(1e308, 0), (-1e39, -200)])
    def test_formats(self, offset: float, exponent: int) -> None:
        attack(pack(simple(format=SampleFormat("float32", offset, exponent)), checks_tiles=False))

    @pytest.mark.parametrize(
        ("dtype", "exponent"),
        [
            ("uint8", -40),
            ("uint8", 0),
            ("uint8", 30),
            ("float32", 30),
        ],
    )
    def test_largest_levels(self, dtype: str, exponent: int) -> None:
        residual = ResidualSection(BLOCKS, Quantizer(1023, exponent, (31, 31, 31)))
        contents = simple(format=SampleFormat(dtype), residual=residual, streams=(levels_stream(LEVELS),))
        attack(pack(contents, checks_tiles=False))

    def test_means_of_infinities(self) -> None:
        exact = ExactSection("bits", 1, 0, 0, SINGLES)
        attack(pack(simple(format=SampleFormat("float32"), exact=exact, streams=(INFINITE,)), checks_tiles=False))

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
    @pytest.mark.parametrize("values", [[-5, 0, 3], [0, 1 << 20, 1 << 30], [7]])
    def test_palettes(self, dtype: str, values: list[int]) -> None:
        exact = ExactSection("palette", 1, 0, len(values), SINGLES)
        ranks = encode_box(np.arange(16).reshape(1, 4, 4) % len(values))
        streams = (encode_palette(np.array(values)), ranks)
        attack(pack(simple(format=SampleFormat(dtype), exact=exact, streams=streams), checks_tiles=False))

    def test_deep_metadata(self) -> None:
        attack(pack(simple(metadata=b"[" * 100_000), checks_tiles=False))

    @pytest.mark.parametrize("metadata", [b"\xff\xfe", b"5", b"[1]", b'"text"', b"{", b'{"a":' + b"9" * 5000 + b"}"])
    def test_metadata(self, metadata: bytes) -> None:
        file = tinc.open(pack(simple(metadata=metadata), checks_tiles=False))
        assert (file.decode() == 0).all()
        with pytest.raises(TincFormatError, match="metadata is damaged"):
            file.info()

    @pytest.mark.parametrize("block", [2, 8, 32])
    def test_largest_tile(self, block: int) -> None:
        """An empty stream of 2**20 voxels."""
        blocks = Blocks((1, 1024, 1024), (1, block, block), (1, 1024 // block, 1024 // block))
        contents = simple(shape=(1024, 1024), residual=ResidualSection(blocks, QUANTIZER), streams=(b"",))
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        assert attack(pack(contents, checks_tiles=False))
        assert time.process_time() - start < 5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10

    @pytest.mark.slow
    def test_tile_of_single_voxels(self) -> None:
        extent = (1, 32, 32, 32, 32)
        residual = ResidualSection(Blocks(extent, (1,) * 5, extent), QUANTIZER)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        attack(pack(simple(shape=extent[1:], residual=residual, streams=(b"",)), checks_tiles=False))
        assert time.process_time() - start < 3
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10

    @pytest.mark.slow
    def test_wide_tree(self) -> None:
        """A file of some kilobytes of padding may have 15 layers of 255, which nothing limits."""
        shape = TreeShape((64, 64, 64), ((1, 1, 1),), ((255,) * 15 + (1,),))
        tree = TreeSection(shape, (1,) * 16, (1,) * 16, bytes(32), 0)
        metadata = b'{"a":"' + b"x" * 4096 + b'"}'
        start = time.process_time()
        attack(pack(simple(shape=(64, 64, 64), tree=tree, metadata=metadata, streams=(b"",)), checks_tiles=False))
        assert time.process_time() - start < 3
