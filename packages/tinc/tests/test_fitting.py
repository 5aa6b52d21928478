"""Training of trees: they learn, keep to their bytes, repeat themselves, and stop when asked."""

import math
from collections.abc import Callable
from time import monotonic, process_time

import numpy as np
import pytest

from tinc.entropy import BitWriter
from tinc.tree.design import design_tree, leaf_splits
from tinc.tree.fitting import FitPlan, Progress, fit_tree
from tinc.tree.quantized import QuantizedTree
from tinc.tree.shape import TreeShape
from tinc.tree.weights import write_weights

PLAN = FitPlan(steps=60, points=192, max_points=2048)
SHAPE = TreeShape((12, 16), ((1, 1), (2, 2)), ((10, 10), (4, 1)))
Wavy = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def values(wavy: Wavy) -> np.ndarray:
    return wavy((12, 16), "float32", noise=0).astype(np.int64)[None] * 16


def size(tree: QuantizedTree) -> int:
    writer = BitWriter()
    write_weights(writer, tree)
    return len(writer.finish())


def mse(tree: QuantizedTree, values: np.ndarray) -> float:
    decoded = tree.decode(tuple(slice(0, n) for n in tree.shape.extent))
    return float(np.square(decoded - values).mean())


class TestFitTree:
    def test_learns(self, values: np.ndarray) -> None:
        """Twelve dB above the mean; the integers are as good as training said."""
        seen: list[Progress] = []
        tree = fit_tree(SHAPE, values, 400, plan=PLAN, callback=seen.append)
        assert 10 * math.log10(values.var() / mse(tree, values)) > 12
        assert mse(tree, values) < 2 * np.median([each.mse for each in seen[-5:]])
        assert [each.step for each in seen] == list(range(10, 61, 10)) and {each.steps for each in seen} == {60}

    def test_is_deterministic(self, values: np.ndarray) -> None:
        plan = FitPlan(steps=30, points=64)
        one, two = (fit_tree(SHAPE, values, 200, plan=plan, seed=3) for _ in range(2))
        other = fit_tree(SHAPE, values, 200, plan=plan, seed=4)
        assert all(np.array_equal(a.weights, b.weights) for a, b in zip(one.layers, two.layers, strict=True))
        assert not all(np.array_equal(a.weights, b.weights) for a, b in zip(one.layers, other.layers, strict=True))

    @pytest.mark.slow
    @pytest.mark.parametrize("budget", [180, 250, 320])
    def test_keeps_to_its_bytes(self, values: np.ndarray, budget: int) -> None:
        """With enough steps the weights take the bytes that they were given."""
        tree = fit_tree(SHAPE, values, budget, plan=FitPlan(steps=2000, points=192))
        assert size(tree) == pytest.approx(budget, rel=0.06)

    @pytest.mark.slow
    def test_budget_matters(self, values: np.ndarray) -> None:
        plan = FitPlan(steps=2000, points=192)
        small, large = (fit_tree(SHAPE, values, budget, plan=plan) for budget in (150, 350))
        assert size(small) < 0.8 * size(large)
        assert mse(small, values) > mse(large, values)

    def test_deadline(self, values: np.ndarray) -> None:
        seen: list[Progress] = []
        plan = FitPlan(steps=2000, points=64)
        tree = fit_tree(SHAPE, values, 200, plan=plan, deadline=monotonic() + 0.1, callback=seen.append)
        assert tree.shape == SHAPE
        assert seen[-1].steps == 2000 and seen[-1].step < 2000

    def test_deadline_ends_soon(self, values: np.ndarray) -> None:
        """The steps that are left after the deadline take no longer than those before."""
        start = process_time()
        fit_tree(SHAPE, values, 200, plan=FitPlan(steps=400, points=64), deadline=monotonic() + 0.05)
        early = process_time() - start
        start = process_time()
        fit_tree(SHAPE, values, 200, plan=FitPlan(steps=400, points=64))
        assert early < 0.7 * (process_time() - start)

    def test_keyboard_interrupt(self, values: np.ndarray) -> None:
        """After the callback's interrupt some steps are left, in which weights become integers: at most a twentieth of
        the schedule, and not many more than were done."""
        calls = []

        def callback(progress: Progress) -> None:
            calls.append(progress.step)
            if progress.step >= 50:
                raise KeyboardInterrupt

        tree = fit_tree(SHAPE, values, 200, plan=FitPlan(steps=1000, points=64), callback=callback)
        assert calls == list(range(10, 81, 10))
        assert mse(tree, values) < values.var()

    def test_channels_and_uneven_leaves(self, wavy: Wavy) -> None:
        """Voxels beyond the volume do not count, and each channel is fitted."""
        one = wavy((9, 11), "float32", noise=0).astype(np.int64) * 16
        values = np.stack([one, 5000 - one])
        shape = TreeShape((9, 11), ((1, 1), (2, 2)), ((10, 10), (4, 2)))
        tree = fit_tree(shape, values, 400, plan=PLAN)
        decoded = tree.decode((slice(0, 9), slice(0, 11)))
        for channel, target in zip(decoded, values, strict=True):
            assert 10 * math.log10(target.var() / np.square(channel - target).mean()) > 8

    def test_inactive_leaves(self, values: np.ndarray) -> None:
        shape = TreeShape((12, 16), ((1, 1), (2, 2)), ((8,), (1,)), (True, False, False, True))
        tree = fit_tree(shape, values, 200, plan=FitPlan(steps=60))
        assert [len(layer.weights) for layer in tree.layers] == [1, 2]

    @pytest.mark.parametrize("contrast", [0, 1, 80])
    def test_low_contrast(self, values: np.ndarray, contrast: int) -> None:
        """A volume that hardly differs from its mean, of 60000 counts."""
        low = 960000 + (values - 1600) * contrast // 640
        tree = fit_tree(SHAPE, low, 300, plan=FitPlan(steps=60))
        assert mse(tree, low) < 4 * low.var() + 100**2

    # samples have at most 2**24 working units
    @pytest.mark.parametrize("scale", [1, 4000])
    def test_scale_does_not_matter(self, values: np.ndarray, scale: int) -> None:
        tree = fit_tree(SHAPE, values * scale, 300, plan=FitPlan(steps=100))
        assert 10 * math.log10((values * scale).var() / mse(tree, values * scale)) > 5


class TestDesignTree:
    @pytest.mark.parametrize("extent", [(1, 1), (5, 7), (64, 64, 64), (1, 200), (20, 20, 20, 20)])
    @pytest.mark.parametrize("budget", [1, 300, 5000, 60000])
    def test_fits_the_budget(self, extent: tuple[int, ...], budget: int) -> None:
        shape = design_tree(extent, 2, budget)
        assert shape.channels == 2 and len(shape.splits) <= 8
        assert all(np.prod([split[axis] for split in shape.splits]) <= max(size, 1) for axis, size in enumerate(extent))
        if budget >= 5000:
            assert shape.num_weights * 5.5 / 8 <= 1.05 * budget
        assert leaf_splits(extent, budget) == shape.splits
