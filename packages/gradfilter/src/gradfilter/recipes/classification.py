"""Recipes that fine-tune classifiers: the paper's networks and data sets (sec. 4).

Optimiser, schedule and lengths are the paper's as recalled; image sizes are the usual ones of each data set, and
augmentation is a random crop and flip.
"""

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from gradfilter.recipes.base import GRADIENTS, FilteredRecipe, filters, sgd_fit
from visionkernels.checks import check
from visionkernels.pictures.recipes import AugmentationRecipe, PictureRecipe
from visionkernels.recipes import settings
from visionkernels.tasks import classification as tasks
from visionkernels.weights import Trained

__all__ = ["CLASSIFICATION", "CLASSIFICATION_FAMILY", "ClassificationRecipe"]

_PLAIN = AugmentationRecipe(rand_augment=None, erasing=0, repeats=1, mixup=0, cutmix=0, smoothing=0)


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(FilteredRecipe, tasks.ClassificationRecipe):
    """Fine-tuning of a trained network in its last convolutions, with a classifier for the classes of the data."""

    trainer: ClassVar[str] = "gradfilter.training:train_classifier"

    model: str
    """A name for `visionkernels.models.create`."""
    augmentation: AugmentationRecipe = _PLAIN

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.augmentation.repeats == 1, "repeats", self.augmentation.repeats, "1")
        mixes = (self.augmentation.mixup, self.augmentation.cutmix, self.augmentation.smoothing)
        check(mixes == (0, 0, 0), "mixup, cutmix, smoothing", mixes, "0, since labels are single classes")

    def record(self, num_classes: int | None = None) -> Trained:
        """Return the record for weights files."""
        options = {} if num_classes is None else {"num_classes": num_classes}
        return Trained(
            kind="classifier", package="gradfilter", model=self.model, options=options,
            inputs=self.pictures.inputs(), settings=settings(self),
        )  # fmt: skip


_CLASSIFIERS = {
    "resnet18": "torchvision:resnet18",
    "resnet34": "torchvision:resnet34",
    "mobilenetv2": "torchvision:mobilenet_v2",
}
# CIFAR is enlarged so that the last maps have 7 pixels; at its own 32 pixels they have one
_PICTURES = {
    "in1k": ("ImageNet", sgd_fit(0.05, 64, epochs=90), PictureRecipe(interpolation="bilinear")),
    "cifar10": ("CIFAR-10", sgd_fit(0.05, 128, epochs=50), PictureRecipe(resize=224, interpolation="bilinear")),
    "cifar100": ("CIFAR-100", sgd_fit(0.05, 128, epochs=50), PictureRecipe(resize=224, interpolation="bilinear")),
}


def _classification() -> dict[str, ClassificationRecipe]:
    recipes = {}
    for (model, source), (data, (title, fit, pictures)) in product(_CLASSIFIERS.items(), _PICTURES.items()):
        for ending, (text, chosen) in filters((2, 4, None)).items():
            name = f"{model}_{data}_{ending}"
            recipes[name] = ClassificationRecipe(
                name=name, summary=f"{title}: {text}", model=source, filter=chosen, fit=fit, pictures=pictures
            )
    return recipes


CLASSIFICATION_FAMILY = f"<{'|'.join(_CLASSIFIERS)}>_<{'|'.join(_PICTURES)}>_<last2|last4|all>_<{'|'.join(GRADIENTS)}>"
"""Pattern of the names of these recipes, which need data and weights."""
CLASSIFICATION = _classification()
"""Recipes by name, `MODEL_SET_PLACE_GRADIENTS`, e.g. `resnet18_in1k_last4_r2`."""
