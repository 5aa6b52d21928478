"""Fine-tuning by name on pictures: the paper's networks and sets (sec. 4), and a small segmentation for a CPU.

What the paper states of its training is the optimiser, its schedule and the lengths, and these are recalled; sizes of
pictures are the usual ones of each set, and augmentation is a random crop and flip.
"""

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from gradfilter.recipes import FilterRecipe, Recipe
from visionkernels.pictures.recipes import AugmentationRecipe, PictureRecipe, SceneRecipe
from visionkernels.recipes import check
from visionkernels.training import FitRecipe, OptimizerRecipe, ScheduleRecipe

__all__ = ["FAMILIES", "PICTURE_RECIPES", "ClassificationRecipe", "SegmentationRecipe"]

_PLAIN = AugmentationRecipe(rand_augment=None, erasing=0, repeats=1, mixup=0, cutmix=0, smoothing=0)


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(Recipe):
    """Fine-tuning a trained classifier in its last convolutions; its classifier is made for the classes of the data."""

    model: str
    """As `gradfilter.models.create_classifier` takes it."""
    pictures: PictureRecipe = field(default_factory=PictureRecipe)
    augmentation: AugmentationRecipe = _PLAIN

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.augmentation.repeats == 1, "repeats", self.augmentation.repeats, "1")
        mixes = (self.augmentation.mixup, self.augmentation.cutmix, self.augmentation.smoothing)
        check(mixes == (0, 0, 0), "mixup, cutmix, smoothing", mixes, "0, since labels are single classes")


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(Recipe):
    """Fine-tuning a segmentation model in its last convolutions."""

    head: str
    """One of `gradfilter.models.SEGMENTATION_HEADS`."""
    encoder: str
    """Of segmentation-models-pytorch, for "fcn" of timm."""
    num_classes: int
    scene: SceneRecipe = field(default_factory=SceneRecipe)
    pretraining: FitRecipe | None = None
    """A training of all layers before, on the same set; None: weights must be given."""
    pretraining_scene: SceneRecipe | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        both = (self.pretraining, self.pretraining_scene)
        check((both[0] is None) == (both[1] is None), "pretraining, pretraining_scene", both, "both or neither")


# label: what is trained, in words and as a recipe
_GRADIENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "exact": ("exact gradients", {"gradients": "exact"}),
    "head": ("the classifier alone", {"gradients": "head", "train_norm": "none"}),
    "r2": ("gradients filtered over 2 x 2 outputs", {"radius": 2}),
    "r4": ("gradients filtered over 4 x 4 outputs", {"radius": 4}),
    "r7": ("gradients filtered over 7 x 7 outputs", {"radius": 7}),
}


def _filters(counts: tuple[int | None, ...]) -> dict[str, tuple[str, FilterRecipe]]:
    """Return summaries and recipes by the ending of a name, such as `last4_r2` or `all_exact`."""
    found = {}
    for last_n, (label, (text, options)) in product(counts, _GRADIENTS.items()):
        place = "all" if last_n is None else f"last{last_n}"
        where = "in all convolutions" if last_n is None else f"in the last {last_n} convolutions"
        summary = text if label == "head" else f"{text} {where}"
        found[f"{place}_{label}"] = (summary, FilterRecipe(last_n=last_n, **options))
    return found


def _fit(lr: float, batch_size: int, **length: Any) -> FitRecipe:
    optimizer = OptimizerRecipe(name="sgd", lr=lr, momentum=0.9, weight_decay=1e-4, decay="all", clip_norm=2.0)
    return FitRecipe(
        batch_size=batch_size,
        optimizer=optimizer,
        schedule=ScheduleRecipe(name="cosine", unit="update"),
        num_workers=4,
        **length,
    )


_CLASSIFIERS = {
    "resnet18": "torchvision:resnet18",
    "resnet34": "torchvision:resnet34",
    "mobilenetv2": "torchvision:mobilenet_v2",
}
# maps of 7 pixels at the end, on CIFAR too: at its own 32 pixels the last ones are of one pixel
_PICTURES = {
    "in1k": ("ImageNet", _fit(0.05, 64, epochs=90), PictureRecipe(interpolation="bilinear")),
    "cifar10": ("CIFAR-10", _fit(0.05, 128, epochs=50), PictureRecipe(resize=224, interpolation="bilinear")),
    "cifar100": ("CIFAR-100", _fit(0.05, 128, epochs=50), PictureRecipe(resize=224, interpolation="bilinear")),
}
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


def _classification() -> dict[str, ClassificationRecipe]:
    recipes = {}
    for (model, source), (data, (title, fit, pictures)) in product(_CLASSIFIERS.items(), _PICTURES.items()):
        for ending, (text, chosen) in _filters((2, 4, None)).items():
            name = f"{model}_{data}_{ending}"
            recipes[name] = ClassificationRecipe(
                name=name, summary=f"{title}: {text}", model=source, filter=chosen, fit=fit, pictures=pictures
            )
    return recipes


def _segmentation() -> dict[str, SegmentationRecipe]:
    fit = replace(_fit(0.01, 8, updates=20_000), best_metric="miou")
    recipes = {}
    for (model, (head, encoder)), (data, (title, num_classes, scene)) in product(_SEGMENTERS.items(), _SCENES.items()):
        for ending, (text, chosen) in _filters((5, 10, None)).items():
            name = f"{model}_{data}_{ending}"
            recipes[name] = SegmentationRecipe(
                name=name, summary=f"{title}: {text}", head=head, encoder=encoder, num_classes=num_classes,
                filter=chosen, fit=fit, scene=scene,
            )  # fmt: skip
    return recipes


def _shapes() -> dict[str, SegmentationRecipe]:
    """Return a segmentation that learns shapes on photographs, then on their negatives in its last layers alone."""
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
    for ending, (text, chosen) in _filters((5,)).items():
        name = f"pspnet_resnet18_shapes_{ending}"
        recipes[name] = SegmentationRecipe(
            name=name, summary=f"drawn shapes, then their negatives: {text}", head="pspnet", encoder="resnet18",
            num_classes=4, filter=chosen, fit=replace(fit, updates=150), data="shapes", scene=negative,
            pretraining=fit, pretraining_scene=upright,
        )  # fmt: skip
    return recipes


def _from(whole: int, values: tuple[float, float, float]) -> tuple[float, float, float]:
    return whole - values[0], whole - values[1], whole - values[2]


FAMILIES = (
    f"<{'|'.join(_CLASSIFIERS)}>_<{'|'.join(_PICTURES)}>_<last2|last4|all>_<{'|'.join(_GRADIENTS)}>",
    f"<{'|'.join(_SEGMENTERS)}>_<{'|'.join(_SCENES)}>_<last5|last10|all>_<{'|'.join(_GRADIENTS)}>",
)
"""The names of the recipes that need data and weights."""
PICTURE_RECIPES: dict[str, Recipe] = {**_classification(), **_segmentation(), **_shapes()}
"""`MODEL_SET_PLACE_GRADIENTS`, e.g. `resnet18_in1k_last4_r2` and `pspnet_resnet18_voc12_last5_exact`."""
