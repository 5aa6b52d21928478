"""Region attention by its definition: gather the keys and values of routed regions, then attend (BiFormer, eq. 6-8).

The gathered copies are `topk` times as large as the keys and values; the other implementations exist to avoid them.
"""

# B batch, G query regions, L key regions, T tokens of a region, M heads, D head size, S slots (topk)

import torch
from torch import Tensor

from visionkernels.ops.region_attention.geometry import RegionGeometry, from_regions, to_regions

__all__ = ["region_attention", "region_attention_weights"]


def region_attention(
    query: Tensor, key: Tensor, value: Tensor, region_index: Tensor, geometry: RegionGeometry,
    slot_weight: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the attended map [B, H, W, C]; see the public function."""
    weights = region_attention_weights(query, key, region_index, geometry, slot_weight)
    gathered = _gather(value, region_index, geometry, slot_weight)
    attended = torch.einsum("bgmtk,bgkmd->bgtmd", weights.to(gathered.dtype), gathered)
    return from_regions(attended.flatten(3), geometry.query_grid, (query.shape[1], query.shape[2])).to(value.dtype)


def region_attention_weights(
    query: Tensor, key: Tensor, region_index: Tensor, geometry: RegionGeometry, slot_weight: Tensor | None
) -> Tensor:
    """Return softmax(scale * Q K^T) [B, G, M, T, S * T'], keys in slot order, then row-major in their region."""
    queries = to_regions(query, geometry.query_grid).unflatten(-1, (geometry.num_heads, -1))
    gathered = _gather(key, region_index, geometry, slot_weight)
    logits = geometry.scale * torch.einsum("bgtmd,bgkmd->bgmtk", _accumulable(queries), gathered)
    valid = geometry.valid_tokens(key)
    if valid is None:
        return logits.softmax(-1)
    is_valid = valid[region_index].flatten(2)[:, :, None, None]
    weights = logits.masked_fill(~is_valid, -torch.inf).softmax(-1)
    # a query whose routed tokens are all invalid attends to nothing
    return weights.masked_fill(~is_valid.any(-1, keepdim=True), 0)


def _gather(source: Tensor, region_index: Tensor, geometry: RegionGeometry, slot_weight: Tensor | None) -> Tensor:
    """Collect the tokens of the routed regions: [B, G, S * T', M, D]."""
    regions = _accumulable(to_regions(source, geometry.key_grid))
    batch = torch.arange(source.shape[0], device=source.device)[:, None, None]
    gathered = regions[batch, region_index]
    if slot_weight is not None:
        gathered = gathered * slot_weight[..., None, None]
    return gathered.flatten(2, 3).unflatten(-1, (geometry.num_heads, -1))


def _accumulable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
