"""Which tree, blocks and tiles are chosen."""

import math

import numpy as np
import pytest

from tinc.residual.blocks import cut
from tinc.residual.design import choose_blocks
from tinc.residual.fill import spread_inside
from tinc.tree.design import design_tree, leaf_splits, tree_share


class TestTree:
    @pytest.mark.parametrize("extent", [(8, 128, 128), (64, 64), (5, 40, 30, 20), (1, 300, 7)])
    @pytest.mark.parametrize("budget", [300, 1000, 4000, 40000])
    def test_fits_the_budget(self, extent: tuple[int, ...], budget: float) -> None:
        shape = design_tree(extent, 1, budget)
        assert shape.num_weights * 5.5 / 8 <= max(budget, 200)
        parts = [math.prod(split[axis] for split in shape.splits) for axis in range(len(extent))]
        assert all(part <= size for part, size in zip(parts, extent, strict=True))

    def test_long_axes_are_split_first(self) -> None:
        assert leaf_splits((8, 128, 128), 4096) == ((1, 1, 1), (1, 2, 2))

    def test_short_axes_are_not_split(self) -> None:
        assert leaf_splits((4, 4, 4), 1e6) == ((1, 1, 1),)

    def test_share_is_bounded_by_both(self) -> None:
        assert tree_share(1000, 10**9) == 400
        assert tree_share(10**9, 128_000) == 1000


class TestBlocks:
    def test_long_waves_get_long_blocks(self) -> None:
        z, y, x = np.mgrid[:8, :32, :32]
        smooth = (10000 * np.sin(x / 40) * np.cos(y / 50 + z / 30)).astype(np.int64)[None]
        noise = np.random.default_rng(0).integers(-3000, 3000, smooth.shape)
        cells = np.random.default_rng(1).integers(0, 2, (2, 8, 8)) * 10000
        sharp = np.kron(cells, np.ones((4, 4, 4), dtype=np.int64))[None]
        long, _ = choose_blocks(smooth * 16 + noise, 300)
        short, _ = choose_blocks(sharp * 16 + noise, 1500)
        assert math.prod(long.block) > math.prod(short.block)

    def test_tiles_are_bounded(self) -> None:
        blocks = cut((1, 500, 500, 500), (8, 8, 8))
        assert math.prod(b * t for b, t in zip(blocks.block, blocks.tile, strict=True)) <= 1 << 19
        covered = sum(
            math.prod(part.stop - part.start for part in blocks.box(tile)) for tile in range(blocks.num_tiles)
        )
        assert covered == 500**3


class TestFill:
    def test_inside_is_kept_and_outside_continues(self) -> None:
        y, x = np.mgrid[:32, :32]
        values = (100.0 + x)[None]
        mask = ((x - 16) ** 2 + (y - 16) ** 2 < 100)[None]
        filled = spread_inside(np.where(mask, values, 0), mask)
        np.testing.assert_array_equal(filled[mask], values[mask])
        # near the mask it is near what is inside, and never beyond it
        assert filled.min() >= values[mask].min() - 1e-9
        assert filled.max() <= values[mask].max() + 1e-9
        assert abs(filled[0, 16, 4] - values[0, 16, 7]) < 6

    @pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 1, 5), (1, 3, 3, 3, 3)])
    def test_shapes(self, shape: tuple[int, ...]) -> None:
        mask = np.zeros(shape, dtype=bool)
        mask[(0,) * len(shape)] = True
        filled = spread_inside(np.full(shape, 5.0), mask)
        assert filled.shape == shape
        assert np.isfinite(filled).all()
