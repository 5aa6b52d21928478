"""Positional tables of patch grids: fixed sine-cosine ones (MAE, appendix A.1), and tables resized to other grids."""

import torch
from jaxtyping import Float
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from visionkernels.checks import InputError, check

__all__ = ["interpolate_positions", "sincos_positions"]


def sincos_positions(width: int, grid: tuple[int, int]) -> Float[Tensor, "1 tokens width"]:
    """Return the table of a grid of (rows, columns): a row of zeros for the class token, then the patches row by row.

    The first half of the channels encodes the column x, the second half the row y, each as [sin(p w_k) | cos(p w_k)]
    with w_k = 10000^(-4 k / width), k from 0 to width / 4 - 1. Computed in float64, returned in float32. Raises
    ValueError for a width that is no multiple of 4.
    """
    check(width >= 4 and width % 4 == 0, "width", width, "a multiple of 4, for sine and cosine of two coordinates")
    rates = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    angles = [coordinate.flatten()[:, None] * rates for coordinate in (x, y)]
    patches = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
    return torch.cat([torch.zeros(1, width), patches.float()])[None]


def interpolate_positions(
    table: Float[Tensor, "1 tokens width"], grid: tuple[int, int], *, source: tuple[int, int] | None = None
) -> Float[Tensor, "1 new_tokens width"]:
    """Resize the patches' part of a table to `grid`, bicubically; the class token's row stays.

    `source` is the grid of the table, by default a square. Raises ValueError for a table of another number of rows.
    """
    patches = table.shape[1] - 1
    rows, columns = (round(patches**0.5),) * 2 if source is None else source
    if table.ndim != 3 or len(table) != 1 or rows * columns != patches:
        raise InputError(
            f"table has shape {list(table.shape)}; a class token and a grid of {rows}x{columns} patches need "
            f"[1, {rows * columns + 1}, width]"
        )
    if (rows, columns) == tuple(grid):
        return table
    resized: Tensor = resample_abs_pos_embed(
        table, new_size=list(grid), old_size=[rows, columns], num_prefix_tokens=1, antialias=False
    )
    return resized
