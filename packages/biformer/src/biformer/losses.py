"""Training losses: distillation from a teacher's logits, and token labelling (after "All Tokens Matter", 2021).

All are computed in float32, for logits of any precision.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from visionkernels.checks import InputError

__all__ = ["distillation_loss", "soft_cross_entropy", "token_labelling_loss"]


def distillation_loss(
    base: Float[Tensor, ""],
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    *,
    kind: Literal["none", "soft", "hard"],
    alpha: float = 0.5,
    tau: float = 1.0,
) -> Float[Tensor, ""]:
    """Blend a base loss with distillation: (1 - alpha) * base + alpha * distil (as in DeiT).

    "soft" is tau^2 * KL(teacher || student) of the logits over tau, summed and divided by batch * classes; "hard" is
    the cross-entropy with the teacher's argmax; "none" returns `base`. The teacher gets no gradient. Raises ValueError
    for an unknown kind, alpha outside [0, 1], tau <= 0, or shapes that differ.
    """
    if kind not in ("none", "soft", "hard"):
        raise InputError(f"kind={kind!r} is unknown; use none, soft or hard")
    if not 0 <= alpha <= 1 or tau <= 0:
        raise InputError(f"alpha={alpha} must be in [0, 1] and tau={tau} above 0")
    if kind == "none":
        return base
    if student_logits.shape != teacher_logits.shape:
        raise InputError(f"student logits {list(student_logits.shape)} and teacher {list(teacher_logits.shape)} differ")
    student, teacher = student_logits.float(), teacher_logits.detach().float()
    if kind == "soft":
        student, teacher = (F.log_softmax(logits / tau, -1) for logits in (student, teacher))
        distil = F.kl_div(student, teacher, reduction="sum", log_target=True) * tau**2 / student.numel()
    else:
        distil = F.cross_entropy(student, teacher.argmax(-1))
    return (1 - alpha) * base + alpha * distil


def token_labelling_loss(
    image_logits: Float[Tensor, "batch classes"],
    cell_logits: Float[Tensor, "batch height width classes"],
    image_target: Int[Tensor, "batch"] | Float[Tensor, "batch classes"],
    cell_target: Float[Tensor, "batch height width classes"],
    *,
    cell_weight: float = 0.5,
) -> Float[Tensor, ""]:
    """Add the mean cross-entropy of all cells to that of the images: image + cell_weight * cells.

    `cell_target` holds a probability per class and cell. Raises ValueError for shapes that disagree.
    """
    if cell_logits.shape != cell_target.shape:
        raise InputError(f"cell_logits {list(cell_logits.shape)} and cell_target {list(cell_target.shape)} differ")
    return soft_cross_entropy(image_logits, image_target) + cell_weight * soft_cross_entropy(cell_logits, cell_target)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of [..., classes] with class indices [...] or probabilities [..., classes]."""
    logits = logits.float()
    if not target.is_floating_point():
        return F.cross_entropy(logits.flatten(0, -2), target.flatten())
    return -torch.sum(target.float() * F.log_softmax(logits, -1), -1).mean()
