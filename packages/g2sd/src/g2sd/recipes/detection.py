"""The paper's settings for detection on COCO (G2SD, sec. 4.2; ViTDet), and small ones for drawn shapes."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

from g2sd.mask_rcnn import DetectorSize
from visionkernels.checks import check, check_choice
from visionkernels.pictures.recipes import IMAGE_INPUTS
from visionkernels.recipes import FitRecipe, OptimizerRecipe, Recipe, ScheduleRecipe, settings
from visionkernels.weights import Trained

__all__ = ["DETECTION", "DetectionRecipe", "DetectionSizes"]


@dataclass(frozen=True, kw_only=True)
class DetectionSizes:
    """A detector; None keeps the default of that size."""

    size: DetectorSize = "small"
    num_classes: int = 81
    """With the background, class 0."""
    img_size: int = 1024
    patch_size: int = 16
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    window_size: int = 14
    """Patches per side of a window."""
    window_blocks: tuple[int, ...] | None = None
    """Blocks, from 0, that attend within windows."""
    pretrain_size: int = 224
    """Pixels per side of the images that the table of positions is for."""
    drop_path_rate: float | None = None
    pyramid_channels: int = 256
    head_width: int = 1024
    regions_per_image: int = 512
    """Proposals per image that the heads are trained on."""

    def __post_init__(self) -> None:
        check_choice("size", self.size, DetectorSize)

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `g2sd.detection.detection_model`."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(Recipe):
    """Training for detection: fine-tuning, or specific distillation where there is a `mode` (G2SD, sec. 3.3)."""

    trainer: ClassVar[str] = "g2sd.detection:train"

    model: DetectionSizes
    mode: Literal["imitation"] | None = None
    """"imitation" of the teacher's maps where it sees objects; None disables distillation."""
    feature_weight: float = 0.001
    """Weight of the loss on the feature pyramid."""
    objectness_weight: float = 0.1
    ramp_updates: int = 500
    """Updates over which both weights rise from 0."""
    scale_range: tuple[float, float] = (0.1, 2.0)
    """Range of the random factor on the size of training images, relative to the size that fits `img_size`."""
    is_ranked: bool = True
    """Whether class numbers are ranks of COCO's category ids, instead of the ids."""

    def __post_init__(self) -> None:
        check(self.mode in ("imitation", None), "mode", self.mode, "imitation or None")
        for name in ("feature_weight", "objectness_weight", "ramp_updates"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        low, high = self.scale_range
        check(0 < low <= high, "scale_range", self.scale_range, "two rising numbers above 0")

    def record(self, num_classes: int | None = None) -> Trained:
        """Return the record of the model."""
        options = self.model.options() | ({} if num_classes is None else {"num_classes": num_classes})
        return Trained(
            kind="detector", package="g2sd", model=f"vitdet_{self.model.size}", options=options,
            inputs=IMAGE_INPUTS, settings=settings(self), details={"is_ranked": self.is_ranked},
        )  # fmt: skip

    def settings_of_loss(self) -> dict[str, Any]:
        """Return the keyword arguments of `g2sd.detection.DetectionDistillTask`."""
        return {name: getattr(self, name) for name in ("feature_weight", "objectness_weight", "ramp_updates")}


# 100 epochs of 118,000 images, in float32
_COCO_FIT = FitRecipe(
    updates=184_375,
    batch_size=64,
    optimizer=OptimizerRecipe(name="adamw", lr=1e-4, weight_decay=0.05, betas=(0.9, 0.999), layer_decay=0.7),
    # the warm-up starts at 0.001 of the peak
    schedule=ScheduleRecipe(
        name="multistep", unit="update", milestones=(163_889, 177_546), milestone_unit="update", warmup=250,
        warmup_lr=0.001 * 1e-4,
    ),
    evaluate_every_epochs=5,
    best_metric="box_ap",
    num_workers=8,
)  # fmt: skip


def _coco(size: DetectorSize, mode: Literal["imitation"] | None) -> DetectionRecipe:
    what = "fine-tuning" if mode is None else "specific distillation"
    return DetectionRecipe(
        name=f"{'finetune' if mode is None else 'specific'}_{size}_coco",
        summary=f"{what} of Mask R-CNN on COCO, 100 epochs",
        model=DetectionSizes(size=size),
        mode=mode,
        fit=_COCO_FIT,
    )


# 64 patches of 16 pixels: a teacher of 96 channels and a student of 24
_SMALL_SIZES: dict[str, Any] = {
    "size": "tiny", "num_classes": 4, "img_size": 128, "num_heads": 3, "depth": 4, "window_size": 4,
    "window_blocks": (0, 2), "pretrain_size": 128, "drop_path_rate": 0.0, "regions_per_image": 32,
}  # fmt: skip
_TEACHER = DetectionSizes(**_SMALL_SIZES, embed_dim=96, pyramid_channels=64, head_width=128)
_STUDENT = DetectionSizes(**_SMALL_SIZES, embed_dim=24, pyramid_channels=32, head_width=64)


def _objects(
    name: str, summary: str, model: DetectionSizes, updates: int, mode: Literal["imitation"] | None
) -> DetectionRecipe:
    return DetectionRecipe(
        name=name,
        summary=summary,
        data="shapes",
        model=model,
        mode=mode,
        # the loss sums over channels, which are fewer than the paper's 256
        feature_weight=0.01,
        ramp_updates=50,
        scale_range=(0.75, 1.5),
        fit=FitRecipe(
            updates=updates,
            batch_size=4,
            optimizer=OptimizerRecipe(lr=1e-3, weight_decay=0.01),
            schedule=ScheduleRecipe(name="onecycle", unit="update"),
            evaluate_every_epochs=5,
            save_every_epochs=5,
        ),
    )


DETECTION = (
    _coco("base", None),
    _coco("small", None),
    _coco("small", "imitation"),
    _coco("tiny", None),
    _coco("tiny", "imitation"),
    _objects("finetune_teacher_objects", "a small teacher that finds shapes on photographs", _TEACHER, 600, None),
    _objects("finetune_objects", "the student finds shapes, without a teacher", _STUDENT, 600, None),
    _objects("specific_objects", "specific distillation of the student that finds shapes", _STUDENT, 600, "imitation"),
)
