"""Region attention by its definition: gather the keys and values of routed regions, then attend (BiFormer, eq. 6-8).

The gathered copies are `topk` times as large as the keys and values; the other implementations exist to avoid them.
"""

# B batch, G query regions, L key regions, T tokens of a region, M heads, D head size, S slots (topk)

import torch
from torch import Tensor

from visionkernels.ops.region_attention.partition import Grid, from_regions, to_regions

__all__ = ["region_attention", "region_attention_weights"]


def region_attention(
    query: Tensor, key: Tensor, value: Tensor, region_index: Tensor, num_heads: int, query_grid: Grid, key_grid: Grid,
    scale: float, valid_size: tuple[int, int] | None, slot_weight: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the attended map [B, H, W, C]; see the public function."""
    weights = region_attention_weights(
        query, key, region_index, num_heads, query_grid, key_grid, scale, valid_size, slot_weight
    )
    gathered = _gather(value, region_index, num_heads, key_grid, slot_weight)
    attended = torch.einsum("bgmtk,bgkmd->bgtmd", weights.to(gathered.dtype), gathered)
    return from_regions(attended.flatten(3), query_grid, (query.shape[1], query.shape[2])).to(value.dtype)


def region_attention_weights(
    query: Tensor, key: Tensor, region_index: Tensor, num_heads: int, query_grid: Grid, key_grid: Grid,
    scale: float, valid_size: tuple[int, int] | None, slot_weight: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return softmax(scale * Q K^T) [B, G, M, T, S * T'], keys in slot order, then row-major in their region."""
    queries = to_regions(query, query_grid).unflatten(-1, (num_heads, -1))
    gathered = _gather(key, region_index, num_heads, key_grid, slot_weight)
    logits = scale * torch.einsum("bgtmd,bgkmd->bgmtk", _accumulable(queries), gathered)
    if valid_size is None:
        return logits.softmax(-1)
    is_valid = valid_tokens(key, key_grid, valid_size)[region_index].flatten(2)[:, :, None, None]
    weights = logits.masked_fill(~is_valid, -torch.inf).softmax(-1)
    # a query whose routed tokens are all invalid attends to nothing
    return weights.masked_fill(~is_valid.any(-1, keepdim=True), 0)


def valid_tokens(key: Tensor, key_grid: Grid, valid_size: tuple[int, int]) -> Tensor:
    """Tell which tokens of each key region lie in the first `valid_size` rows and columns: bool [L, T']."""
    rows = torch.arange(key.shape[1], device=key.device) < valid_size[0]
    columns = torch.arange(key.shape[2], device=key.device) < valid_size[1]
    return to_regions((rows[:, None] & columns)[None, ..., None], key_grid)[0, ..., 0]


def _gather(source: Tensor, region_index: Tensor, num_heads: int, grid: Grid, slot_weight: Tensor | None) -> Tensor:
    """Collect the tokens of the routed regions: [B, G, S * T', M, D]."""
    regions = _accumulable(to_regions(source, grid))
    batch = torch.arange(source.shape[0], device=source.device)[:, None, None]
    gathered = regions[batch, region_index]
    if slot_weight is not None:
        gathered = gathered * slot_weight[..., None, None]
    return gathered.flatten(2, 3).unflatten(-1, (num_heads, -1))


def _accumulable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
