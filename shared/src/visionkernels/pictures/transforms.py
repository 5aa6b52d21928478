"""From pictures and classes to a batch: timm's transforms, repeated augmentation, mixup and cutmix."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from visionkernels.checks import InputError
from visionkernels.pictures.recipes import AugmentationRecipe, PictureRecipe

__all__ = [
    "LabelMixing",
    "evaluation_transform",
    "repeated_augmentation_order",
    "training_steps",
    "training_transform",
]


def training_transform(pictures: PictureRecipe, augmentation: AugmentationRecipe) -> Callable[[Image.Image], Any]:
    """Return timm's training transform with the recipe's settings."""
    transform: Callable[[Image.Image], Any] = _timm_training_transform(pictures, augmentation)
    return transform


def training_steps(pictures: PictureRecipe, augmentation: AugmentationRecipe) -> tuple[Any, Any, Any]:
    """Return the three steps of `training_transform`: crop and flip, augment, normalise and erase."""
    first, second, third = _timm_training_transform(pictures, augmentation, is_separate=True)
    return first, second, third


def evaluation_transform(pictures: PictureRecipe) -> Callable[[Image.Image], Any]:
    """Return timm's evaluation transform: resize the shorter side, crop the centre, normalise."""
    return create_transform(
        pictures.size,
        interpolation=pictures.interpolation,
        mean=pictures.mean,
        std=pictures.std,
        crop_pct=pictures.size / pictures.resize,
    )


def repeated_augmentation_order(length: int, epoch: int, *, repeats: int = 3) -> Sequence[int]:
    """Return the images of one epoch: a permutation seeded by `epoch`, each image `repeats` times in a row.

    The order is cut to as many entries as the dataset has, in whole groups of 256. Process r of R takes entries
    r, r + R, ..., so that the copies of an image meet different processes.
    """
    sampler = RepeatAugSampler(range(length), num_replicas=1, rank=0, num_repeats=repeats)
    sampler.set_epoch(epoch)
    return list(sampler)


class LabelMixing:
    """Turns a batch of images and class indices into mixed images and soft labels, by mixup or cutmix (timm's)."""

    def __init__(self, augmentation: AugmentationRecipe, num_classes: int) -> None:
        self.smoothing, self.num_classes, self.mixup = augmentation.smoothing, num_classes, None
        if augmentation.mixup > 0 or augmentation.cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=augmentation.mixup,
                cutmix_alpha=augmentation.cutmix,
                prob=augmentation.mix_prob,
                switch_prob=augmentation.mix_switch,
                label_smoothing=augmentation.smoothing,
                num_classes=num_classes,
            )

    def __call__(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if self.mixup is None:
            return images, mixup_target(labels, self.num_classes, smoothing=self.smoothing)
        if len(images) % 2:
            raise InputError(f"mixup pairs images; {len(images)} a process and step is odd, change batch_size")
        mixed: tuple[Tensor, Tensor] = self.mixup(images, labels)
        return mixed


def _timm_training_transform(
    pictures: PictureRecipe, augmentation: AugmentationRecipe, *, is_separate: bool = False
) -> Any:
    transform = create_transform(
        pictures.size,
        is_training=True,
        no_aug=not augmentation.random_crop,
        scale=augmentation.crop_scale,
        color_jitter=0.0,
        auto_augment=augmentation.rand_augment,
        interpolation=pictures.interpolation,
        mean=pictures.mean,
        std=pictures.std,
        re_prob=augmentation.erasing,
        re_mode="pixel",
        separate=is_separate,
    )
    for step in transform if is_separate else (transform,):
        for part in getattr(step, "transforms", ()):
            for op in getattr(part, "ops", ()):
                if op.name.startswith("Posterize"):
                    op.aug_fn = partial(_posterize, op.aug_fn)
    return transform


def _posterize(posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **options: Any) -> Image.Image:
    # timm asks for no bits at the top of its scale; Pillow refuses that since version 13, and gave black before
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)
