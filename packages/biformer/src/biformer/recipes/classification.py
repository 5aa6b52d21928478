"""Recipes for ImageNet with the paper's settings (BiFormer, sec. 4.1), and a small one that learns on a CPU."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from biformer.recipes.base import BiFormerRecipe
from visionkernels.checks import check
from visionkernels.pictures.recipes import AugmentationRecipe, PictureRecipe
from visionkernels.recipes import FitRecipe, OptimizerRecipe, ScheduleRecipe, settings
from visionkernels.tasks import classification as tasks
from visionkernels.weights import Trained

__all__ = ["CLASSIFICATION", "ClassificationRecipe", "DistillationRecipe", "TokenLabellingRecipe"]


@dataclass(frozen=True, kw_only=True)
class DistillationRecipe:
    """Distillation from a teacher's logits besides the labels (as in DeiT)."""

    teacher: str
    """A weights file of this package, or a model of timm with published weights."""
    kind: Literal["none", "soft", "hard"] = "hard"
    """"soft" uses the teacher's probabilities, "hard" its best class."""
    alpha: float = 0.5
    """Weight of the teacher in the loss."""
    tau: float = 1.0
    """Temperature of "soft"."""

    def __post_init__(self) -> None:
        check(self.kind in ("none", "soft", "hard"), "kind", self.kind, "none, soft or hard")
        check(0 <= self.alpha <= 1, "alpha", self.alpha, "in [0, 1]")
        check(self.tau > 0, "tau", self.tau, "above 0")


@dataclass(frozen=True, kw_only=True)
class TokenLabellingRecipe:
    """Labels for every cell of the last map from a teacher, and mixing by whole cells."""

    teacher: str | None = "dm_nfnet_f6.dm_in1k"
    """A weights file of this package, or a convolutional model of timm with published weights."""
    labels: str | None = None
    """Folder of stored label maps instead of a teacher: see `biformer.cell_labels.read_label_map`."""
    cell_weight: float = 0.5
    """Weight of the cells' loss beside the image's."""
    mix: float = 1.0
    """Alpha of the beta distribution of MixToken; 0 disables mixing."""

    def __post_init__(self) -> None:
        both = (self.teacher, self.labels)
        check((both[0] is None) != (both[1] is None), "teacher, labels", both, "exactly one, the other None")
        check(self.cell_weight >= 0, "cell_weight", self.cell_weight, "at least 0")
        check(self.mix >= 0, "mix", self.mix, "at least 0")


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(tasks.ClassificationRecipe):
    """Training of a classifier."""

    trainer: ClassVar[str] = "biformer.training:train"

    model: BiFormerRecipe
    distillation: DistillationRecipe | None = None
    token_labelling: TokenLabellingRecipe | None = None

    def record(self, num_classes: int | None = None) -> Trained:
        """Return the record for weights files."""
        options = self.model.options() | ({} if num_classes is None else {"num_classes": num_classes})
        return Trained(
            kind="classifier", package="biformer", model=self.model.name, options=options,
            inputs=self.pictures.inputs(), settings=settings(self),
        )  # fmt: skip

    def __post_init__(self) -> None:
        check(self.pictures.size >= 32, "size", self.pictures.size, "at least 32, the stride of the last stage")
        both = self.distillation is not None and self.token_labelling is not None
        check(not both, "distillation, token_labelling", "both", "at most one of the two")
        mixes = self.augmentation.mixup > 0 or self.augmentation.cutmix > 0
        check(self.token_labelling is None or not mixes, "mixup, cutmix", "on", "0 with token labelling, which mixes")


# 300 epochs at 5e-4 * batch / 512. The cosine counts from the start of training, the warm-up lies over it, and the
# rate is set by the epoch that ended last. The paper ran fp16, which overflows for some; bf16 has float32's range.
_IMAGENET_FIT = FitRecipe(
    epochs=300,
    batch_size=1024,
    optimizer=OptimizerRecipe(name="adamw", lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8),
    schedule=ScheduleRecipe(name="cosine", unit="epoch", warmup=5, warmup_lr=1e-6, min_lr=1e-5, lag_epochs=1),
    precision="bf16",
    ema_decay=0.99996,
    num_workers=8,
)


def _imagenet(model: str, drop_path_rate: float, summary: str) -> ClassificationRecipe:
    return ClassificationRecipe(
        name=f"{model}_in1k",
        summary=summary,
        model=BiFormerRecipe(name=model, drop_path_rate=drop_path_rate),
        fit=_IMAGENET_FIT,
    )


def _token_labelling(recipe: ClassificationRecipe, top1: str) -> ClassificationRecipe:
    return replace(
        recipe,
        name=f"{recipe.name}_token_labelling",
        summary=f"ImageNet-1K with a label for every cell; own design, the paper has {top1} % top-1",
        augmentation=replace(recipe.augmentation, mixup=0.0, cutmix=0.0),
        token_labelling=TokenLabellingRecipe(),
    )


_SMALL = _imagenet("biformer_small", 0.15, "ImageNet-1K, 300 epochs: 83.8 % top-1 in the paper")
_BASE = _imagenet("biformer_base", 0.4, "ImageNet-1K, 300 epochs: 84.3 % top-1 in the paper")

_MICRO = ClassificationRecipe(
    name="biformer_micro_mnist5k",
    summary="5,000 handwritten digits, above 95 % top-1 in minutes on a CPU",
    data="mnist5k",
    model=BiFormerRecipe(
        name="biformer_tiny",
        num_classes=10,
        n_win=4,
        depth=(1, 1, 2, 1),
        embed_dim=(32, 64, 128, 256),
        mlp_ratios=(3, 3, 3, 3),
        topks=(1, 4, 16, -2),
    ),
    fit=FitRecipe(
        epochs=4,
        batch_size=64,
        optimizer=OptimizerRecipe(lr=2e-3, weight_decay=0.05),
        schedule=ScheduleRecipe(name="onecycle", unit="update"),
    ),
    pictures=PictureRecipe(
        size=64,
        resize=64,
        interpolation="bilinear",
        mean=(0.1307,) * 3,
        std=(0.3081,) * 3,  # of MNIST
    ),
    augmentation=AugmentationRecipe(
        random_crop=False, rand_augment=None, erasing=0, repeats=1, mixup=0, cutmix=0, smoothing=0.1
    ),
)

CLASSIFICATION = (
    _imagenet("biformer_tiny", 0.1, "ImageNet-1K, 300 epochs: 81.4 % top-1 in the paper"),
    _SMALL,
    _BASE,
    _imagenet("biformer_stl", 0.1, "ImageNet-1K, 300 epochs: 82.7 % top-1 in the paper"),
    _imagenet("biformer_stl_nchw", 0.1, "ImageNet-1K, 300 epochs: 82.7 % top-1 in the repository's table"),
    _token_labelling(_SMALL, "84.3"),
    _token_labelling(_BASE, "85.4"),
    _MICRO,
)
