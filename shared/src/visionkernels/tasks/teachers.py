"""Teachers of classifiers: opened from a file or by name, frozen, and fed as they were trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionkernels import models
from visionkernels.checks import InputError
from visionkernels.package import Package
from visionkernels.tasks.classification import open_plain
from visionkernels.weights import Trained, open_trained, read_checkpoint

__all__ = ["Teacher", "open_teacher"]


def open_teacher(
    teacher: str | Path | nn.Module,
    *,
    checkpoint: str | Path | None = None,
    package: Package | str | None = None,
    num_classes: int | None = None,
    **options: Any,
) -> nn.Module:
    """Return a teacher in evaluation mode.

    `teacher` is a module, a weights file of any package (or an official one of `package`), or a model by name as
    `visionkernels.models.create` takes it, which gets the weights in `checkpoint`, or else published ones, and
    `options`. Raises InputError for a name that is neither, a teacher that has not `num_classes` outputs, and as
    `open_trained` does.
    """
    if isinstance(teacher, nn.Module):
        model = teacher
    elif Path(teacher).is_file():
        if checkpoint is not None:
            raise InputError(f"--teacher {teacher} is a file; --teacher-checkpoint is for a teacher by name")
        model = open_trained(teacher, package=package).model
    elif checkpoint is not None:
        model = open_plain(
            read_checkpoint(checkpoint), Trained(kind="classifier", package="", model=str(teacher), options=options)
        ).model
    else:
        name = str(teacher)
        if "/" in name and not name.startswith("hf-hub:"):
            raise FileNotFoundError(f"teacher {name} is not a file")
        model = models.create(name, pretrained=not models.is_callable(name), **options)
    outputs = getattr(model, "num_classes", num_classes)
    if num_classes is not None and outputs != num_classes:
        raise InputError(f"teacher {_named(teacher)} has {outputs} classes, the data {num_classes}")
    return model.eval()


def _named(teacher: str | Path | nn.Module) -> str:
    return type(teacher).__name__ if isinstance(teacher, nn.Module) else str(teacher)


class Teacher(nn.Module):
    """A frozen model on images that are normalised by `mean` and `std`, anew where it was trained with others."""

    def __init__(self, model: nn.Module, *, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        super().__init__()
        self.scale: Tensor | None
        self.shift: Tensor | None
        self.model = model.eval().requires_grad_(False)
        scale = shift = None
        config = cast(dict[str, Any], getattr(model, "pretrained_cfg", None) or {})
        if mean is not None and std is not None:
            own_mean, own_std = (tuple(config.get(name, own)) for name, own in (("mean", mean), ("std", std)))
            if (own_mean, own_std) != (tuple(mean), tuple(std)):
                scale = (torch.tensor(std) / torch.tensor(own_std))[:, None, None]
                shift = ((torch.tensor(mean) - torch.tensor(own_mean)) / torch.tensor(own_std))[:, None, None]
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return super().train(False)

    def prepare(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels h w"]:
        """Return images normalised as the model was trained."""
        return images if self.scale is None or self.shift is None else images * self.scale + self.shift

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return logits."""
        logits: Tensor = self.model(self.prepare(images))
        return logits
