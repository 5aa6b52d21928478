"""Normalised knowledge distillation of class logits (NKD; Yang et al., ICCV 2023)."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from visionkernels.ops._dispatch import Backend, choose_backend, without_autocast
from visionkernels.ops.nkd_loss import eager, reference

__all__ = ["nkd_loss"]


def nkd_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    *,
    alpha: float = 1.0,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> Float[Tensor, ""]:
    r"""Distil the label's probability, and apart from it how the others are shared out (NKD).

    With y = labels[i], p = softmax(z) over all classes, q = softmax(z / temperature) over the classes c != y, S the
    student and T the teacher,

        loss = mean over i of -p_T[y] * log p_S[y]  -  alpha * temperature**2 * sum over c != y of q_T[c] * log q_S[c].

    The first term has temperature 1. A class of which the teacher has no share (q_T = 0, also by a logit of -inf)
    adds nothing; loss and gradient stay finite however far logits lie apart.

    Computes in float32 (float64 where an input is float64), under autocast too, and returns that dtype.
    `teacher_logits` may have another floating dtype, and gets no gradient. Triton has no second derivative.

    Raises TypeError for dtypes and devices, ValueError for shapes that differ, an empty batch, fewer than two classes,
    a temperature that is not positive and a label outside [0, classes) (on a GPU: a device-side assertion),
    RuntimeError for `backend="triton"` where it cannot run.
    """
    _check_logits(student_logits, teacher_logits)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be a positive number")
    _check_labels(labels, student_logits)
    arguments = (student_logits, teacher_logits.detach(), labels, float(alpha), float(temperature))
    with without_autocast(student_logits):
        match choose_backend("nkd_loss", backend, student_logits, teacher_logits):
            case "triton":
                from visionkernels.ops.nkd_loss import triton

                return triton.nkd_loss(*arguments)
            case "reference":
                return reference.nkd_loss(*arguments)
            case _:
                return eager.nkd_loss(*arguments)


def _check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not logits.is_floating_point():
            raise TypeError(f"{name} is {logits.dtype}; nkd_loss takes floating-point logits")
    if teacher_logits.device != student_logits.device:
        raise TypeError(f"teacher_logits is on {teacher_logits.device}; expected {student_logits.device}, as student")
    shape = list(student_logits.shape)
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise ValueError(f"student_logits has shape {shape}; expected [batch >= 1, classes >= 2]")
    if list(teacher_logits.shape) != shape:
        raise ValueError(f"teacher_logits has shape {list(teacher_logits.shape)}; expected {shape}, as student_logits")


def _check_labels(labels: Tensor, logits: Tensor) -> None:
    batch, classes = logits.shape
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels is {labels.dtype}; expected int64 or int32 (the argmax of soft labels)")
    if labels.device != logits.device:
        raise TypeError(f"labels is on {labels.device}; expected {logits.device}, as student_logits")
    if labels.shape != (batch,):
        raise ValueError(f"labels has shape {list(labels.shape)}; expected [{batch}]")
    if torch.compiler.is_compiling() or labels.is_meta:
        return
    if not labels.is_cpu:
        torch._assert_async(((labels >= 0) & (labels < classes)).all())
        return
    low, high = (int(extreme) for extreme in labels.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"labels spans [{low}, {high}]; allowed is [0, {classes - 1}]")
