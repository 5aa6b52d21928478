"""The paper's recipes for classification and for training without labels, and small ones for handwritten digits."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from g2sd.generic import Supervision
from g2sd.recipes.base import AutoencoderSizes, ViTSizes, adamw, autoencoder_record, cosine
from g2sd.specific import Mode
from visionkernels.checks import check, check_choice
from visionkernels.pictures.recipes import AugmentationRecipe, PictureRecipe
from visionkernels.recipes import FitRecipe, OptimizerRecipe, settings
from visionkernels.tasks.classification import ClassificationRecipe
from visionkernels.weights import Trained

__all__ = ["PICTURES", "FinetuneRecipe", "GenericRecipe", "PretrainRecipe", "ProbeRecipe"]


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(ClassificationRecipe):
    """Pre-training of a masked autoencoder, without labels (MAE)."""

    trainer: ClassVar[str] = "g2sd.training:pretrain"

    model: AutoencoderSizes
    mask_ratio: float = 0.75
    is_normalised: bool = True
    """Whether the pixels of each patch are normalised by its mean and deviation."""

    def __post_init__(self) -> None:
        check(0 < self.mask_ratio < 1, "mask_ratio", self.mask_ratio, "in (0, 1)")

    def record(self, num_classes: int | None = None) -> Trained:
        """Return the record of the autoencoder."""
        return autoencoder_record(self, self.model)


@dataclass(frozen=True, kw_only=True)
class GenericRecipe(ClassificationRecipe):
    """Generic distillation of one student or several, without labels (G2SD, sec. 3.2)."""

    trainer: ClassVar[str] = "g2sd.training:distil_generic"

    students: tuple[AutoencoderSizes, ...]
    teacher_layer: int = 4
    """Block of the teacher's decoder whose output is the target, from 1."""
    supervise: Supervision = "all"
    mask_ratio: float = 0.75
    beta: float = 2.0
    """Threshold of the smooth L1 loss."""
    num_masks: int = 1
    """Masks per image and update."""

    def __post_init__(self) -> None:
        check_choice("supervise", self.supervise, Supervision)
        is_whole = bool(self.students) and all(isinstance(student, AutoencoderSizes) for student in self.students)
        check(is_whole, "students", self.students, "one or more, with their sizes")

    def settings_of_loss(self) -> dict[str, Any]:
        """Return the keyword arguments of `g2sd.generic.GenericDistiller`."""
        names = ("teacher_layer", "supervise", "mask_ratio", "beta", "num_masks")
        return {name: getattr(self, name) for name in names}

    def record(self, num_classes: int | None = None) -> Trained:
        """Return the record of a single student, without the teacher's widths."""
        check(len(self.students) == 1, "students", len(self.students), "a single one, or its own file is to be opened")
        return autoencoder_record(self, self.students[0])


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(ClassificationRecipe):
    """Training with labels: fine-tuning, or specific distillation where there is a `mode` (G2SD, sec. 3.3)."""

    trainer: ClassVar[str] = "g2sd.training:finetune"

    model: ViTSizes
    mode: Mode | None = None
    """Distillation loss; None disables distillation."""
    temperature: float = 1.0
    alpha: float = 1.0
    """Weight of NKD on the classes that are not the label."""
    labels_per_class: int | None = None
    """Number of training images of each class, drawn at random; None takes all."""

    def __post_init__(self) -> None:
        check(self.mode is None or self.mode in ("hard", "soft", "nkd"), "mode", self.mode, "hard, soft, nkd or None")
        check(self.temperature > 0, "temperature", self.temperature, "above 0")
        count = self.labels_per_class
        check(count is None or count >= 1, "labels_per_class", count, "at least 1 or None")

    def record(self, num_classes: int | None = None) -> Trained:
        """Return the record of the classifier."""
        options = {"img_size": self.pictures.size, **self.model.options()}
        return Trained(
            kind="classifier", package="g2sd", model=self.model.name, inputs=self.pictures.inputs(),
            options=options | ({} if num_classes is None else {"num_classes": num_classes}), settings=settings(self),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ProbeRecipe(ClassificationRecipe):
    """Training of a linear classifier on a frozen encoder (MAE, appendix A.1)."""

    trainer: ClassVar[str] = "g2sd.probe:linear_probe"

    pool: Literal["class", "mean"] = "class"
    """Features: the class token, or the mean of the patches' tokens."""

    def __post_init__(self) -> None:
        check(self.pool in ("class", "mean"), "pool", self.pool, "'class' or 'mean'")


# a random crop of a fifth or more of the area, mirrored or not, and nothing else
_CROP_ALONE = AugmentationRecipe(
    crop_scale=(0.2, 1.0), rand_augment=None, erasing=0, repeats=1, mixup=0, cutmix=0, smoothing=0
)
_SUPERVISED = AugmentationRecipe(repeats=1)
# fp16 overflows for some; bf16 has float32's range
_GENERIC_FIT = FitRecipe(
    epochs=300, batch_size=4096, optimizer=adamw(2.4e-3, (0.9, 0.95)), schedule=cosine(10, 2.5e-6), precision="bf16",
    num_workers=8,
)  # fmt: skip
_PRETRAIN_FIT = FitRecipe(
    epochs=400, batch_size=4096, optimizer=adamw(2.4e-3, (0.9, 0.95)), schedule=cosine(40, 0.0), precision="bf16",
    num_workers=8,
)  # fmt: skip
_SPECIFIC_FIT = FitRecipe(
    epochs=200, batch_size=1024, optimizer=adamw(4e-3, (0.9, 0.999), layer_decay=0.75), schedule=cosine(5, 1e-6),
    precision="bf16", num_workers=8,
)  # fmt: skip

# the learning rate is .1 for 256 images, without weight decay
_PROBE_FIT = FitRecipe(
    epochs=90, batch_size=4096, optimizer=OptimizerRecipe(name="g2sd.lars:Lars", lr=1.6, weight_decay=0.0),
    schedule=cosine(10, 0.0), num_workers=8,
)  # fmt: skip


_BOTH = GenericRecipe(
    name="generic_both_in1k",
    summary="generic distillation of ViT-Tiny and ViT-Small at once, 300 epochs",
    students=(AutoencoderSizes(name="mae_vit_tiny_patch16"), AutoencoderSizes(name="mae_vit_small_patch16")),
    fit=_GENERIC_FIT,
    augmentation=_CROP_ALONE,
)


def _of_imagenet(size: str) -> tuple[ClassificationRecipe, ...]:
    """Return the paper's recipes for a student of this size."""
    autoencoder, vit = f"mae_vit_{size}_patch16", f"g2sd_vit_{size}_patch16_224"
    return (
        PretrainRecipe(
            name=f"pretrain_{size}_in1k",
            summary="MAE on ImageNet-1K, 400 epochs, without a teacher",
            model=AutoencoderSizes(name=autoencoder),
            fit=_PRETRAIN_FIT,
            augmentation=_CROP_ALONE,
        ),
        GenericRecipe(
            name=f"generic_{size}_in1k",
            summary="generic distillation on ImageNet-1K, 300 epochs",
            students=(AutoencoderSizes(name=autoencoder),),
            fit=_GENERIC_FIT,
            augmentation=_CROP_ALONE,
        ),
        FinetuneRecipe(
            name=f"finetune_{size}_in1k",
            summary="fine-tuning on ImageNet-1K, 200 epochs, without a teacher",
            model=ViTSizes(name=vit, distilled=False, drop_path_rate=0.1),
            fit=_SPECIFIC_FIT,
            augmentation=_SUPERVISED,
        ),
        FinetuneRecipe(
            name=f"specific_{size}_in1k",
            summary="specific distillation on ImageNet-1K, 200 epochs",
            model=ViTSizes(name=vit),
            mode="hard",
            fit=_SPECIFIC_FIT,
            augmentation=_SUPERVISED,
        ),
        ProbeRecipe(
            name=f"linear_{size}_in1k",
            summary="linear probe on ImageNet-1K, 90 epochs",
            fit=_PROBE_FIT,
            augmentation=replace(_CROP_ALONE, crop_scale=(0.08, 1.0)),
        ),
    )


# digits of 28 pixels in 49 patches of 4: a teacher of 96 channels and a student of 24
_DIGITS = PictureRecipe(size=28, resize=28, interpolation="bilinear", mean=(0.1307,) * 3, std=(0.3081,) * 3)
_AS_THEY_ARE = replace(_CROP_ALONE, random_crop=False)
_TEACHER_SIZES: dict[str, Any] = {"patch_size": 4, "embed_dim": 96, "depth": 3, "num_heads": 3}
# one head: with three, attention takes a third of the time on a CPU, for the same accuracies
_STUDENT_SIZES: dict[str, Any] = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 1}
_TEACHER_MAE = AutoencoderSizes(**_TEACHER_SIZES, decoder_embed_dim=64, decoder_depth=3, decoder_num_heads=4)
_STUDENT_MAE = AutoencoderSizes(**_STUDENT_SIZES, decoder_embed_dim=24, decoder_depth=2, decoder_num_heads=1)


def _digits_fit(epochs: int, lr: float, betas: tuple[float, float] = (0.9, 0.95), **options: Any) -> FitRecipe:
    return FitRecipe(
        epochs=epochs,
        batch_size=64,
        optimizer=adamw(lr, betas, **options),
        schedule=cosine(epochs / 10, 0.0),
        evaluate_every_epochs=max(epochs // 2, 1),
        save_every_epochs=max(epochs // 2, 1),
    )


def _small(**fields: Any) -> dict[str, Any]:
    return {"data": "mnist5k", "pictures": _DIGITS, "augmentation": _AS_THEY_ARE, **fields}


_STUDENT_VIT = ViTSizes(**_STUDENT_SIZES)
# 200 labels: three updates an epoch, on mixed digits
_FEW: dict[str, Any] = {"labels_per_class": 20}
_FEW |= _small(augmentation=replace(_AS_THEY_ARE, mixup=0.8, cutmix=1.0, smoothing=0.1))
_FEW |= {"fit": _digits_fit(150, 2e-3, (0.9, 0.999))}
_OF_DIGITS: tuple[ClassificationRecipe, ...] = (
    ProbeRecipe(
        name="linear_mnist5k", summary="linear probe on digits",
        **_small(
            fit=replace(
                _digits_fit(20, 1.6), optimizer=OptimizerRecipe(name="g2sd.lars:Lars", lr=1.6, weight_decay=0.0)
            )
        ),
    ),
    PretrainRecipe(
        name="pretrain_teacher_mnist5k", summary="MAE of a small teacher on digits", model=_TEACHER_MAE,
        **_small(fit=_digits_fit(20, 2e-3)),
    ),
    PretrainRecipe(
        name="pretrain_student_mnist5k", summary="MAE of a smaller student on digits", model=_STUDENT_MAE,
        **_small(fit=_digits_fit(10, 4e-3)),
    ),
    GenericRecipe(
        name="generic_mnist5k", summary="generic distillation of the student on digits", students=(_STUDENT_MAE,),
        teacher_layer=2, **_small(fit=_digits_fit(10, 4e-3)),
    ),
    FinetuneRecipe(
        name="finetune_teacher_mnist5k", summary="fine-tuning of the teacher on digits",
        model=ViTSizes(**_TEACHER_SIZES, distilled=False), **_small(fit=_digits_fit(10, 1e-3, (0.9, 0.999))),
    ),
    FinetuneRecipe(
        name="finetune_mnist5k", summary="fine-tuning of the student on digits",
        model=replace(_STUDENT_VIT, distilled=False), **_small(fit=_digits_fit(20, 2e-3, (0.9, 0.999))),
    ),
    FinetuneRecipe(
        name="specific_mnist5k", summary="specific distillation of the student on digits", model=_STUDENT_VIT,
        mode="hard", **_small(fit=_digits_fit(20, 2e-3, (0.9, 0.999))),
    ),
    FinetuneRecipe(
        name="finetune_teacher_few_mnist5k", summary="fine-tuning of the teacher on 200 labelled digits",
        model=ViTSizes(**_TEACHER_SIZES, distilled=False),
        **{**_small(fit=_digits_fit(60, 1e-3, (0.9, 0.999))), "labels_per_class": 20},
    ),
    FinetuneRecipe(
        name="finetune_few_mnist5k", summary="fine-tuning of the student on 200 labelled digits",
        model=replace(_STUDENT_VIT, distilled=False), **_FEW,
    ),
    FinetuneRecipe(
        name="specific_few_mnist5k", summary="specific distillation of the student on 200 labelled digits, by NKD",
        model=replace(_STUDENT_VIT, distilled=False), mode="nkd", **_FEW,
    ),
)  # fmt: skip

PICTURES: tuple[ClassificationRecipe, ...] = (*_of_imagenet("tiny"), *_of_imagenet("small"), _BOTH, *_OF_DIGITS)
