"""Segmentation with any model from images [B, 3, H, W] to logits [B, classes, H, W]: loss, inference and metrics."""

from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn import functional as F

from visionkernels.evaluation import own_share
from visionkernels.extras import require
from visionkernels.pictures.recipes import SceneRecipe
from visionkernels.pictures.scenes import IGNORED, Scenes, aligned_size

__all__ = ["SegmentationTask", "evaluate", "pixel_loss", "predict"]


def pixel_loss(
    logits: Float[Tensor, "batch classes height width"], labels: Int[Tensor, "batch height width"]
) -> Float[Tensor, ""]:
    """Return the cross-entropy, in float32: the sum over labelled pixels (not 255), divided by the number of all."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum") / labels.numel()


class SegmentationTask(TrainingTask):
    """Cross-entropy of every pixel, in float32, of a model that gives logits, in training perhaps a list of them.

    The first of a list are the main logits, the others those of auxiliary heads. The sum over labelled pixels is
    divided by the number of all pixels, as in mmsegmentation, so that a batch without labels has loss 0.
    """

    def __init__(self, model: nn.Module, *, auxiliary_weight: float = 0.4) -> None:
        super().__init__(verbose=False)
        self.trainable_module, self.auxiliary_weight = model, auxiliary_weight

    def forward(
        self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch height width"]
    ) -> dict[str, Tensor]:
        """Take images and class indices, 255 for pixels that do not count; return the losses and the main logits."""
        given = self.trainable_module(images)
        logits: list[Tensor] = [given] if isinstance(given, Tensor) else given
        losses = [pixel_loss(each, labels) for each in logits]
        loss = losses[0] + self.auxiliary_weight * sum(losses[1:])
        return {"loss": loss, "main_loss": losses[0], "output": logits[0]}


@torch.inference_mode()
def predict(
    model: nn.Module, image: Float[Tensor, "channels height width"], scene: SceneRecipe
) -> Float[Tensor, "classes height width"]:
    """Return class probabilities for every pixel of a normalised image, by the settings of `scene`.

    The image is resized to `aligned_size`, computed whole or in windows, and the logits are resized back; the mean is
    over `test_scales` and, with `test_flip`, over the mirrored image as well. Raises ValueError for a batch, and for a
    model in training mode.
    """
    if image.ndim != 3:
        raise ValueError(f"image has shape {list(image.shape)}; expected [channels, height, width]")
    if model.training:
        raise ValueError("the model is in training mode, call model.eval() first")
    height, width = image.shape[-2:]
    infer = partial(_slide, crop=scene.crop, stride=scene.stride) if scene.inference == "slide" else _whole
    total: Any = 0
    count = 0
    for scale in scene.test_scales:
        resized = F.interpolate(image[None], aligned_size(height, width, scene, scale), mode="bilinear", antialias=True)
        for is_flipped in (False, True) if scene.test_flip else (False,):
            logits = infer(model, resized.flip(-1)).flip(-1) if is_flipped else infer(model, resized)
            total = total + _resize(logits.float(), (height, width))[0].softmax(0)
            count += 1
    return cast(Tensor, total / count)


def evaluate(
    model: nn.Module,
    scenes: Scenes,
    recipe: SceneRecipe,
    *,
    num_classes: int,
    workers: int = 0,
    show_progress: bool = True,
) -> dict[str, float]:
    """Measure a model on its device by the settings of `recipe`, in percent; several processes share the pictures.

    `miou` is the mean over the classes that occur, in labels or predictions of the whole set, of intersection over
    union; `pixel_accuracy` the share of labelled pixels that are right; `majority_miou` the `miou` of always naming
    the most frequent class. Raises ValueError for pictures without a labelled pixel, and ImportError without
    torchmetrics.
    """
    metrics = require("torchmetrics", "torchmetrics")
    device = next(model.parameters()).device
    confusion = metrics.ConfusionMatrix(task="multiclass", num_classes=max(num_classes, 2), ignore_index=IGNORED).to(
        device
    )
    model.eval()
    for image, labels in own_share(scenes, workers, show_progress=show_progress):
        confusion.update(predict(model, image.to(device), recipe).argmax(0), labels.to(device))
    counts = confusion.compute().double()
    if not counts.any():
        raise ValueError(f"none of the {len(scenes)} pictures has a labelled pixel, so there is nothing to measure")
    truth, named, right = counts.sum(1), counts.sum(0), counts.diagonal()
    union = truth + named - right
    return {
        "miou": 100 * float((right / union)[union > 0].mean()),
        "pixel_accuracy": 100 * float(right.sum() / counts.sum()),
        "majority_miou": 100 * float(truth.max() / truth.sum() / (truth > 0).sum()),
    }


def _whole(model: nn.Module, images: Tensor) -> Tensor:
    return cast(Tensor, model(images))


def _slide(model: nn.Module, images: Tensor, *, crop: int, stride: int) -> Tensor:
    """The mean logits of windows of `crop` pixels a side every `stride` pixels, the last ones moved back inside."""
    height, width = images.shape[-2:]
    total: Tensor | None = None
    count = images.new_zeros(height, width)
    for top in _starts(height, crop, stride):
        for left in _starts(width, crop, stride):
            window = (..., slice(top, top + crop), slice(left, left + crop))
            logits: Tensor = model(images[window])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[window] += logits
            count[window] += 1
    assert total is not None
    return total / count


def _starts(side: int, crop: int, stride: int) -> list[int]:
    steps = max(-(-(side - crop) // stride), 0) + 1
    return [max(min(step * stride, side - crop), 0) for step in range(steps)]


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)
