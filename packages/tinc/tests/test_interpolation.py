"""Lossless coding of integer arrays: round trips of all shapes and values, and small files of smooth arrays."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinc.entropy import BitReader, BitWriter
from tinc.errors import TincFormatError
from tinc.interpolation import MAX_BITS, IntegerCoder, passes

shapes = st.lists(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11, 13]), min_size=1, max_size=5).filter(
    lambda shape: np.prod(shape) <= 3000
)


def encoded(values: np.ndarray) -> bytes:
    writer = BitWriter()
    IntegerCoder().write(writer, values)
    return writer.finish()


def decoded(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    return IntegerCoder().read(BitReader(content), shape)


class TestPasses:
    @given(shapes)
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_every_place_once(self, shape: list[int]) -> None:
        seen = np.zeros(shape, dtype=int)
        seen.reshape(-1)[0] = 1
        for item in passes(tuple(shape)):
            assert seen[item.place].size and not seen[item.place].any()
            seen[item.place] += 1
        assert (seen == 1).all()


class TestIntegerCoder:
    @given(shapes, st.integers(0, 39), st.integers(0, 2**32 - 1))
    @settings(max_examples=30, deadline=None, derandomize=True)
    def test_round_trip(self, shape: list[int], bits: int, seed: int) -> None:
        """Noise has all magnitudes up to 2**39."""
        rng = np.random.default_rng(seed)
        values = rng.integers(-(1 << bits), (1 << bits) + 1, shape) * (rng.random(shape) < rng.random())
        assert np.array_equal(decoded(encoded(values), tuple(shape)), values)

    @pytest.mark.parametrize("value", [0, 1, -1, 2**24, 2**39, -(2**39)])
    @pytest.mark.parametrize("shape", [(1,), (1, 1, 1), (5, 1, 7), (2, 3, 1, 5, 2), (1, 127)])
    def test_constant(self, value: int, shape: tuple[int, ...]) -> None:
        content = encoded(np.full(shape, value))
        assert (decoded(content, shape) == value).all()
        assert len(content) <= 20 + np.prod(shape) / 12

    def test_alternating_extremes(self) -> None:
        """With values at both ends, differences reach at most 2**40 - 1."""
        largest = (1 << (MAX_BITS - 1)) - 1
        values = np.where(np.indices((7, 9)).sum(0) % 2, largest // 2, -(largest // 2))
        assert np.array_equal(decoded(encoded(values), values.shape), values)

    def test_ramp_is_small(self) -> None:
        ramp = np.add.outer(3 * np.arange(31), 5 * np.arange(29)).astype(np.int64)
        assert len(encoded(ramp)) < 120

    def test_deterministic(self) -> None:
        values = np.random.default_rng(0).integers(0, 100, (9, 8))
        assert encoded(values) == encoded(values.copy(order="F"))

    @given(st.integers(0, 2**32 - 1))
    @settings(max_examples=15, deadline=None, derandomize=True)
    def test_damaged(self, seed: int) -> None:
        """Any bytes decode to an array of the shape or raise TincFormatError."""
        rng = np.random.default_rng(seed)
        content = encoded(rng.integers(-500, 500, (6, 5, 4)))
        for item in (content[: rng.integers(0, len(content))], rng.bytes(rng.integers(0, 200)), b"\xff" * 50):
            try:
                assert decoded(item, (6, 5, 4)).shape == (6, 5, 4)
            except TincFormatError as error:
                assert "damaged" in str(error)
