"""Segmentation with G2SD: specific distillation from a teacher's class maps, and training by a recipe (G2SD, sec. 3.3).

The student learns labels, and where in the image the teacher sees each class. Models are those of `g2sd.upernet`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from g2sd.recipes import SegmentationMode, SegmentationRecipe, check_teacher
from g2sd.segmentation_checkpoint import load_official_segmentation, load_segmentation_encoder
from g2sd.segmentation_losses import Reduction, channel_wise_loss, pixel_kl_loss
from g2sd.upernet import SegmentationModel, segmentation_model
from visionkernels.checks import InputError, check, check_choice
from visionkernels.tasks.segmentation import SegmentationSets, SegmentationTask, pixel_loss, shares_norms
from visionkernels.training import FitResult
from visionkernels.training.task import Task

__all__ = [
    "DistilledStudent",
    "SegmentationDistillTask",
    "load_official_segmentation",
    "load_segmentation_encoder",
    "segmentation_model",
    "train",
]


def train(
    recipe: SegmentationRecipe,
    data: str | Path | None,
    out: str | Path,
    *,
    init: str | Path | None = None,
    teacher: str | Path | SegmentationModel | None = None,
) -> FitResult:
    """Train a segmentation model, with a teacher where the recipe has a `mode`; rerun to resume the run in `out`.

    `data` is as for `visionkernels.pictures.scenes.open_scenes`, by default the recipe's own. `init` is a file with the
    encoder to start from, of generic distillation, MAE or a classifier. `teacher` is a model or its file, at the
    recipe's image size. `out`/weights.safetensors holds the student, for `load_official_segmentation`. The metrics are
    those of `visionkernels.tasks.segmentation.evaluate`. Raises InputError for a teacher that the recipe does not take,
    none where it needs one, and batches of one image.
    """
    check_teacher(recipe, teacher)
    is_synced = shares_norms(recipe.fit, recipe.sync_norm, needs="UperNet")
    num_classes = recipe.model.num_classes
    sets = SegmentationSets.open(recipe, data, num_classes=num_classes, install="g2sd-vision[train]")
    torch.manual_seed(recipe.fit.seed)
    trained = sets.record(teacher=type(teacher).__name__ if isinstance(teacher, nn.Module) else teacher)
    model = segmentation_model(img_size=recipe.scene.crop, scene=recipe.scene, **trained.options)
    trained = replace(trained, options={**trained.options, "out_indices": model.backbone.out_indices})
    if init is not None:
        trained = trained.with_details(started_from=load_segmentation_encoder(model.backbone, init))
    task = _task(recipe, model, teacher)
    if is_synced:
        task.trainable_module = nn.SyncBatchNorm.convert_sync_batchnorm(task.trainable_module)
    return sets.fit(task, out, trained)


def _task(recipe: SegmentationRecipe, model: SegmentationModel, teacher: str | Path | SegmentationModel | None) -> Any:
    if teacher is None or recipe.mode is None:
        return SegmentationTask(model, auxiliary_weight=recipe.auxiliary_weight)
    if not isinstance(teacher, SegmentationModel):
        teacher = load_official_segmentation(teacher, img_size=recipe.scene.crop)
    return SegmentationDistillTask(model, teacher, **recipe.settings_of_loss())


class SegmentationDistillTask(Task):
    """Cross-entropy of both heads, as `SegmentationTask`, and a frozen teacher's class maps.

    loss = main + auxiliary_weight auxiliary + weight distillation. Class maps are compared before they are enlarged, by
    `channel_wise_loss` or `pixel_kl_loss` (`mode`, `temperature`, `reduction`). A teacher of other classes is met by a
    1x1 convolution, which is not kept; the channel-wise loss is divided by the student's classes then too. The teacher
    stays in evaluation mode and computes no loss. Raises ValueError for models of different patch grids, and for
    invalid settings.
    """

    def __init__(
        self,
        student: SegmentationModel,
        teacher: SegmentationModel,
        *,
        mode: SegmentationMode = "channel_wise",
        weight: float = 3.0,
        temperature: float = 1.0,
        reduction: Reduction = "batchmean",
        auxiliary_weight: float = 0.4,
    ) -> None:
        super().__init__(DistilledStudent(student, teacher.num_classes), teacher=teacher)
        check_choice("mode", mode, SegmentationMode)
        check_choice("reduction", reduction, Reduction)
        check(temperature > 0, "temperature", temperature, "above 0")
        check(weight >= 0, "weight", weight, "at least 0")
        sizes = [(model.img_size, model.backbone.grid) for model in (teacher, student)]
        if sizes[0] != sizes[1]:
            (theirs, their_grid), (ours, our_grid) = sizes
            raise InputError(
                f"the teacher has {their_grid[0]}x{their_grid[1]} patches of images of {theirs[0]}x{theirs[1]} pixels, "
                f"the student {our_grid[0]}x{our_grid[1]} of {ours[0]}x{ours[1]}; they must be the same"
            )
        self.mode, self.weight, self.temperature, self.reduction = mode, weight, temperature, reduction
        self.auxiliary_weight = auxiliary_weight
        self.share = teacher.num_classes / student.num_classes

    def forward(
        self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch height width"]
    ) -> dict[str, Tensor]:
        """Take images and class indices, 255 for pixels that do not count; return the losses and the main logits."""
        class_maps, aligned = self.trainable_module(images)
        with torch.no_grad():
            target = self.teacher.class_maps(images)[0]
        size = (images.shape[2], images.shape[3])
        logits = [self.teacher.enlarge(maps, size) for maps in class_maps]
        main, *auxiliary = (pixel_loss(head, labels) for head in logits)
        distillation = self._distillation(aligned, target)
        loss = main + self.weight * distillation
        if auxiliary:
            loss = loss + self.auxiliary_weight * sum(auxiliary)
        return {"loss": loss, "main_loss": main, "distillation_loss": distillation, "output": logits[0]}

    def _distillation(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.mode == "channel_wise":
            return self.share * channel_wise_loss(student, teacher, temperature=self.temperature)
        return pixel_kl_loss(student, teacher, temperature=self.temperature, reduction=self.reduction)

    def final_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the student's weights alone."""
        return {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}


class DistilledStudent(nn.Module):
    """A model and, for a teacher of other classes, a 1x1 convolution from its class maps to theirs."""

    def __init__(self, model: SegmentationModel, teacher_classes: int) -> None:
        super().__init__()
        self.model = model
        is_same = teacher_classes == model.num_classes
        self.align = None if is_same else nn.Conv2d(model.num_classes, teacher_classes, 1)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Any:
        """Return logits, or in training the class maps of all heads and the one that the teacher's is compared with."""
        if not self.training:
            return self.model(images)
        class_maps = self.model.class_maps(images)
        return class_maps, class_maps[0] if self.align is None else self.align(class_maps[0])

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's optimisers leave without decay."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's groups of layers, those of the model."""
        return self.model.group_matcher(coarse, prefix="model.")
