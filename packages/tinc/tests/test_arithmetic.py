"""Integer tables agree with a mathematics library, and products of integers do not depend on the order."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinc.arithmetic import ACTIVATION_BITS, BASIS_BITS, PHASE_BITS, cosine_basis, sine_table, to_fixed
from visionkernels.ops.siren_mlp import integer_siren_mlp


class TestSineTable:
    def test_values(self) -> None:
        exact = [2**ACTIVATION_BITS * math.sin(2 * math.pi * z / 2**PHASE_BITS) for z in range(2**PHASE_BITS)]
        assert min(abs(abs(item) % 1 - 0.5) for item in exact) > 1e-7  # no tie that a library could round otherwise
        assert np.array_equal(sine_table().numpy(), np.rint(exact))


class TestCosineBasis:
    @pytest.mark.parametrize("length", [1, 2, 4, 8, 16, 32])
    @pytest.mark.parametrize("step", [1, 2, 4, 8, 16, 32])
    def test_values(self, length: int, step: int) -> None:
        k, n = np.indices((length, length))
        gain = np.where(k == 0, 1, math.sqrt(2)) / math.sqrt(length * step)
        exact = 2**BASIS_BITS * gain * np.cos(math.pi * (2 * n + 1) * k / (2 * length))
        if step > 1:
            x = math.pi * np.maximum(k, 1) / (2 * length * step)
            exact *= np.where(k == 0, 1, np.sin(step * x) / (step * np.sin(x)))
        assert np.array_equal(cosine_basis(length, step), np.rint(exact))

    @pytest.mark.parametrize(("length", "step"), [(4, 2), (2, 8), (8, 4)])
    def test_coarse_rows_are_means_of_fine_ones(self, length: int, step: int) -> None:
        fine = cosine_basis(length * step)[:length].reshape(length, length, step).mean(2)
        assert np.abs(fine - cosine_basis(length, step)).max() <= 1

    def test_is_orthonormal(self) -> None:
        basis = cosine_basis(32) / 2**BASIS_BITS
        assert np.abs(basis @ basis.T - np.eye(32)).max() < 1e-3


class TestExactness:
    @given(st.integers(0, 2**32 - 1), st.sampled_from([3, 200, 4095]))
    @settings(max_examples=20, deadline=None, derandomize=True)
    def test_any_order_and_type(self, seed: int, largest: int) -> None:
        """Small weights use float32 and large ones float64; both give the integers of int64, in any order."""
        rng = np.random.default_rng(seed)
        inputs = torch.from_numpy(rng.integers(0, 4096, (1, 37, 23)).astype(np.int32))
        weights = rng.integers(-largest, largest + 1, (2, 24, 5))
        multiplier, shift = int(rng.integers(1, 256)), int(rng.integers(0, 41))
        order = rng.permutation(23)
        table = sine_table()

        def run(chosen: np.ndarray) -> torch.Tensor:
            layer = np.concatenate([weights[:, :-1][:, chosen], weights[:, -1:]], 1)
            return integer_siren_mlp(
                inputs[:, :, torch.from_numpy(chosen)], [torch.from_numpy(layer).float()], [multiplier], [shift],
                table=table, bits=ACTIVATION_BITS,
            )  # fmt: skip

        sines = table.numpy().astype(np.int64)[inputs.numpy()]
        sums = sines @ weights[:, :-1] + (weights[:, -1:] << ACTIVATION_BITS)
        expected = (sums * multiplier + ((1 << shift) >> 1)) >> shift
        assert np.array_equal(run(np.arange(23)).numpy(), expected)
        assert np.array_equal(run(order).numpy(), expected)


class TestToFixed:
    @given(st.floats(1e-9, 1e6), st.integers(2, 20))
    @settings(max_examples=80, deadline=None, derandomize=True)
    def test_is_near(self, value: float, mantissa_bits: int) -> None:
        multiplier, shift = to_fixed(value, mantissa_bits=mantissa_bits, max_shift=60)
        value = min(value, 2**mantissa_bits - 1)
        assert 0 < multiplier < 1 << mantissa_bits and 0 <= shift <= 60
        assert multiplier / 2**shift == pytest.approx(value, rel=2.0 ** (1 - mantissa_bits))

    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
    def test_errors(self, value: float) -> None:
        with pytest.raises(ValueError, match=f"value={value} must be positive"):
            to_fixed(value, mantissa_bits=7, max_shift=40)

    def test_too_large(self) -> None:
        assert to_fixed(1000.0, mantissa_bits=7, max_shift=40) == (127, 0)
