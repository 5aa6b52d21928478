"""Mask R-CNN on ViTDet's pyramid: torchvision's detector with detectron2's settings (G2SD, sec. 4.2; ViTDet).

What torchvision's own Mask R-CNN computes otherwise is replaced here: anchors are not rounded and have the strides of
the patches, whatever the image's size; regions are pooled around pixel centres with as many samples as they need; boxes
are compared by L1; the region proposals' losses are divided by all anchors that may be drawn; the masks to learn are
binary; and pictures are resized smoothly, as in training. What differs from detectron2 still: the background is class 0
instead of the last, which files of weights do not show; masks are pasted into pictures by torchvision's resizing; boxes
of less than a hundredth of a pixel are dropped; and proposals are ranked by probabilities, whose ties are logits above
17.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_area, roi_align

from g2sd.vitdet import LEVELS, SimpleFeaturePyramid, ViTDetBackbone
from visionkernels.checks import InputError, check, check_choice

__all__ = ["DetectorOutputs", "DetectorSize", "MaskRCNN", "Targets", "detection_model"]

DetectorSize: TypeAlias = Literal["tiny", "small", "base", "large"]

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {
        "embed_dim": 1024, "depth": 24, "num_heads": 16, "drop_path_rate": 0.4,
        "window_blocks": tuple(i for i in range(24) if i % 6 != 5),
    },
}  # fmt: skip
Targets: TypeAlias = Sequence[Mapping[str, Tensor]]


def detection_model(
    size: DetectorSize = "small",
    *,
    num_classes: int = 81,
    img_size: int = 1024,
    pyramid_channels: int = 256,
    head_width: int = 1024,
    regions_per_image: int = 512,
    **options: Any,
) -> "MaskRCNN":
    """Return a detector with random weights; "tiny", "small", "base" have 27.7, 44.5, 110.9 M of them.

    `num_classes` counts the background, class 0. `options` (`embed_dim`, `depth`, `num_heads`, `patch_size`,
    `window_size`, `window_blocks`, `pretrain_size`, `drop_path_rate`) go to `ViTDetBackbone` and replace what
    `size` says. The heads' convolutions have `pyramid_channels`, the boxes' linear layer `head_width`; they learn from
    `regions_per_image` proposals, of which up to a quarter lie on objects. Raises ValueError for sizes that do not fit.
    """
    check_choice("size", size, DetectorSize)
    backbone = ViTDetBackbone(img_size, **(_SIZES[size] | options))
    return MaskRCNN(
        SimpleFeaturePyramid(backbone, pyramid_channels),
        num_classes=num_classes,
        head_width=head_width,
        regions_per_image=regions_per_image,
    )


class DetectorOutputs(NamedTuple):
    """Outputs of a detector for a batch in training."""

    losses: dict[str, Tensor]
    images: Tensor
    """[B, 3, img_size, img_size], normalised and padded."""
    features: list[Tensor]
    """The maps of the pyramid, finest first."""
    objectness: list[Tensor]
    """Logits [B, anchors, H, W] of each map."""


class MaskRCNN(GeneralizedRCNN):  # type: ignore[misc]  # torchvision.models has no types
    """Takes a list of images [3, H, W] in 0..1, as torchvision's detectors do.

    In evaluation they are resized so that the longer side has `img_size` pixels, and padded to a square; the result
    holds for each image `boxes` [N, 4] in its pixels, `labels` and `scores` [N], and `masks` [N, 1, H, W] in 0..1. In
    training they are padded as they are, and with targets (`boxes`, `labels`, `masks`) the result is the losses.
    Weights are float32; autocast takes other types where they do no harm. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self, pyramid: SimpleFeaturePyramid, *, num_classes: int, head_width: int = 1024, regions_per_image: int = 512
    ) -> None:
        check(num_classes >= 2, "num_classes", num_classes, "at least 2: the background and one kind of object")
        check(head_width >= 1, "head_width", head_width, "at least 1")
        check(regions_per_image >= 1, "regions_per_image", regions_per_image, "at least 1")
        net = pyramid.net
        windows = [cast(int, block.window_size) for block in net.blocks]
        check(0 in windows, "window_blocks", tuple(range(len(windows))), "fewer, so that a block attends everywhere")
        grid = net.img_size // net.patch_size
        check(max(windows) <= grid, "window_size", max(windows), f"at most {grid}, the patches of a side")
        strides = [net.patch_size / 4 * 2**level for level in range(len(LEVELS))]
        transform = _Transform(
            min_size=net.img_size,
            max_size=net.img_size,
            image_mean=list(IMAGENET_DEFAULT_MEAN),
            image_std=list(IMAGENET_DEFAULT_STD),
            size_divisible=net.img_size,
            _skip_resize=True,  # training images are already jittered
        )
        proposals = _region_proposals(pyramid.out_channels, strides)
        heads = _region_heads(pyramid.out_channels, strides[:4], num_classes, head_width, regions_per_image)
        super().__init__(pyramid, proposals, heads, transform)
        self.num_classes, self.img_size = num_classes, net.img_size

    def forward(self, images: Sequence[Tensor], targets: Targets | None = None) -> Any:
        """Return detections, or in training losses. Raises ValueError for images and targets that do not fit."""
        self._check(images)
        if not self.training:
            return super().forward(list(images))
        if targets is None:
            raise InputError("targets are missing; in training each image needs boxes, labels and masks")
        return self.outputs(images, targets).losses

    def outputs(self, images: Sequence[Tensor], targets: Targets) -> DetectorOutputs:
        """Return the losses of a batch, and the maps that a teacher's are compared with. Raises as `forward`."""
        self._check(images)
        self._check_targets(images, targets)
        batch, wanted = self.transform(list(images), [dict(target) for target in targets])
        features = self.backbone(batch.tensors)
        with _kept_output(self.rpn.head) as objectness:
            proposals, losses = self.rpn(batch, features, wanted)
        _, more = self.roi_heads(features, proposals, batch.image_sizes, wanted)
        return DetectorOutputs(losses | more, batch.tensors, list(features.values()), objectness)

    def maps(self, images: Float[Tensor, "batch 3 height width"]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the pyramid and the objectness logits of a prepared batch, and compute nothing else."""
        features = list(self.backbone(images).values())
        return features, self.rpn.head(features)[0]

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's optimisers leave without decay."""
        return {"backbone.net.pos_embed"}

    def group_matcher(self, coarse: bool = False, *, prefix: str = "") -> dict[str, Any]:
        """Return timm's groups of layers: embeddings, then each block, then everything else.

        `prefix` precedes the names of the detector's parameters in a larger model.
        """
        own = re.escape(f"{prefix}backbone.net.")
        return {"stem": rf"^{own}(?:pos_embed|patch_embed)", "blocks": [(rf"^{own}blocks\.(\d+)", None)]}

    def _check(self, images: Sequence[Tensor]) -> None:
        if not len(images):
            raise InputError("images are none; give one or more")
        for place, image in enumerate(images):
            shape = list(image.shape)
            if len(shape) != 3 or shape[0] != 3 or 0 in shape or not image.is_floating_point():
                raise InputError(f"image {place} is {shape}, {image.dtype}; expected [3, H, W] of floats in 0..1")
            if self.training and max(shape[1:]) > self.img_size:
                raise InputError(f"image {place} is {shape}, in training at most {self.img_size} pixels a side")

    def _check_targets(self, images: Sequence[Tensor], targets: Targets) -> None:
        if len(targets) != len(images):
            raise InputError(f"targets are {len(targets)} for {len(images)} images")
        for place, (image, target) in enumerate(zip(images, targets, strict=True)):
            if missing := [key for key in ("boxes", "labels", "masks") if key not in target]:
                raise InputError(f"target {place} lacks {', '.join(missing)}")
            boxes, labels, masks = (target[key] for key in ("boxes", "labels", "masks"))
            wanted = ([len(labels), 4], [len(labels), *image.shape[1:]])
            if labels.ndim != 1 or (list(boxes.shape), list(masks.shape)) != wanted:
                shapes = ", ".join(f"{key} {list(target[key].shape)}" for key in ("boxes", "labels", "masks"))
                raise InputError(
                    f"target {place} has {shapes}; expected [N, 4], [N] and [N, {image.shape[1]}, {image.shape[2]}]"
                )
            if not (labels.dtype == torch.int64 and bool(((labels > 0) & (labels < self.num_classes)).all())):
                raise InputError(f"target {place} has labels other than integers of 1 to {self.num_classes - 1}")
            if not bool((boxes.isfinite().all() & (boxes[:, 2:] > boxes[:, :2])).all()):
                raise InputError(
                    f"target {place} has a box without width or height; boxes are left, top, right, bottom"
                )


class _Transform(GeneralizedRCNNTransform):  # type: ignore[misc]  # torchvision.models has no types
    """Resizes smoothly, and rounds sizes; torchvision does neither."""

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        if self.training:
            return cast(Any, super().resize(image, target))
        scale = self.max_size / max(image.shape[1:])
        size = [max(round(side * scale), 1) for side in image.shape[1:]]
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0], target


@contextmanager
def _kept_output(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the objectness that a head computes meanwhile."""
    kept: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, inputs, outputs: kept.extend(outputs[0]))
    try:
        yield kept
    finally:
        handle.remove()


def _region_proposals(channels: int, strides: Sequence[float]) -> "_RegionProposals":
    return _RegionProposals(
        _Anchors(strides),
        _in_float32(RPNHead(channels, 3, conv_depth=2)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 1000, "testing": 1000},
        nms_thresh=0.7,
    )


class _Anchors(AnchorGenerator):  # type: ignore[misc]  # torchvision.models has no types
    """Three anchors a place, of the area of squares of eight strides, with fractions of pixels."""

    def __init__(self, strides: Sequence[float]) -> None:
        super().__init__(tuple((8 * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides))
        self.strides = tuple(strides)

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        # torchvision's strides are whole numbers, from the sizes of image and map
        device = strides[0][0].device
        fixed = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        return cast(list[Tensor], super().grid_anchors(grid_sizes, fixed))

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Tensor:
        heights = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)
        width, height = ((sides[:, None] * sizes / 2).flatten() for sides in (1 / heights, heights))
        return torch.stack([-width, -height, width, height], 1)


class _RegionProposals(RegionProposalNetwork):  # type: ignore[misc]  # torchvision.models has no types
    """Losses of sampled anchors, divided by the number of anchors that may be drawn."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(masks).bool() for masks in self.fg_bg_sampler(labels))
        drawn, wanted = positive | negative, torch.cat(labels)
        classes = F.binary_cross_entropy_with_logits(objectness.flatten()[drawn], wanted[drawn], reduction="sum")
        boxes = F.l1_loss(pred_bbox_deltas[positive], torch.cat(regression_targets)[positive], reduction="sum")
        total = len(labels) * self.fg_bg_sampler.batch_size_per_image
        return classes / total, boxes / total


def _region_heads(
    channels: int, strides: Sequence[float], num_classes: int, head_width: int, regions_per_image: int
) -> "_RegionHeads":
    layers = [channels] * 4
    predictor = FastRCNNPredictor(head_width, num_classes)
    mask_predictor = MaskRCNNPredictor(channels, channels, num_classes)
    for layer, std in (
        (predictor.cls_score, 0.01),
        (predictor.bbox_pred, 0.001),
        (mask_predictor.mask_fcn_logits, 0.001),
    ):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return _RegionHeads(
        box_roi_pool=_AlignedPool(strides, 7),
        box_head=FastRCNNConvFCHead((channels, 7, 7), layers, [head_width], norm_layer=_channel_norm),
        box_predictor=_in_float32(predictor),
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        batch_size_per_image=regions_per_image,
        positive_fraction=0.25,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        mask_roi_pool=_AlignedPool(strides, 14),
        mask_head=MaskRCNNHeads(channels, layers, dilation=1, norm_layer=_channel_norm),
        mask_predictor=_in_float32(mask_predictor),
    )


_channel_norm = partial(LayerNorm2d, eps=1e-6)


class _AlignedPool(nn.Module):
    """Pools regions from the map of their size (T.-Y. Lin and others, 2017), around the centres of its pixels."""

    def __init__(self, strides: Sequence[float], side: int) -> None:
        super().__init__()
        self.strides, self.side = tuple(strides), side

    def forward(
        self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        # of the finer maps, as many as there are strides
        maps = list(features.values())[: len(self.strides)]
        regions = torch.cat([F.pad(box, (1, 0), value=place) for place, box in enumerate(boxes)])
        # a region of 14 x 14 patches belongs to the map of the patches' stride, the third
        octaves = torch.log2(box_area(regions[:, 1:]).sqrt() / (56 * self.strides[0]) + 1e-8) + 2
        levels = octaves.floor().clamp(0, len(maps) - 1)
        pooled = maps[0].new_zeros(len(regions), maps[0].shape[1], self.side, self.side)
        for level, (map_, stride) in enumerate(zip(maps, self.strides, strict=True)):
            places = torch.where(levels == level)[0]
            pooled[places] = roi_align(map_, regions[places], self.side, 1 / stride, sampling_ratio=0, aligned=True)
        return pooled


class _RegionHeads(RoIHeads):  # type: ignore[misc]  # torchvision.models has no types
    """Compares boxes by L1, and learns masks whose pixels are in or out."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            return cast(Any, super().forward(features, proposals, image_shapes))
        regions, matches, labels, deltas = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, regions, image_shapes)
        class_logits, box_deltas = self.box_predictor(self.box_head(pooled))
        classes = torch.cat(labels)
        positive = torch.where(classes > 0)[0]
        box_deltas = box_deltas.unflatten(1, (-1, 4))[positive, classes[positive]]
        boxes = F.l1_loss(box_deltas, torch.cat(deltas)[positive], reduction="sum")
        inside = [label > 0 for label in labels]
        regions = [region[where] for region, where in zip(regions, inside, strict=True)]
        pooled = self.mask_roi_pool(features, regions, image_shapes)
        mask_logits = self.mask_predictor(self.mask_head(pooled))
        mask_logits = mask_logits[torch.arange(len(mask_logits), device=classes.device), classes[positive]]
        assert targets is not None
        wanted = [
            _masks_in(target["masks"], match[where], region, mask_logits.shape[-1])
            for target, match, where, region in zip(targets, matches, inside, regions, strict=True)
        ]
        masks = F.binary_cross_entropy_with_logits(mask_logits, torch.cat(wanted), reduction="sum")
        return [], {
            "loss_classifier": F.cross_entropy(class_logits, classes),
            "loss_box_reg": boxes / len(classes),
            "loss_mask": masks / max(mask_logits.numel(), 1),
        }


def _masks_in(masks: Tensor, places: Tensor, regions: Tensor, side: int) -> Tensor:
    """Return the masks at `places` within their regions, with values 0 and 1."""
    rows = torch.cat([places[:, None].to(regions), regions], 1)
    pooled = roi_align(masks[:, None].to(regions), rows, side, 1.0, sampling_ratio=0, aligned=True)
    return (pooled[:, 0] >= 0.5).to(regions)


def _in_float32(head: Any) -> Any:
    """Make a head return float32 under autocast: boxes are decoded, and losses computed, from what it returns."""
    head.register_forward_hook(_convert)
    return head


def _convert(head: nn.Module, inputs: Any, outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    return type(outputs)(_convert(head, inputs, output) for output in outputs)
