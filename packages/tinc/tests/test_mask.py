"""Masks: every shape and pattern comes back, and shapes with a smooth border are small."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinc.entropy import BitReader, BitWriter
from tinc.errors import TincFormatError
from tinc.residual.fill import continue_blocks, spread_inside
from tinc.residual.mask import MaskCoder

shapes = st.lists(st.sampled_from([1, 2, 3, 5, 7, 8, 13]), min_size=1, max_size=5).filter(
    lambda shape: np.prod(shape) <= 2000
)


def encoded(mask: np.ndarray) -> bytes:
    writer = BitWriter()
    MaskCoder().write(writer, mask)
    return writer.finish()


class TestMaskCoder:
    @given(shapes, st.floats(0, 1), st.integers(0, 2**32 - 1))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_round_trip(self, shape: list[int], share: float, seed: int) -> None:
        mask = np.random.default_rng(seed).random(shape) < share
        assert np.array_equal(MaskCoder().read(BitReader(encoded(mask)), tuple(shape)), mask)

    @pytest.mark.parametrize("value", [False, True])
    def test_constant(self, value: bool) -> None:
        content = encoded(np.full((1, 20, 30), value))
        assert len(content) < 20
        assert (MaskCoder().read(BitReader(content), (1, 20, 30)) == value).all()

    def test_ball_is_small(self) -> None:
        ball = np.square(np.indices((1, 32, 32, 32)) - 15.5)[1:].sum(0) < 150
        assert len(encoded(ball)) < 0.15 * ball.size / 8

    @given(st.integers(0, 2**32 - 1))
    @settings(max_examples=30, deadline=None, derandomize=True)
    def test_damaged(self, seed: int) -> None:
        content = np.random.default_rng(seed).bytes(seed % 90)
        try:
            assert MaskCoder().read(BitReader(content), (1, 9, 8)).dtype == bool
        except TincFormatError as error:
            assert "damaged" in str(error)


class TestSpreadInside:
    @pytest.mark.parametrize("shape", [(1, 8, 8), (2, 5, 7), (1, 1, 9), (1, 3, 4, 5)])
    def test_inside_is_kept(self, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(0)
        values, mask = rng.normal(size=shape) * 100 + 500, rng.random(shape) < 0.5
        spread = spread_inside(values, mask)
        assert np.array_equal(spread[mask], values[mask])
        assert np.isfinite(spread).all()
        # means of what is inside, or close to them
        assert spread[~mask].min() >= values[mask].min() - 1 and spread[~mask].max() <= values[mask].max() + 1

    def test_empty_mask(self) -> None:
        assert np.isfinite(spread_inside(np.ones((1, 4, 4)), np.zeros((1, 4, 4), dtype=bool))).all()


class TestContinueBlocks:
    def test_inside_is_kept(self) -> None:
        rng = np.random.default_rng(0)
        blocks, inside = rng.normal(size=(3, 1, 8, 8)) * 50, rng.random((3, 1, 8, 8)) < 0.6
        filled = continue_blocks(blocks, inside, step=20.0)
        assert np.array_equal(filled[inside], blocks[inside]) and np.isfinite(filled).all()
