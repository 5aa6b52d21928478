"""The block transform: forward and its integer inverse, layouts, coarser volumes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinc.residual.transform import forward_blocks, inverse_blocks, join_blocks, split_blocks

blocks = st.lists(st.sampled_from([1, 2, 4, 8, 16, 32]), min_size=1, max_size=4).filter(lambda b: np.prod(b) <= 4096)


class TestSplitBlocks:
    @given(blocks, st.integers(1, 3))
    @settings(max_examples=30, deadline=None, derandomize=True)
    def test_round_trip(self, block: list[int], grid: int) -> None:
        if np.prod(block) * grid ** len(block) > 10000:
            block = block[:1]
        volume = np.arange(np.prod([grid * b for b in block])).reshape([grid * b for b in block])
        split = split_blocks(volume, block)
        assert split.shape == (*[grid] * len(block), *block)
        assert np.array_equal(join_blocks(split), volume)


class TestInverseBlocks:
    @given(blocks, st.integers(0, 26), st.integers(0, 2**32 - 1))
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_inverts_forward(self, block: list[int], bits: int, seed: int) -> None:
        """Rounded coefficients, a basis of 14 bits and a rounding an axis: the error stays within their sum."""
        values = np.random.default_rng(seed).integers(-(1 << bits), (1 << bits) + 1, (*[1] * len(block), *block))
        coefficients = np.rint(forward_blocks(values)).astype(np.int64)
        back = inverse_blocks(coefficients)
        # each basis entry is off by at most 2**-15, a coefficient by 1 / 2
        spread = float(np.sqrt(np.square(values.astype(float)).sum()))
        bound = 1 + len(block) + 0.5 * np.sqrt(np.prod(block)) + spread * sum(b * 2.0**-14 for b in block)
        assert np.abs(back - values).max() <= bound

    @given(blocks, st.integers(0, 2**32 - 1))
    @settings(max_examples=30, deadline=None, derandomize=True)
    def test_against_integers(self, block: list[int], seed: int) -> None:
        """float64 sums are those of Python's integers."""
        rng = np.random.default_rng(seed)
        largest = int(2**36 / np.sqrt(np.prod(block)))
        coefficients = rng.integers(-largest, largest + 1, (*[1] * len(block), *block))
        from tinc.arithmetic import cosine_basis

        exact = coefficients.astype(object)
        for axis in range(len(block), 2 * len(block)):
            basis = cosine_basis(exact.shape[axis]).astype(np.int64).astype(object)
            exact = np.moveaxis((np.moveaxis(exact, axis, -1) @ basis + (1 << 13)) // (1 << 14), -1, axis)
        assert np.array_equal(inverse_blocks(coefficients), exact.astype(np.int64))

    def test_forward_keeps_lengths(self) -> None:
        values = np.random.default_rng(0).normal(size=(2, 3, 8, 16)) * 1000
        assert np.square(forward_blocks(values)).sum() == pytest.approx(np.square(values).sum(), rel=1e-3)

    @pytest.mark.parametrize("step", [2, 4, 8])
    def test_coarse_blocks_are_means(self, step: int) -> None:
        grid = np.linspace(0, 1, 16)
        values = np.rint(2000 * np.cos(np.add.outer(grid, 2 * grid)))[None, None]
        coefficients = np.rint(forward_blocks(values)).astype(np.int64)
        low = coefficients[..., : 16 // step, : 16 // step]
        coarse = inverse_blocks(low, (step, step))
        means = values.reshape(16 // step, step, 16 // step, step).mean((1, 3))
        # a sample of the low frequencies, not their mean over a cell: up to a tenth more of the amplitude
        assert np.abs(coarse[0, 0] - means).max() < 0.1 * 2000
