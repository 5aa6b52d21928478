"""Training tasks: classification with mixed labels, distillation, and token labelling.

Losses are those of `biformer.losses`, in float32. Token labelling is our own design after "All Tokens Matter" (2021),
since the paper's code for it was never released.
"""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from torch import Tensor, nn
from torch.nn import functional as F

from biformer.losses import distillation_loss, soft_cross_entropy, token_labelling_loss
from biformer.model import BiFormer
from biformer.recipes import DistillationRecipe, TokenLabellingRecipe
from visionkernels.checks import InputError
from visionkernels.tasks.teachers import Teacher
from visionkernels.training.task import Task

__all__ = [
    "CellClassifier",
    "CellTeacher",
    "ClassifierTask",
    "TokenLabellingTask",
    "mix_cells",
]

STRIDE = 32
"""Side in pixels of the image patch of one cell of the last map."""


class CellTeacher(Teacher):
    """A frozen model that labels the student's images, or each of their cells."""

    @torch.no_grad()
    def label_cells(
        self, images: Float[Tensor, "batch channels height width"], grid: tuple[int, int]
    ) -> Float[Tensor, "batch rows columns classes"]:
        """Return class probabilities of each cell of `grid`: the classifier at each position of the last map.

        Raises ValueError for a model whose features are not a map [batch, channels, height, width].
        """
        features = self.model.forward_features(self.prepare(images))  # type: ignore[operator]
        if features.ndim != 4:
            kind = type(self.model).__name__
            raise InputError(f"teacher {kind} has features {list(features.shape)}; token labelling needs a map of them")
        if features.shape[-2:] != grid:
            features = F.interpolate(features, grid, mode="bilinear", align_corners=False)
        logits = self.model.get_classifier()(features.permute(0, 2, 3, 1))  # type: ignore[operator]
        return cast(Tensor, logits).float().softmax(-1)


class ClassifierTask(Task):
    """Soft-target cross-entropy, blended with distillation if there is a teacher."""

    def __init__(
        self, model: nn.Module, *, teacher: CellTeacher | None = None, distillation: DistillationRecipe | None = None
    ) -> None:
        super().__init__(model, teacher=teacher)
        if (teacher is None) != (distillation is None or distillation.kind == "none"):
            raise InputError("teacher and distillation belong together; give both or neither")
        self.distillation = distillation

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Take images and labels, class indices or probabilities; return the loss and the logits."""
        logits = self.trainable_module(images)
        base = soft_cross_entropy(logits, target)
        if self.teacher is None or self.distillation is None:
            return {"loss": base, "output": logits}
        recipe = self.distillation
        loss = distillation_loss(
            base, logits, self.teacher(images), kind=recipe.kind, alpha=recipe.alpha, tau=recipe.tau
        )
        return {"loss": loss, "label_loss": base, "output": logits}


class CellClassifier(nn.Module):
    """A model with a second classifier on every cell of its last map, which evaluation ignores."""

    def __init__(self, model: BiFormer) -> None:
        super().__init__()
        self.model = model
        self.cell_head = nn.Linear(model.num_features, model.num_classes)
        nn.init.trunc_normal_(self.cell_head.weight, std=0.02)
        nn.init.zeros_(self.cell_head.bias)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Any:
        """Return logits [B, classes], in training also those of the cells, [B, rows, columns, classes]."""
        features = self.model.forward_features(images)
        logits = self.model.forward_head(features)
        return (logits, self.cell_head(features.permute(0, 2, 3, 1))) if self.training else logits


class TokenLabellingTask(Task):
    """The image's and the cells' cross-entropy, on images mixed by whole cells (MixToken).

    Labels of cells come with the batch, or from `teacher`, which gets the images before they are mixed.
    """

    def __init__(
        self,
        module: CellClassifier,
        recipe: TokenLabellingRecipe,
        *,
        smoothing: float,
        teacher: CellTeacher | None = None,
    ) -> None:
        super().__init__(module, teacher=teacher)
        self.recipe, self.smoothing = recipe, smoothing
        self.num_classes = module.model.num_classes

    def forward(self, images: Tensor, labels: Tensor, cells: Tensor | None = None) -> dict[str, Tensor]:
        """Take images, class indices and, without a teacher, cell labels [B, rows, columns, classes]."""
        if cells is None:
            if self.teacher is None:
                raise InputError("cells=None needs a teacher")
            cells = self.teacher.label_cells(images, (images.shape[-2] // STRIDE, images.shape[-1] // STRIDE))
        share = 1.0
        if self.recipe.mix > 0:
            images, cells, share = mix_cells(images, cells, float(np.random.beta(self.recipe.mix, self.recipe.mix)))  # noqa: NPY002 - seeded with timm's
        target = mixup_target(labels, self.num_classes, share, self.smoothing)
        logits, cell_logits = self.trainable_module(images)
        loss = token_labelling_loss(logits, cell_logits, target, cells, cell_weight=self.recipe.cell_weight)
        return {"loss": loss, "output": logits}

    def final_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's weights under its own names, without the classifier of cells."""
        model = "model."
        return {key.removeprefix(model): value for key, value in state.items() if key.startswith(model)}


def mix_cells(
    images: Float[Tensor, "batch channels height width"],
    cells: Float[Tensor, "batch rows columns classes"],
    share: float,
) -> tuple[Tensor, Tensor, float]:
    """Replace a box of whole cells in every image by that of the image at the mirrored position of the batch.

    `share` in [0, 1] is the area that is kept, up to rounding to cells. Returns images, cell labels, and the exact
    share. The box is drawn from numpy's generator, as in timm's cutmix.
    """
    (top, bottom, left, right), share = cutmix_bbox_and_lam(cells.shape[:3], share)
    height, width = images.shape[-2] // cells.shape[1], images.shape[-1] // cells.shape[2]
    box = (..., slice(top * height, bottom * height), slice(left * width, right * width))
    images, cells = images.clone(), cells.clone()
    images[box] = images.flip(0)[box]
    cells[:, top:bottom, left:right] = cells.flip(0)[:, top:bottom, left:right]
    return images, cells, float(share)
