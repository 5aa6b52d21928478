"""Normalised knowledge distillation of class logits (NKD; Yang et al., ICCV 2023)."""

from jaxtyping import Float, Int
from torch import Tensor

from visionkernels.checks import InputError
from visionkernels.ops._checks import (
    check_alike,
    check_devices,
    check_floating,
    check_index,
    check_not_negative,
    check_positive,
    check_range,
)
from visionkernels.ops._dispatch import Backend, choose_backend, implementation, without_autocast

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
    a temperature that is not positive, a negative `alpha` and a label outside [0, classes) (on a GPU: a device-side
    assertion), RuntimeError for `backend="triton"` where it cannot run.
    """
    check_floating("nkd_loss", "logits", student_logits=student_logits, teacher_logits=teacher_logits)
    if student_logits.ndim != 2 or student_logits.shape[0] < 1 or student_logits.shape[1] < 2:
        raise InputError(f"student_logits has shape {list(student_logits.shape)}; expected [batch >= 1, classes >= 2]")
    check_alike(student_logits=student_logits, teacher_logits=teacher_logits)
    check_positive(temperature=temperature)
    check_not_negative(alpha=alpha)
    check_index("labels", labels, hint=" (the argmax of soft labels)")
    check_devices(student_logits=student_logits, labels=labels)
    if labels.shape != student_logits.shape[:1]:
        raise InputError(f"labels has shape {list(labels.shape)}; expected [{len(student_logits)}]")
    check_range("labels", labels, student_logits.shape[1])
    chosen = choose_backend("nkd_loss", backend, student_logits, teacher_logits)
    with without_autocast(student_logits):
        loss = implementation(__name__, chosen).nkd_loss
        return loss(student_logits, teacher_logits.detach(), labels, float(alpha), float(temperature))
