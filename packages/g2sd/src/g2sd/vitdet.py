"""ViTDet: a plain vision transformer with windows and relative positions, and its feature pyramid (G2SD, sec. 3.3).

Names of parameters are those of detectron2's ViTDet. Padded tokens of the last windows take part in attention, and the
relative positions meet unscaled queries, as there.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.layers import DropPath, LayerNorm2d, PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from g2sd.blocks import LeanMlp, norm_layer
from g2sd.positions import interpolate_positions
from visionkernels.checks import InputError, check

__all__ = ["LEVELS", "SimpleFeaturePyramid", "ViTDetBackbone", "resize_relative"]

LEVELS = ("p2", "p3", "p4", "p5", "p6")
"""Maps of the pyramid, at strides 4 to 64 of patches of 16 pixels."""


class ViTDetBackbone(nn.Module):
    """Takes normalised images [B, 3, H, W], returns the last map [B, embed_dim, H / patch, W / patch].

    Sides are multiples of the patch; the model is made for `img_size` pixels a side, and interpolates positions for
    others. Blocks of `window_blocks` attend within windows of `window_size` patches a side, the others everywhere.
    """

    def __init__(
        self,
        img_size: int = 1024,
        patch_size: int = 16,
        *,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        window_size: int = 14,
        window_blocks: Sequence[int] = (0, 1, 3, 4, 6, 7, 9, 10),
        pretrain_size: int = 224,
        drop_path_rate: float = 0.1,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        check(patch_size >= 1, "patch_size", patch_size, "at least 1")
        check(img_size % patch_size == 0, "img_size", img_size, f"a multiple of patch_size={patch_size}")
        check(num_heads >= 1, "num_heads", num_heads, "at least 1")
        check(pretrain_size >= patch_size, "pretrain_size", pretrain_size, f"at least patch_size={patch_size}")
        check(0 <= drop_path_rate < 1, "drop_path_rate", drop_path_rate, "in [0, 1)")
        check(embed_dim % num_heads == 0, "embed_dim", embed_dim, f"a multiple of num_heads={num_heads}")
        check(all(0 <= i < depth for i in window_blocks), "window_blocks", tuple(window_blocks), f"in 0 to {depth - 1}")
        check(window_size >= 1, "window_size", window_size, "at least 1")
        grid = img_size // patch_size
        self.img_size, self.patch_size, self.embed_dim = img_size, patch_size, embed_dim
        self.pretrain_grid = pretrain_size // patch_size
        self.patch_embed = PatchEmbed(None, patch_size, in_chans, embed_dim, output_fmt="NHWC", strict_img_size=False)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.pretrain_grid**2, embed_dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList(
            _Block(
                embed_dim, num_heads, mlp_ratio, window_size=window_size if i in window_blocks else 0,
                side=window_size if i in window_blocks else grid, drop_path=drop_path_rate * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch embed_dim rows columns"]:
        """Return the last map. Raises ValueError for sides that are no multiples of the patch."""
        if images.ndim != 4 or any(side % self.patch_size or not side for side in images.shape[2:]):
            raise InputError(
                f"images have shape {list(images.shape)}; sides must be multiples of {self.patch_size} pixels"
            )
        x = self.patch_embed(images)
        grid = (x.shape[1], x.shape[2])
        positions = interpolate_positions(self.pos_embed, grid, source=(self.pretrain_grid,) * 2)[:, 1:]
        x = x + positions.view(1, *grid, -1)
        for block in self.blocks:
            x = block(x)
        return x.permute(0, 3, 1, 2)


class _Block(nn.Module):
    """A pre-norm block on maps [B, H, W, C], its attention perhaps within windows."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, *, window_size: int, side: int, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm_layer(width), norm_layer(width)
        self.attn = _Attention(width, num_heads, side)
        self.mlp = LeanMlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.norm1(x)
        if self.window_size:
            mixed = _join(self.attn(_windows(mixed, self.window_size)), self.window_size, x.shape)
        else:
            mixed = self.attn(mixed)
        x = x + self.drop_path(mixed)
        output: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return output


def _windows(x: Tensor, side: int) -> Tensor:
    """Cut [B, H, W, C] into windows [B * count, side, side, C], with zeros at the right and bottom."""
    height, width, channels = x.shape[1:]
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side)).transpose(2, 3)
    return x.reshape(-1, side, side, channels)


def _join(windows: Tensor, side: int, shape: torch.Size) -> Tensor:
    """Undo `_windows`."""
    batch, height, width, channels = shape
    rows, columns = -(-height // side), -(-width // side)
    x = windows.view(batch, rows, columns, side, side, channels).transpose(2, 3)
    return x.reshape(batch, rows * side, columns * side, channels)[:, :height, :width]


class _Attention(nn.Module):
    """Attention on maps with decomposed relative positions: score += q . R_h[dy] + q . R_w[dx]."""

    def __init__(self, width: int, num_heads: int, side: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, self.head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, self.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        heads = self.qkv(x).view(batch, height * width, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)  # [B, heads, H * W, head_dim]
        map_query = query.unflatten(2, (height, width))
        rows = torch.einsum("bnhwc,hkc->bnhwk", map_query, _relative(self.rel_pos_h, height).to(query.dtype))
        columns = torch.einsum("bnhwc,wkc->bnhwk", map_query, _relative(self.rel_pos_w, width).to(query.dtype))
        bias = (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        output: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, height, width, channels))
        return output


def resize_relative(table: Float[Tensor, "distances head_dim"], length: int) -> Float[Tensor, "new_distances head_dim"]:
    """Return a table of relative positions for `length` distances, interpolated linearly."""
    return table if len(table) == length else F.interpolate(table.T[None], size=length, mode="linear")[0].T


def _relative(table: Tensor, side: int) -> Tensor:
    """Return [side, side, head_dim]: entry (i, k) for query i and key k, the table interpolated to the side."""
    table = resize_relative(table, 2 * side - 1)
    places = torch.arange(side, device=table.device)
    return table[places[:, None] - places[None] + side - 1]


class SimpleFeaturePyramid(nn.Module):
    """Maps p2 to p6 of `out_channels` from the last map of a backbone: strides from a quarter of the patch to four."""

    def __init__(self, net: ViTDetBackbone, out_channels: int = 256) -> None:
        super().__init__()
        check(out_channels >= 1, "out_channels", out_channels, "at least 1")
        self.net, self.out_channels = net, out_channels
        width = net.embed_dim
        double = [nn.ConvTranspose2d(width, width // 2, 2, 2)]
        quadruple = [*double, LayerNorm2d(width // 2), nn.GELU(), nn.ConvTranspose2d(width // 2, width // 4, 2, 2)]
        steps: dict[str, tuple[list[nn.Module], int]] = {
            "simfp_2": (quadruple, width // 4),
            "simfp_3": ([nn.ConvTranspose2d(width, width // 2, 2, 2)], width // 2),
            "simfp_4": ([], width),
            "simfp_5": ([nn.MaxPool2d(2, 2)], width),
        }
        for name, (resize, channels) in steps.items():
            ends = [_NormedConv(channels, out_channels, 1), _NormedConv(out_channels, out_channels, 3)]
            setattr(self, name, nn.Sequential(*resize, *ends))

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> dict[str, Tensor]:
        """Return the maps by name, from the largest to the smallest, in float32 in any precision."""
        last = self.net(images)
        maps = [cast(Any, getattr(self, f"simfp_{level}"))(last) for level in (2, 3, 4, 5)]
        maps = [level.to(torch.promote_types(level.dtype, torch.float32)) for level in maps]
        maps.append(F.max_pool2d(maps[-1], 1, 2))
        return dict(zip(LEVELS, maps, strict=True))


class _NormedConv(nn.Conv2d):
    """A convolution without bias and a norm over channels."""

    def __init__(self, channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = LayerNorm2d(out_channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm(super().forward(x))
        return output
