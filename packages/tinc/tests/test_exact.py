"""Grids of allowed error, palettes, bits of floating-point numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinc.errors import TincFormatError
from tinc.exact import (
    BitsGrid,
    PaletteGrid,
    StepGrid,
    choose_grid,
    decode_box,
    decode_palette,
    encode_box,
    encode_palette,
)

floats = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=5), elements=st.floats(width=32, allow_nan=False)
)  # fmt: skip


class TestStepGrid:
    @given(st.sampled_from(["uint8", "uint16", "int16"]), st.integers(0, 70000), st.integers(0, 2**32 - 1))
    @settings(max_examples=80, deadline=None, derandomize=True)
    def test_integers(self, dtype: str, error: int, seed: int) -> None:
        limits = np.iinfo(dtype)
        samples = np.random.default_rng(seed).integers(limits.min, limits.max + 1, 200).astype(dtype)
        samples[:2] = limits.min, limits.max
        grid = StepGrid(dtype, 2 * error + 1)
        back = grid.samples(grid.numbers(samples))
        assert back.dtype == samples.dtype
        assert np.abs(back.astype(int) - samples).max() <= error

    @given(floats.filter(lambda item: np.isfinite(item).all()), st.floats(1e-30, 1e30))
    @settings(max_examples=80, deadline=None, derandomize=True)
    def test_reals(self, samples: np.ndarray, error: float) -> None:
        """The chosen grid keeps the bound."""
        grid = choose_grid(samples, error)
        with np.errstate(over="ignore"):
            back = grid.samples(grid.numbers(samples)).astype(np.float64)
        assert np.abs(back - samples).max() <= error


class TestPaletteGrid:
    def test_round_trip(self) -> None:
        values = np.array([-32768, -5, 0, 3, 32767])
        grid = PaletteGrid("int16", values)
        samples = values[np.random.default_rng(0).integers(0, 5, (3, 4))].astype(np.int16)
        assert np.array_equal(grid.samples(grid.numbers(samples)), samples)

    def test_what_is_not_there(self) -> None:
        """A value outside of the palette becomes the next value above, or the last one."""
        grid = PaletteGrid("uint8", np.array([10, 20]))
        assert grid.numbers(np.array([0, 10, 11, 20, 255], dtype=np.uint8)).tolist() == [0, 0, 1, 1, 1]

    @pytest.mark.parametrize("number", [-1, 2])
    def test_damaged(self, number: int) -> None:
        with pytest.raises(TincFormatError, match="refers to values that its palette lacks"):
            PaletteGrid("uint8", np.array([10, 20])).samples(np.array([number]))

    @given(st.sets(st.integers(-32768, 65535), min_size=1, max_size=300))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def test_palette(self, values: set[int]) -> None:
        rising = np.array(sorted(values))
        assert np.array_equal(decode_palette(encode_palette(rising), len(rising)), rising)

    def test_damaged_palette(self) -> None:
        with pytest.raises(TincFormatError, match="palette is damaged"):
            decode_palette(encode_palette(np.array([5, 4, 9])), 3)


SPECIAL = [
    0x80000000,
    0,
    1,
    0x80000001,
    0x7F800000,
    0xFF800000,
    0x7FC00000,
    0xFFC00001,
    0x7F7FFFFF,
    0xFF7FFFFF,
    0x3F800000,
]


class TestBitsGrid:
    @given(st.integers(0, 2**32 - 1))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def test_round_trip(self, seed: int) -> None:
        bits = np.random.default_rng(seed).integers(0, 2**32, 500, dtype=np.uint32)
        grid = BitsGrid()
        assert np.array_equal(grid.samples(grid.numbers(bits.view(np.float32))).view(np.uint32), bits)

    @pytest.mark.parametrize("bits", SPECIAL, ids=lambda bits: f"{bits:#x}")
    def test_special(self, bits: int) -> None:
        """Special values are -0, 0, subnormals, infinities, quiet NaNs and the largest."""
        value = np.array([bits], dtype=np.uint32)
        grid = BitsGrid()
        assert grid.samples(grid.numbers(value.view(np.float32))).view(np.uint32).tolist() == [bits]

    def test_order(self) -> None:
        """Numbers increase with values, and neighbours differ by 1."""
        values = np.array([-np.inf, -1, -1e-45, 0, 1e-45, 1, np.inf], dtype=np.float32)
        numbers = BitsGrid().numbers(values)
        assert (np.diff(numbers) > 0).all()
        ahead = np.nextafter(values[1:-1], np.float32(np.inf))
        apart = BitsGrid().numbers(ahead) - numbers[1:-1]
        assert ((apart == 1) | (apart == 2)).all()


class TestChooseGrid:
    def test_few_values_make_a_palette(self) -> None:
        samples = np.random.default_rng(0).choice(np.array([3, 900, 60000], dtype=np.uint16), (20, 20))
        grid = choose_grid(samples, 0)
        assert isinstance(grid, PaletteGrid) and grid.values.tolist() == [3, 900, 60000]
        assert isinstance(choose_grid(np.arange(400, dtype=np.uint16).reshape(20, 20), 0), StepGrid)

    def test_fine_bounds_keep_bits(self) -> None:
        samples = np.array([[1.0, 1e6]], dtype=np.float32)
        assert isinstance(choose_grid(samples, 1e-3), BitsGrid)
        assert isinstance(choose_grid(samples, 1.0), StepGrid)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite(self, value: float) -> None:
        assert isinstance(choose_grid(np.array([[1, value]], dtype=np.float32), 0), BitsGrid)


class TestBox:
    def test_round_trip(self) -> None:
        numbers = np.random.default_rng(0).integers(-1000, 1000, (2, 5, 6))
        assert np.array_equal(decode_box(encode_box(numbers), [2, 5, 6]), numbers)
