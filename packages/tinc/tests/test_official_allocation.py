"""Budgets and widths: the quadratic, the shares of levels and nodes, what cannot be built."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinc.official.allocation import (
    Dims,
    allocate,
    check_divisible,
    hidden_width,
    node_places,
    parameter_budget,
    plan_tree,
    statistics,
)
from tinc.official.volume import normalise
from tinc.recipes import RECIPES, Level


class TestHiddenWidth:
    @given(st.floats(0, 1e7), st.integers(1, 8), st.integers(1, 60), st.none() | st.integers(1, 8))
    def test_properties(self, budget: float, layers: int, inputs: int, output: int | None) -> None:
        """The width is the largest whose segment fits, or 1."""
        layers = max(layers, 1 if output is None else 2)
        width = hidden_width(budget, layers=layers, input=inputs, output=output)

        def cost(hidden: int) -> int:
            return Dims(inputs, hidden, output or hidden, layers).num_parameters

        assert width >= 1
        assert width == 1 or cost(width) <= budget * (1 + 1e-9)
        assert cost(width + 1) > budget * (1 - 1e-9)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="layers=1 must be at least 2 in a leaf"):
            hidden_width(100, layers=1, input=3, output=1)
        with pytest.raises(ValueError, match="layers=0 must be at least 1"):
            hidden_width(100, layers=0, input=3, output=None)


class TestStatistics:
    def test_reference(self) -> None:
        volume = np.random.default_rng(0).normal(size=(4, 8, 12, 2)).astype(np.float32)
        measured = statistics(volume, 3)
        for level, index in node_places(3):
            sizes = [size // 2**level for size in volume.shape[:3]]
            box = volume[tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, sizes, strict=True))]
            assert measured[level].aoi[index] == (box > 0).sum()
            assert measured[level].var[index] == pytest.approx(box.astype(float).var())

    def test_order(self) -> None:
        places = list(node_places(3))
        assert len(places) == 73
        assert places[:4] == [(0, (0, 0, 0)), (1, (0, 0, 0)), (2, (0, 0, 0)), (2, (0, 0, 1))]
        assert places[10] == (1, (0, 0, 1)) and places[11] == (2, (0, 0, 2))


def measure(shape: tuple[int, ...], seed: int = 0):
    volume = np.random.default_rng(seed).gamma(0.5, size=shape).astype(np.float32)
    return statistics(normalise(volume)[0], 3)


class TestAllocate:
    @given(st.integers(3000, 200_000), st.sampled_from(["equal", "aoi", "var"]), st.integers(1, 3))
    def test_properties(self, budget: int, how: str, channels: int) -> None:
        """A tree without a width of 1 costs at most its budget, and a node's output is its children's input."""
        levels = (Level(1.0, 2), Level(0.8, 1), Level(1.5, 3, allocation=how))
        try:
            nodes = allocate(levels, budget, measure((8, 8, 8)), channels=channels)
        except ValueError as error:
            assert "widths fall to 1" in str(error)
            return
        if all(node.dims.hidden > 1 for node in nodes):
            assert sum(node.dims.num_parameters for node in nodes) <= budget
        outputs = {(node.level, node.index): node.dims.output for node in nodes}
        for node in nodes:
            parent = node.level - 1, tuple(place // 2 for place in node.index)
            assert node.dims.input == outputs.get(parent, 3)
            assert node.dims.output == (channels if node.level == 2 else node.dims.hidden)

    def test_variance_overspends_only_officially(self) -> None:
        levels, measured = (Level(1.0, 2), Level(1.0, 2), Level(1.5, 3, allocation="var")), measure((8, 8, 8))
        costs = {
            compat: sum(node.dims.num_parameters for node in allocate(levels, 20_000, measured, compat=compat))
            for compat in ("none", "official")
        }
        assert costs["none"] <= 20_000 < 4 * 20_000 < costs["official"] < 8 * 20_000

    def test_floor(self) -> None:
        levels = RECIPES["multi2"].levels
        with pytest.raises(ValueError, match=r"the narrowest tree .* has 422, the largest reachable ratio is 156.1"):
            allocate(levels, 100, origin_bytes=263_562)
        narrow = allocate(levels, 100, compat="official")
        assert sum(node.dims.num_parameters for node in narrow) == 422
        assert len(allocate(levels, 422)) == 73

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="at least 2: a leaf of one layer"):
            allocate((Level(1, 2), Level(1, 1)), 1000)
        with pytest.raises(ValueError, match="channels=0 must be at least 1"):
            allocate((Level(1, 2),), 1000, channels=0)
        with pytest.raises(ValueError, match="allocation 'aoi' of level 1 needs statistics"):
            allocate((Level(1, 2), Level(1, 2, allocation="aoi")), 1000)
        volume = np.zeros((4, 4, 4, 1), np.float32)
        volume[0, 0, 0] = 1
        levels = (Level(1, 2), Level(1, 2), Level(1, 2, allocation="var"))
        with pytest.raises(ValueError, match="'var' of level 2: node 2-0-0-2 and its siblings have no variance"):
            volume_of_two = np.kron(volume, np.ones((2, 2, 2, 1), np.float32))
            volume_of_two[0, 0, 0] = 2
            allocate(levels, 10**5, statistics(volume_of_two, 3), compat="official")
        with pytest.raises(ValueError, match="no value above 0"):
            below = (Level(1, 2), Level(1, 2, allocation="aoi"))
            allocate(below, 1000, statistics(-volume, 2))


class TestPlanTree:
    def test_indivisible(self) -> None:
        with pytest.raises(
            ValueError, match="width=30 is not divisible by the 4 leaves along it of a tree of 3 levels"
        ):
            check_divisible((8, 16, 30), 3)
        values = normalise(np.arange(8 * 8 * 6).reshape(8, 8, 6))[0]
        with pytest.raises(ValueError, match="width=6 is not divisible"):
            plan_tree(RECIPES["multi2"], values, 10_000)

    def test_channels(self) -> None:
        values = normalise(np.arange(64).reshape(4, 4, 2, 2))[0]
        with pytest.raises(ValueError, match="output=1 must be 2, the channels of the volume"):
            plan_tree(RECIPES["multi0"], values, 10_000)

    def test_huge_ratio(self) -> None:
        recipe = replace(RECIPES["multi1"], ratio=100_000.0)
        values = normalise(np.arange(512).reshape(8, 8, 8))[0]
        assert plan_tree(recipe, values, 4096).num_parameters == 6 + 8 * 6
        with pytest.raises(ValueError, match="largest reachable ratio"):
            plan_tree(replace(recipe, compat="none"), values, 4096)

    def test_budget(self) -> None:
        assert parameter_budget(263_562, 64) == 1029
        assert parameter_budget(3, 64) == 0
        assert math.isclose(parameter_budget(1 << 20, 4), (1 << 20) / 16)
