"""Channel-wise distillation of dense predictions (Shu et al., ICCV 2021)."""

from jaxtyping import Float
from torch import Tensor

from visionkernels.ops._checks import check_alike, check_floating, check_positive
from visionkernels.ops._dispatch import Backend, choose_backend, implementation, without_autocast

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
    check_floating("channel_wise_distillation", "maps", student=student, teacher=teacher)
    if student.ndim < 3 or not student.numel():
        raise ValueError(
            f"student has shape {list(student.shape)}; expected [batch, channels, *spatial], at least one of each"
        )
    check_alike(student=student, teacher=teacher)
    check_positive(temperature=temperature)
    chosen = choose_backend("channel_wise_distillation", backend, student, teacher)
    with without_autocast(student):
        loss = implementation(__name__, chosen).channel_wise_distillation
        return loss(student, teacher.detach(), float(temperature))
