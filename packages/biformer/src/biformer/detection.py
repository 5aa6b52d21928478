"""BiFormer in a detector: model, task, and training by a recipe (BiFormer, sec. 4.2).

Detectors are torchvision's, with the paper's settings. What differs from the paper's:

| | the paper's | here |
|---|---|---|
| RetinaNet | loss averaged over the anchors of the batch | over those of each image |
| | level 7 from level 6 as it is | from its ReLU |
| Mask R-CNN | RoIAlign aligned to pixel centres | not aligned |
| | L1 loss of boxes in both stages | smooth L1, beta 1/9 |
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any, cast, get_args

import torch
from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from biformer.model import BiFormerBackbone
from biformer.recipes import DetectionHead, DetectionRecipe
from biformer.segmentation import backbone_model
from visionkernels.checks import InputError, check_known
from visionkernels.tasks.detection import DetectionSets, DetectionTask
from visionkernels.training import FitResult
from visionkernels.weights import Checkpoint, load_strict

__all__ = ["PyramidBackbone", "detection_model", "open_detector", "train"]


def detection_model(
    name: str,
    head: DetectionHead = "retinanet",
    *,
    num_classes: int = 91,
    min_size: int = 800,
    max_size: int = 1333,
    pyramid_channels: int = 256,
    regions_per_image: int = 512,
    init: str | Path | None = None,
    n_win: int = 16,
    **options: Any,
) -> RetinaNet | MaskRCNN:
    """Return a torchvision detector on a BiFormer.

    It takes a list of images [3, H, W] in 0..1 and resizes and pads them to multiples of 32. In training it also takes
    targets (`boxes`, `labels`, `masks`) and returns its losses; in evaluation it returns for each image `boxes`,
    `labels`, `scores`, and from "maskrcnn" `masks` [N, 1, H, W] in 0..1. BatchNorm keeps its statistics.

    Args:
        name: one of the BiFormer models
        head: the detector
        num_classes: classes with the background, class 0
        min_size: shorter side in pixels, unless the longer one would exceed `max_size`
        max_size: largest longer side in pixels
        pyramid_channels: channels of the pyramid, which set the width of the heads
        regions_per_image: proposals that "maskrcnn" learns from, up to a quarter of them on objects
        init: as for `biformer.segmentation.segmentation_model`
        n_win: regions per side
        options: for `timm.create_model`

    Raises ValueError for unknown names, and CheckpointError.
    """
    check_known("head", head, get_args(DetectionHead))
    if num_classes < 2:
        raise InputError(f"num_classes={num_classes} must be at least 2: the background and one kind of object")
    model = backbone_model(name, init, n_win=n_win, **options)
    sizes: dict[str, Any] = {
        "min_size": min_size,
        "max_size": max_size,
        "image_mean": list(IMAGENET_DEFAULT_MEAN),
        "image_std": list(IMAGENET_DEFAULT_STD),
        "size_divisible": 32,
    }
    if head == "retinanet":
        stages = BiFormerBackbone(model, (1, 2, 3), norm_eval=True)
        last = LastLevelP6P7(stages.feature_info[-1]["num_chs"], pyramid_channels)
        last.use_P5 = False  # level 6 comes from the backbone, whatever its width
        # anchors, 4 convolutions a branch, focal loss of gamma 2 and alpha 0.25, and L1 are torchvision's own
        return RetinaNet(PyramidBackbone(stages, pyramid_channels, last), num_classes, detections_per_img=100, **sizes)
    backbone = PyramidBackbone(BiFormerBackbone(model, norm_eval=True), pyramid_channels, LastLevelMaxPool())
    return MaskRCNN(backbone, **_region_heads(pyramid_channels, num_classes, regions_per_image), **sizes)


def _region_heads(channels: int, num_classes: int, regions_per_image: int) -> dict[str, Any]:
    """Return the paper's settings of Mask R-CNN, with its usual widths at 256 channels."""
    levels = [str(level) for level in range(4)]
    return {
        # 8 times the strides 4, 8, 16, 32, 64
        "rpn_anchor_generator": AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5),
        "rpn_post_nms_top_n_train": 1000,
        "box_batch_size_per_image": regions_per_image,
        "box_roi_pool": MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=0),
        "box_head": TwoMLPHead(channels * 7**2, 4 * channels),
        "box_predictor": FastRCNNPredictor(4 * channels, num_classes),
        "mask_roi_pool": MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=0),
        "mask_head": MaskRCNNHeads(channels, [channels] * 4, dilation=1),
        "mask_predictor": MaskRCNNPredictor(channels, channels, num_classes),
    }


class PyramidBackbone(nn.Module):
    """Feature pyramid on the maps of a BiFormer, as torchvision's detectors take it."""

    def __init__(self, stages: BiFormerBackbone, channels: int, last: nn.Module) -> None:
        super().__init__()
        dims = [info["num_chs"] for info in stages.feature_info]
        self.stages, self.out_channels = stages, channels
        self.pyramid = FeaturePyramidNetwork(dims, channels, extra_blocks=cast(Any, last))

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> dict[str, Tensor]:
        """Return the maps of the pyramid by level, finest first."""
        maps = OrderedDict((str(level), stage.contiguous()) for level, stage in enumerate(self.stages(images)))
        return cast(dict[str, Tensor], self.pyramid(maps))


def train(
    recipe: DetectionRecipe, data: str | Path | None, out: str | Path, *, init: str | Path | None = None
) -> FitResult:
    """Train a detector; rerun with the same arguments to resume the run in `out`.

    `data` is as for `visionkernels.pictures.objects.open_objects`, by default the recipe's own; `init` holds weights of
    the backbone. `out`/weights.safetensors opens with `visionkernels.weights.open_trained`. The metrics are those
    of `visionkernels.tasks.detection.evaluate`. Raises as `open_objects`, `detection_model` and
    `visionkernels.training.fit`.
    """
    sets = DetectionSets.open(
        recipe, data, num_classes=recipe.model.num_classes, install="biformer[train,dense]",
        has_masks=recipe.head == "maskrcnn",
    )  # fmt: skip
    torch.manual_seed(recipe.fit.seed)
    trained = sets.record(started_from=init)
    model = detection_model(recipe.model.name, **trained.options, init=init)
    return sets.fit(DetectionTask(model), out, trained)


def open_detector(checkpoint: Checkpoint) -> RetinaNet | MaskRCNN:
    """Return the model of a weights file of `train`, in evaluation mode."""
    assert checkpoint.trained is not None
    model = detection_model(cast(str, checkpoint.trained.model), **checkpoint.trained.options)
    load_strict(model, checkpoint.state, source=checkpoint.path)
    return model.eval()
