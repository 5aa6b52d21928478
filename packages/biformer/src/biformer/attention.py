"""The attention layers of BiFormer: bi-level routing attention (sec. 3.2), and what stands in for it at `topk` <= 0.

The work on tokens is `visionkernels.ops.region_attention`; this module projects, pads, routes and adds the local
enhancement (`lepe`, a depth-wise convolution of the values).
"""

# B batch, H W map, C channels, S = n_win, R = regions

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from visionkernels.ops import Backend, choose_backend
from visionkernels.ops.region_attention import (
    region_attention,
    region_attention_packed,
    region_attention_weights,
    region_view,
)

from biformer.routing import Routing, pool_regions, select_regions

__all__ = [
    "BiLevelRoutingAttention",
    "ConvolutionalMixer",
    "DataFormat",
    "FullAttention",
    "KeyValueDownsampling",
    "PadMode",
    "regional_routing_attention",
    "regional_routing_attention_weights",
]

DataFormat = Literal["NHWC", "NCHW"]
PadMode = Literal["official", "masked"]
KeyValueDownsampling = Literal["identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool"]


class BiLevelRoutingAttention(nn.Module):
    """Bi-level routing attention: each region attends to the tokens of its `topk` most affine regions.

        index = topk(mean_r(Q) mean_r(K)^T),   out = proj(attend(Q, K[index], V[index]) + lepe(V))

    Takes and returns [B, H, W, dim] ("NHWC") or [B, dim, H, W] ("NCHW"). The map is cut into n_win x n_win regions.

    - `qk_dim` (default dim) channels for query and key; `qk_scale` defaults to qk_dim ** -0.5: the full width, not
      the head's, as the released weights need it.
    - `side_dwconv` is the odd kernel of lepe, 0 for none; `param_attention="qkv"` leaves the output projection out.
    - `auto_pad` zero-pads the input at the right and bottom to multiples of n_win. `pad_mode="official"` lets the
      padding take part as the released models do; "masked" keeps it out of the means, the softmax and lepe, so that
      topk may exceed the regions that hold pixels. Equal at divisible sizes.
    - `kv_downsample_mode` pools keys and values inside each region: adaptively to kv_per_win x kv_per_win
      ("ada_avgpool", "ada_maxpool") or by kv_downsample_ratio ("avgpool", "maxpool").
    - `soft_routing` multiplies the keys and values of a slot by its routing weight; `diff_routing` lets gradients
      into the routing, and needs soft_routing; `param_routing` adds a Linear before the affinity, and needs both.

    "NCHW" is the later official form: 1x1 convolutions, regions of (H // n_win, W // n_win) pixels however many that
    makes, zeros padded after the projection, lepe on the unpadded values. It equals NHWC at divisible sizes.

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
        qk_dim = qk_dim or dim
        _check_choice("pad_mode", pad_mode, PadMode)
        _check_choice("data_format", data_format, DataFormat)
        _check_choice("backend", backend, Backend)
        _check_choice("kv_downsample_mode", kv_downsample_mode, KeyValueDownsampling)
        _check_choice("param_attention", param_attention, Literal["qkvo", "qkv"])
        for name, value in (("dim", dim), ("qk_dim", qk_dim)):
            if value % num_heads:
                raise ValueError(f"{name}={value} is not divisible by num_heads={num_heads}")
        if n_win < 1:
            raise ValueError(f"n_win={n_win} must be at least 1")
        if data_format == "NHWC" and not 1 <= topk <= n_win**2:
            raise ValueError(f"topk={topk} is outside [1, {n_win**2}], the regions of a {n_win}x{n_win} grid")
        if topk < 1:
            raise ValueError(f"topk={topk} must be at least 1")
        if diff_routing and not soft_routing:
            raise NotImplementedError("diff_routing without soft_routing has no gradient to pass; set soft_routing=True")
        if param_routing and not diff_routing:
            raise ValueError("param_routing=True has nothing to learn from without diff_routing=True")
        self.dim, self.qk_dim, self.num_heads, self.n_win, self.topk = dim, qk_dim, num_heads, n_win, topk
        self.scale = qk_dim**-0.5 if qk_scale is None else qk_scale
        self.auto_pad, self.pad_mode, self.data_format, self.backend = auto_pad, pad_mode, data_format, backend
        self.diff_routing, self.soft_routing = diff_routing, soft_routing
        self.pooling = _key_value_pooling(kv_downsample_mode, kv_per_win, kv_downsample_ratio)
        if pad_mode == "masked" and self.pooling is not None:
            raise ValueError(f"pad_mode='masked' has no meaning with kv_downsample_mode={kv_downsample_mode!r}")
        self.qkv = _pointwise(dim, 2 * qk_dim + dim, data_format)
        self.lepe = _depthwise(dim, side_dwconv)
        self.proj = _pointwise(dim, dim, data_format) if param_attention == "qkvo" else nn.Identity()
        self.router = nn.Linear(qk_dim, qk_dim) if param_routing else nn.Identity()

    def forward(self, x: Float[Tensor, "batch a b c"]) -> Float[Tensor, "batch a b c"]:
        """Attend within [B, H, W, dim], or [B, dim, H, W] for "NCHW"."""
        x = self._checked_nhwc(x)
        height, width = x.shape[1:3]
        source, qkv, region_size = self._project(x)
        valid_size = self._valid_size(x, qkv)
        index, weight = self._route(source, qkv, region_size, valid_size)
        attended = self._attend(qkv, index, weight, region_size, valid_size)[:, :height, :width]
        if self.lepe is not None:
            value = qkv[..., 2 * self.qk_dim :]
            if self.data_format == "NCHW" or valid_size is not None:
                value = value[:, :height, :width]
            attended = attended + _convolve(self.lepe, value)[:, :height, :width]
        if self.data_format == "NCHW":
            return self.proj(attended.permute(0, 3, 1, 2))
        return self.proj(attended)

    def routing(self, x: Float[Tensor, "batch a b c"]) -> Routing:
        """Return what the layer routes and attends to for input `x`, attention by the definition."""
        x = self._checked_nhwc(x)
        source, qkv, region_size = self._project(x)
        valid_size = self._valid_size(x, qkv)
        index, weight = self._route(source, qkv, region_size, valid_size)
        grid = _grid(qkv, region_size)
        query, key, _ = qkv.split([self.qk_dim, self.qk_dim, self.dim], -1)
        attention = region_attention_weights(
            query, key if self.pooling is None else self.pooling(key, grid), index, num_heads=self.num_heads, query_grid=grid, key_grid=grid,
            scale=self.scale, valid_size=valid_size, slot_weight=weight if self.soft_routing else None,
        )  # fmt: skip
        return Routing(index, weight, attention, grid, region_size)

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}, n_win={self.n_win}, topk={self.topk}, {self.data_format}"

    def _checked_nhwc(self, x: Tensor) -> Tensor:
        x = _checked_nhwc(x, self.dim, self.data_format)
        height, width = x.shape[1:3]
        if self.data_format == "NCHW" and min(height, width) < self.n_win:
            raise ValueError(f"a {height}x{width} map has a side below n_win={self.n_win}; the NCHW form needs one pixel a region")
        if self.data_format == "NHWC" and not self.auto_pad and (height % self.n_win or width % self.n_win):
            raise ValueError(f"a {height}x{width} map is not divisible by n_win={self.n_win}; set auto_pad=True")
        return x

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Return the map to pool for routing, the padded qkv map and the region size; NHWC pads before projecting."""
        height, width = x.shape[1:3]
        if self.data_format == "NCHW":
            region_size = (height // self.n_win, width // self.n_win)
            qkv = self.qkv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return x, _pad_to_multiple(qkv, region_size), region_size
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
            is_empty = _empty_regions(_grid(qkv, region_size), region_size, valid_size, source.device)
        with torch.set_grad_enabled(self.diff_routing and torch.is_grad_enabled()), _without_autocast(source):
            if choose_backend("region_routing", self.backend, source) == "reference":
                counted = valid_size if self.data_format == "NHWC" else (source.shape[1], source.shape[2])
                means = pool_regions(qkv[..., : 2 * self.qk_dim], region_size, counted)
            else:
                # a mean commutes with the projection: project the few means instead of averaging the many projections
                means = pool_regions(source, region_size, None if self.data_format == "NCHW" else valid_size)
                weight, bias = self.qkv.weight[: 2 * self.qk_dim].flatten(1), self.qkv.bias[: 2 * self.qk_dim]
                means = F.linear(means, weight.to(means.dtype), bias.to(means.dtype))
            query, key = (self.router(half) for half in means.chunk(2, -1))
            return select_regions(query, key, self.topk, self.scale, is_empty)

    def _attend(
        self, qkv: Tensor, index: Tensor, weight: Tensor, region_size: tuple[int, int],
        valid_size: tuple[int, int] | None,
    ) -> Tensor:  # fmt: skip
        grid = _grid(qkv, region_size)
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


class FullAttention(nn.Module):
    """Attention among all tokens of the map, with 8 heads whatever the stage: the last stage of every released model.

    Takes and returns the map in `data_format`. `side_dwconv` is the odd kernel of the local enhancement, 0 for none.
    It acts on the layer's input in the NHWC form and on the values in the NCHW form, as the released weights need it.
    """

    def __init__(self, dim: int, *, side_dwconv: int = 5, data_format: DataFormat = "NHWC") -> None:
        super().__init__()
        _check_choice("data_format", data_format, DataFormat)
        self.num_heads = 8
        if dim % self.num_heads:
            raise ValueError(f"dim={dim} is not divisible by the {self.num_heads} heads of full attention")
        self.dim, self.data_format = dim, data_format
        self.qkv = _pointwise(dim, 3 * dim, data_format, bias=False)
        self.lepe = _depthwise(dim, side_dwconv)
        self.proj = _pointwise(dim, dim, data_format)

    def forward(self, x: Float[Tensor, "batch a b c"]) -> Float[Tensor, "batch a b c"]:
        """Attend within [B, H, W, dim], or [B, dim, H, W] for "NCHW"."""
        x = _checked_nhwc(x, self.dim, self.data_format)
        is_nchw = self.data_format == "NCHW"
        qkv = self.qkv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if is_nchw else self.qkv(x)
        query, key, value = (
            part.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        if self.lepe is not None:
            attended = attended + _convolve(self.lepe, qkv[..., 2 * self.dim :] if is_nchw else x)
        return self.proj(attended.permute(0, 3, 1, 2) if is_nchw else attended)


class ConvolutionalMixer(nn.Module):
    """What a block holds at `topk=0` in place of attention: 1x1, 5x5 depth-wise and 1x1 convolutions of [B, H, W, dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.conv_in = nn.Conv2d(dim, dim, 1)
        self.depthwise = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        """Mix [B, H, W, dim]."""
        x = _checked_nhwc(x, self.dim, "NHWC").permute(0, 3, 1, 2)
        return self.conv_out(self.depthwise(self.conv_in(x))).permute(0, 2, 3, 1)


def regional_routing_attention(
    query: Float[Tensor, "batch channels height width"],
    key: Float[Tensor, "batch channels key_height key_width"],
    value: Float[Tensor, "batch channels key_height key_width"],
    region_graph: Int[Tensor, "batch heads regions topk"],
    region_size: tuple[int, int],
    *,
    scale: float,
    kv_region_size: tuple[int, int] | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "batch channels height width"]:
    """Attend from each query region to the key regions that `region_graph` names for it, head by head.

    The functional form of the later official code: channels first, one graph a head, key and value on a map of their
    own size with regions of `kv_region_size` (default `region_size`). Maps are zero-padded at the right and bottom to
    multiples of their region size; padded keys take part with logit 0. Raises ValueError for shapes that disagree or
    an index outside the key regions, TypeError for dtypes.
    """
    heads, (query, key, value) = _split_heads(region_graph, region_size, kv_region_size, query, key, value)
    attended = region_attention(
        query.padded, key.padded, value.padded, region_graph.flatten(0, 1), num_heads=1, query_grid=query.grid,
        key_grid=key.grid, scale=scale, backend=backend,
    )  # fmt: skip
    attended = attended[:, : query.size[0], : query.size[1]].permute(0, 3, 1, 2)
    return attended.unflatten(0, (-1, heads)).flatten(1, 2)


def regional_routing_attention_weights(
    query: Float[Tensor, "batch channels height width"],
    key: Float[Tensor, "batch channels key_height key_width"],
    region_graph: Int[Tensor, "batch heads regions topk"],
    region_size: tuple[int, int],
    *,
    scale: float,
    kv_region_size: tuple[int, int] | None = None,
) -> Float[Tensor, "batch heads regions tokens keys"]:
    """Return the softmax weights of `regional_routing_attention`; keys in slot order, then row by row in a region."""
    heads, (query, key) = _split_heads(region_graph, region_size, kv_region_size, query, key)
    weights = region_attention_weights(
        query.padded, key.padded, region_graph.flatten(0, 1), num_heads=1, query_grid=query.grid, key_grid=key.grid,
        scale=scale,
    )  # fmt: skip
    return weights[:, :, 0].unflatten(0, (-1, heads))


class _HeadMap(NamedTuple):
    padded: Tensor  # [B * heads, H', W', channels of a head]
    grid: tuple[int, int]
    size: tuple[int, int]  # before padding


def _split_heads(
    region_graph: Tensor, region_size: tuple[int, int], kv_region_size: tuple[int, int] | None, *maps: Tensor
) -> tuple[int, list[_HeadMap]]:
    if region_graph.ndim != 4:
        raise ValueError(f"region_graph has shape {list(region_graph.shape)}; expected [batch, heads, regions, topk]")
    heads, split = region_graph.shape[1], []
    for position, feature in enumerate(maps):
        name = ("query", "key", "value")[position]
        size = region_size if position == 0 else kv_region_size or region_size
        if feature.ndim != 4 or not feature.shape[1] or feature.shape[1] % heads:
            raise ValueError(f"{name} has shape {list(feature.shape)}; expected 4 axes and channels divisible by {heads} heads")
        if min(size) < 1:
            raise ValueError(f"region size {size} of {name} must be at least (1, 1)")
        by_head = feature.unflatten(1, (heads, -1)).flatten(0, 1).permute(0, 2, 3, 1)
        padded = _pad_to_multiple(by_head, size)
        split.append(_HeadMap(padded, _grid(padded, size), (feature.shape[2], feature.shape[3])))
    return heads, split


class _KeyValuePooling(nn.Module):
    """Pools a [B, H, W, C] map inside each region of a grid."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, feature: Tensor, grid: tuple[int, int]) -> Tensor:
        regions = region_view(feature, grid)
        pooled = self.pool(regions.flatten(0, 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        blocks = pooled.unflatten(0, regions.shape[:3])
        return blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _key_value_pooling(mode: str, per_window: int | None, ratio: int | None) -> _KeyValuePooling | None:
    if mode == "identity" or (mode in ("avgpool", "maxpool") and (ratio or 1) <= 1):
        return None
    if mode in ("avgpool", "maxpool"):
        pool = F.avg_pool2d if mode == "avgpool" else F.max_pool2d
        return _KeyValuePooling(partial(_pool_by_ratio, pool=pool, ratio=ratio))
    if not per_window or per_window < 1:
        raise ValueError(f"kv_downsample_mode={mode!r} needs kv_per_win >= 1, not {per_window}")
    pool = F.adaptive_avg_pool2d if mode == "ada_avgpool" else F.adaptive_max_pool2d
    return _KeyValuePooling(partial(pool, output_size=per_window))


def _pool_by_ratio(regions: Tensor, pool: Callable[..., Tensor], ratio: int) -> Tensor:
    if min(regions.shape[2:]) < ratio:
        raise ValueError(f"kv_downsample_ratio={ratio} is larger than a region of {tuple(regions.shape[2:])} tokens")
    return pool(regions, ratio)


def _check_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(get_args(choices))}")


def _checked_nhwc(x: Tensor, dim: int, data_format: DataFormat) -> Tensor:
    """Check a map in `data_format` and return it channels last."""
    layout = "[batch, height, width, dim]" if data_format == "NHWC" else "[batch, dim, height, width]"
    if x.ndim != 4:
        raise ValueError(f"input has shape {list(x.shape)}; expected {layout}")
    if not x.is_floating_point():
        raise TypeError(f"input is {x.dtype}; expected a floating-point map")
    nhwc = x if data_format == "NHWC" else x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    if nhwc.shape[-1] != dim:
        raise ValueError(f"input has {nhwc.shape[-1]} channels; expected {layout} with dim={dim}")
    if not nhwc.shape[1] or not nhwc.shape[2]:
        raise ValueError(f"input has empty spatial size {nhwc.shape[1]}x{nhwc.shape[2]}")
    return nhwc


def _pointwise(dim_in: int, dim_out: int, data_format: DataFormat, *, bias: bool = True) -> nn.Linear | nn.Conv2d:
    if data_format == "NHWC":
        return nn.Linear(dim_in, dim_out, bias=bias)
    return nn.Conv2d(dim_in, dim_out, 1, bias=bias)


def _depthwise(dim: int, kernel: int) -> nn.Conv2d | None:
    if kernel <= 0:
        return None
    if kernel % 2 == 0:
        raise ValueError(f"side_dwconv={kernel} is even; the local enhancement needs an odd kernel, or 0 for none")
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)


def _convolve(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve [B, H, W, C]; a view of channels-last memory, the layout that depth-wise convolutions are fastest in."""
    return convolution(x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)


def _grid(feature: Tensor, region_size: tuple[int, int]) -> tuple[int, int]:
    return feature.shape[1] // region_size[0], feature.shape[2] // region_size[1]


def _pad_to_multiple(feature: Tensor, region_size: tuple[int, int]) -> Tensor:
    return F.pad(feature, (0, 0, 0, -feature.shape[2] % region_size[1], 0, -feature.shape[1] % region_size[0]))


def _empty_regions(
    grid: tuple[int, int], region_size: tuple[int, int], valid_size: tuple[int, int], device: torch.device
) -> Tensor:
    rows = torch.arange(grid[0], device=device) * region_size[0] >= valid_size[0]
    columns = torch.arange(grid[1], device=device) * region_size[1] >= valid_size[1]
    return (rows[:, None] | columns).flatten()


def _without_autocast(x: Tensor) -> AbstractContextManager[None]:
    if x.is_meta:
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
