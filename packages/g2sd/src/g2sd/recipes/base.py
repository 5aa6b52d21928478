"""Sizes of models, and settings that the recipes of all stages share."""

from dataclasses import dataclass
from typing import Any

from visionkernels.checks import InputError, check
from visionkernels.recipes import ModelRecipe, OptimizerRecipe, ScheduleRecipe, settings
from visionkernels.tasks.classification import ClassificationRecipe
from visionkernels.weights import Trained

__all__ = ["AutoencoderSizes", "ViTSizes", "adamw", "autoencoder_record", "check_teacher", "cosine"]


@dataclass(frozen=True, kw_only=True)
class AutoencoderSizes(ModelRecipe):
    """A masked autoencoder of timm's registry; None keeps the model's default."""

    name: str = "mae_vit_small_patch16"
    patch_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    decoder_embed_dim: int | None = None
    decoder_depth: int | None = None
    decoder_num_heads: int | None = None


@dataclass(frozen=True, kw_only=True)
class ViTSizes(ModelRecipe):
    """A classifier of this package; None keeps the model's default."""

    name: str = "g2sd_vit_small_patch16_224"
    distilled: bool = True
    """With a distillation token; otherwise the mean of the patches is classified."""
    drop_path_rate: float = 0.0
    patch_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None

    def __post_init__(self) -> None:
        check(0 <= self.drop_path_rate < 1, "drop_path_rate", self.drop_path_rate, "in [0, 1)")


def autoencoder_record(recipe: ClassificationRecipe, sizes: AutoencoderSizes, **widths: int | None) -> Trained:
    """Return the record of a masked autoencoder; `widths` are those of its heads for a teacher."""
    options = {"img_size": recipe.pictures.size, **sizes.options(), **widths}
    return Trained(
        kind="autoencoder", package="g2sd", model=sizes.name, options=options, inputs=recipe.pictures.inputs(),
        settings=settings(recipe),
    )  # fmt: skip


def check_teacher(recipe: Any, teacher: object) -> None:
    """Raise InputError for a teacher if the recipe has no mode, and for a missing one if it has."""
    if teacher is None and recipe.mode is not None:
        raise InputError(f"recipe {recipe.name} has mode={recipe.mode!r} and needs --teacher")
    if teacher is not None and recipe.mode is None:
        raise InputError(f"recipe {recipe.name} does not take --teacher; choose one of specific distillation")


def adamw(lr: float, betas: tuple[float, float], **options: Any) -> OptimizerRecipe:
    """Return AdamW as all stages use it."""
    return OptimizerRecipe(name="adamw", lr=lr, weight_decay=0.05, betas=betas, **options)


def cosine(warmup_epochs: float, min_lr: float) -> ScheduleRecipe:
    """Return a cosine that counts from the end of its warm-up."""
    return ScheduleRecipe(
        name="cosine", unit="update", warmup_epochs=warmup_epochs, after_warmup=True, warmup_lr=0.0, min_lr=min_lr
    )
