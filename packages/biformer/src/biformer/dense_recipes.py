"""The paper's settings for segmentation on ADE20K and detection on COCO (BiFormer, sec. 4.2 and 4.3), and small ones.

Heads are those of `biformer.segmentation` and `biformer.detection`, near to the paper's but not the same code.
"""

from dataclasses import dataclass, field
from typing import Literal

from biformer.recipes import ModelRecipe, Recipe
from visionkernels.pictures.recipes import SceneRecipe
from visionkernels.recipes import check
from visionkernels.training import FitRecipe, OptimizerRecipe, ScheduleRecipe

__all__ = [
    "DENSE_RECIPES",
    "DetectionHead",
    "DetectionRecipe",
    "SegmentationHead",
    "SegmentationRecipe",
]

SegmentationHead = Literal["upernet", "fpn"]
DetectionHead = Literal["retinanet", "maskrcnn"]


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(Recipe):
    """A complete training of a segmentation model."""

    head: SegmentationHead
    auxiliary_weight: float = 0.0
    """Of the loss of a second head on stage 3; 0: there is none."""
    dropout: float = 0.1
    """Before the classifiers."""
    decoder_channels: int | None = None
    """None: the paper's, 512 of UperNet and 128 of FPN."""
    sync_norm: bool = True
    """Share the statistics of BatchNorm between GPUs."""
    scene: SceneRecipe = field(default_factory=SceneRecipe)

    def __post_init__(self) -> None:
        check(self.head in ("upernet", "fpn"), "head", self.head, "'upernet' or 'fpn'")
        check(self.auxiliary_weight >= 0, "auxiliary_weight", self.auxiliary_weight, "at least 0")
        check(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(Recipe):
    """A complete training of a detector; `model.num_classes` counts the background, which is class 0."""

    head: DetectionHead
    min_size: int = 800
    """Pixels of the shorter side, unless the longer one would exceed `max_size`."""
    max_size: int = 1333
    pyramid_channels: int = 256
    regions_per_image: int = 512
    """Proposals that the second stage of "maskrcnn" learns from."""

    def __post_init__(self) -> None:
        check(self.head in ("retinanet", "maskrcnn"), "head", self.head, "'retinanet' or 'maskrcnn'")
        check(self.min_size >= 32, "min_size", self.min_size, "at least 32, the stride of the last stage")
        for name in ("pyramid_channels", "regions_per_image"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.max_size >= self.min_size, "max_size", self.max_size, f"at least min_size={self.min_size}")


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


def _ade20k(
    size: str, head: SegmentationHead, fit: FitRecipe, drop_path_rate: float, auxiliary_weight: float, paper: str
) -> SegmentationRecipe:
    return SegmentationRecipe(
        name=f"biformer_{size}_ade20k_{head}",
        summary=f"ADE20K, {fit.updates:,} updates: {paper} mIoU in the paper, with its own head",
        model=ModelRecipe(name=f"biformer_{size}", num_classes=150, drop_path_rate=drop_path_rate, n_win=8),
        fit=fit,
        head=head,
        auxiliary_weight=auxiliary_weight,
    )


def _coco(size: str, head: DetectionHead, fit: FitRecipe, drop_path_rate: float, paper: str) -> DetectionRecipe:
    return DetectionRecipe(
        name=f"biformer_{size}_coco_{head}",
        summary=f"COCO, {fit.epochs} epochs: {paper} AP in the paper, with its own head",
        model=ModelRecipe(name=f"biformer_{size}", num_classes=91, drop_path_rate=drop_path_rate, n_win=16),
        fit=fit,
        head=head,
    )


def _micro_model(num_classes: int) -> ModelRecipe:
    return ModelRecipe(
        name="biformer_tiny",
        num_classes=num_classes,
        n_win=4,
        depth=(1, 1, 1, 1),
        embed_dim=(32, 64, 96, 128),
        topks=(1, 4, 4, -2),
    )


_MICRO_SEGMENTATION = SegmentationRecipe(
    name="biformer_micro_shapes_fpn",
    summary="shapes drawn on photographs, segmented in minutes on a CPU",
    data="shapes",
    model=_micro_model(4),
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
_MICRO_DETECTION = DetectionRecipe(
    name="biformer_micro_shapes_maskrcnn",
    summary="shapes drawn on photographs, found and outlined in minutes on a CPU",
    data="shapes",
    model=_micro_model(4),
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

DENSE_RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _ade20k("small", "fpn", _FPN_FIT, 0.15, 0.0, "48.9"),
        _ade20k("base", "fpn", _FPN_FIT, 0.3, 0.0, "49.9"),
        _ade20k("small", "upernet", _UPERNET_FIT, 0.3, 0.4, "49.8"),
        _ade20k("base", "upernet", _UPERNET_FIT, 0.4, 0.4, "51.0"),
        _coco("small", "retinanet", _RETINANET_FIT, 0.2, "45.9 box"),
        _coco("base", "retinanet", _RETINANET_FIT, 0.3, "47.1 box"),
        _coco("small", "maskrcnn", _MASKRCNN_FIT, 0.2, "47.8 box, 43.2 mask"),
        _coco("base", "maskrcnn", _MASKRCNN_FIT, 0.3, "48.6 box, 43.7 mask"),
        _MICRO_SEGMENTATION,
        _MICRO_DETECTION,
    )
}
