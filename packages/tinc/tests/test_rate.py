"""Targets are met as promised: sizes never above, PSNR never below, errors never beyond, nothing lost without loss."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinc

Wavy = Callable[..., np.ndarray]
DTYPES = ["uint8", "uint16", "int16", "float32"]
quick = settings(max_examples=12, deadline=None, derandomize=True)


@st.composite
def volumes(draw: st.DrawFn, dtypes: list[str] = DTYPES, most: int = 400) -> np.ndarray:
    """Two to four axes, of noise, waves, steps, sparse or constant values, over the whole type or a part of it."""
    shape = draw(st.lists(st.integers(1, 14), min_size=2, max_size=4).filter(lambda sizes: math.prod(sizes) <= most))
    dtype, seed = draw(st.sampled_from(dtypes)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    kind = draw(st.sampled_from(["noise", "waves", "half", "hot", "few", "constant"]))
    if kind == "noise":
        values = rng.random(shape)
    elif kind == "waves":
        grid = np.meshgrid(*(np.linspace(0, 4, size) for size in shape), indexing="ij")
        values = 0.5 + 0.5 * np.sin(sum(grid))
    elif kind == "half":
        values = rng.random(shape) * (np.indices(shape)[-1] < shape[-1] / 2)
    elif kind == "hot":
        values = np.zeros(shape)
        values.flat[rng.integers(values.size)] = 1
    elif kind == "few":
        values = rng.integers(0, 4, shape) / 3
    else:
        values = np.full(shape, rng.random())
    if dtype == "float32":
        low, high = draw(st.sampled_from([(0, 1), (-1e30, 1e30), (1e-30, 2e-30), (1000, 1000.01), (-3, 7)]))
    else:
        limits = np.iinfo(dtype)
        low, high = draw(st.sampled_from([(limits.min, limits.max), (limits.max - 9, limits.max), (0, 100)]))
    return (low + values * (float(high) - low)).astype(dtype)


def psnr(original: np.ndarray, decoded: np.ndarray) -> float:
    """Over the range of the type; of float32, over that of the values."""
    mse = np.square(original.astype(np.float64) - decoded).mean()
    if original.dtype == np.float32:
        peak = float(original.max()) - float(original.min()) or 1.0
    else:
        peak = 255.0 if original.dtype == np.uint8 else 65535.0
    return math.inf if mse == 0 else 20 * math.log10(peak) - 10 * math.log10(mse)


def compress(array: np.ndarray, **target: Any) -> tinc.TincFile:
    file = tinc.compress(array, preset="fast", **target)
    decoded = file.decode()
    assert decoded.shape == array.shape and decoded.dtype == array.dtype.newbyteorder("=")
    assert np.isfinite(decoded).all()
    return file


class TestLossless:
    @given(volumes(most=2000))
    @quick
    def test_exact(self, array: np.ndarray) -> None:
        assert compress(array, lossless=True).decode().tobytes() == array.tobytes()

    @given(volumes(DTYPES[:3]))
    @quick
    def test_max_error_of_zero(self, array: np.ndarray) -> None:
        assert compress(array, max_error=0.9).decode().tobytes() == array.tobytes()

    @given(st.integers(0, 2**32 - 1))
    @quick
    def test_any_bits(self, seed: int) -> None:
        """float32 of any bits: NaN with their payloads, infinities, subnormals."""
        bits = np.random.default_rng(seed).integers(0, 2**32, (5, 6), dtype=np.uint32)
        array = bits.view(np.float32)
        assert tinc.compress(array, lossless=True, preset="fast").decode().tobytes() == array.tobytes()

    @pytest.mark.parametrize(
        "bits",
        [
            0x7F800000, 0xFF800000, 1, 0x80000001, 0x007FFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x7FC00000, 0xFFC12345,
            0x7FFFFFFF, 0xFFFFFFFF, 0x80000000,
        ],
        ids=lambda bits: f"{bits:#010x}",
    )  # fmt: skip
    def test_special(self, bits: int) -> None:
        array = np.arange(12, dtype=np.float32).reshape(3, 4)
        array.view(np.uint32)[1, 2] = bits
        assert tinc.compress(array, lossless=True, preset="fast").decode().tobytes() == array.tobytes()

    @pytest.mark.parametrize("layers", ["tree", "both"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_with_a_tree(self, wavy: Wavy, dtype: str, layers: str, few_steps: None) -> None:
        array = wavy((6, 18), dtype)
        file = tinc.compress(array, lossless=True, layers=layers)  # type: ignore[arg-type]
        assert "tree" in file.info() and file.decode().tobytes() == array.tobytes()

    def test_is_smaller_than_zlib(self, wavy: Wavy) -> None:
        import zlib

        array = wavy((12, 20, 20), "uint16")
        file = tinc.compress(array, lossless=True, preset="fast")
        assert file.nbytes_stored < 0.8 * len(zlib.compress(array.tobytes(), 9))


class TestMaxError:
    @given(volumes(most=1000), st.floats(1e-6, 0.6))
    @quick
    def test_every_sample(self, array: np.ndarray, share: float) -> None:
        """From a millionth to more than half of the range."""
        reach = float(array.max()) - float(array.min()) or 1.0
        error = share * reach
        decoded = compress(array, max_error=error).decode()
        assert np.abs(decoded.astype(np.float64) - array).max() <= error

    @pytest.mark.parametrize("error", [1, 7, 255, 40000, 65535])
    @pytest.mark.parametrize("dtype", ["uint16", "int16"])
    def test_both_ends(self, dtype: str, error: int) -> None:
        limits = np.iinfo(dtype)
        array = np.array([[limits.min, limits.max, 0], [limits.max - 1, limits.min + 1, 5]], dtype=dtype)
        assert np.abs(compress(array, max_error=error).decode().astype(int) - array).max() <= error

    @pytest.mark.parametrize("error", [65536, 1e6, 1e300])
    def test_larger_than_the_type(self, error: float) -> None:
        compress(np.array([[0, 65535]], dtype=np.uint16), max_error=error)

    def test_larger_than_float32(self) -> None:
        array = np.array([[-3e38, 3e38, 0]], dtype=np.float32)
        assert np.abs(compress(array, max_error=1e37).decode().astype(np.float64) - array).max() <= 1e37

    @pytest.mark.parametrize("dtype", ["uint16", "float32"])
    def test_with_a_tree(self, wavy: Wavy, dtype: str, few_steps: None) -> None:
        array = wavy((6, 18), dtype)
        file = tinc.compress(array, max_error=2, layers="both")
        assert "tree" in file.info()
        assert np.abs(file.decode().astype(np.float64) - array).max() <= 2

    def test_more_error_is_smaller(self, wavy: Wavy) -> None:
        files = [tinc.compress(wavy((12, 20, 20)), max_error=error, preset="fast") for error in (0, 1, 4, 16)]
        sizes = [file.nbytes_stored for file in files]
        assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.4 * sizes[0]


class TestSize:
    @given(volumes(), st.floats(0.3, 12))
    @settings(max_examples=10, deadline=None, derandomize=True)
    def test_never_above(self, array: np.ndarray, bits: float) -> None:
        """Or a ValueError that names what is possible; never a larger file."""
        size = max(int(array.size * bits / 8), 1)
        try:
            with np.errstate(over="ignore"):
                file = tinc.compress(array, bytes=size, preset="fast")
        except ValueError as error:
            assert "out of reach" in str(error) and size < 200
            return
        assert file.nbytes_stored <= size or array.min() == array.max()

    def test_many_bits(self, wavy: Wavy) -> None:
        """10.5 bits a sample of 32."""
        assert tinc.compress(wavy((9, 17), "float32"), bytes=200, preset="fast").nbytes_stored <= 200

    @pytest.mark.parametrize("target", [{"ratio": 8}, {"bytes": 300}, {"bpv": 2.0}])
    @pytest.mark.parametrize("dtype", ["uint8", "float32"])
    def test_is_used(self, wavy: Wavy, dtype: str, target: dict[str, float]) -> None:
        """No more than one percent of the target is left."""
        array = wavy((6, 12, 12), dtype)
        file = compress(array, **target)
        size = {"ratio": array.nbytes / 8, "bytes": 300, "bpv": array.size / 4}[next(iter(target))]
        assert 0.99 * size - 4 <= file.nbytes_stored <= size
        assert psnr(array, file.decode()) > psnr(array, np.full_like(array, array.mean())) + 3

    def test_exact_where_it_fits(self, wavy: Wavy) -> None:
        array = wavy((12, 20, 20))
        exact = tinc.compress(array, lossless=True, preset="fast")
        assert tinc.compress(array, bytes=exact.nbytes_stored, preset="fast").decode().tobytes() == array.tobytes()

    @pytest.mark.parametrize("layers", ["tree", "both"])
    def test_layers(self, wavy: Wavy, layers: str, few_steps: None) -> None:
        file = tinc.compress(wavy((4, 17, 6)), bytes=300, layers=layers)  # type: ignore[arg-type]
        assert file.nbytes_stored <= 300
        assert ("tree" in file.info(), "residual" in file.info()) == (layers != "residual", layers != "tree")

    @pytest.mark.parametrize("target", [{"ratio": 30}, {"bytes": 1}])
    def test_out_of_reach(self, wavy: Wavy, target: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=r"out of reach.* \d+ bytes, a ratio of \d+"):
            tinc.compress(wavy((10, 10)), preset="fast", **target)  # type: ignore[arg-type]

    @pytest.mark.parametrize("target", [{"ratio": 1000}, {"bpv": 0.01}])
    def test_less_than_a_byte(self, wavy: Wavy, target: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="out of reach"):
            tinc.compress(wavy((10, 10)), preset="fast", **target)  # type: ignore[arg-type]

    def test_constant_is_small(self) -> None:
        """Whatever the target, a constant takes some dozens of bytes and is exact."""
        for dtype in DTYPES:
            array = np.full((20, 30, 40), 77, dtype=dtype)
            for target in ({"ratio": 100}, {"psnr": 30}, {"lossless": True}, {"bpv": 0.1}):
                file = compress(array, **target)
                assert file.nbytes_stored < 120 and np.array_equal(file.decode(), array)

    def test_whole_range_of_float32(self) -> None:
        array = (np.random.default_rng(0).uniform(-1, 1, (16, 16)) * 3.4e38).astype(np.float32)
        compress(array, ratio=10)


class TestPsnr:
    @given(volumes(), st.floats(10, 45))
    @settings(max_examples=8, deadline=None, derandomize=True)
    def test_never_below(self, array: np.ndarray, target: float) -> None:
        assert psnr(array, compress(array, psnr=target).decode()) >= target

    @pytest.mark.parametrize("target", [30, 50, 57, 65])
    def test_noise(self, target: float) -> None:
        """Bytes of noise, where rounding to integers adds as much as the levels."""
        array = np.random.default_rng(0).integers(0, 256, (10, 10)).astype(np.uint8)
        assert psnr(array, compress(array, psnr=target).decode()) >= target

    @pytest.mark.parametrize("dtype", ["uint16", "float32"])
    def test_is_not_exceeded_much(self, wavy: Wavy, dtype: str) -> None:
        """0.2 dB above what was asked for is a waste."""
        array = wavy((6, 12, 12), dtype)
        target = 40 if dtype in ("uint8", "float32") else 84
        assert target - 0.3 < psnr(array, compress(array, psnr=target).decode()) < target + 0.3

    def test_more_is_larger(self, wavy: Wavy) -> None:
        sizes = [compress(wavy((5, 11, 9)), psnr=target).nbytes_stored for target in (25, 40)]
        assert sizes == sorted(sizes)

    @pytest.mark.parametrize("layers", ["tree", "both"])
    def test_with_a_tree(self, wavy: Wavy, layers: str, few_steps: None) -> None:
        array = wavy((4, 17, 6))
        file = tinc.compress(array, psnr=15, layers=layers)  # type: ignore[arg-type]
        assert "tree" in file.info() and psnr(array, file.decode()) >= 15

    def test_beyond_the_levels(self) -> None:
        """Integers reach any PSNR."""
        array = np.random.default_rng(0).integers(0, 256, (10, 10)).astype(np.uint8)
        assert psnr(array, compress(array, psnr=200).decode()) >= 200

    def test_absurd(self) -> None:
        array = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
        assert np.array_equal(compress(array, psnr=4000).decode(), array)


class TestMask:
    def test_background_is_exact(self, wavy: Wavy) -> None:
        """Zeros around an object stay zeros, at any rate."""
        array = wavy((8, 16, 16), "uint16", noise=20)
        outside = np.square(np.indices(array.shape) - np.array([4, 8, 8]).reshape(3, 1, 1, 1)).sum(0) > 40
        array[outside] = 0
        file = compress(array, ratio=12)
        assert file._contents.residual.background == 0  # type: ignore[union-attr]
        assert (file.decode()[outside] == 0).all()

    @pytest.mark.parametrize("where", ["first-half", "one-hot", "frame"])
    def test_backgrounds(self, where: str) -> None:
        array = np.zeros((16, 20), dtype=np.uint8)
        if where == "first-half":
            array[:, 10:] = np.random.default_rng(0).integers(100, 200, (16, 10))
        elif where == "one-hot":
            array[7, 3] = 255
        else:
            array[4:-4, 4:-4] = 100 + np.arange(12)
        file = compress(array, bytes=150)
        assert file.nbytes_stored <= 150 and psnr(array, file.decode()) > 20
