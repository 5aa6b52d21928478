"""Masked autoencoders (MAE, CVPR 2022) as teachers and as students of generic distillation (G2SD, sec. 3.2).

The encoder sees the visible patches only. For distillation, decoders run on tokens in the order [class, visible,
removed]: blocks do not care for the order, so that nothing is sorted back unless somebody asks (`PatchMask.unshuffle`).
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any, cast

import timm
import torch
from jaxtyping import Float
from timm.layers import Mlp, PatchEmbed
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from g2sd.blocks import attend, create_block, norm_layer
from g2sd.masking import PatchMask, draw_noise, mask_patches
from g2sd.positions import sincos_positions
from visionkernels.checks import InputError, check, check_known
from visionkernels.modules import is_plain, is_untouched
from visionkernels.ops.restore_tokens import restore_tokens

__all__ = ["MaskedAutoencoder", "create_autoencoder", "pixel_loss", "pixel_patches", "pixels_of"]


class MaskedAutoencoder(nn.Module):
    """Encoder of visible patches, decoder of all, and heads: pixels, and with `teacher_decoder_width` features.

    `img_size` and `patch_size` are numbers of pixels or (height, width). Heads from the decoder to the teacher's
    decoder width, and from the encoder to `teacher_width` (which nothing trains, but official files hold it), are MLPs.
    The positional tables are fixed. Raises ValueError for sizes that do not fit each other.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        *,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        teacher_width: int | None = None,
        teacher_decoder_width: int | None = None,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        check(num_classes == 0, "num_classes", num_classes, "0: an autoencoder classifies nothing, see g2sd_vit_*")
        height, width = (img_size,) * 2 if isinstance(img_size, int) else img_size
        patch = (patch_size,) * 2 if isinstance(patch_size, int) else tuple(patch_size)
        if height < 1 or width < 1 or height % patch[0] or width % patch[1]:
            raise InputError(f"img_size={height}x{width} must be a multiple of patch_size={patch[0]}x{patch[1]}")
        for name, dim, heads in (("", embed_dim, num_heads), ("decoder_", decoder_embed_dim, decoder_num_heads)):
            check(heads >= 1, f"{name}num_heads", heads, "at least 1")
            check(dim % heads == 0, f"{name}embed_dim", dim, f"a multiple of {name}num_heads={heads}")
        self.num_classes, self.num_features, self.embed_dim = 0, embed_dim, embed_dim
        self.grad_checkpointing = False
        self.patch_embed: Any = PatchEmbed((height, width), cast(Any, patch), in_chans, embed_dim)
        self.grid: tuple[int, int] = self.patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(create_block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = norm_layer(embed_dim)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_embed_dim, self.grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            create_block(decoder_embed_dim, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch[0] * patch[1] * in_chans)
        self.encoderfeature_pred = None if teacher_width is None else _head(embed_dim, teacher_width)
        self.decoderfeature_pred = (
            None if teacher_decoder_width is None else _head(decoder_embed_dim, teacher_decoder_width)
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Draw all weights: Xavier for matrices, N(0, 0.02) for tokens."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        for token in (self.cls_token, self.mask_token):
            nn.init.normal_(token, std=0.02)

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def decoder_width(self) -> int:
        """Channels of the decoder."""
        return self.decoder_embed.out_features

    def embed(
        self, images: Float[Tensor, "batch channels height width"], mask: PatchMask | None = None
    ) -> Float[Tensor, "masks patches embed_dim"]:
        """Return patches with their positions, with a mask the visible ones: no others are projected.

        Raises ValueError for images of another size, and for a mask that is not for them; see `encode`.
        """
        height, width = self.patch_embed.img_size
        if images.ndim != 4 or not len(images) or images.shape[2:] != (height, width):
            raise InputError(
                f"images have shape {list(images.shape)}; the model takes [batch, channels, {height}, {width}]: resize "
                "them, or create the model with their img_size (load_official interpolates learned positions)"
            )
        if mask is None:
            return self.patch_embed(images) + self.pos_embed[:, 1:]
        if len(mask.ids_shuffle) % len(images) or mask.ids_shuffle.shape[1] != self.num_patches:
            raise InputError(
                f"the mask is for [{', '.join(map(str, mask.ids_shuffle.shape))}] images and patches; expected a "
                f"multiple of {len(images)} images, and {self.num_patches} patches"
            )
        image = torch.arange(len(mask.ids_shuffle), device=images.device)[:, None] % len(images)
        positions = self.pos_embed[0, 1:][mask.visible]
        projection, (rows, columns) = self.patch_embed.proj, self.patch_embed.patch_size
        if not is_plain(projection, nn.Conv2d):
            return self.patch_embed(images)[image, mask.visible] + positions
        pixels = images.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # [B, C, down, rows, across, columns]
        pixels = pixels.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        visible = F.linear(pixels[image, mask.visible].flatten(2), projection.weight.flatten(1), projection.bias)
        return visible + positions

    def encode(
        self, images: Float[Tensor, "batch channels height width"], mask: PatchMask | None = None
    ) -> Float[Tensor, "masks tokens embed_dim"]:
        """Return class and visible tokens before the last norm; without a mask, all patches are visible.

        A mask whose length is a multiple of the batch holds several masks per image: first one for every image, then a
        second one for every image, and so on.
        """
        patches = self.embed(images, mask)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1), patches], 1)
        return self._run(self.blocks, x)

    def decode(
        self, tokens: Float[Tensor, "batch tokens embed_dim"], mask: PatchMask, *, num_blocks: int | None = None
    ) -> Float[Tensor, "batch all_tokens decoder_width"]:
        """Return all tokens, [class, visible, removed], after `num_blocks` of the decoder, by default all.

        `tokens` are those of `encode`. The decoder's own norm is not applied. Raises ValueError for a number of blocks
        that it does not have.
        """
        num_blocks = len(self.decoder_blocks) if num_blocks is None else num_blocks
        check(1 <= num_blocks <= len(self.decoder_blocks), "num_blocks", num_blocks, f"1 to {len(self.decoder_blocks)}")
        known = self.decoder_embed(self.norm(tokens))
        positions, width = self.decoder_pos_embed[0], self.decoder_width
        ids = mask.ids_shuffle[:, :, None].expand(-1, -1, width)
        places = positions[1:].expand(len(known), -1, -1).gather(1, ids)
        first_place = positions[:1].expand(len(known), -1, -1)
        known = known + torch.cat([first_place, places[:, : mask.num_visible]], 1)
        removed = self.mask_token + places[:, mask.num_visible :]
        x = torch.cat([known, removed.to(known.dtype)], 1)
        first, *others = cast(list[Any], self.decoder_blocks[:num_blocks])
        if not _runs_as_written(first):
            return self._run((first, *others), x)
        # a removed patch enters as its position alone, whatever the image: its projections come from one table
        table = first.attn.qkv(first.norm1(self.mask_token[0] + positions[1:]))
        rows = table[mask.ids_shuffle[:, mask.num_visible :]]
        x = attend(first, x, torch.cat([first.attn.qkv(first.norm1(known)), rows], 1))
        return self._run(others, x)

    def _run(self, blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint_seq(list(blocks), x))
        for block in blocks:
            x = block(x)
        return x

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of storing their activations."""
        self.grad_checkpointing = enable

    def forward_features(self, images: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Return normed tokens of whole images, [batch, 1 + patches, width]."""
        return self.norm(self.encode(images))

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "batch patches"] | None = None,
        *,
        mask_ratio: float = 0.75,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "batch patches pixels"], PatchMask]:
        """Return the pixels of all patches, in the order of the image, and the mask; see `pixel_loss`."""
        if noise is None:
            noise = draw_noise(len(images), self.num_patches, generator=generator, device=images.device)
        mask = mask_patches(noise, mask_ratio)
        known = self.decoder_embed(self.norm(self.encode(images, mask)))
        x = restore_tokens(known, self.mask_token.view(-1), self.decoder_pos_embed[0], mask.ids_restore)
        x = self._run(self.decoder_blocks, x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:], mask


def _runs_as_written(block: Any) -> bool:
    return type(block) is Block and is_untouched(block) and is_untouched(block.attn)


def _head(width: int, target_width: int) -> Mlp:
    return Mlp(width, target_width, target_width)


def pixel_patches(
    images: Float[Tensor, "batch channels height width"], patch_size: tuple[int, int]
) -> Float[Tensor, "batch patches pixels"]:
    """Cut images into patches, row by row; values of a patch are ordered (row, column, channel)."""
    batch, channels, height, width = images.shape
    rows, columns = patch_size
    if height % rows or width % columns:
        raise InputError(f"images of {height}x{width} pixels do not divide into patches of {rows}x{columns}")
    cut = images.view(batch, channels, height // rows, rows, width // columns, columns)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, rows * columns * channels)


def pixels_of(
    patches: Float[Tensor, "batch patches pixels"], grid: tuple[int, int], patch_size: tuple[int, int]
) -> Float[Tensor, "batch channels height width"]:
    """Put patches of a grid (rows, columns) back together: the inverse of `pixel_patches`."""
    (down, across), (rows, columns) = grid, patch_size
    cut = patches.view(len(patches), down, across, rows, columns, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, down * rows, across * columns)


def pixel_loss(
    prediction: Float[Tensor, "batch patches pixels"],
    patches: Float[Tensor, "batch patches pixels"],
    removed: Float[Tensor, "batch patches"],
    *,
    is_normalised: bool = True,
) -> Float[Tensor, ""]:
    """Return the mean squared error of the removed patches (MAE, sec. 3), in float32.

    With `is_normalised` the target is (p - mean) / sqrt(var + 1e-6) of each patch, with the unbiased variance. Raises
    ValueError where no patch is removed.
    """
    if not removed.any():
        raise InputError("removed is all zero; the loss is a mean over removed patches: use a larger mask_ratio")
    prediction, target = prediction.float(), patches.float()
    if is_normalised:
        target = (target - target.mean(2, keepdim=True)) / (target.var(2, keepdim=True) + 1e-6).sqrt()
    return ((prediction - target).square().mean(2) * removed).sum() / removed.sum()


def _sizes(
    width: int, depth: int, heads: int, decoder: int, decoder_depth: int, decoder_heads: int, **others: Any
) -> dict[str, Any]:
    return {
        "embed_dim": width, "depth": depth, "num_heads": heads, "decoder_embed_dim": decoder,
        "decoder_depth": decoder_depth, "decoder_num_heads": decoder_heads, **others,
    }  # fmt: skip


_TINY, _SMALL, _BASE = (192, 12, 3), (384, 12, 6), (768, 12, 12)
_VARIANTS: dict[str, dict[str, Any]] = {
    "mae_vit_tiny_patch16": _sizes(*_TINY, 128, 4, 4),
    "mae_vit_tiny_patch16_dec128d4b": _sizes(*_TINY, 128, 4, 4),
    "mae_vit_tiny_patch16_12h_dec128d4b": _sizes(192, 12, 12, 128, 4, 4),
    "mae_vit_tiny_patch16_dec64d4b": _sizes(*_TINY, 64, 4, 4),
    "mae_vit_small_patch16": _sizes(*_SMALL, 256, 4, 8),
    "mae_vit_small_patch16_dec192d4b": _sizes(*_SMALL, 192, 4, 8),
    **{
        f"mae_vit_small_patch16_dec{width}d{depth}b": _sizes(*_SMALL, width, depth, heads)
        for width, heads in ((128, 4), (256, 8), (512, 16))
        for depth in (2, 4, 8)
    },
    "mae_vit_base_patch16": _sizes(*_BASE, 512, 8, 16),
    "mae_vit_base_patch16_dec512d8b": _sizes(*_BASE, 512, 8, 16),
    "mae_vit_base_patch16_dec512d4b": _sizes(*_BASE, 512, 4, 16),
    "mae_vit_base_patch16_dec256d4b": _sizes(*_BASE, 256, 4, 8),
    "mae_vit_large_patch16_dec512d8b": _sizes(1024, 24, 16, 512, 8, 16),
    "mae_vit_huge_patch14_dec512d8b": _sizes(1280, 32, 16, 512, 8, 16, patch_size=14),
}
_CFG = {
    "url": "", "num_classes": 0, "input_size": (3, 224, 224), "pool_size": None, "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "first_conv": "patch_embed.proj", "classifier": (),
    "fixed_input_size": True,
}  # fmt: skip
default_cfgs = generate_default_cfgs(dict.fromkeys(_VARIANTS, _CFG))


def create_autoencoder(name: str, **options: Any) -> MaskedAutoencoder:
    """Return a registered autoencoder with random weights; `options` replace its sizes. ValueError for other names."""
    check_known("masked autoencoder", name, _VARIANTS)
    model = timm.create_model(name, **options)
    assert isinstance(model, MaskedAutoencoder)
    return model


def _entry_point(name: str, sizes: dict[str, Any]) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        for option in ("features_only", "out_indices"):
            given = kwargs.get(option)
            check(not given, option, given, "left out: take feature maps from g2sd_vit_*, which has this encoder")
        model: nn.Module = build_model_with_cfg(MaskedAutoencoder, name, pretrained, **(sizes | kwargs))
        return model

    create.__module__, create.__name__, create.__qualname__ = __name__, name, name
    create.__doc__ = f"Masked autoencoder of width {sizes['embed_dim']} and {sizes['depth']} blocks."
    return create


for _name, _arguments in _VARIANTS.items():
    setattr(sys.modules[__name__], _name, register_model(_entry_point(_name, _arguments)))
