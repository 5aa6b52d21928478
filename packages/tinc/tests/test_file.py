"""Open files: the second decoder, indexing as in NumPy, parts, coarser volumes, partial files, saving."""

import math
import operator
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tinc
from tinc import TincFile, TincFormatError

Wavy = Callable[..., np.ndarray]


class TestSecondDecoder:
    def test_agrees(self, example: TincFile, decoder: ModuleType) -> None:
        """A decoder written from docs/tinc-format.md gives the same samples, coarser ones too."""
        for level in sorted({0, min(example.levels, 2)}):
            expected = example.decode(level=level)
            found = decoder.decode(example.tobytes(), level)
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert found.tobytes() == expected.tobytes(), level

    def test_clips(self, decoder: ModuleType) -> None:
        """A step beyond the largest sample, and a residual beyond both ends of the type."""
        high = np.array([[65535, 65530, 65533], [0, 4, 9]], dtype=np.uint16)
        step = tinc.compress(high, max_error=4)
        edge = np.where(np.indices((9, 9)).sum(0) % 5 < 2, 0, 255).astype(np.uint8)
        for file in (step, tinc.compress(edge, bytes=60, preset="fast")):
            assert np.array_equal(decoder.decode(file.tobytes()), file.decode())

    def test_prefix(self, example: TincFile, decoder: ModuleType) -> None:
        head = decoder.read_header(example.tobytes())
        info = example.info()
        assert (head.dtype, head.channel_axis) == (info["dtype"], info["channel_axis"])
        assert sum(map(len, head.streams)) == example.nbytes_stored - info["header_bytes"]


class TestMachines:
    def test_same_samples(self, examples: dict[str, TincFile], tmp_path: Path) -> None:
        """One thread or two, here and with the kernels of the oldest processors that BLAS and torch know."""
        for name, file in examples.items():
            file.save(tmp_path / f"{name}.tinc")
        program = (
            "import sys, pathlib, zlib, torch, tinc\n"
            "for threads in (1, 2):\n"
            "    torch.set_num_threads(threads)\n"
            "    for path in sorted(pathlib.Path(sys.argv[1]).glob('*.tinc')):\n"
            "        print(path.stem, zlib.crc32(tinc.decompress(path).tobytes()))\n"
        )
        oldest = {"OPENBLAS_CORETYPE": "Prescott", "MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"}
        found = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            capture_output=True, text=True, check=True, env=os.environ | oldest,
        ).stdout.splitlines()  # fmt: skip
        here = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for path in sorted(tmp_path.glob("*.tinc")):
                here.append(f"{path.stem} {zlib.crc32(tinc.decompress(path).tobytes())}")
        assert found == here and len(here) == 2 * len(examples)


KEYS = st.one_of(
    st.integers(-12, 12),
    st.slices(9),
    st.slices(3),
    st.builds(slice, *[st.none() | st.integers(-15, 15)] * 2, st.sampled_from([None, 1, 2, 3, -1, -2, -5])),
    st.just(Ellipsis),
)


class TestGetItem:
    @given(st.sampled_from(["tiles", "channels", "both", "palette", "step-tree", "residual-4"]), st.data())
    @settings(max_examples=150, deadline=None, derandomize=True)
    def test_as_numpy(self, examples: dict[str, TincFile], name: str, data: st.DataObject) -> None:
        """Integers, slices with steps of either sign, ellipses: the values, shapes and errors of NumPy."""
        file = examples[name]
        array = file.decode()
        key: Any = tuple(data.draw(st.lists(KEYS, max_size=file.ndim + 1)))
        if data.draw(st.booleans()) and len(key) == 1:
            key = key[0]
        try:
            expected = array[key]
        except IndexError:
            with pytest.raises(IndexError):
                file[key]
            return
        found = file[key]
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert np.array_equal(found, expected)

    def test_numpy_integers(self, examples: dict[str, TincFile]) -> None:
        file = examples["tiles"]
        assert np.array_equal(file[np.int64(-1), np.uint8(3)], file.decode()[-1, 3])

    @pytest.mark.parametrize("key", [[0, 1], None, "a", 1.5, np.array([True, False])])
    def test_other_keys(self, examples: dict[str, TincFile], key: Any) -> None:
        with pytest.raises((TypeError, IndexError)):
            examples["tiles"][key]

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            (6, "index 6 is not inside axis 0 of size 6"),
            ((0, -13), "index -13 is not inside axis 1 of size 12"),
            ((0, 0, 0, 0), "4 indices for an array of 3 axes"),
            ((..., ...), "one ellipsis only"),
        ],
    )
    def test_errors(self, examples: dict[str, TincFile], key: Any, message: str) -> None:
        with pytest.raises(IndexError, match=message):
            examples["tiles"][key]

    def test_iterates(self, examples: dict[str, TincFile]) -> None:
        """Without __iter__ Python counts up until an IndexError: that must come."""
        file = examples["tiles"]
        assert len(list(file)) == len(file) == 6


@pytest.fixture(scope="module")
def smooth(wavy: Wavy) -> tuple[np.ndarray, TincFile]:
    volume = wavy((8, 16, 24), "uint16", noise=0) * 100
    return volume, tinc.compress(volume, psnr=60, preset="fast")


class TestDecode:
    def test_parts(self, example: TincFile) -> None:
        """A fresh file decodes a region to that part of the whole, bit for bit, at the first levels and the last."""
        rng = np.random.default_rng(0)
        for level in sorted({0, min(example.levels, 1), example.levels}):
            everything = example.decode(level=level)
            for _ in range(3):
                low = [int(rng.integers(0, n)) for n in everything.shape]
                region = tuple(
                    slice(a, int(rng.integers(a, n)) + 1) for a, n in zip(low, everything.shape, strict=True)
                )
                part = TincFile(example.tobytes()).decode(region, level=level)
                assert part.tobytes() == everything[region].tobytes(), (level, region)

    def test_shapes_of_levels(self, example: TincFile) -> None:
        axis = example.info()["channel_axis"]
        for level in range(example.levels + 1):
            expected = [n if i == axis else -(-n // (1 << level)) for i, n in enumerate(example.shape)]
            assert list(example.decode(level=level).shape) == expected

    @pytest.mark.parametrize(
        ("level", "largest"),
        [
            (1, 0.1),
            (2, 0.25),
        ],
    )
    def test_levels_are_near_means(self, smooth: tuple[np.ndarray, TincFile], level: int, largest: float) -> None:
        volume, file = smooth
        assert file.levels >= 2
        step = 1 << level
        means = volume.reshape([part for n in volume.shape for part in (n // step, step)]).mean((1, 3, 5))
        assert np.abs(file.decode(level=level) - means).mean() < largest * volume.std()

    def test_levels_of_exact_files_are_means(self, wavy: Wavy) -> None:
        volume = wavy((5, 7), "float32")
        means = np.array([
            [volume[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].astype(float).mean() for j in range(4)] for i in range(3)
        ])  # fmt: skip
        found = tinc.compress(volume, lossless=True, preset="fast").decode(level=1)
        np.testing.assert_allclose(found, means, rtol=1e-6)

    def test_empty_region(self, example: TincFile) -> None:
        region = tuple(slice(1, 1) if axis == 0 else slice(None) for axis in range(example.ndim))
        part = example.decode(region)
        assert part.shape == (0, *example.shape[1:]) and part.dtype == example.dtype

    def test_out(self, example: TincFile) -> None:
        out = np.empty(example.shape, dtype=example.dtype)
        assert example.decode(out=out) is out
        assert out.tobytes() == example.decode().tobytes()
        backward = np.empty(example.shape, dtype=example.dtype)[::-1]
        assert np.array_equal(example.decode(out=backward), out, equal_nan=example.dtype.kind == "f")

    def test_out_errors(self, examples: dict[str, TincFile]) -> None:
        file = examples["tiles"]
        for out in (np.empty((6, 12, 9), dtype=np.uint8), np.empty(file.shape, dtype=np.uint16)):
            with pytest.raises(ValueError, match=r"out is .*the region is uint8 \(6, 12, 10\)"):
                file.decode(out=out)

    @pytest.mark.parametrize(
        ("region", "message"),
        [
            ((slice(0, 7), slice(None), slice(None)), "0:7 is not inside axis 0 of size 6"),
            ((slice(-1, 2), slice(None), slice(None)), "-1:2 is not inside axis 0"),
            ((slice(3, 2), slice(None), slice(None)), "3:2 is not inside axis 0"),
            ((slice(None), slice(0, 4, 2), slice(None)), "0:4 is not inside axis 1"),
            ((slice(None), slice(None)), "the region has 2 axes, the array 3"),
        ],
    )
    def test_region_errors(self, examples: dict[str, TincFile], region: Any, message: str) -> None:
        with pytest.raises(IndexError, match=message):
            examples["tiles"].decode(region)

    @pytest.mark.parametrize("level", [-1, 30])
    def test_level_errors(self, example: TincFile, level: int) -> None:
        with pytest.raises(ValueError, match=rf"level={level} must be in \[0, {example.levels}\]"):
            example.decode(level=level)

    def test_load(self, example: TincFile) -> None:
        """After it the streams are not read again."""
        file = TincFile(example.tobytes())
        assert file.load() is file
        file._stream = None  # type: ignore[method-assign, assignment]
        assert file.decode().tobytes() == example.decode().tobytes()


class TestDuck:
    def test_array(self, example: TincFile) -> None:
        array = np.asarray(example)
        assert array.tobytes() == example.decode().tobytes() and array.dtype == example.dtype
        assert np.asarray(example, dtype=np.float64).dtype == np.float64
        for name in ("ndim", "size", "nbytes", "shape"):
            assert getattr(example, name) == getattr(array, name), name
        assert len(example) == len(array)
        assert example.nbytes_stored == len(example.tobytes())
        assert example.ratio == example.nbytes / example.nbytes_stored

    def test_no_copy(self, examples: dict[str, TincFile]) -> None:
        with pytest.raises(ValueError, match="without a copy"):
            examples["tiles"].__array__(copy=False)

    def test_chunks(self, example: TincFile) -> None:
        """Boxes of `chunks` cover the array, as dask.array.from_array would cut it."""
        assert all(1 <= chunk <= n for chunk, n in zip(example.chunks, example.shape, strict=True))
        starts = [range(0, n, chunk) for n, chunk in zip(example.shape, example.chunks, strict=True)]
        array = np.empty(example.shape, dtype=example.dtype)
        for start in product(*starts):
            box = tuple(slice(a, a + chunk) for a, chunk in zip(start, example.chunks, strict=True))
            array[box] = example[box]
        assert array.tobytes() == example.decode().tobytes()

    def test_dask(self, examples: dict[str, TincFile]) -> None:
        import dask.array as dask

        file = examples["tiles"]
        lazy = dask.from_array(file, chunks=file.chunks)
        assert np.array_equal(lazy[1:5, ::2].compute(scheduler="sync"), file.decode()[1:5, ::2])

    def test_chunks_are_tiles(self, examples: dict[str, TincFile]) -> None:
        """A chunk is decoded from one stream."""
        file = TincFile(examples["tiles"].tobytes())
        file[tuple(slice(0, chunk) for chunk in file.chunks)]
        assert len(file._tiles) == 1


class TestPartial:
    def test_every_length(self, examples: dict[str, TincFile], wavy: Wavy) -> None:
        """Tiles whose streams are there are right; the others are empty, and nothing fails."""
        file = examples["tiles"]
        content, whole = file.tobytes(), file.decode()
        complete = 0
        for length in range(file.info()["header_bytes"], len(content) + 1, 7):
            with pytest.raises(TincFormatError, match="cut off or damaged") if length < len(content) else nullcontext():
                tinc.open(content[:length])
            part = tinc.open(content[:length], partial=True).decode()
            assert part.shape == whole.shape
            right = int((part == whole).sum())
            assert right >= complete * 0.9
            complete = max(complete, right)
        assert np.array_equal(tinc.open(content, partial=True).decode(), whole)

    def test_first_tile(self, examples: dict[str, TincFile]) -> None:
        file = examples["tiles"]
        end = file._directory.offsets[1]
        part = tinc.open(file.tobytes()[:end], partial=True)
        box = tuple(slice(0, chunk) for chunk in file.chunks)
        assert np.array_equal(part[box], file[box])

    def test_no_header(self, examples: dict[str, TincFile]) -> None:
        content = examples["tiles"].tobytes()
        for length in (0, 3, 10, 20, 30):
            with pytest.raises(TincFormatError):
                tinc.open(content[:length], partial=True)

    def test_lost_tree(self, examples: dict[str, TincFile]) -> None:
        """Without its tree nothing of a file can be decoded, and that is said."""
        file = examples["both"]
        part = tinc.open(file.tobytes()[: file.info()["header_bytes"] + 3], partial=True)
        with pytest.raises(TincFormatError, match="stream 0 is cut off"):
            part.decode()


class TestResample:
    @pytest.mark.parametrize("shape", [(6, 12, 10), (3, 6, 5), (1, 1, 1), (7, 5, 20)])
    def test_shape(self, examples: dict[str, TincFile], shape: tuple[int, ...]) -> None:
        found = examples["mask"].resample(shape)
        assert found.shape == shape and found.dtype == np.float32 and np.isfinite(found).all()

    def test_same_size(self, examples: dict[str, TincFile]) -> None:
        file = examples["tiles"]
        np.testing.assert_allclose(file.resample(file.shape), file.decode(), atol=1e-3)

    def test_channels(self, examples: dict[str, TincFile]) -> None:
        assert examples["channels"].resample((3, 5, 6)).shape == (3, 5, 6, 2)

    def test_smooth(self, smooth: tuple[np.ndarray, TincFile]) -> None:
        volume, file = smooth
        means = volume.reshape(4, 2, 8, 2, 12, 2).mean((1, 3, 5))
        assert np.abs(file.resample((4, 8, 12)) - means).mean() < 0.08 * volume.std()

    @pytest.mark.parametrize("shape", [(6, 12), (0, 1, 1), (6, 12, 10, 1)])
    def test_errors(self, examples: dict[str, TincFile], shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="must give 3 sizes of at least 1"):
            examples["tiles"].resample(shape)

    def test_four_axes(self, examples: dict[str, TincFile]) -> None:
        with pytest.raises(ValueError, match="cannot be resampled"):
            examples["residual-4"].resample((2, 2, 2, 2))


class TestInfo:
    def test_is_json(self, example: TincFile) -> None:
        import json

        info = json.loads(json.dumps(example.info()))
        assert tuple(info["shape"]) == example.shape and info["bytes"] == example.nbytes_stored
        parts = sum(info.get(name, {}).get("bytes", 0) for name in ("tree", "residual", "exact"))
        assert info["header_bytes"] + parts == example.nbytes_stored
        assert info["bits_per_sample"] == pytest.approx(8 * example.nbytes_stored / math.prod(example.shape))

    def test_kinds(self, examples: dict[str, TincFile]) -> None:
        """The examples are what their names say."""
        for name, file in examples.items():
            info = file.info()
            assert ("tree" in info) == any(word in name for word in ("tree", "both", "leaves")), name
            assert ("exact" in info) == any(word in name for word in ("step", "bits", "palette", "constant")) or (
                name == "constant-leaves"
            )
        assert examples["bits"].info()["exact"]["grid"] == "bits"
        assert examples["palette-tree"].info()["exact"]["grid"] == "palette"
        assert examples["mask"]._contents.residual.background == 0  # type: ignore[union-attr]
        leaves = examples["constant-leaves"].info()["tree"]
        assert 0 < leaves["active_leaves"] < leaves["leaves"]
        assert examples["tiles"].info()["residual"]["tiles"] > 1

    def test_metadata(self, examples: dict[str, TincFile]) -> None:
        assert examples["channels"].metadata == examples["channels"].info()["metadata"] == {"unit": "µm"}
        assert examples["tiles"].metadata == {} and "metadata" not in examples["tiles"].info()

    def test_repr(self, examples: dict[str, TincFile]) -> None:
        file = examples["tiles"]
        assert repr(file) == f"TincFile((6, 12, 10), uint8, {file.nbytes_stored} bytes, ratio {file.ratio:.1f})"


class TestSave:
    def test_round_trip(self, example: TincFile, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "a.tinc"
        example.save(path)
        opened = tinc.open(path)
        assert path.read_bytes() == example.tobytes() == opened.tobytes()
        assert opened.decode().tobytes() == example.decode().tobytes()
        assert tinc.decompress(str(path)).tobytes() == example.decode().tobytes()
        assert [each.name for each in path.parent.iterdir()] == ["a.tinc"]

    def test_overwrite(self, examples: dict[str, TincFile], tmp_path: Path) -> None:
        path = tmp_path / "a.tinc"
        examples["tiles"].save(path)
        with pytest.raises(FileExistsError, match="exists"):
            examples["mask"].save(path)
        assert path.read_bytes() == examples["tiles"].tobytes()
        examples["mask"].save(path, overwrite=True)
        assert path.read_bytes() == examples["mask"].tobytes()

    def test_over_itself(self, examples: dict[str, TincFile], tmp_path: Path) -> None:
        """An open file can be written where it is read from."""
        path = tmp_path / "a.tinc"
        examples["tiles"].save(path)
        opened = tinc.open(path)
        opened.save(path, overwrite=True)
        assert np.array_equal(opened.decode(), examples["tiles"].decode())


class TestOpen:
    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_bytes(self, examples: dict[str, TincFile], kind: Callable[[bytes], Any]) -> None:
        assert np.array_equal(tinc.open(kind(examples["tiles"].tobytes())).decode(), examples["tiles"].decode())

    def test_bytes_are_copied(self, examples: dict[str, TincFile]) -> None:
        content = bytearray(examples["tiles"].tobytes())
        file = tinc.open(content)
        content[:] = bytes(len(content))
        file.verify()

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            tinc.open(tmp_path / "none.tinc")

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "a.tinc").touch()
        with pytest.raises(TincFormatError, match=r"a\.tinc is empty"):
            tinc.open(tmp_path / "a.tinc")

    def test_names_the_file(self, examples: dict[str, TincFile], tmp_path: Path) -> None:
        """Of damage that opening and of damage that decoding finds."""
        path = tmp_path / "a.tinc"
        path.write_bytes(b"GIF89a" * 9)
        with pytest.raises(TincFormatError, match=r"a\.tinc: this is no \.tinc file"):
            tinc.open(path)
        content = bytearray(examples["tiles"].tobytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(TincFormatError, match=r"a\.tinc: the checksum of stream \d+ is wrong"):
            tinc.open(path).verify()

    def test_only_what_is_needed(self, examples: dict[str, TincFile]) -> None:
        """A damaged tile does not matter to parts that do not touch it; `verify` finds it."""
        content = bytearray(examples["tiles"].tobytes())
        content[-1] ^= 1
        file = tinc.open(content)
        box = tuple(slice(0, chunk) for chunk in file.chunks)
        assert np.array_equal(file[box], examples["tiles"][box])
        with pytest.raises(TincFormatError, match="is wrong"):
            file.verify()
        with pytest.raises(TincFormatError, match="is wrong"):
            file.decode()


def test_index_protocol() -> None:
    """Whatever is an integer to Python is one to a file."""

    class Two:
        def __index__(self) -> int:
            return 2

    file = tinc.compress(np.arange(40, dtype=np.uint8).reshape(5, 8), lossless=True)
    assert np.array_equal(file[Two()], file.decode()[2]) and operator.index(Two()) == 2
