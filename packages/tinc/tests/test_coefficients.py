"""Coding of transform coefficients: every grid, block and magnitude comes back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinc.entropy import BitReader, BitWriter
from tinc.errors import TincFormatError
from tinc.residual.coefficients import LARGEST, MAX_UNARY, CoefficientCoder

geometries = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 5]), st.sampled_from([1, 2, 4, 8])), min_size=1, max_size=5
).filter(lambda pairs: np.prod([grid * block for grid, block in pairs]) <= 3000)


def encoded(levels: np.ndarray) -> bytes:
    axes = levels.ndim // 2
    writer = BitWriter()
    CoefficientCoder(levels.shape[:axes], levels.shape[axes:]).write(writer, levels)
    return writer.finish()


def decoded(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    axes = len(shape) // 2
    return CoefficientCoder(shape[:axes], shape[axes:]).read(BitReader(content))


class TestCoefficientCoder:
    @given(geometries, st.integers(0, 24), st.floats(0.01, 1), st.integers(0, 2**32 - 1))
    @settings(max_examples=25, deadline=None, derandomize=True)
    def test_round_trip(self, pairs: list[tuple[int, int]], bits: int, share: float, seed: int) -> None:
        """From all zero to magnitudes of 2**24."""
        rng = np.random.default_rng(seed)
        shape = (*(grid for grid, _ in pairs), *(block for _, block in pairs))
        levels = rng.integers(-(1 << bits), (1 << bits) + 1, shape) * (rng.random(shape) < share)
        assert np.array_equal(decoded(encoded(levels), shape), levels)

    @pytest.mark.parametrize("value", [0, 1, -1, 2, MAX_UNARY - 1, MAX_UNARY, MAX_UNARY + 1, LARGEST, -LARGEST])
    def test_constant(self, value: int) -> None:
        levels = np.full((1, 2, 3, 1, 4, 2), value)
        assert np.array_equal(decoded(encoded(levels), levels.shape), levels)

    def test_zeros_are_small(self) -> None:
        assert len(encoded(np.zeros((1, 4, 4, 1, 8, 8), dtype=np.int64))) <= 12

    def test_structure_pays(self) -> None:
        """Levels that shrink with the frequency take less than the same ones in any order."""
        rng = np.random.default_rng(0)
        radius = np.indices((8, 8)).sum(0)
        levels = np.rint(rng.laplace(size=(1, 8, 8, 1, 8, 8)) * 8 / (1 + radius) ** 2).astype(np.int64)
        mixed = rng.permutation(levels.reshape(-1)).reshape(levels.shape)
        assert len(encoded(levels)) < 0.85 * len(encoded(mixed))

    def test_contexts_and_costs(self) -> None:
        """The table that the quantiser asks has a finite cost for each coefficient."""
        rng = np.random.default_rng(0)
        levels = rng.integers(-3, 4, (1, 6, 6, 1, 8, 8))
        coder, writer = CoefficientCoder(levels.shape[:3], levels.shape[3:]), BitWriter()
        coder.write(writer, levels)
        costs, contexts = coder.cost_table(), coder.contexts(levels)
        assert contexts.shape == levels.shape and contexts.max() < len(costs)
        assert np.isfinite(costs).all() and (costs >= 0).all()
        keep = np.ones(levels.shape, dtype=bool)
        keep[..., 0, 0, 0] = False
        bits = costs[contexts, np.abs(levels)][keep].sum()
        assert bits / 8 == pytest.approx(len(writer.finish()), rel=0.15)

    @given(st.integers(0, 2**32 - 1))
    @settings(max_examples=15, deadline=None, derandomize=True)
    def test_damaged(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        content = encoded(rng.integers(-20, 20, (1, 2, 2, 1, 4, 4)))
        for each in (content[: rng.integers(0, len(content))], rng.bytes(rng.integers(0, 100)), b"\xff" * 50):
            try:
                assert decoded(each, (1, 2, 2, 1, 4, 4)).shape == (1, 2, 2, 1, 4, 4)
            except TincFormatError as error:
                assert "damaged" in str(error)
