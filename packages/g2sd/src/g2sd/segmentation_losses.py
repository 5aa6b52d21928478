"""Distillation losses between logits of segmentation models (Channel-wise Knowledge Distillation, ICCV 2021; G2SD)."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from visionkernels.checks import InputError, check, check_choice
from visionkernels.ops.channel_wise_distillation import channel_wise_distillation

__all__ = ["Reduction", "channel_wise_loss", "pixel_kl_loss"]

Reduction: TypeAlias = Literal["mean", "batchmean", "sum"]


def channel_wise_loss(
    student: Float[Tensor, "batch classes height width"],
    teacher: Float[Tensor, "batch classes height width"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Return T^2 sum(-P_T log P_S) / (batch classes), P the softmax of each class's logits / T over all pixels.

    The cross-entropy, not the divergence: its least value is the teacher's entropy. Float32; the teacher gets no
    gradient. Raises ValueError for shapes that differ and for a temperature that is not above 0.
    """
    return channel_wise_distillation(student, teacher, temperature=temperature)


def pixel_kl_loss(
    student: Float[Tensor, "batch classes height width"],
    teacher: Float[Tensor, "batch classes height width"],
    *,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
) -> Float[Tensor, ""]:
    """Return T^2 KL(teacher || student) of the classes of every pixel, logits / T.

    `reduction` divides the sum by nothing, by the batch, or by all elements, classes too ("mean", as the official code
    does, which makes it tiny). Precision and errors as for `channel_wise_loss`.
    """
    check_choice("reduction", reduction, Reduction)
    check(temperature > 0, "temperature", temperature, "above 0")
    if student.shape != teacher.shape or not student.numel():
        raise InputError(
            f"student {list(student.shape)} and teacher {list(teacher.shape)} must be equal, and not empty"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    ours, theirs = (F.log_softmax(logits.to(dtype) / temperature, 1) for logits in (student, teacher.detach()))
    total = temperature**2 * F.kl_div(ours, theirs, reduction="sum", log_target=True)
    return total / {"mean": ours.numel(), "batchmean": len(ours), "sum": 1}[reduction]
