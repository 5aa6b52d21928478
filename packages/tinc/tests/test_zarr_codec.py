"""The codec of Zarr format 3: whole and partial reads, shards, fill values, wrong arrays."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from tinc.errors import TincFormatError
from tinc.file import TincFile
from tinc.zarr_codec import TincCodec

SHAPE, CHUNKS = (11, 9, 10), (4, 9, 6)
VALUES = (np.arange(990).reshape(SHAPE) * 31 % 977).astype(np.uint16)


def create(store: Any, values: np.ndarray = VALUES, codec: TincCodec | None = None, **options: Any) -> zarr.Array:
    options = {"chunks": CHUNKS, "compressors": None, "serializer": codec or TincCodec()} | options
    array = zarr.create_array(store, shape=values.shape, dtype=values.dtype, **options)
    array[:] = values
    return array


@pytest.fixture(scope="module")
def array() -> zarr.Array:
    return create(zarr.storage.MemoryStore())


@pytest.fixture(scope="module")
def sharded() -> zarr.Array:
    return create(zarr.storage.MemoryStore(), chunks=(4, 9, 5), shards=(8, 9, 10))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Voxels of each call of `TincFile.decode`."""
    counts: list[int] = []
    decode = TincFile.decode

    def count(self: TincFile, *args: Any, **options: Any) -> np.ndarray:
        found = decode(self, *args, **options)
        counts.append(found.size)
        return found

    monkeypatch.setattr(TincFile, "decode", count)
    return counts


class TestRead:
    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
    def test_round_trip(self, dtype: str) -> None:
        values = VALUES.astype(dtype)
        found = create(zarr.storage.MemoryStore(), values)
        assert found[:].dtype == dtype and np.array_equal(found[:], values)

    @pytest.mark.parametrize(
        ("shape", "chunks"), [((7,), (4,)), ((1,), (1,)), ((1, 2, 5, 6, 7), (1, 1, 4, 4, 4)), ((3, 1), (2, 1))]
    )
    def test_shapes(self, shape: tuple[int, ...], chunks: tuple[int, ...]) -> None:
        values = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        found = create(zarr.storage.MemoryStore(), values, chunks=chunks)
        assert np.array_equal(found[:], values)
        assert np.array_equal(found[..., -1], values[..., -1])
        if len(shape) == 5:
            assert np.array_equal(found[0, 1, 2:5, ::2, 3], values[0, 1, 2:5, ::2, 3])

    def test_channels(self) -> None:
        values = np.stack([VALUES[0], VALUES[1], VALUES[2]], axis=-1)
        found = create(zarr.storage.MemoryStore(), values, TincCodec(channel_axis=2), chunks=(4, 4, 3))
        assert np.array_equal(found[2:7, 3:, 1], values[2:7, 3:, 1])

    def test_lossy(self) -> None:
        """A part is the same part of the whole, to the bit."""
        rng = np.random.default_rng(0)
        values = (np.add.outer(np.arange(16.0), np.arange(20.0)) * 90 + rng.normal(0, 50, (9, 16, 20))).astype("int16")
        store = zarr.storage.MemoryStore()
        found = create(store, values, TincCodec(ratio=6), chunks=(9, 16, 10))
        whole = found[:]
        assert 0 < np.abs(whole.astype(float) - values).mean() < 40
        assert sum(len(value) for key, value in store._store_dict.items() if "c/" in key) <= values.nbytes / 6
        assert np.array_equal(found[2:5, 7, 3:15], whole[2:5, 7, 3:15])

    @settings(max_examples=20, deadline=None)
    @given(st.data())
    def test_basic_indices(self, array: zarr.Array, sharded: zarr.Array, data: st.DataObject) -> None:
        key = data.draw(_basic_keys())
        for source in (array, sharded):
            assert np.array_equal(source[key], VALUES[key])

    @settings(max_examples=4, deadline=None)
    @given(st.data())
    def test_other_indices(self, array: zarr.Array, sharded: zarr.Array, data: st.DataObject) -> None:
        """Orthogonal, by coordinates, by a mask."""
        lists = [data.draw(st.lists(st.integers(-n, n - 1), min_size=1, max_size=5)) for n in SHAPE]
        mask = np.array(data.draw(st.lists(st.booleans(), min_size=9, max_size=9)))
        points = data.draw(st.lists(st.tuples(*(st.integers(0, n - 1) for n in SHAPE)), min_size=1, max_size=6))
        coordinates = tuple(np.array(points).T)
        for source in (array, sharded):
            expected = VALUES[np.ix_(lists[0], np.flatnonzero(mask), lists[2])]
            assert np.array_equal(source.oindex[lists[0], mask, lists[2]], expected)
            assert np.array_equal(source.oindex[lists[0], :, -1], VALUES[lists[0]][:, :, -1])
            assert np.array_equal(source.vindex[coordinates], VALUES[coordinates])
            chosen = len(points) == VALUES % 7
            assert np.array_equal(source.get_mask_selection(chosen), VALUES[chosen])

    def test_parts_alone(self, array: zarr.Array, sharded: zarr.Array, decoded: list[int]) -> None:
        """A part decodes its own voxels in the chunks that it touches, and no others."""
        array[1:3, 2, 1:4]
        assert decoded == [2 * 1 * 3]
        decoded.clear()
        array[3:5, 0:2, 5:7]
        assert sorted(decoded) == [2, 2, 2, 2]
        decoded.clear()
        array[0, 0, 0]
        assert decoded == [1]
        decoded.clear()
        sharded[1, 2, 4:7]
        assert sorted(decoded) == [1, 2]  # of two chunks in one shard
        decoded.clear()
        # a codec after ours would need whole chunks
        wrapped = create(zarr.storage.MemoryStore(), compressors=zarr.codecs.ZstdCodec())
        decoded.clear()
        assert wrapped[0, 0, 0] == VALUES[0, 0, 0]
        assert decoded == [np.prod(CHUNKS)]

    def test_fill_value(self) -> None:
        """What was never written, and what equals the fill value, takes no space."""
        store = zarr.storage.MemoryStore()
        found = zarr.create_array(
            store, shape=SHAPE, chunks=CHUNKS, dtype="int16", serializer=TincCodec(), compressors=None, fill_value=-7
        )
        assert (found[:] == -7).all() and (found[2, 3:5] == -7).all()
        found[:4] = np.full((4, 9, 10), -7, dtype="int16")
        assert list(store._store_dict) == ["zarr.json"]
        found[1, 1, 1] = 5
        assert found[1, 1, 1] == 5 and (found[0] == -7).all()

    def test_missing_values(self) -> None:
        """NaN as fill value, which pads the chunks at the edge, with a lossy codec."""
        values = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)
        for codec in (TincCodec(max_error=0.01), TincCodec(ratio=4)):
            found = create(zarr.storage.MemoryStore(), values, codec, chunks=(4, 4), fill_value=np.nan)
            assert np.isfinite(found[:]).all()
            assert np.array_equal(found[4:, 4:], values[4:, 4:])

    def test_updates(self) -> None:
        """Without loss, parts of chunks can be written over and over."""
        found, values = create(zarr.storage.MemoryStore()), VALUES.copy()
        for key in [(slice(2, 6), 3, slice(None)), (0, 0, 0), (slice(None, None, 3), slice(1, 4), slice(5, 9, 2))]:
            found[key] = values[key] = values[key] + 1
        assert np.array_equal(found[:], values)

    def test_big_endian_and_order(self) -> None:
        values = VALUES.astype(">u2")[::-1, :, ::-1]
        found = create(zarr.storage.MemoryStore(), values)
        assert np.array_equal(found[:], values)
        fortran = create(zarr.storage.MemoryStore(), config={"order": "F"})
        assert np.array_equal(fortran[1:5, :, 2], VALUES[1:5, :, 2])

    def test_sharded_updates(self) -> None:
        found, values = create(zarr.storage.MemoryStore(), chunks=(4, 9, 5), shards=(8, 9, 10)), VALUES.copy()
        found[3:6, 1, ::2] = values[3:6, 1, ::2] = 4
        assert np.array_equal(found[:], values)


class TestTincCodec:
    def test_metadata(self, tmp_path: Path) -> None:
        create(str(tmp_path / "a.zarr"), codec=TincCodec(max_error=2, channel_axis=0))
        codecs = json.loads((tmp_path / "a.zarr/zarr.json").read_text())["codecs"]
        assert codecs == [{"name": "tinc", "configuration": {"max_error": 2, "channel_axis": 0}}]
        codec = zarr.open_array(str(tmp_path / "a.zarr")).serializer
        assert codec == TincCodec(max_error=2, channel_axis=0)
        assert TincCodec.from_dict({"name": "tinc"}) == TincCodec(lossless=True)
        assert pickle.loads(pickle.dumps(codec)) == codec and len({codec, TincCodec()}) == 2

    def test_parallel_chunks(self, tmp_path: Path) -> None:
        """Zarr encodes and decodes many chunks at once, in threads."""
        values = np.tile(VALUES, (1, 1, 4))
        found = create(str(tmp_path / "a.zarr"), values, chunks=(6, 5, 5))
        assert np.array_equal(found[:], values)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"dtype": "float64"}, TypeError, "dtype=float64: tinc takes uint8, uint16, int16, float32; convert"),
            ({"dtype": "bool"}, TypeError, "dtype=bool"),
            ({"dtype": "complex64"}, TypeError, "dtype=complex64"),
            ({"shape": (4,) * 5, "chunks": (2,) * 5}, ValueError, r"\(2, 2, 2, 2, 2\) have more than 4 axes"),
            ({"serializer": TincCodec(channel_axis=2)}, ValueError, r"channel_axis=2 must be in \[-2, 2\)"),
            ({"serializer": TincCodec(channel_axis=0), "shape": (99, 4), "chunks": (99, 4)}, ValueError, "99 channels"),
            ({"dtype": "float64", "shards": (4, 4)}, TypeError, "dtype=float64"),
        ],
    )
    def test_creation_errors(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        store = zarr.storage.MemoryStore()
        given_options = {"shape": (4, 4), "chunks": (2, 2), "dtype": "uint8", "serializer": TincCodec()} | options
        with pytest.raises(error, match=message):
            zarr.create_array(store, compressors=None, **given_options)
        assert not store._store_dict

    def test_shards_of_many_axes(self) -> None:
        """Zarr shows a codec the chunks within shards not before it writes."""
        found = zarr.create_array(
            zarr.storage.MemoryStore(), shape=(4,) * 5, chunks=(2,) * 5, shards=(4,) * 5, dtype="uint8",
            serializer=TincCodec(), compressors=None,
        )  # fmt: skip
        with pytest.raises(ValueError, match="more than 4 axes"):
            found[:] = 1

    def test_configuration_errors(self) -> None:
        with pytest.raises(ValueError, match="name='zfp' must be 'tinc'"):
            TincCodec.from_dict({"name": "zfp"})
        with pytest.raises(ValueError, match="the tinc codec has no rate, speed; update it, or correct"):
            TincCodec.from_dict({"name": "tinc", "configuration": {"speed": 1, "rate": 2}})
        for configuration in ([], "", 0, False):
            with pytest.raises(ValueError, match=r"configuration=.* must be an object"):
                TincCodec.from_dict({"name": "tinc", "configuration": configuration})
        with pytest.raises(ValueError, match=r"ratio=0\.5 must be above 1"):
            TincCodec(ratio=0.5)

    def test_damaged_chunk(self, tmp_path: Path) -> None:
        """The chunk is named; others can be read."""
        found = create(str(tmp_path / "a.zarr"))
        path = tmp_path / "a.zarr/c/0/0/1"
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(TincFormatError, match=r"chunk .*c/0/0/1: the file has \d+ bytes and says"):
            found[:]
        assert np.array_equal(found[4:], VALUES[4:])
        (tmp_path / "a.zarr/c/0/0/1").write_bytes(TincCodec().encode_chunk(VALUES[:2, :2, :2]))
        with pytest.raises(TincFormatError, match=r"c/0/0/1: the chunk is uint16 \(2, 2, 2\); the array's chunks are"):
            found[0]


def _basic_keys() -> st.SearchStrategy[tuple[Any, ...]]:
    """Indices as Zarr takes them: integers, slices that step forward, an ellipsis."""

    def axis(size: int) -> st.SearchStrategy[Any]:
        ends = st.none() | st.integers(-size - 2, size + 2)
        steps = st.none() | st.integers(1, size + 2)
        return st.integers(-size, size - 1) | st.builds(slice, ends, ends, steps)

    whole = st.tuples(*map(axis, SHAPE))
    return whole | whole.map(lambda key: key[:2]) | whole.map(lambda key: (..., key[2]))
