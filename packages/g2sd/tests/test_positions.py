"""Positional tables by their definition."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from g2sd.positions import interpolate_positions, sincos_positions


class TestSincosPositions:
    @pytest.mark.parametrize("grid", [(3, 3), (2, 5), (1, 1)], ids=str)
    def test_reference(self, grid):
        """Number by number: the first half of the channels is of the column, the second of the row."""
        width, (rows, columns) = 16, grid
        table = sincos_positions(width, grid)
        assert table.shape == (1, 1 + rows * columns, width)
        torch.testing.assert_close(table[0, 0], torch.zeros(width))
        for row in range(rows):
            for column in range(columns):
                wanted = []
                for coordinate in (column, row):
                    angles = [coordinate * 10000 ** (-k / (width / 4)) for k in range(width // 4)]
                    wanted += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
                torch.testing.assert_close(table[0, 1 + row * columns + column], torch.tensor(wanted))

    def test_axes(self):
        """Patches of one column share the first half, patches of one row the second."""
        patches = sincos_positions(8, (4, 6))[0, 1:].view(4, 6, 8)
        torch.testing.assert_close(patches[..., :4], patches[:1, :, :4].expand(4, 6, 4))
        torch.testing.assert_close(patches[..., 4:], patches[:, :1, 4:].expand(4, 6, 4))

    @pytest.mark.parametrize("width", [0, 2, 6, 30])
    def test_errors(self, width):
        with pytest.raises(ValueError, match=f"width={width} must be a multiple of 4"):
            sincos_positions(width, (2, 2))


class TestInterpolatePositions:
    @pytest.mark.parametrize(("source", "grid"), [((4, 4), (7, 7)), ((7, 7), (3, 5)), ((2, 6), (4, 3))], ids=str)
    def test_reference(self, source, grid):
        table = torch.randn(1, 1 + source[0] * source[1], 12)
        resized = interpolate_positions(table, grid, source=source)
        maps = table[:, 1:].view(1, *source, 12).permute(0, 3, 1, 2)
        wanted = F.interpolate(maps, grid, mode="bicubic", align_corners=False).flatten(2).mT
        torch.testing.assert_close(resized, torch.cat([table[:, :1], wanted], 1))

    def test_same_grid(self):
        table = torch.randn(1, 17, 8)
        assert interpolate_positions(table, (4, 4)) is table
        # the same number of patches in another shape
        assert not torch.equal(interpolate_positions(table, (2, 8)), table)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_dtype(self, dtype):
        assert interpolate_positions(torch.randn(1, 17, 8).to(dtype), (5, 5)).dtype == dtype

    @given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.floats(-3, 3))
    def test_properties(self, side, rows, columns, value):
        """A constant table stays as it is, on any grid."""
        resized = interpolate_positions(torch.full((1, 1 + side**2, 4), value), (rows, columns))
        torch.testing.assert_close(resized, torch.full((1, 1 + rows * columns, 4), value))

    @pytest.mark.parametrize(
        ("shape", "source"), [((1, 16, 8), None), ((2, 17, 8), None), ((17, 8), None), ((1, 17, 8), (3, 4))], ids=str
    )
    def test_errors(self, shape, source):
        with pytest.raises(ValueError, match=rf"table has shape \[{', '.join(map(str, shape))}\]"):
            interpolate_positions(torch.zeros(shape), (2, 2), source=source)
