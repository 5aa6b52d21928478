"""Routing between regions: pooled queries and keys, their affinity and its top-k (BiFormer, sec. 3.2, eq. 3-4).

Routing is computed in float32 (float64 for float64 input) also under autocast, since a top-k is a discrete choice.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d

from visionkernels.checks import InputError

__all__ = ["Routing", "pool_regions", "route", "select_regions"]


@dataclass(frozen=True)
class Routing:
    """Routing of one layer, per image and query region; regions are numbered row by row."""

    index: Int[Tensor, "batch regions topk"]
    """Chosen regions, the most similar first."""
    weight: Float[Tensor, "batch regions topk"]
    """Softmax of the chosen affinities."""
    attention: Float[Tensor, "batch regions heads tokens keys"]
    """Softmax over the tokens of the chosen regions, in the order of `index`, row by row inside a region."""
    grid: tuple[int, int]
    """Regions from top to bottom and from left to right."""
    region_size: tuple[int, int]
    """Tokens of a region from top to bottom and from left to right; the last regions may reach into padding."""


def route(
    query: Float[Tensor, "batch height width qk"],
    key: Float[Tensor, "batch height width qk"],
    n_win: int,
    topk: int,
    *,
    scale: float | None = None,
) -> tuple[Int[Tensor, "batch regions topk"], Float[Tensor, "batch regions topk"]]:
    """Route each of the n_win x n_win regions of two maps to its `topk` most similar regions (eq. 3-4).

    Returns the indices and the softmax of their affinities; `scale` (default qk ** -0.5) affects the latter alone.
    Raises ValueError if n_win does not divide the maps or topk is outside [1, n_win ** 2].
    """
    height, width = query.shape[1:3]
    if height % n_win or width % n_win:
        raise InputError(f"a {height}x{width} map does not divide into {n_win}x{n_win} regions; pad it to multiples")
    region_size = (height // n_win, width // n_win)
    pooled_query, pooled_key = pool_regions(query, region_size), pool_regions(key, region_size)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return select_regions(pooled_query, pooled_key, topk, scale)


def pool_regions(
    feature: Float[Tensor, "batch height width channels"],
    region_size: tuple[int, int],
    valid_size: tuple[int, int] | None = None,
) -> Float[Tensor, "batch regions channels"]:
    """Average the tokens of each region; those outside the first `valid_size` rows and columns do not count.

    A region that reaches beyond the map averages the tokens that it has; without any it is zero.
    """
    channels_first = _exact(feature).permute(0, 3, 1, 2)
    pooled = avg_pool2d(channels_first, region_size, ceil_mode=True, count_include_pad=False)
    if valid_size is not None:
        inside = channels_first.new_zeros(1, 1, *feature.shape[1:3])
        inside[..., : valid_size[0], : valid_size[1]] = 1
        fraction = avg_pool2d(inside, region_size)
        pooled = avg_pool2d(channels_first * inside, region_size) / fraction.clamp_min(1e-12)
    return pooled.flatten(2).transpose(1, 2)


def select_regions(
    pooled_query: Float[Tensor, "batch regions qk"],
    pooled_key: Float[Tensor, "batch key_regions qk"],
    topk: int,
    scale: float,
    is_empty: Tensor | None = None,
) -> tuple[Int[Tensor, "batch regions topk"], Float[Tensor, "batch regions topk"]]:
    """Take the `topk` largest of scale * Q K^T per query region, and their softmax.

    Regions marked in `is_empty` [key_regions] come last, with weight zero. Raises ValueError for a topk out of range.
    """
    regions = pooled_key.shape[1]
    if not 1 <= topk <= regions:
        raise InputError(f"topk={topk} is outside [1, {regions}], the number of regions; lower topk or refine the grid")
    affinity = (_exact(pooled_query) * scale) @ _exact(pooled_key).transpose(1, 2)
    if is_empty is not None:
        affinity = affinity.masked_fill(is_empty, -torch.inf)
    chosen, index = affinity.topk(topk, -1)
    return index, chosen.softmax(-1)


def _exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
