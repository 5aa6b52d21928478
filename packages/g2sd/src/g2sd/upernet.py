"""UperNet (ECCV 2018) on a plain ViT as G2SD has it: the head, an auxiliary head, and the whole segmentation model.

Names of parameters are mmsegmentation's. The decoder of segmentation-models-pytorch norms every map first, which
official files have no weights for, and names its layers otherwise.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from g2sd.segmentation_backbone import SegmentationBackbone
from visionkernels.checks import InputError, check, check_choice
from visionkernels.pictures.layouts import IGNORED
from visionkernels.pictures.recipes import SceneRecipe

__all__ = ["FCNHead", "SegmentationModel", "Size", "UPerHead", "in_windows", "segmentation_model"]

POOL_SCALES = (1, 2, 3, 6)

Size: TypeAlias = Literal["tiny", "small", "base", "large"]


class SegmentationModel(nn.Module):
    """Takes normalised images [B, 3, H, W] up to `img_size`, returns logits [B, classes, H, W].

    In training it returns a list: these, and those of the auxiliary head. Smaller images are padded by zeros at the
    right and bottom, larger ones are an error: `visionkernels.tasks.segmentation.predict` goes over them in windows, by
    `scene`.
    """

    def __init__(
        self,
        backbone: SegmentationBackbone,
        decode_head: "UPerHead",
        auxiliary_head: "FCNHead | None" = None,
        *,
        scene: SceneRecipe | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.decode_head, self.auxiliary_head = backbone, decode_head, auxiliary_head
        self.img_size, self.num_classes = backbone.img_size, decode_head.conv_seg.out_channels
        self.scene = scene or in_windows(min(self.img_size))

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Any:
        """Return logits at the images' size. Raises ValueError for larger images, and for an empty batch."""
        maps = self.class_maps(images)
        logits = [self.enlarge(class_map, (images.shape[2], images.shape[3])) for class_map in maps]
        return logits if self.training else logits[0]

    def class_maps(self, images: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """Return logits as the heads give them: at a quarter of the patch's stride, in training the auxiliary's too.

        Their sides are those of `img_size`, padding included.
        """
        if images.ndim == 4 and len(images):
            height, width = self.img_size
            below, right = height - images.shape[2], width - images.shape[3]
            images = F.pad(images, (0, right, 0, below)) if min(below, right) >= 0 else images
        maps = self.backbone(images)
        logits: list[Tensor] = [self.decode_head(maps)]
        if self.training and self.auxiliary_head is not None:
            logits.append(self.auxiliary_head(maps[2]))
        return logits

    def enlarge(
        self, class_map: Float[Tensor, "batch classes rows columns"], size: tuple[int, int]
    ) -> Float[Tensor, "batch classes height width"]:
        """Return logits of a head at the pixels of images of `size`, (height, width)."""
        return _resized(class_map, self.img_size)[..., : size[0], : size[1]]

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's optimisers leave without decay."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False, *, prefix: str = "") -> dict[str, Any]:
        """Return timm's groups of layers: embeddings, then each block, then everything else."""
        return self.backbone.group_matcher(coarse, prefix=f"{prefix}backbone.")


def in_windows(crop: int, scene: SceneRecipe | None = None) -> SceneRecipe:
    """Return settings for models of `crop` pixels a side: windows two thirds apart, by default as for ADE20K."""
    scene = scene or SceneRecipe(short_side=crop, long_side=4 * crop)
    return replace(scene, crop=crop, inference="slide", stride=max(2 * crop // 3, 1))


class UPerHead(nn.Module):
    """Pools the last map at four scales, adds maps from coarse to fine, and classifies all of them together.

    `channels` is the width of all its layers. Convolutions before BatchNorm start by Kaiming, the classifier normal of
    0.01.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, num_classes: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        *finer, last = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), _ConvNorm(last, channels, 1)) for scale in POOL_SCALES
        )
        self.bottleneck = _ConvNorm(last + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(_ConvNorm(width, channels, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(_ConvNorm(channels, channels, 3) for _ in finer)
        self.fpn_bottleneck = _ConvNorm(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = _classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Float[Tensor, "batch classes height width"]:
        """Return logits at the size of the first map; `maps` come from fine to coarse.

        Raises ValueError in training for one image: BatchNorm after the pool to one pixel needs two.
        """
        *finer, last = maps
        norm = self.bottleneck.bn
        # statistics that processes share are of more than this batch
        if norm.training and len(last) < 2 and not isinstance(norm, nn.SyncBatchNorm):
            raise InputError("batch of 1 image in training; UperNet norms means of whole maps over the batch: use 2")
        pooled = [_resized(module(last), last.shape[2:]) for module in self.psp_modules]
        levels = [lateral(level) for lateral, level in zip(self.lateral_convs, finer, strict=True)]
        levels.append(self.bottleneck(torch.cat([last, *pooled], 1)))
        for place in range(len(levels) - 2, -1, -1):
            levels[place] = levels[place] + _resized(levels[place + 1], levels[place].shape[2:])
        levels[:-1] = [conv(level) for conv, level in zip(self.fpn_convs, levels[:-1], strict=True)]
        size = levels[0].shape[2:]
        joined = torch.cat([level if level.shape[2:] == size else _resized(level, size) for level in levels], 1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(joined)))


class FCNHead(nn.Module):
    """Classifies one map after a 3x3 convolution."""

    def __init__(self, in_channels: int, channels: int, num_classes: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.convs = nn.Sequential(_ConvNorm(in_channels, channels, 3))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = _classifier(channels, num_classes)

    def forward(
        self, features: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Return logits at the size of the map."""
        return self.conv_seg(self.dropout(self.convs(features)))


class _ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


_BLOCKS: dict[int, tuple[int, ...]] = {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}
_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "drop_path_rate": 0.2},
}


def segmentation_model(
    size: Size = "small",
    *,
    num_classes: int = 150,
    img_size: int | tuple[int, int] = 512,
    decoder_channels: int | None = None,
    auxiliary_channels: int | None = 256,
    dropout: float = 0.1,
    scene: SceneRecipe | None = None,
    **options: Any,
) -> SegmentationModel:
    """Return UperNet on a plain ViT with random weights; "tiny", "small", "base" have 11.0, 42.0, 163.9 M of them.

    `options` (`embed_dim`, `depth`, `num_heads`, `patch_size`, `out_indices`, `drop_path_rate`, ...) go to
    `SegmentationBackbone` and replace what `size` sets. `decoder_channels` is by default the backbone's width;
    `auxiliary_channels=None` leaves the auxiliary head out. `scene` says how images are prepared. Raises ValueError
    for sizes that do not fit.
    """
    check_choice("size", size, Size)
    check(1 <= num_classes <= IGNORED, "num_classes", num_classes, f"1 to {IGNORED}, the label of ignored pixels")
    sizes = _SIZES[size] | options
    if sizes["depth"] in _BLOCKS:
        sizes = {"out_indices": _BLOCKS[sizes["depth"]]} | sizes
    backbone = SegmentationBackbone(img_size, **sizes)
    width = backbone.embed_dim
    auxiliary = None
    if auxiliary_channels is not None:
        auxiliary = FCNHead(width, auxiliary_channels, num_classes, dropout=dropout)
    head = UPerHead([width] * 4, width if decoder_channels is None else decoder_channels, num_classes, dropout=dropout)
    return SegmentationModel(backbone, head, auxiliary, scene=scene)
