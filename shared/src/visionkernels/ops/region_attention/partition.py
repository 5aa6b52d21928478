"""How a map is cut into a grid of regions: views and copies, row-major in the grid and inside each region."""

from torch import Tensor

__all__ = ["Grid", "from_regions", "region_view", "to_regions"]

Grid = tuple[int, int]  # regions from top to bottom, regions from left to right


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
