"""How heads and regions lie in maps: regions are row-major in their grid, and tokens row-major in their region."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Grid", "RegionGeometry", "from_regions", "region_view", "to_regions"]

Grid = tuple[int, int]  # regions from top to bottom, regions from left to right


@dataclass(frozen=True)
class RegionGeometry:
    """Heads, grids and scale of one call of `region_attention`, checked against its maps."""

    num_heads: int
    query_grid: Grid
    key_grid: Grid
    scale: float
    valid_size: tuple[int, int] | None  # rows and columns of the key map that get weight; None for all

    @property
    def key_regions(self) -> int:
        return self.key_grid[0] * self.key_grid[1]

    def valid_tokens(self, key: Tensor) -> Tensor | None:
        """Return which tokens of each key region lie inside `valid_size`, bool [L, T'], or None if all do."""
        if self.valid_size is None:
            return None
        rows, columns = (
            torch.arange(size, device=key.device) < valid
            for size, valid in zip(key.shape[1:3], self.valid_size, strict=True)
        )
        return to_regions((rows[:, None] & columns)[None, ..., None], self.key_grid)[0, ..., 0]


def region_view(feature: Tensor, grid: Grid) -> Tensor:
    """View [B, H, W, C] as [B, rows, columns, H / rows, W / columns, C] without a copy."""
    rows, columns = grid
    height, width = feature.shape[1] // rows, feature.shape[2] // columns
    return feature.unflatten(1, (rows, height)).unflatten(3, (columns, width)).transpose(2, 3)


def to_regions(feature: Tensor, grid: Grid) -> Tensor:
    """Cut [B, H, W, C] into [B, regions, tokens, C]."""
    return region_view(feature, grid).flatten(3, 4).flatten(1, 2)


def from_regions(regions: Tensor, grid: Grid, size: tuple[int, int]) -> Tensor:
    """Lay [B, regions, tokens, C] out as the map [B, *size, C]: the inverse of `to_regions`."""
    rows, columns = grid
    blocks = regions.unflatten(1, (rows, columns)).unflatten(3, (size[0] // rows, size[1] // columns))
    return blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2)
