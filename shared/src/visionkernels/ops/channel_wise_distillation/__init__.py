"""Channel-wise distillation of dense predictions: where in the map each channel lies (Shu et al., ICCV 2021)."""

import math

from jaxtyping import Float
from torch import Tensor

from visionkernels.ops._dispatch import Backend, choose_backend, without_autocast
from visionkernels.ops.channel_wise_distillation import eager, reference

__all__ = ["channel_wise_distillation"]


def channel_wise_distillation(
    student: Float[Tensor, "batch channels *spatial"],
    teacher: Float[Tensor, "batch channels *spatial"],
    *,
    temperature: float = 1.0,
    backend: Backend = "auto",
) -> Float[Tensor, ""]:
    r"""Compare the maps of a student and a teacher as distributions over positions, one for each sample and channel.

    With P = softmax(z / temperature) over all positions n of a channel,

        loss = -temperature**2 * mean over b, c of sum over n of P_teacher[b, c, n] * log P_student[b, c, n]

    the cross entropy and not the KL divergence: its least value is the teacher's entropy, its gradient the same.

    Computes in float32 (float64 where an input is float64), under autocast too, and returns that dtype. `teacher` may
    have another floating dtype than `student`, and gets no gradient; there is no second derivative. Eager on a CPU
    keeps one tensor of the size of `student` for backward, Triton the inputs; both are deterministic.

    Raises TypeError for dtypes and devices, ValueError for shapes that differ, empty or without spatial axes, and a
    temperature that is not positive, RuntimeError for `backend="triton"` where it cannot run.
    """
    _check(student, teacher, temperature)
    arguments = (student, teacher.detach(), float(temperature))
    with without_autocast(student):
        match choose_backend("channel_wise_distillation", backend, student, teacher):
            case "triton":
                from visionkernels.ops.channel_wise_distillation import triton

                return triton.channel_wise_distillation(*arguments)
            case "reference":
                return reference.channel_wise_distillation(*arguments)
            case _:
                return eager.channel_wise_distillation(*arguments)


def _check(student: Tensor, teacher: Tensor, temperature: float) -> None:
    for name, logits in (("student", student), ("teacher", teacher)):
        if not logits.is_floating_point():
            raise TypeError(f"{name} is {logits.dtype}; channel_wise_distillation takes floating-point maps")
    if teacher.device != student.device:
        raise TypeError(f"teacher is on {teacher.device}; expected {student.device}, as student")
    if student.ndim < 3 or not student.numel():
        raise ValueError(
            f"student has shape {list(student.shape)}; expected [batch, channels, *spatial], at least one of each"
        )
    if teacher.shape != student.shape:
        raise ValueError(f"teacher has shape {list(teacher.shape)}; expected {list(student.shape)}, as student")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be a positive number")
