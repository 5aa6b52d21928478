"""How pictures become input, and how they vary in training: frozen settings that check themselves."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, cast

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from visionkernels.checks import check, check_choice

__all__ = ["IMAGE_INPUTS", "AugmentationRecipe", "PictureRecipe", "SceneRecipe"]

_Settings = TypeVar("_Settings", bound="_ImageInputs")


IMAGE_INPUTS: Mapping[str, Any] = {"channel_order": "RGB", "range": (0, 1)}
"""What every image is, before `mean` and `std`, in the words of a weights file."""


class _ImageInputs:
    """How images become input, as a weights file tells it."""

    def inputs(self) -> dict[str, Any]:
        """Return what a weights file says of how its inputs are prepared."""
        return {**asdict(cast(Any, self)), **IMAGE_INPUTS}

    @classmethod
    def of_inputs(cls: type[_Settings], inputs: Mapping[str, Any]) -> _Settings:
        """Return the settings that `inputs` wrote. Raises InputError for inputs that are no RGB images in 0..1."""
        for name, value in IMAGE_INPUTS.items():
            check(inputs.get(name, value) == value, name, inputs.get(name), repr(value))
        return cls(**{item.name: inputs[item.name] for item in fields(cast(Any, cls))})


@dataclass(frozen=True, kw_only=True)
class PictureRecipe(_ImageInputs):
    """How a picture becomes the model's input."""

    size: int = 224
    """Pixels a side of the input."""
    resize: int = 256
    """Pixels of the shorter side before the centre crop in evaluation."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    """Mean and standard deviation of the channels, in 0..1."""
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD

    def __post_init__(self) -> None:
        check(self.size >= 1, "size", self.size, "at least 1")
        check(self.resize >= self.size, "resize", self.resize, f"at least size={self.size}")
        check_choice("interpolation", self.interpolation, Literal["bicubic", "bilinear"])


@dataclass(frozen=True, kw_only=True)
class AugmentationRecipe:
    """How training pictures and labels vary."""

    random_crop: bool = True
    """Crop a share of the area at random and flip half of the pictures, instead of resizing them."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Least and largest share of the area of such a crop."""
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    """As `timm.data.create_transform` takes it; None: no RandAugment."""
    erasing: float = 0.25
    """Probability of erasing a rectangle."""
    repeats: int = 3
    """Copies of a picture, each augmented anew, that an epoch holds in a row; 1: each picture once an epoch."""
    mixup: float = 0.8
    """Alpha of the beta distribution; 0: no mixup."""
    cutmix: float = 1.0
    """Alpha of the beta distribution; 0: no cutmix."""
    mix_prob: float = 1.0
    """Share of the batches that are mixed at all."""
    mix_switch: float = 0.5
    """Share of cutmix where both are on."""
    smoothing: float = 0.1
    """Share of the label that is spread over all classes."""

    def __post_init__(self) -> None:
        for name in ("erasing", "mix_prob", "mix_switch"):
            value = getattr(self, name)
            check(0 <= value <= 1, name, value, "in [0, 1]")
        for name in ("mixup", "cutmix"):
            check(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        low, high = self.crop_scale
        check(0 < low <= high <= 1, "crop_scale", self.crop_scale, "two rising numbers in (0, 1]")
        check(0 <= self.smoothing < 1, "smoothing", self.smoothing, "in [0, 1)")
        check(self.repeats >= 1, "repeats", self.repeats, "at least 1")


@dataclass(frozen=True, kw_only=True)
class SceneRecipe(_ImageInputs):
    """How a picture becomes the input of a segmentation model, in training and in evaluation."""

    short_side: int = 512
    """Pixels of the shorter side, before the random scale."""
    long_side: int = 2048
    """Pixels that the longer side may have at most, before the random scale."""
    scale_range: tuple[float, float] = (0.5, 2.0)
    crop: int = 512
    """Pixels a side of a training crop."""
    max_class_share: float = 0.75
    """Largest share of a crop that one class may fill; ten crops are tried."""
    multiple: int = 32
    """In evaluation both sides are rounded up to a multiple of this."""
    inference: Literal["whole", "slide"] = "whole"
    """"slide": the mean over overlapping windows of `crop` pixels a side."""
    stride: int = 341
    """Pixels between windows of "slide"."""
    test_scales: tuple[float, ...] = (1.0,)
    """Probabilities are averaged over these sizes of the picture."""
    test_flip: bool = False
    """Average over the mirrored picture as well."""
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    """Mean and standard deviation of the channels, in 0..1."""
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD

    def __post_init__(self) -> None:
        for name in ("short_side", "crop", "multiple", "stride"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.long_side >= self.short_side, "long_side", self.long_side, f"at least {self.short_side}")
        low, high = self.scale_range
        check(0 < low <= high, "scale_range", self.scale_range, "two rising numbers above 0")
        check(0 < self.max_class_share <= 1, "max_class_share", self.max_class_share, "in (0, 1]")
        check(self.inference in ("whole", "slide"), "inference", self.inference, "'whole' or 'slide'")
        check(self.stride <= self.crop, "stride", self.stride, f"at most crop={self.crop}, or pixels are left out")
        scales = bool(self.test_scales) and min(self.test_scales) > 0
        check(scales, "test_scales", self.test_scales, "one or more numbers above 0")
