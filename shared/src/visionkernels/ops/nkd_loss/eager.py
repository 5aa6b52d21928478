"""NKD in plain ATen: the label's logit is -inf in the distribution of the others."""

import torch
from torch import Tensor

__all__ = ["nkd_loss"]


def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float, temperature: float
) -> Tensor:
    """Return the loss; see the public function."""
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    student, teacher, label = student_logits.to(dtype), teacher_logits.to(dtype), labels.long()[:, None]
    target = -teacher.softmax(1).gather(1, label) * student.log_softmax(1).gather(1, label)
    q_teacher = (teacher / temperature).scatter(1, label, -torch.inf).softmax(1)
    log_q_student = (student / temperature).scatter(1, label, -torch.inf).log_softmax(1)
    # 0 * -inf; the gradient there is q_student alone, through the normaliser
    shares = (q_teacher * log_q_student).masked_fill(q_teacher == 0, 0)
    return target.mean() - (alpha * temperature**2 / len(labels)) * shares.sum()
