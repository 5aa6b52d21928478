"""The paper's settings for segmentation on ADE20K (G2SD, sec. 4.3; UperNet), and small ones for drawn shapes."""

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from g2sd.segmentation_losses import Reduction
from g2sd.upernet import Size
from visionkernels.checks import check, check_choice
from visionkernels.pictures.recipes import SceneRecipe
from visionkernels.recipes import FitRecipe, OptimizerRecipe, ScheduleRecipe, settings
from visionkernels.tasks import segmentation as tasks
from visionkernels.weights import Trained

__all__ = ["SEGMENTATION", "SegmentationMode", "SegmentationRecipe", "SegmentationSizes"]

SegmentationMode: TypeAlias = Literal["channel_wise", "pixel_kl"]


@dataclass(frozen=True, kw_only=True)
class SegmentationSizes:
    """A segmentation model; None keeps the default of that size."""

    size: Size = "small"
    num_classes: int = 150
    patch_size: int = 16
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    out_indices: tuple[int, ...] | None = None
    """Blocks, from 0, whose outputs are the four feature maps."""
    drop_path_rate: float | None = None
    dropout: float = 0.1
    """Dropout rate before the classifiers."""
    decoder_channels: int | None = None
    """None: those of the backbone."""
    auxiliary_channels: int = 256

    def __post_init__(self) -> None:
        check_choice("size", self.size, Size)
        check(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of `g2sd.segmentation.segmentation_model`."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(tasks.SegmentationRecipe):
    """Training for segmentation: fine-tuning, or specific distillation where there is a `mode` (G2SD, sec. 3.3)."""

    trainer: ClassVar[str] = "g2sd.segmentation:train"

    model: SegmentationSizes
    mode: SegmentationMode | None = None
    """Distillation loss; None disables distillation."""
    weight: float = 3.0
    """Weight of the distillation loss."""
    temperature: float = 1.0
    reduction: Reduction = "batchmean"
    """Reduction of "pixel_kl"."""
    auxiliary_weight: float = 0.4
    """Weight of the loss of the auxiliary head; 0 leaves the head out."""
    sync_norm: bool = True
    """Share the statistics of BatchNorm between GPUs."""
    scene: SceneRecipe = field(default_factory=lambda: SceneRecipe(inference="slide"))
    """The model takes images of `crop` pixels a side."""

    def __post_init__(self) -> None:
        check(self.mode in ("channel_wise", "pixel_kl", None), "mode", self.mode, "channel_wise, pixel_kl or None")
        check_choice("reduction", self.reduction, Reduction)
        check(self.temperature > 0, "temperature", self.temperature, "above 0")
        for name in ("weight", "auxiliary_weight"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        inference = self.scene.inference
        check(inference == "slide", "scene.inference", inference, "'slide': positions are for images of one size")
        crop, patch = self.scene.crop, self.model.patch_size
        check(crop % patch == 0, "scene.crop", crop, f"a multiple of patch_size={patch}")

    def record(self, num_classes: int | None = None) -> Trained:
        """Return the record of the model."""
        options = self.model.options() | ({} if num_classes is None else {"num_classes": num_classes})
        if self.auxiliary_weight == 0:
            options["auxiliary_channels"] = None
        return Trained(
            kind="segmenter", package="g2sd", model=f"upernet_{self.model.size}", options=options,
            inputs=self.scene.inputs(), settings=settings(self),
        )  # fmt: skip

    def settings_of_loss(self) -> dict[str, Any]:
        """Return the keyword arguments of `g2sd.segmentation.SegmentationDistillTask`."""
        names = ("mode", "weight", "temperature", "reduction", "auxiliary_weight")
        return {name: getattr(self, name) for name in names}


_ADE20K_FIT = FitRecipe(
    updates=160_000,
    batch_size=16,
    optimizer=OptimizerRecipe(name="adamw", lr=1e-4, weight_decay=0.05, betas=(0.9, 0.999), layer_decay=0.65),
    # the warm-up starts at 1e-6 of the peak
    schedule=ScheduleRecipe(name="poly", unit="update", power=1.0, warmup=1500, warmup_lr=1e-6 * 1e-4),
    precision="bf16",
    evaluate_every_epochs=13,
    best_metric="miou",
    num_workers=8,
)


def _ade20k(size: Size, mode: SegmentationMode | None) -> SegmentationRecipe:
    what = "fine-tuning" if mode is None else "specific distillation"
    return SegmentationRecipe(
        name=f"{'finetune' if mode is None else 'specific'}_{size}_ade20k",
        summary=f"{what} of UperNet on ADE20K, 160,000 updates",
        model=SegmentationSizes(size=size),
        mode=mode,
        fit=_ADE20K_FIT,
    )


# 64 patches of 8 pixels: a teacher of 48 channels and a student of 24
_SMALL_SIZES: dict[str, Any] = {
    "size": "tiny", "num_classes": 4, "patch_size": 8, "depth": 4, "out_indices": (0, 1, 2, 3), "num_heads": 3,
    "drop_path_rate": 0.0, "dropout": 0.0, "auxiliary_channels": 16,
}  # fmt: skip
_TEACHER = SegmentationSizes(**_SMALL_SIZES, embed_dim=48, decoder_channels=32)
_STUDENT = SegmentationSizes(**_SMALL_SIZES, embed_dim=24, decoder_channels=16)


def _shapes(name: str, summary: str, model: SegmentationSizes, mode: SegmentationMode | None) -> SegmentationRecipe:
    return SegmentationRecipe(
        name=name,
        summary=summary,
        data="shapes",
        model=model,
        mode=mode,
        fit=FitRecipe(
            updates=300,
            batch_size=8,
            optimizer=OptimizerRecipe(lr=2e-3, weight_decay=0.01),
            schedule=ScheduleRecipe(name="onecycle", unit="update"),
            evaluate_every_epochs=5,
            save_every_epochs=5,
        ),
        scene=SceneRecipe(
            short_side=64, long_side=80, scale_range=(0.75, 1.5), crop=64, max_class_share=1.0, inference="slide",
            stride=43,
        ),
    )  # fmt: skip


SEGMENTATION = (
    _ade20k("base", None),
    _ade20k("small", None),
    _ade20k("small", "channel_wise"),
    _ade20k("tiny", None),
    _ade20k("tiny", "channel_wise"),
    _shapes("finetune_teacher_shapes", "a small teacher for shapes drawn on photographs", _TEACHER, None),
    _shapes("finetune_shapes", "the student on shapes, without a teacher", _STUDENT, None),
    _shapes("specific_shapes", "specific distillation of the student on shapes", _STUDENT, "channel_wise"),
)
