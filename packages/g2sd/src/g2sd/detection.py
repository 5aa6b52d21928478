"""Detection with G2SD: imitation of a teacher where it sees objects, and training by a recipe (G2SD, sec. 3.3).

The student learns boxes, classes and masks, and the pyramid and the objectness of a larger detector. Models are those
of `g2sd.mask_rcnn`.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from g2sd.detection_checkpoint import detector_rules, load_detection_encoder, load_official_detection
from g2sd.detection_losses import FeatureAdapter, objectness_weighted_losses
from g2sd.jitter import large_scale_jitter
from g2sd.mask_rcnn import MaskRCNN, Targets, detection_model
from g2sd.recipes import DetectionRecipe, check_teacher
from g2sd.vitdet import LEVELS
from visionkernels.checks import InputError, check
from visionkernels.tasks.detection import DetectionSets, DetectionTask
from visionkernels.training import FitResult
from visionkernels.training.task import Task

__all__ = [
    "DetectionDistillTask",
    "DetectionTask",
    "DistilledDetector",
    "detection_model",
    "load_detection_encoder",
    "load_official_detection",
    "train",
]


def train(
    recipe: DetectionRecipe,
    data: str | Path | None,
    out: str | Path,
    *,
    init: str | Path | None = None,
    teacher: str | Path | MaskRCNN | None = None,
) -> FitResult:
    """Train a detector, with a teacher where the recipe has a `mode`; rerun to resume the run in `out`.

    `data` is as for `visionkernels.pictures.objects.open_objects`, by default the recipe's own. `init` is a file with
    the encoder to start from, of generic distillation, MAE, a classifier or a detector. `teacher` is a detector or its
    file, of the recipe's image size. `out`/weights.safetensors holds the student in detectron2's layout, for
    `load_official_detection`. The metrics are those of `visionkernels.tasks.detection.evaluate`. Raises InputError for
    a teacher that the recipe does not take, and none where it needs one.
    """
    check_teacher(recipe, teacher)
    sets = DetectionSets.open(
        recipe, data, num_classes=recipe.model.num_classes, install="g2sd-vision[train,dense]",
        is_ranked=recipe.is_ranked, steps=large_scale_jitter(recipe.model.img_size, recipe.scale_range),
    )  # fmt: skip
    torch.manual_seed(recipe.fit.seed)
    trained = sets.record(teacher=type(teacher).__name__ if isinstance(teacher, nn.Module) else teacher)
    model = detection_model(**trained.options)
    if init is not None:
        trained = trained.with_details(started_from=load_detection_encoder(model.backbone.net, init))
    task: Any = _PlainTask(model)
    if teacher is not None:
        module = teacher if isinstance(teacher, MaskRCNN) else load_official_detection(teacher)
        task = DetectionDistillTask(model, module, **recipe.settings_of_loss())
    evaluate = partial(_metrics, sets=sets, workers=recipe.fit.num_workers)
    return sets.fit(task, out, trained, evaluate=evaluate)


def _metrics(model: nn.Module, sets: DetectionSets, workers: int) -> Mapping[str, float]:
    return sets.measure(model.model if isinstance(model, DistilledDetector) else model, workers=workers)


class _PlainTask(DetectionTask):
    """Labels alone; weights are saved in detectron2's layout."""

    def final_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return detector_rules().inverse().rename(state)


class DetectionDistillTask(Task):
    """A detector's losses, and those of a frozen teacher's pyramid and objectness.

    loss = the detector's + ramp (feature_weight features + objectness_weight objectness), the two of
    `objectness_weighted_losses`; the ramp rises linearly from 0 to 1 over `ramp_updates`. The teacher stays in
    evaluation mode, sees the same images, and computes nothing but its maps. Each process samples its own regions
    and weight the imitation by what the teacher sees in their own images. Raises ValueError for detectors
    of different image or patch sizes, and for settings that cannot be.
    """

    def __init__(
        self,
        student: MaskRCNN,
        teacher: MaskRCNN,
        *,
        feature_weight: float = 0.001,
        objectness_weight: float = 0.1,
        ramp_updates: int = 500,
    ) -> None:
        super().__init__(DistilledDetector(student, teacher.backbone.out_channels), teacher=teacher)
        check(feature_weight >= 0, "feature_weight", feature_weight, "at least 0")
        check(objectness_weight >= 0, "objectness_weight", objectness_weight, "at least 0")
        check(ramp_updates >= 0, "ramp_updates", ramp_updates, "at least 0")
        sizes = [(model.img_size, model.backbone.net.patch_size) for model in (teacher, student)]
        if sizes[0] != sizes[1]:
            (theirs, their_patch), (ours, our_patch) = sizes
            raise InputError(
                f"the teacher takes images of {theirs} pixels a side in patches of {their_patch}, the student of "
                f"{ours} in patches of {our_patch}; they must be the same"
            )
        check(student is not teacher, "teacher", "the student", "another detector")
        self.feature_weight, self.objectness_weight = feature_weight, objectness_weight
        self.ramp_updates, self.ramp = ramp_updates, 0.0 if ramp_updates else 1.0

    def begin_update(self, update: int, total_updates: int) -> None:
        """Set the ramp for the update with this index, from 0."""
        self.ramp = min(1.0, update / self.ramp_updates) if self.ramp_updates else 1.0

    def forward(  # type: ignore[override]  # lists, since images differ in size
        self, images: Sequence[Tensor], targets: Targets
    ) -> dict[str, Tensor]:
        """Take the training inputs of the detector; return the loss and its parts."""
        losses, prepared, features, objectness = self.trainable_module(images, targets)
        with torch.no_grad():
            target_features, target_objectness = self.teacher.maps(prepared)
        imitation = objectness_weighted_losses(features, target_features, objectness, target_objectness)
        own = torch.stack([loss.float() for loss in losses.values()]).sum()
        weighted = self.feature_weight * imitation.features + self.objectness_weight * imitation.objectness
        parts = {"feature_imitation": imitation.features, "objectness_imitation": imitation.objectness}
        return {"loss": own + self.ramp * weighted, **losses, **parts}

    def final_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the student's weights alone, in detectron2's layout."""
        own = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
        return detector_rules().inverse().rename(own)


class DistilledDetector(nn.Module):
    """A detector and the convolutions from its pyramid to a teacher's of `teacher_channels`."""

    def __init__(self, model: MaskRCNN, teacher_channels: int) -> None:
        super().__init__()
        self.model = model
        self.adapter = FeatureAdapter(model.backbone.out_channels, len(LEVELS), teacher_channels)

    def forward(self, images: Sequence[Tensor], targets: Targets | None = None) -> Any:
        """Return detections, or in training the outputs of the detector with adapted features."""
        if not self.training:
            return self.model(images)
        outputs = self.model.outputs(images, targets or ())
        return outputs._replace(features=self.adapter(outputs.features))

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that timm's optimisers leave without decay."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's groups of layers, those of the detector."""
        return self.model.group_matcher(coarse, prefix="model.")
