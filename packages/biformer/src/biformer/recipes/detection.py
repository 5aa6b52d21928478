"""Recipes for detection on COCO with the paper's settings (BiFormer, sec. 4.2), and a small one that learns on a CPU.

Detectors are those of `biformer.detection`, close to the paper's but not the same code.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from biformer.recipes.base import BiFormerRecipe, micro_model
from visionkernels.checks import check, check_choice
from visionkernels.pictures.recipes import IMAGE_INPUTS
from visionkernels.recipes import FitRecipe, OptimizerRecipe, Recipe, ScheduleRecipe, settings
from visionkernels.weights import Trained

__all__ = ["DETECTION", "DetectionHead", "DetectionRecipe"]

DetectionHead = Literal["retinanet", "maskrcnn"]


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(Recipe):
    """Training of a detector; `model.num_classes` includes the background, class 0."""

    trainer: ClassVar[str] = "biformer.detection:train"

    model: BiFormerRecipe
    head: DetectionHead
    min_size: int = 800
    """Pixels of the shorter side, unless the longer one would exceed `max_size`."""
    max_size: int = 1333
    pyramid_channels: int = 256
    regions_per_image: int = 512
    """Proposals that the second stage of "maskrcnn" learns from."""

    def record(self, num_classes: int | None = None) -> Trained:
        """Return the record for weights files."""
        options = {
            "head": self.head,
            "min_size": self.min_size,
            "max_size": self.max_size,
            "pyramid_channels": self.pyramid_channels,
            "regions_per_image": self.regions_per_image,
            **self.model.options(),
            **({} if num_classes is None else {"num_classes": num_classes}),
        }
        return Trained(
            kind="detector",
            package="biformer",
            model=self.model.name,
            options=options,
            inputs=IMAGE_INPUTS,
            settings=settings(self),
        )

    def __post_init__(self) -> None:
        check_choice("head", self.head, DetectionHead)
        check(self.min_size >= 32, "min_size", self.min_size, "at least 32, the stride of the last stage")
        for name in ("pyramid_channels", "regions_per_image"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.max_size >= self.min_size, "max_size", self.max_size, f"at least min_size={self.min_size}")


def _coco_fit(optimizer: OptimizerRecipe, best_metric: str) -> FitRecipe:
    return FitRecipe(
        epochs=12,
        batch_size=16,
        optimizer=optimizer,
        schedule=ScheduleRecipe(
            name="multistep", unit="update", milestones=(8, 11), warmup=500, warmup_lr=0.001 * optimizer.lr
        ),
        norm_eval=True,
        best_metric=best_metric,
        num_workers=8,
    )


_RETINANET_FIT = _coco_fit(OptimizerRecipe(name="adamw", lr=1e-4, weight_decay=1e-4, decay="all"), "box_ap")
_MASKRCNN_FIT = _coco_fit(
    OptimizerRecipe(name="adamw", lr=1e-4, weight_decay=0.05, decay="all", no_decay=("*norm*",)), "mask_ap"
)


def _coco(size: str, head: DetectionHead, fit: FitRecipe, drop_path_rate: float, paper: str) -> DetectionRecipe:
    return DetectionRecipe(
        name=f"biformer_{size}_coco_{head}",
        summary=f"COCO, {fit.epochs} epochs: {paper} AP in the paper, with its own head",
        model=BiFormerRecipe(name=f"biformer_{size}", num_classes=91, drop_path_rate=drop_path_rate, n_win=16),
        fit=fit,
        head=head,
    )


_MICRO_DETECTION = DetectionRecipe(
    name="biformer_micro_shapes_maskrcnn",
    summary="shapes drawn on photographs, detected with masks in minutes on a CPU",
    data="shapes",
    model=micro_model(4),
    fit=FitRecipe(
        updates=300,
        batch_size=4,
        optimizer=OptimizerRecipe(lr=1e-3, weight_decay=0.01),
        schedule=ScheduleRecipe(name="onecycle", unit="update"),
    ),
    head="maskrcnn",
    min_size=128,
    max_size=128,
    pyramid_channels=64,
    regions_per_image=32,
)


DETECTION = (
    _coco("small", "retinanet", _RETINANET_FIT, 0.2, "45.9 box"),
    _coco("base", "retinanet", _RETINANET_FIT, 0.3, "47.1 box"),
    _coco("small", "maskrcnn", _MASKRCNN_FIT, 0.2, "47.8 box, 43.2 mask"),
    _coco("base", "maskrcnn", _MASKRCNN_FIT, 0.3, "48.6 box, 43.7 mask"),
    _MICRO_DETECTION,
)
