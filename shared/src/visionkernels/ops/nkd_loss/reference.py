"""NKD by its definition, sample by sample."""

import torch
from torch import Tensor

__all__ = ["nkd_loss"]


def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float, temperature: float
) -> Tensor:
    """Return the loss; see the public function."""
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    losses = []
    for student, teacher, label in zip(student_logits.to(dtype), teacher_logits.to(dtype), labels, strict=True):
        target = -teacher.softmax(0)[label] * student.log_softmax(0)[label]
        others = torch.arange(len(student), device=labels.device) != label
        q_teacher = (teacher[others] / temperature).softmax(0)
        log_q_student = (student[others] / temperature).log_softmax(0)
        distributed = -(q_teacher * log_q_student)[q_teacher != 0].sum()
        losses.append(target + alpha * temperature**2 * distributed)
    return torch.stack(losses).mean()
