"""The plain ViT of G2SD's segmentation models: relative position biases, layer scale, and maps at four strides.

Names of parameters are the official ones (BEiT's backbone of mmsegmentation); the index of the biases, which official
files hold once a block, is computed (`relative_index`).
"""

# N tokens: the class token, then the patches row by row; R rows of a bias table

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from timm.layers import DropPath, PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

from g2sd.blocks import LeanMlp, norm_layer
from visionkernels.checks import InputError, check

__all__ = ["BiasedAttention", "SegmentationBackbone", "interpolate_biases", "num_biases", "relative_index"]


class SegmentationBackbone(nn.Module):
    """From normalised images of one size to four maps of `embed_dim` channels, a quarter to twice the patch apart.

    The maps are the patches after the blocks `out_indices`, counted from 0; there is no last norm. `img_size` and
    `patch_size` are numbers of pixels or (height, width). `init_values` is where layer scale starts (None: there is
    none), `drop_path_rate` that of the last block. Without `has_relative_bias` attention knows positions from the
    table alone. Linear layers and tables of positions start truncated-normal of 0.02, biases of attention at 0. Raises
    ValueError for sizes that do not fit each other.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 512,
        patch_size: int | tuple[int, int] = 16,
        *,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        out_indices: Sequence[int] = (3, 5, 7, 11),
        init_values: float | None = 1.0,
        drop_path_rate: float = 0.1,
        has_relative_bias: bool = True,
    ) -> None:
        super().__init__()
        size: tuple[int, int] = (img_size,) * 2 if isinstance(img_size, int) else (img_size[0], img_size[1])
        patch: tuple[int, int] = (patch_size,) * 2 if isinstance(patch_size, int) else (patch_size[0], patch_size[1])
        _check_sizes(size, patch, embed_dim, num_heads, depth, out_indices)
        check(0 <= drop_path_rate < 1, "drop_path_rate", drop_path_rate, "in [0, 1)")
        self.img_size, self.embed_dim, self.out_indices = size, embed_dim, tuple(out_indices)
        self.patch_embed = PatchEmbed(size, cast(Any, patch), in_chans, embed_dim)
        self.grid: tuple[int, int] = self.patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        grid = self.grid if has_relative_bias else None
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            _Block(embed_dim, num_heads, mlp_ratio, grid, init_values=init_values, drop_path=rate) for rate in rates
        )
        self.relative_position_index: Tensor | None
        self.register_buffer("relative_position_index", grid and relative_index(grid), persistent=False)
        self.fpn1 = nn.Sequential(_doubling(embed_dim), nn.BatchNorm2d(embed_dim), nn.GELU(), _doubling(embed_dim))
        self.fpn2 = nn.Sequential(_doubling(embed_dim))
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights that loading an encoder replaces."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's optimisers leave without decay."""
        return {"cls_token", "pos_embed"}

    def group_matcher(self, coarse: bool = False, *, prefix: str = "") -> dict[str, Any]:
        """Return timm's groups of layers: embeddings, then each block, then everything else.

        `prefix` precedes the names of the backbone's parameters in a larger model.
        """
        own = re.escape(prefix)
        return {"stem": rf"^{own}(?:cls_token|pos_embed|patch_embed)", "blocks": [(rf"^{own}blocks\.(\d+)", None)]}

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """Return maps at a quarter, half, once and twice the stride of the patches (4, 8, 16, 32 for 16 pixels).

        Raises ValueError for images of another size than `img_size`, and for an empty batch.
        """
        height, width = self.img_size
        if images.ndim != 4 or not len(images) or images.shape[2:] != (height, width):
            raise InputError(
                f"images have shape {list(images.shape)}; the model takes [batch, channels, {height}, {width}], one or "
                "more: predict in windows of this size, or load the file with another img_size, which interpolates"
            )
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], 1) + self.pos_embed
        maps = []
        for number, block in enumerate(self.blocks):
            x = block(x, self.relative_position_index)
            if number in self.out_indices:
                maps.append(x[:, 1:].mT.unflatten(2, self.grid))
        return [self.fpn1(maps[0]), self.fpn2(maps[1]), maps[2], F.max_pool2d(maps[3], 2)]


class _Block(nn.Module):
    """x += gamma_1 attention(norm1(x)), x += gamma_2 MLP(norm2(x))."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        grid: tuple[int, int] | None,
        *,
        init_values: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(width)
        self.attn = BiasedAttention(width, num_heads, grid)
        self.norm2 = norm_layer(width)
        self.mlp = LeanMlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma_1, self.gamma_2 = (
            None if init_values is None else nn.Parameter(torch.full((width,), float(init_values))) for _ in range(2)
        )

    def forward(self, x: Tensor, index: Tensor | None) -> Tensor:
        x = x + self.drop_path(_scaled(self.attn(self.norm1(x), index), self.gamma_1))
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma_2))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


class BiasedAttention(nn.Module):
    """softmax(q k^T / sqrt(d) + bias) v, where the bias depends on where a patch lies as seen from another.

    `grid` are the rows and columns of patches, None for attention without bias. In evaluation without gradients the
    biases [heads, N, N] (12 MB for 3 heads and 1025 tokens) are gathered once and kept until `train` or `eval` is
    called, gradients are wanted, or the table is replaced or changed in place, but not through `.data`.
    """

    def __init__(self, width: int, num_heads: int, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (width // num_heads) ** -0.5
        table = None if grid is None else nn.Parameter(torch.zeros(num_biases(grid), num_heads))
        self.relative_position_bias_table = table
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave kept biases out of copies."""
        return {**self.__dict__, "_kept": None}

    def train(self, mode: bool = True) -> "BiasedAttention":
        """Set the mode, and forget kept biases."""
        self._kept = None
        super().train(mode)
        return self

    def forward(
        self, x: Float[Tensor, "batch tokens width"], index: Int[Tensor, "tokens tokens"] | None
    ) -> Float[Tensor, "batch tokens width"]:
        """Attend, with rows `index` of the table as biases."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None if index is None else self.bias(index, query.dtype)
        # on a CPU the fused form has no gradient for biases, and falls back to a slower one
        if bias is not None and query.device.type == "cpu" and query.requires_grad:
            mixed = ((query * self.scale) @ key.mT + bias).softmax(3) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def bias(self, index: Int[Tensor, "tokens tokens"], dtype: torch.dtype) -> Float[Tensor, "1 heads tokens tokens"]:
        """Return the biases of all pairs, query before key."""
        table = self.relative_position_bias_table
        assert table is not None
        # tensors made in inference mode do not count changes, and a step of a fused optimiser is not counted either
        if torch.compiler.is_compiling():
            return _gathered(table, index, dtype)
        if self.training or torch.is_grad_enabled() or table.is_inference():
            self._kept = None
            return _gathered(table, index, dtype)
        seen = (table.data_ptr(), table._version, table.device, dtype, index.shape)
        if self._kept is None or self._kept[0] != seen:
            self._kept = seen, _gathered(table, index, dtype)
        return self._kept[1]


def _gathered(table: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    # head by head from a short row: several times as fast, with its gradient, as table[index]
    biases = table.to(dtype).t().contiguous().index_select(1, index.flatten())
    return biases.view(1, -1, *index.shape)


def num_biases(grid: tuple[int, int]) -> int:
    """Return the rows of a bias table: steps between patches, class to token, token to class, class to class."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def relative_index(grid: tuple[int, int]) -> Int[Tensor, "tokens tokens"]:
    """Return the row of a bias table for every query (first axis) and key of a grid of (rows, columns).

    Of query i and key j it is (y_i - y_j + rows - 1) (2 columns - 1) + x_i - x_j + columns - 1; the last three rows are
    for the class token as query, as key, and as both.
    """
    rows, columns = grid
    y, x = (side.flatten() for side in torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    steps = (y[:, None] - y + rows - 1) * (2 * columns - 1) + x[:, None] - x + columns - 1
    index = F.pad(steps, (1, 0, 1, 0))
    index[0], index[:, 0], index[0, 0] = (num_biases(grid) - place for place in (3, 2, 1))
    return index


def interpolate_biases(
    table: Float[Tensor, "rows heads"], grid: tuple[int, int], *, source: tuple[int, int]
) -> Float[Tensor, "new_rows heads"]:
    """Resize the patches' part of a bias table from grid `source` to `grid`, bicubically; the last three rows stay.

    Raises ValueError for a table of another grid.
    """
    check(len(table) == num_biases(source), "rows of table", len(table), f"{num_biases(source)} for a grid of {source}")
    if grid == source:
        return table
    steps = table[:-3].t().unflatten(1, (2 * source[0] - 1, 2 * source[1] - 1))[None]
    resized = F.interpolate(steps, (2 * grid[0] - 1, 2 * grid[1] - 1), mode="bicubic", align_corners=False)
    return torch.cat([resized[0].flatten(1).t(), table[-3:]])


def _doubling(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, 2, 2)


def _check_sizes(
    size: tuple[int, int], patch: tuple[int, int], width: int, num_heads: int, depth: int, out_indices: Sequence[int]
) -> None:
    text = " and ".join(f"{side}" for side in size)
    if min(size) < 1 or size[0] % patch[0] or size[1] % patch[1]:
        raise InputError(f"img_size={text} must be multiples of patch_size={patch[0]} and {patch[1]}")
    if size[0] < 2 * patch[0] or size[1] < 2 * patch[1]:
        raise InputError(f"img_size={text} must be two patches of {patch[0]} and {patch[1]} pixels or more a side")
    check(width % num_heads == 0, "embed_dim", width, f"a multiple of num_heads={num_heads}")
    rises = len(out_indices) == 4 and list(out_indices) == sorted({*out_indices}) and out_indices[0] >= 0
    check(rises and out_indices[3] < depth, "out_indices", tuple(out_indices), f"4 rising numbers below depth={depth}")
