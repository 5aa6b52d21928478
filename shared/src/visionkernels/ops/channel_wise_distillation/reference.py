"""Channel-wise distillation by its definition: the cross entropy of two softmaxes over positions."""

import torch
from torch import Tensor

__all__ = ["channel_wise_distillation"]


def channel_wise_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the loss; see the public function."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    log_student = torch.log_softmax(student.to(dtype).flatten(2) / temperature, -1)
    p_teacher = torch.softmax(teacher.to(dtype).flatten(2) / temperature, -1)
    return -(temperature**2) * (p_teacher * log_student).sum(-1).mean()
