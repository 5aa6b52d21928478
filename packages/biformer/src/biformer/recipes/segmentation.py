"""The paper's settings for segmentation on ADE20K (BiFormer, sec. 4.3), and a small one that learns on a CPU.

Heads are those of `biformer.segmentation`, near to the paper's but not the same code.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from biformer.recipes.base import BiFormerRecipe, micro_model
from visionkernels.checks import check, check_choice
from visionkernels.pictures.recipes import SceneRecipe
from visionkernels.recipes import FitRecipe, OptimizerRecipe, ScheduleRecipe, settings
from visionkernels.tasks import segmentation as tasks
from visionkernels.weights import Trained

__all__ = ["SEGMENTATION", "SegmentationHead", "SegmentationRecipe"]

SegmentationHead = Literal["upernet", "fpn"]


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(tasks.SegmentationRecipe):
    """Training of a segmentation model."""

    trainer: ClassVar[str] = "biformer.segmentation:train"

    model: BiFormerRecipe
    head: SegmentationHead
    auxiliary_weight: float = 0.0
    """Weight of the loss of a second head on stage 3; 0 disables the head."""
    dropout: float = 0.1
    """Rate before the classifiers."""
    decoder_channels: int | None = None
    """None takes the paper's, 512 for UperNet and 128 for FPN."""
    sync_norm: bool = True
    """Share the statistics of BatchNorm between GPUs."""

    def record(self, num_classes: int | None = None) -> Trained:
        """Return the record for weights files."""
        options = {
            "head": self.head,
            "has_auxiliary": self.auxiliary_weight > 0,
            "decoder_channels": self.decoder_channels,
            "dropout": self.dropout,
            **self.model.options(),
            **({} if num_classes is None else {"num_classes": num_classes}),
        }
        return Trained(
            kind="segmenter", package="biformer", model=self.model.name, options=options, inputs=self.scene.inputs(),
            settings=settings(self),
        )  # fmt: skip

    def __post_init__(self) -> None:
        check_choice("head", self.head, SegmentationHead)
        check(self.auxiliary_weight >= 0, "auxiliary_weight", self.auxiliary_weight, "at least 0")
        check(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")


# float32 throughout: fp16 gave users NaN in segmentation
_FPN_FIT = FitRecipe(
    updates=80_000,
    batch_size=32,
    optimizer=OptimizerRecipe(name="adamw", lr=2e-4, weight_decay=1e-4, decay="all"),
    # a warm-up starts at a share of the peak: here 0.1
    schedule=ScheduleRecipe(name="cosine", unit="update", warmup=1000, warmup_lr=0.1 * 2e-4),
    evaluate_every_epochs=13,
    best_metric="miou",
    num_workers=8,
)
_UPERNET_FIT = FitRecipe(
    updates=160_000,
    batch_size=16,
    optimizer=OptimizerRecipe(name="adamw", lr=6e-5, weight_decay=0.01, decay="all", no_decay=("*norm*",)),
    schedule=ScheduleRecipe(name="poly", unit="update", power=1.0, warmup=1500, warmup_lr=1e-6 * 6e-5),
    evaluate_every_epochs=13,
    best_metric="miou",
    num_workers=8,
)


def _ade20k(
    size: str, head: SegmentationHead, fit: FitRecipe, drop_path_rate: float, auxiliary_weight: float, paper: str
) -> SegmentationRecipe:
    return SegmentationRecipe(
        name=f"biformer_{size}_ade20k_{head}",
        summary=f"ADE20K, {fit.updates:,} updates: {paper} mIoU in the paper, with its own head",
        model=BiFormerRecipe(name=f"biformer_{size}", num_classes=150, drop_path_rate=drop_path_rate, n_win=8),
        fit=fit,
        head=head,
        auxiliary_weight=auxiliary_weight,
    )


_MICRO_SEGMENTATION = SegmentationRecipe(
    name="biformer_micro_shapes_fpn",
    summary="shapes drawn on photographs, segmented in minutes on a CPU",
    data="shapes",
    model=micro_model(4),
    fit=FitRecipe(
        updates=300,
        batch_size=8,
        optimizer=OptimizerRecipe(lr=1e-3, weight_decay=0.01),
        schedule=ScheduleRecipe(name="onecycle", unit="update"),
    ),
    head="fpn",
    decoder_channels=32,
    scene=SceneRecipe(short_side=128, long_side=160, scale_range=(0.75, 1.5), crop=128, max_class_share=1.0, stride=85),
)

SEGMENTATION = (
    _ade20k("small", "fpn", _FPN_FIT, 0.15, 0.0, "48.9"),
    _ade20k("base", "fpn", _FPN_FIT, 0.3, 0.0, "49.9"),
    _ade20k("small", "upernet", _UPERNET_FIT, 0.3, 0.4, "49.8"),
    _ade20k("base", "upernet", _UPERNET_FIT, 0.4, 0.4, "51.0"),
    _MICRO_SEGMENTATION,
)
