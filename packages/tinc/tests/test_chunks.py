"""Chunks as files, directly and through the numcodecs codec."""

import dataclasses
import math
import pickle
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinc
from tinc.chunks import MAX_RATIO, MIN_CHUNK_BYTES, ChunkOptions, TincChunks
from tinc.errors import TincFormatError

DTYPES = ["uint8", "uint16", "int16", "float32"]


def noise(shape: tuple[int, ...], dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


class TestChunkOptions:
    def test_default_is_lossless(self) -> None:
        assert ChunkOptions().lossless and ChunkOptions() == ChunkOptions(lossless=True)
        assert ChunkOptions().as_json() == {"lossless": True}
        assert ChunkOptions(ratio=16, seed=3).as_json() == {"ratio": 16, "seed": 3}

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 1), (1, 3, 1), (2, 1, 3, 2), (1, 2, 1, 3, 2, 2), (1,) * 6])
    def test_shapes(self, dtype: str, shape: tuple[int, ...]) -> None:
        chunk = noise(shape, dtype)
        content = ChunkOptions().encode_chunk(chunk)
        file = ChunkOptions().open_chunk(content, shape, chunk.dtype)
        assert 2 <= file.ndim <= 4
        assert np.array_equal(file.decode().reshape(shape), chunk)

    def test_channels(self) -> None:
        """The axis of channels is kept when axes of length 1 are removed or added."""
        for shape, axis, expected, place in [
            ((3, 4, 5), 0, (3, 4, 5), 0), ((4, 3), -1, (1, 4, 3), 2), ((3,), 0, (1, 1, 3), 2),
            ((1, 1, 2, 3, 4, 5), 2, (1, 2, 3, 4, 5), 1), ((1, 2, 1, 3, 4, 5), 0, (1, 2, 1, 3, 4), None),
        ]:  # fmt: skip
            options = ChunkOptions(channel_axis=axis)
            if place is None:
                assert options.arrange(shape).shape == (1, 2, 3, 4, 5)
                continue
            chunk = noise(shape)
            file = options.open_chunk(options.encode_chunk(chunk), shape, chunk.dtype)
            assert file.shape == expected and file.info()["channel_axis"] == place
            assert np.array_equal(file.decode().reshape(shape), chunk)

    @pytest.mark.parametrize("options", [{"ratio": MAX_RATIO}, {"bpv": 0.001}, {"ratio": 500.0}])
    @pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7,), (12, 10, 9)])
    def test_sizes_out_of_reach(self, options: dict[str, float], shape: tuple[int, ...]) -> None:
        """Targets are at least 128 bytes, so that tiny chunks can be written at any ratio."""
        content = ChunkOptions(**options).encode_chunk(noise(shape, "uint16"))
        assert len(content) <= MIN_CHUNK_BYTES

    def test_sizes(self) -> None:
        chunk = noise((8, 12, 12), "uint16")
        assert len(ChunkOptions(ratio=8).encode_chunk(chunk)) <= chunk.nbytes / 8
        assert len(ChunkOptions(bpv=2).encode_chunk(chunk)) <= chunk.nbytes / 8
        # the target of a padded chunk refers to the part within the array
        assert len(ChunkOptions(ratio=8).encode_chunk(chunk, counted=chunk.size // 2)) <= chunk.nbytes / 16

    @pytest.mark.parametrize("shape", [(6, 8), (3, 50)])
    def test_all_sizes(self, shape: tuple[int, ...]) -> None:
        """The search finds a file of any size above the minimum for a small chunk."""
        chunk = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        for size in (80, 128, 160):
            options = ChunkOptions(ratio=chunk.nbytes / size)
            assert len(options.encode_chunk(chunk)) <= max(size, MIN_CHUNK_BYTES)

    def test_quality_out_of_reach(self) -> None:
        """A PSNR that the lossy layers cannot reach makes the chunk lossless, and `info` shows it."""
        chunk = noise((4, 6, 6))
        file = tinc.open(ChunkOptions(psnr=200).encode_chunk(chunk))
        assert "exact" in file.info() and np.array_equal(file.decode(), chunk)
        lossy = tinc.open(ChunkOptions(psnr=40).encode_chunk(chunk))
        assert "exact" not in lossy.info()
        error = np.square(lossy.decode().astype(float) - chunk).mean()
        assert 10 * math.log10(255**2 / error) >= 40

    @pytest.mark.parametrize("target", [{"ratio": 8}, {"psnr": 40}, {"max_error": 0.5}, {}])
    def test_not_finite(self, target: dict[str, Any]) -> None:
        chunk = noise((6, 8), "float32")
        chunk[0, :3] = np.nan, np.inf, -np.inf
        kept = ChunkOptions(**target)
        assert np.array_equal(tinc.open(kept.encode_chunk(chunk)).decode(), chunk, equal_nan=True)
        filled = tinc.open(dataclasses.replace(kept, nan="fill").encode_chunk(chunk)).decode()
        assert np.isfinite(filled).all() == bool(target)
        if target:
            with pytest.raises(ValueError, match="not finite"):
                dataclasses.replace(kept, nan="raise").encode_chunk(chunk)

    def test_max_error(self) -> None:
        chunk = noise((6, 8, 8), "int16") - 100
        result = tinc.open(ChunkOptions(max_error=3).encode_chunk(chunk.astype("int16"))).decode()
        assert 0 < np.abs(result.astype(int) - chunk).max() <= 3

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"ratio": 1}, r"ratio=1 must be above 1 and at most 10000"),
            ({"ratio": 20_000}, r"ratio=20000 must be above 1 and at most 10000"),
            ({"ratio": "8"}, r"ratio='8' must be above 1"),
            ({"bpv": 0}, r"bpv=0 must be above 0 and at most 32"),
            ({"psnr": math.nan}, r"psnr=nan must be above 0"),
            ({"max_error": -0.5}, r"max_error=-0.5 must be at least 0"),
            ({"max_error": math.inf}, r"max_error=inf must be at least 0"),
            ({"ratio": 8, "psnr": 40}, r"give one target of .*; got ratio, psnr"),
            ({"ratio": 8, "lossless": True}, r"got ratio, lossless"),
            ({"preset": "slow"}, r"preset='slow' must be one of 'fast', 'balanced', 'best'"),
            ({"layers": 3}, r"layers=3 must be one of 'auto'"),
            ({"channel_axis": 0.5}, r"channel_axis=0.5 must be an integer or None"),
            ({"channel_axis": [0]}, r"channel_axis=\[0\] must be an integer or None"),
            ({"channel_axis": True}, r"channel_axis=True must be an integer or None"),
            ({"nan": "zero"}, r"nan='zero' must be one of 'exact', 'fill', 'raise'"),
        ],
    )
    def test_errors(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ChunkOptions(**options)

    def test_chunk_errors(self) -> None:
        with pytest.raises(TypeError, match=r"dtype=float64 must be one of uint8, uint16, int16, float32"):
            ChunkOptions().encode_chunk(np.zeros((2, 2)))
        with pytest.raises(ValueError, match=r"\(2, 2, 2, 2, 2\) have more than 4 axes longer than 1"):
            ChunkOptions().encode_chunk(noise((2,) * 5))
        with pytest.raises(ValueError, match=r"channel_axis=3 must be in \[-3, 3\)"):
            ChunkOptions(channel_axis=3).encode_chunk(noise((2, 2, 2)))
        with pytest.raises(ValueError, match="65 channels; at most 64"):
            ChunkOptions(channel_axis=0).encode_chunk(noise((65, 2, 2)))
        with pytest.raises(ValueError, match="empty"):
            ChunkOptions().encode_chunk(noise((0, 2)))
        content = ChunkOptions().encode_chunk(noise((4, 4)))
        with pytest.raises(TincFormatError, match=r"the chunk is uint8 \(4, 4\); the array's chunks are int16"):
            ChunkOptions().open_chunk(content, (4, 4), np.dtype("int16"))
        with pytest.raises(TincFormatError, match=r"the array's chunks are uint8 \(2, 8\)"):
            ChunkOptions().open_chunk(content, (2, 8), np.dtype("uint8"))


class TestTincChunks:
    def test_config(self) -> None:
        codec = TincChunks(ratio=16, channel_axis=1)
        config = codec.get_config()
        assert config == {"id": "tinc", "ratio": 16, "channel_axis": 1}
        # the entry point finds the codec by its id
        result = numcodecs.get_codec(config)
        assert type(result) is TincChunks and result == codec and result != TincChunks(ratio=17)
        assert pickle.loads(pickle.dumps(codec)) == codec
        assert repr(codec).startswith("TincChunks(ratio=16, ")
        with pytest.raises(TypeError, match="unexpected keyword"):
            numcodecs.get_codec({"id": "tinc", "rate": 3})

    @settings(max_examples=30, deadline=None)
    @given(st.data())
    def test_round_trip(self, data: st.DataObject) -> None:
        """The decoded array has the bytes of the encoded one in the same order."""
        dtype = data.draw(st.sampled_from(["u1", "<u2", ">u2", "<i2", ">i2", "<f4", ">f4"]))
        chunk = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=4, max_side=5)))
        if data.draw(st.booleans()):
            chunk = np.asfortranarray(chunk)
        codec = TincChunks()
        decoded = codec.decode(codec.encode(chunk))
        assert decoded.dtype == chunk.dtype
        assert decoded.tobytes() == chunk.tobytes(order="A")
        if chunk.flags.c_contiguous and chunk.ndim > 1:
            assert decoded.shape == chunk.shape
        out = np.empty_like(chunk)
        assert codec.decode(codec.encode(chunk), out=out) is not None
        assert out.tobytes() == chunk.tobytes()

    def test_buffers(self) -> None:
        codec, content = TincChunks(), bytes(range(100))
        for buffer in (content, bytearray(content), memoryview(content)):
            assert codec.decode(memoryview(codec.encode(buffer))).tobytes() == content
        out = bytearray(100)
        codec.decode(codec.encode(content), out=out)
        assert out == content
        with pytest.raises(TypeError, match="buf is of type bytes; a lossy codec needs an array"):
            TincChunks(ratio=4).encode(content)
        with pytest.raises(ValueError, match="buf is not contiguous"):
            codec.encode(noise((4, 4))[:, ::2])
        with pytest.raises(TypeError, match="dtype=float64"):
            codec.encode(np.zeros((2, 2)))
        with pytest.raises(ValueError, match=r"the chunk is uint8 \(4, 4\), which does not fit"):
            codec.decode(codec.encode(noise((4, 4))), out=np.empty((3, 4), dtype=np.uint8))

    def test_damage(self) -> None:
        codec = TincChunks()
        content = codec.encode(noise((5, 6)))
        for length in range(len(content)):
            with pytest.raises(TincFormatError):
                codec.decode(content[:length])
        for bit in range(8 * len(content)):
            broken = bytearray(content)
            broken[bit // 8] ^= 1 << bit % 8
            with pytest.raises(TincFormatError):
                codec.decode(broken)

    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("dtype", ["<u2", ">u2", ">i2", "u1", ">f4"])
    def test_zarr_v2(self, order: Any, dtype: str) -> None:
        """The codec is a compressor of an array of format 2 whose chunks exceed its edge."""
        values, store = noise((5, 6, 7), dtype), zarr.storage.MemoryStore()
        options: dict[str, Any] = {"zarr_format": 2, "order": order, "compressors": TincChunks()}
        array = zarr.create_array(store, shape=values.shape, chunks=(4, 5, 4), dtype=dtype, **options)
        array[:] = values
        again = zarr.open_array(store, mode="r")
        assert again.compressors == (TincChunks(),)
        assert np.array_equal(again[:], values)
        assert np.array_equal(again[3:5, ::3, -1], values[3:5, ::3, -1])
