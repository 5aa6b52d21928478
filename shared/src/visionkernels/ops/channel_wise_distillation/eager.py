"""Channel-wise distillation in plain ATen: on a CPU a few rows at a time, with the gradient in the same pass.

Rows of shifted logits x = (z - max z) / T have sum P_t log P_s = <P_t, x> + log max P_s, since max P_s = 1 / sum exp x.
So two softmaxes are all that is exponentiated, and P_s - P_t is the gradient but for a factor.
"""

# R rows (batch * channels), N positions

from typing import Any

import torch
from torch import Tensor

from visionkernels.autograd import anchor_to, first_order_only

__all__ = ["channel_wise_distillation"]

_CHUNK_ELEMENTS = 65536
"""Elements of the rows of a pass, one or more: four float32 buffers of this size stay in a core's cache."""


def channel_wise_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the loss; see the public function."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    if student.is_cpu and not torch.compiler.is_compiling():
        anchor = anchor_to("channel_wise_distillation", student, advice="; pass backend='reference'")
        return _Loss.apply(student, teacher, temperature, dtype, anchor)
    log_student = torch.log_softmax(student.to(dtype).flatten(2) / temperature, -1)
    p_teacher = torch.softmax(teacher.to(dtype).flatten(2) / temperature, -1)
    return (p_teacher * log_student).sum() * (-(temperature**2) / student.shape[:2].numel())


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, temperature: float, dtype: torch.dtype, anchor: Tensor | None
    ) -> Tensor:
        students, teachers = (x.flatten(2).flatten(0, 1).contiguous() for x in (student, teacher))  # [R, N]
        rows, positions = students.shape
        chunk = max(1, _CHUNK_ELEMENTS // positions)
        shifted, p_teacher = students.new_empty(2, min(chunk, rows), positions, dtype=dtype)
        difference = students.new_empty(rows if ctx.needs_input_grad[0] else len(shifted), positions, dtype=dtype)
        peaks, crosses = students.new_empty(rows, dtype=dtype), []
        for first in range(0, rows, chunk):
            part = slice(first, first + chunk)
            z, target = students[part].to(dtype), teachers[part].to(dtype)
            x, p_t = shifted[: len(z)], p_teacher[: len(z)]
            p_s = difference[part] if ctx.needs_input_grad[0] else difference[: len(z)]
            torch.sub(z, z.amax(1, keepdim=True), out=x)
            if temperature != 1:
                x /= temperature
                target = target / temperature
            torch.softmax(target, 1, out=p_t)
            torch.softmax(x, 1, out=p_s)
            torch.amax(p_s, 1, out=peaks[part])
            crosses.append(torch.dot(p_t.view(-1), x.view(-1)))
            p_s -= p_t
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(difference)
        ctx.shape, ctx.dtype, ctx.factor = student.shape, student.dtype, temperature / rows
        ctx.anchor = anchor
        return (torch.stack(crosses).sum() + peaks.log().sum()) * (-(temperature**2) / rows)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (difference,) = ctx.saved_tensors
        return (difference * (grad * ctx.factor)).view(ctx.shape).to(ctx.dtype), None, None, None, None
