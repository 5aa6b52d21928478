"""Straightforward implementation of bi-level routing attention, the baseline of the benches.

"expanded" gathers keys and values as the official code is described to: from a view expanded over all query regions,
whose backward allocates regions times the keys and values. "index_select" is the same algorithm with whole regions
picked by index. Both partition the projected map, copy heads to be contiguous, and multiply, softmax, multiply.
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from biformer.attention import BiLevelRoutingAttention
from biformer.full_attention import FullAttention
from biformer.model import BiFormer, BiFormerBlock

__all__ = ["Gather", "StraightforwardAttention", "straightforward_core", "straightforward_model"]

Gather = Literal["expanded", "index_select"]


def straightforward_core(
    qkv: Tensor, index: Tensor, *, n_win: int, num_heads: int, scale: float, gather: Gather
) -> Tensor:
    """Attend within a packed map [B, H, W, 3 C] by a routing index [B, n_win ** 2, topk]: [B, H, W, C]."""
    batch, height, width, channels = qkv.shape
    query, key_value = _partition(qkv, n_win).split([channels // 3, 2 * channels // 3], -1)
    routed = _GATHERS[gather](key_value, index)  # [B, R, S, T, 2 C]
    key, value = routed.flatten(2, 3).flatten(0, 1).unflatten(-1, (2, num_heads, -1)).unbind(2)
    query = query.flatten(0, 1).unflatten(-1, (num_heads, -1)).transpose(1, 2).contiguous()
    weights = ((query * scale) @ key.permute(0, 2, 3, 1).contiguous()).softmax(-1)
    attended = weights @ value.transpose(1, 2).contiguous()
    blocks = attended.transpose(1, 2).flatten(2).reshape(batch, n_win, n_win, height // n_win, width // n_win, -1)
    return blocks.transpose(2, 3).reshape(batch, height, width, -1)


def _partition(feature: Tensor, n_win: int) -> Tensor:
    batch, height, width, channels = feature.shape
    blocks = feature.view(batch, n_win, height // n_win, n_win, width // n_win, channels).transpose(2, 3)
    return blocks.reshape(batch, n_win**2, -1, channels)


def _expanded(key_value: Tensor, index: Tensor) -> Tensor:
    batch, regions, tokens, channels = key_value.shape
    everything = key_value.view(batch, 1, regions, tokens, channels).expand(-1, regions, -1, -1, -1)
    wanted = index.view(batch, regions, -1, 1, 1).expand(-1, -1, -1, tokens, channels)
    return torch.gather(everything, 2, wanted)


def _index_select(key_value: Tensor, index: Tensor) -> Tensor:
    batch, regions, tokens, channels = key_value.shape
    first = torch.arange(batch, device=index.device).view(batch, 1, 1) * regions
    rows = key_value.reshape(batch * regions, tokens * channels).index_select(0, (index + first).flatten())
    return rows.view(batch, regions, -1, tokens, channels)


_GATHERS = {"expanded": _expanded, "index_select": _index_select}


class StraightforwardAttention(nn.Module):
    """The layer around the core, with the weights of a BiLevelRoutingAttention (NHWC, divisible sizes)."""

    def __init__(self, layer: BiLevelRoutingAttention, gather: Gather) -> None:
        super().__init__()
        self.qkv, self.lepe, self.proj = layer.qkv, layer.lepe, layer.proj
        self.n_win, self.topk, self.num_heads, self.scale = layer.n_win, layer.topk, layer.num_heads, layer.scale
        self.gather: Gather = gather

    def forward(self, x: Tensor) -> Tensor:
        """Attend within [B, H, W, C]."""
        qkv = self.qkv(x)
        query, key, value = qkv.chunk(3, -1)
        with torch.no_grad():
            mean_query, mean_key = (_partition(half, self.n_win).mean(2) for half in (query, key))
            index = ((mean_query * self.scale) @ mean_key.transpose(1, 2)).topk(self.topk, -1).indices
        attended = straightforward_core(
            qkv, index, n_win=self.n_win, num_heads=self.num_heads, scale=self.scale, gather=self.gather
        )
        return self.proj(attended + _enhance(self.lepe, value))


class _StraightforwardFullAttention(nn.Module):
    def __init__(self, layer: FullAttention) -> None:
        super().__init__()
        self.qkv, self.lepe, self.proj, self.num_heads = layer.qkv, layer.lepe, layer.proj, layer.num_heads

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = tokens.unbind(0)
        weights = ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)).softmax(-1)
        attended = (weights @ value).transpose(1, 2).reshape(x.shape)
        return self.proj(attended + _enhance(self.lepe, x))


def _enhance(convolution: nn.Conv2d | None, x: Tensor) -> Tensor | int:
    return 0 if convolution is None else convolution(x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)


class _StraightforwardBiFormer(BiFormer):
    def forward_stage(self, x: Tensor, stage: int) -> Tensor:
        return self.stages[stage](self.downsample_layers[stage](x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def straightforward_model(model: BiFormer, gather: Gather) -> BiFormer:
    """Return a copy of an NHWC model with every attention replaced, and images left in their own memory layout."""
    plain = copy.deepcopy(model)
    plain.__class__ = _StraightforwardBiFormer
    for block in plain.modules():
        if isinstance(block, BiFormerBlock) and isinstance(block.attn, BiLevelRoutingAttention):
            block.attn = StraightforwardAttention(block.attn, gather)
        elif isinstance(block, BiFormerBlock) and isinstance(block.attn, FullAttention):
            block.attn = _StraightforwardFullAttention(block.attn)
    return plain
