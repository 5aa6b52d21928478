"""Segmentation with any model from images [B, 3, H, W] to logits [B, classes, H, W]: data, loss, training, metrics."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from visionkernels.checks import InputError, check_size
from visionkernels.export import export_program
from visionkernels.extras import require
from visionkernels.pictures.recipes import SceneRecipe
from visionkernels.pictures.scenes import IGNORED, Scenes, aligned_size, open_scenes
from visionkernels.recipes import FitRecipe, Recipe, data_of
from visionkernels.tasks.sets import LabelledSets
from visionkernels.tasks.sharing import shard_loader
from visionkernels.training.task import Task
from visionkernels.weights import TrainedModel

__all__ = [
    "SegmentationRecipe",
    "SegmentationSets",
    "SegmentationTask",
    "evaluate",
    "evaluate_trained",
    "export",
    "pixel_loss",
    "predict",
    "shares_norms",
]


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(Recipe):
    """A training on images with a class for every pixel."""

    scene: SceneRecipe = field(default_factory=SceneRecipe)


@dataclass(frozen=True)
class SegmentationSets(LabelledSets):
    """Images with a class per pixel; `source` is as `visionkernels.pictures.scenes.open_scenes` takes it."""

    recipe: SegmentationRecipe
    train: Scenes
    validation: Scenes

    @classmethod
    def open(
        cls, recipe: SegmentationRecipe, data: str | Path | None, *, num_classes: int, install: str
    ) -> "SegmentationSets":
        """Open `data`, by default the recipe's own. Raises ImportError with the pip line, and as `open_scenes`."""
        for module in ("accelerate", "torchmetrics"):
            require(module, install)
        source = data_of(recipe, data)
        train, validation = (
            open_scenes(source, split, recipe.scene, num_classes=num_classes) for split in ("train", "validation")
        )
        return cls(recipe, source, num_classes, train, validation)

    def measure(
        self, model: nn.Module, *, workers: int = 0, known: Mapping[str, float] | None = None
    ) -> Mapping[str, float]:
        """Return the metrics of a model on the validation images; `known` are metrics that are reported with them."""
        scene = self.recipe.scene
        measured = evaluate(model, self.validation, scene, num_classes=self.num_classes, workers=workers)
        return {**measured, **(known or {})}


def shares_norms(fit: FitRecipe, sync_norm: bool, *, needs: str | None) -> bool:
    """Tell whether BatchNorm shares its statistics between processes, which GPUs do.

    Raises InputError where a norm of the decoder `needs` (None: there is none) would see a single image.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    is_synced = sync_norm and processes > 1 and fit.device != "cpu" and torch.cuda.is_available()
    together = fit.batch_size // (fit.accumulation_steps * (1 if is_synced else processes))
    if needs is not None and together < 2:
        raise InputError(f"batch_size={fit.batch_size} norms {together} pictures at a time; {needs} needs 2")
    return is_synced


def pixel_loss(
    logits: Float[Tensor, "batch classes height width"], labels: Int[Tensor, "batch height width"]
) -> Float[Tensor, ""]:
    """Return the cross-entropy, in float32: the sum over labelled pixels (not 255), divided by the number of all."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum") / labels.numel()


class SegmentationTask(Task):
    """Cross-entropy of every pixel, in float32, of a model that gives logits, in training perhaps a list of them.

    The first of a list are the main logits, the others those of auxiliary heads. The sum over labelled pixels is
    divided by the number of all pixels, as in mmsegmentation, so that a batch without labels has loss 0.
    """

    def __init__(self, model: nn.Module, *, auxiliary_weight: float = 0.4) -> None:
        super().__init__(model)
        self.auxiliary_weight = auxiliary_weight

    def forward(
        self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch height width"]
    ) -> dict[str, Tensor]:
        """Take images and class indices, 255 for pixels that do not count; return the losses and the main logits."""
        given = self.trainable_module(images)
        logits: list[Tensor] = [given] if isinstance(given, Tensor) else given
        losses = [pixel_loss(output, labels) for output in logits]
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
        raise InputError(f"image has shape {list(image.shape)}; expected [channels, height, width]")
    if model.training:
        raise InputError("the model is in training mode, call model.eval() first")
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
    for image, labels in shard_loader(scenes, workers, show_progress=show_progress):
        confusion.update(predict(model, image.to(device), recipe).argmax(0), labels.to(device))
    counts = confusion.compute().double()
    if not counts.any():
        raise InputError(f"none of the {len(scenes)} pictures has a labelled pixel, so there is nothing to measure")
    truth, named, right = counts.sum(1), counts.sum(0), counts.diagonal()
    union = truth + named - right
    return {
        "miou": 100 * float((right / union)[union > 0].mean()),
        "pixel_accuracy": 100 * float(right.sum() / counts.sum()),
        "majority_miou": 100 * float(truth.max() / truth.sum() / (truth > 0).sum()),
    }


def evaluate_trained(
    opened: TrainedModel, data: str | Path, *, workers: int = 0, batch_size: int = 1
) -> Mapping[str, float]:
    """Return the metrics of a model on the validation images of `data`, one by one, prepared as it was trained."""
    scene, num_classes = _scene_of(opened), opened.trained.options["num_classes"]
    scenes = open_scenes(data, "validation", scene, num_classes=num_classes)
    return evaluate(opened.model, scenes, scene, num_classes=num_classes, workers=workers)


def export(opened: TrainedModel, path: Path, *, size: tuple[int, int] | None = None, **options: Any) -> str:
    """Write a segmentation model as `visionkernels.export.export_program` does; see `visionkernels.tasks.export`."""
    check_size(size)
    scene, num_classes = _scene_of(opened), opened.trained.options["num_classes"]
    height, width = (scene.crop, scene.crop) if size is None else size
    description = {"model": opened.trained.model, "num_classes": num_classes, "mean": scene.mean, "std": scene.std}
    example = torch.zeros(2, 3, height, width, device=next(opened.model.parameters()).device)
    export_program(opened.model, example, path, description=description, **options)
    return f"images [batch, 3, {height}, {width}] to logits [batch, {num_classes}, {height}, {width}]"


def _scene_of(opened: TrainedModel) -> SceneRecipe:
    own = getattr(opened.model, "scene", None)
    if isinstance(own, SceneRecipe):
        return own
    inputs = opened.trained.inputs
    return SceneRecipe() if inputs is None else SceneRecipe.of_inputs(inputs)


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
