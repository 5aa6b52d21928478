"""Bi-level routing attention as a layer (BiFormer, sec. 3.2).

The work on tokens is `visionkernels.ops.region_attention`; this module projects, pads, routes and adds the local
enhancement (`lepe`, a depth-wise convolution of the values).
"""

# B batch, H W map, C channels, S = n_win, R = regions

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from biformer.maps import (
    DataFormat,
    checked_nhwc,
    convolve,
    depthwise,
    grid_of,
    pad_to_multiple,
    pointwise,
)
from biformer.routing import Routing, pool_regions, select_regions
from visionkernels.checks import InputError, check, check_choice
from visionkernels.modules import is_plain
from visionkernels.ops import Backend, choose_backend, without_autocast
from visionkernels.ops.region_attention import (
    region_attention,
    region_attention_packed,
    region_attention_weights,
    region_view,
)

__all__ = [
    "BiLevelRoutingAttention",
    "KeyValueDownsampling",
    "PadMode",
]

PadMode = Literal["official", "masked"]
KeyValueDownsampling = Literal["identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool"]


@register_notrace_module
class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention: each region attends to the tokens of the `topk` regions that are most similar to it.

        index = topk(mean_r(Q) mean_r(K)^T),   out = proj(attend(Q, K[index], V[index]) + lepe(V))

    Takes and returns [B, H, W, dim] ("NHWC") or [B, dim, H, W] ("NCHW"), divided into n_win x n_win regions.

    - `qk_dim` (default: dim) is the number of query and key channels. `qk_scale` defaults to qk_dim ** -0.5, of the
      full width and not of a head, as the released weights require.
    - `side_dwconv` is the odd kernel of lepe; 0 disables it. `param_attention="qkv"` omits the output projection.
    - `auto_pad` zero-pads the input at the right and bottom to multiples of n_win. With `pad_mode="official"` the
      padding takes part, as in the released models; "masked" excludes it from means, softmax and lepe, so that topk may
      exceed the number of regions with pixels. Both are equal at divisible sizes.
    - `kv_downsample_mode` pools keys and values inside each region: adaptively to kv_per_win x kv_per_win
      ("ada_avgpool", "ada_maxpool") or by kv_downsample_ratio ("avgpool", "maxpool").
    - `soft_routing` multiplies the keys and values of a slot by its routing weight. `diff_routing` passes gradients to
      the routing and requires soft_routing. `param_routing` adds a Linear before the affinity and requires both.

    "NCHW" is the later official form: 1x1 convolutions, regions of (H // n_win, W // n_win) pixels however many these
    are, zero padding after the projection, lepe on the unpadded values. It equals NHWC at divisible sizes.

    Raises ValueError for arguments outside these ranges, and at call time for a shape that does not fit; TypeError
    for integer input; NotImplementedError for diff_routing without soft_routing, which the paper does not define.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        topk: int = 4,
        *,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        side_dwconv: int = 5,
        auto_pad: bool = True,
        pad_mode: PadMode = "official",
        param_attention: Literal["qkvo", "qkv"] = "qkvo",
        kv_downsample_mode: KeyValueDownsampling = "identity",
        kv_per_win: int | None = None,
        kv_downsample_ratio: int | None = None,
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        data_format: DataFormat = "NHWC",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        qk_dim = dim if qk_dim is None else qk_dim
        check(qk_dim >= 1, "qk_dim", qk_dim, "at least 1")
        check_choice("pad_mode", pad_mode, PadMode)
        check_choice("data_format", data_format, DataFormat)
        check_choice("backend", backend, Backend)
        check_choice("kv_downsample_mode", kv_downsample_mode, KeyValueDownsampling)
        check_choice("param_attention", param_attention, Literal["qkvo", "qkv"])
        for name, value in (("dim", dim), ("qk_dim", qk_dim)):
            if value % num_heads:
                raise InputError(f"{name}={value} is not divisible by num_heads={num_heads}")
        if n_win < 1:
            raise InputError(f"n_win={n_win} must be at least 1")
        if data_format == "NHWC" and not 1 <= topk <= n_win**2:
            raise InputError(f"topk={topk} is outside [1, {n_win**2}], the regions of a {n_win}x{n_win} grid")
        if topk < 1:
            raise InputError(f"topk={topk} must be at least 1")
        if diff_routing and not soft_routing:
            raise NotImplementedError(
                "diff_routing without soft_routing has no gradient to pass; set soft_routing=True"
            )
        if param_routing and not diff_routing:
            raise InputError("param_routing=True has nothing to learn from without diff_routing=True")
        self.dim, self.qk_dim, self.num_heads, self.n_win, self.topk = dim, qk_dim, num_heads, n_win, topk
        self.scale = qk_dim**-0.5 if qk_scale is None else qk_scale
        self.auto_pad, self.pad_mode, self.data_format, self.backend = auto_pad, pad_mode, data_format, backend
        self.diff_routing, self.soft_routing = diff_routing, soft_routing
        self.pooling = _key_value_pooling(kv_downsample_mode, kv_per_win, kv_downsample_ratio)
        if pad_mode == "masked" and self.pooling is not None:
            raise InputError(f"pad_mode='masked' has no meaning with kv_downsample_mode={kv_downsample_mode!r}")
        self.qkv = pointwise(dim, 2 * qk_dim + dim, data_format)
        self.lepe = depthwise(dim, side_dwconv)
        self.proj = pointwise(dim, dim, data_format) if param_attention == "qkvo" else nn.Identity()
        self.router = nn.Linear(qk_dim, qk_dim) if param_routing else nn.Identity()

    def forward(self, x: Float[Tensor, "batch a b c"]) -> Float[Tensor, "batch a b c"]:
        """Attend within [B, H, W, dim], or [B, dim, H, W] for "NCHW"."""
        x = self.checked_nhwc(x)
        height, width = x.shape[1:3]
        source, qkv, region_size = self._project(x)
        valid_size = self._valid_size(x, qkv)
        index, weight = self._route(source, qkv, region_size, valid_size)
        attended = self._attend(qkv, index, weight, region_size, valid_size)[:, :height, :width]
        if self.lepe is not None:
            value = qkv[..., 2 * self.qk_dim :]
            if self.data_format == "NCHW" or valid_size is not None:
                value = value[:, :height, :width]
            attended = attended + convolve(self.lepe, value)[:, :height, :width]
        if self.data_format == "NCHW":
            return self.proj(attended.permute(0, 3, 1, 2))
        return self.proj(attended)

    def routing(self, x: Float[Tensor, "batch a b c"]) -> Routing:
        """Return routing and attention of the layer for input `x`, computed by the reference."""
        x = self.checked_nhwc(x)
        source, qkv, region_size = self._project(x)
        valid_size = self._valid_size(x, qkv)
        index, weight = self._route(source, qkv, region_size, valid_size)
        grid = grid_of(qkv, region_size)
        query, key, _ = qkv.split([self.qk_dim, self.qk_dim, self.dim], -1)
        attention = region_attention_weights(
            query, key if self.pooling is None else self.pooling(key, grid), index, num_heads=self.num_heads,
            query_grid=grid, scale=self.scale, valid_size=valid_size, slot_weight=weight if self.soft_routing else None,
        )  # fmt: skip
        return Routing(index, weight, attention, grid, region_size)

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}, n_win={self.n_win}, topk={self.topk}, {self.data_format}"

    def checked_nhwc(self, x: Tensor) -> Tensor:
        x = checked_nhwc(x, self.dim, self.data_format)
        height, width = x.shape[1:3]
        if self.data_format == "NCHW" and min(height, width) < self.n_win:
            raise InputError(
                f"a {height}x{width} map has a side below n_win={self.n_win}; the NCHW form needs one pixel a region"
            )
        if self.data_format == "NHWC" and not self.auto_pad and (height % self.n_win or width % self.n_win):
            raise InputError(f"a {height}x{width} map is not divisible by n_win={self.n_win}; set auto_pad=True")
        return x

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Return the map to pool for routing, the padded qkv map and the region size; NHWC pads before projecting."""
        height, width = x.shape[1:3]
        if self.data_format == "NCHW":
            region_size = (height // self.n_win, width // self.n_win)
            qkv = self.qkv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return x, pad_to_multiple(qkv, region_size), region_size
        region_size = (-(-height // self.n_win), -(-width // self.n_win))
        padded = F.pad(x, (0, 0, 0, region_size[1] * self.n_win - width, 0, region_size[0] * self.n_win - height))
        return padded, self.qkv(padded), region_size

    def _valid_size(self, x: Tensor, qkv: Tensor) -> tuple[int, int] | None:
        if self.pad_mode == "official" or x.shape[1:3] == qkv.shape[1:3]:
            return None
        return x.shape[1], x.shape[2]

    def _route(
        self, source: Tensor, qkv: Tensor, region_size: tuple[int, int], valid_size: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor]:
        is_empty = None
        if valid_size is not None and self.data_format == "NHWC":
            is_empty = _empty_regions(grid_of(qkv, region_size), region_size, valid_size, source.device)
        with torch.set_grad_enabled(self.diff_routing and torch.is_grad_enabled()), without_autocast(source):
            backend = choose_backend("region_routing", self.backend, source)
            if backend == "reference" or not is_plain(self.qkv, nn.Linear, nn.Conv2d):
                counted = valid_size if self.data_format == "NHWC" else (source.shape[1], source.shape[2])
                means = pool_regions(qkv[..., : 2 * self.qk_dim], region_size, counted)
            else:
                # a mean commutes with the projection: project the few means instead of averaging the many projections
                means = pool_regions(source, region_size, None if self.data_format == "NCHW" else valid_size)
                weight, bias = (p[: 2 * self.qk_dim].to(means.dtype) for p in (self.qkv.weight, _bias(self.qkv)))
                means = F.linear(means, weight.flatten(1), bias)
            query, key = (self.router(half) for half in means.chunk(2, -1))
            return select_regions(query, key, self.topk, self.scale, is_empty)

    def _attend(
        self, qkv: Tensor, index: Tensor, weight: Tensor, region_size: tuple[int, int],
        valid_size: tuple[int, int] | None,
    ) -> Tensor:  # fmt: skip
        grid = grid_of(qkv, region_size)
        slot_weight = weight if self.soft_routing else None
        if self.pooling is None:
            return region_attention_packed(
                qkv, index, value_size=self.dim, num_heads=self.num_heads, grid=grid, scale=self.scale,
                valid_size=valid_size, slot_weight=slot_weight, backend=self.backend,
            )  # fmt: skip
        query, key_value = qkv.tensor_split([self.qk_dim], -1)
        key, value = self.pooling(key_value, grid).tensor_split([self.qk_dim], -1)
        return region_attention(
            query, key, value, index, num_heads=self.num_heads, query_grid=grid, scale=self.scale,
            slot_weight=slot_weight, backend=self.backend,
        )  # fmt: skip


class _KeyValuePooling(nn.Module):
    """Pooling of a [B, H, W, C] map inside each region of a grid."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, feature: Tensor, grid: tuple[int, int]) -> Tensor:
        regions = region_view(feature, grid)
        pooled = self.pool(regions.flatten(0, 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        blocks = pooled.unflatten(0, regions.shape[:3])
        return blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _key_value_pooling(mode: str, per_window: int | None, ratio: int | None) -> _KeyValuePooling | None:
    ratio = 1 if ratio is None else ratio
    check(ratio >= 1, "kv_downsample_ratio", ratio, "at least 1")
    if mode == "identity" or (mode in ("avgpool", "maxpool") and ratio == 1):
        return None
    if mode in ("avgpool", "maxpool"):
        return _KeyValuePooling(partial(_pool_by_ratio, pool=_POOLS[mode], ratio=ratio))
    if per_window is None or per_window < 1:
        raise InputError(f"kv_downsample_mode={mode!r} needs kv_per_win >= 1, not {per_window}")
    return _KeyValuePooling(partial(_POOLS[mode], output_size=per_window))


_POOLS: dict[str, Callable[..., Tensor]] = {
    "avgpool": F.avg_pool2d,
    "maxpool": F.max_pool2d,
    "ada_avgpool": F.adaptive_avg_pool2d,
    "ada_maxpool": F.adaptive_max_pool2d,
}


def _pool_by_ratio(regions: Tensor, pool: Callable[..., Tensor], ratio: int) -> Tensor:
    if min(regions.shape[2:]) < ratio:
        raise InputError(f"kv_downsample_ratio={ratio} is larger than a region of {tuple(regions.shape[2:])} tokens")
    return pool(regions, ratio)


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _empty_regions(
    grid: tuple[int, int], region_size: tuple[int, int], valid_size: tuple[int, int], device: torch.device
) -> Tensor:
    rows = torch.arange(grid[0], device=device) * region_size[0] >= valid_size[0]
    columns = torch.arange(grid[1], device=device) * region_size[1] >= valid_size[1]
    return (rows[:, None] | columns).flatten()
