"""Recipes that fine-tune segmentation models: the paper's networks and data sets (sec. 4), and small ones for a CPU."""

from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from gradfilter.recipes.base import GRADIENTS, FilteredRecipe, filters, sgd_fit
from visionkernels.checks import check
from visionkernels.pictures.recipes import SceneRecipe
from visionkernels.recipes import FitRecipe, OptimizerRecipe, ScheduleRecipe, settings
from visionkernels.tasks import segmentation as tasks
from visionkernels.weights import Trained

__all__ = ["SEGMENTATION", "SEGMENTATION_FAMILY", "SegmentationRecipe"]


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(FilteredRecipe, tasks.SegmentationRecipe):
    """Fine-tuning of a segmentation model in its last convolutions."""

    trainer: ClassVar[str] = "gradfilter.training:train_segmenter"

    head: str
    """One of `gradfilter.models.SEGMENTATION_HEADS`."""
    encoder: str
    """Name in segmentation-models-pytorch, or in timm for "fcn"."""
    num_classes: int
    pretraining: FitRecipe | None = None
    """Training of all layers beforehand, on the same data; None requires weights to start from."""
    pretraining_scene: SceneRecipe | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        both = (self.pretraining, self.pretraining_scene)
        check((both[0] is None) == (both[1] is None), "pretraining, pretraining_scene", both, "both or neither")

    def record(self, num_classes: int | None = None) -> Trained:
        """Return the record for weights files."""
        options = {"head": self.head, "num_classes": self.num_classes if num_classes is None else num_classes}
        return Trained(
            kind="segmenter", package="gradfilter", model=self.encoder, options=options, inputs=self.scene.inputs(),
            settings=settings(self),
        )  # fmt: skip


_SEGMENTERS = {
    "pspnet_resnet18": ("pspnet", "resnet18"),
    "pspnet_mobilenetv2": ("pspnet", "mobilenet_v2"),
    "deeplabv3_resnet18": ("deeplabv3", "resnet18"),
    "deeplabv3_mobilenetv2": ("deeplabv3", "mobilenet_v2"),
    "fcn_resnet18": ("fcn", "resnet18"),
    "upernet_resnet18": ("upernet", "resnet18"),
}
_SCENES = {
    "voc12": ("Pascal VOC 2012", 21, SceneRecipe()),
    "cityscapes": ("Cityscapes", 19, SceneRecipe(short_side=1024, crop=768, stride=512)),
}


def _segmentation() -> dict[str, SegmentationRecipe]:
    fit = replace(sgd_fit(0.01, 8, updates=20_000), best_metric="miou")
    recipes = {}
    for (model, (head, encoder)), (data, (title, num_classes, scene)) in product(_SEGMENTERS.items(), _SCENES.items()):
        for ending, (text, chosen) in filters((5, 10, None)).items():
            name = f"{model}_{data}_{ending}"
            recipes[name] = SegmentationRecipe(
                name=name, summary=f"{title}: {text}", head=head, encoder=encoder, num_classes=num_classes,
                filter=chosen, fit=fit, scene=scene,
            )  # fmt: skip
    return recipes


def _shapes() -> dict[str, SegmentationRecipe]:
    """Return recipes that learn shapes on photographs, then on their negatives in the last layers alone."""
    upright = SceneRecipe(
        short_side=128, long_side=160, scale_range=(0.75, 1.5), crop=96, max_class_share=1.0, stride=64
    )
    # (1 - x - mean) / std, since a negative of the pixels x is 1 - x
    negative = replace(upright, mean=_from(1, IMAGENET_DEFAULT_MEAN), std=_from(0, IMAGENET_DEFAULT_STD))
    fit = FitRecipe(
        updates=300,
        batch_size=8,
        optimizer=OptimizerRecipe(name="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4, decay="all", clip_norm=2.0),
        schedule=ScheduleRecipe(name="onecycle", unit="update"),
        evaluate_every_epochs=5,
    )
    recipes = {}
    for ending, (text, chosen) in filters((5,)).items():
        name = f"pspnet_resnet18_shapes_{ending}"
        recipes[name] = SegmentationRecipe(
            name=name, summary=f"drawn shapes, then their negatives: {text}", head="pspnet", encoder="resnet18",
            num_classes=4, filter=chosen, fit=replace(fit, updates=150), data="shapes", scene=negative,
            pretraining=fit, pretraining_scene=upright,
        )  # fmt: skip
    return recipes


def _from(whole: int, values: tuple[float, float, float]) -> tuple[float, float, float]:
    return whole - values[0], whole - values[1], whole - values[2]


SEGMENTATION_FAMILY = f"<{'|'.join(_SEGMENTERS)}>_<{'|'.join(_SCENES)}>_<last5|last10|all>_<{'|'.join(GRADIENTS)}>"
"""Pattern of the names of these recipes, which need data and weights."""
SEGMENTATION: dict[str, SegmentationRecipe] = {**_segmentation(), **_shapes()}
"""Recipes by name, `MODEL_SET_PLACE_GRADIENTS`, e.g. `pspnet_resnet18_voc12_last5_exact`."""
