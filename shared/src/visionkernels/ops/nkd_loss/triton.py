"""NKD on GPUs: a program walks over the classes of one sample, and leaves out the label.

Six numbers of each sample are saved for backward. Everything is relative to the largest logit but the label's, so that
an offset costs no digits. No matrices are multiplied, so there is no flop formula.
"""

# B batch, K classes

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionkernels.ops._cases import AotCase, Roofline

__all__ = ["aot_cases", "nkd_loss", "rooflines"]

_BLOCK = 1024


def nkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float, temperature: float
) -> Tensor:
    """Return the loss; see the public function."""
    loss, _ = _forward_op(student_logits, teacher_logits, labels, alpha, temperature)
    return loss


@triton.jit
def _others(logit_ptr, start, label, K, BLOCK_K: tl.constexpr):
    """Return a block of one sample's logits, -inf for the label and past the end."""
    k = start + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    return tl.load(logit_ptr + k, mask=(k < K) & (k != label), other=float("-inf")).to(tl.float32)


@triton.jit
def _statistics(logit_ptr, label, K, inverse_temperature, BLOCK_K: tl.constexpr):
    """Return z_y and m = max z of the others, log sum exp(z - m) of all, and log sum exp((z - m) / T) of the others."""
    # a finite floor instead of the NaN of infinities
    top, total, total_tempered = -1e30, 0.0, 0.0
    for start in range(0, K, BLOCK_K):
        z = _others(logit_ptr, start, label, K, BLOCK_K)
        highest = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - highest) + tl.sum(tl.exp(z - highest), 0)
        tempered = tl.sum(tl.exp((z - highest) * inverse_temperature), 0)
        total_tempered = total_tempered * tl.exp((top - highest) * inverse_temperature) + tempered
        top = highest
    own = tl.load(logit_ptr + label).to(tl.float32)
    # by the larger of the two, so that neither exponential overflows
    ahead = tl.maximum(own - top, 0.0)
    log_total = ahead + tl.log(total * tl.exp(-ahead) + tl.exp(own - top - ahead))
    return own, top, log_total, tl.log(total_tempered)


@triton.jit
def _nkd_loss_fwd_kernel(
    student_ptr, teacher_ptr, label_ptr, loss_ptr, statistic_ptr,  # [B, K]; [B, K]; [B]; [B]; [B, 6]
    K, inverse_temperature, distributed_scale, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    student_ptr += row * K
    teacher_ptr += row * K
    s_own, s_top, s_log, s_log_tempered = _statistics(student_ptr, label, K, inverse_temperature, BLOCK_K)
    t_own, t_top, t_log, t_log_tempered = _statistics(teacher_ptr, label, K, inverse_temperature, BLOCK_K)
    cross = 0.0
    for start in range(0, K, BLOCK_K):
        log_q_s = (_others(student_ptr, start, label, K, BLOCK_K) - s_top) * inverse_temperature - s_log_tempered
        log_q_t = (_others(teacher_ptr, start, label, K, BLOCK_K) - t_top) * inverse_temperature - t_log_tempered
        q_t = tl.exp(log_q_t)
        cross += tl.sum(tl.where(q_t == 0.0, 0.0, q_t * log_q_s), 0)
    p_t = tl.exp(t_own - t_top - t_log)
    tl.store(loss_ptr + row, -p_t * (s_own - s_top - s_log) - distributed_scale * cross)
    statistic_ptr += row * 6
    tl.store(statistic_ptr, s_top)
    tl.store(statistic_ptr + 1, s_log)
    tl.store(statistic_ptr + 2, s_log_tempered)
    tl.store(statistic_ptr + 3, t_top)
    tl.store(statistic_ptr + 4, t_log_tempered)
    tl.store(statistic_ptr + 5, p_t)


@triton.jit
def _nkd_loss_bwd_kernel(
    student_ptr, teacher_ptr, label_ptr, statistic_ptr, grad_ptr, dstudent_ptr,  # statistic [B, 6]; grad []
    B, K, inverse_temperature, difference_scale, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d student = grad / B * (p_T[y] (p_S - [c = y]) + alpha T (q_S - q_T) [c != y])."""
    blocks = tl.cdiv(K, BLOCK_K)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    label = tl.load(label_ptr + row)
    statistic_ptr += row * 6
    s = tl.load(student_ptr + row * K + k, mask=k < K, other=float("-inf")).to(tl.float32) - tl.load(statistic_ptr)
    t = tl.load(teacher_ptr + row * K + k, mask=k < K, other=float("-inf")).to(tl.float32) - tl.load(statistic_ptr + 3)
    p_s, p_t = tl.exp(s - tl.load(statistic_ptr + 1)), tl.load(statistic_ptr + 5)
    q_s = tl.exp(s * inverse_temperature - tl.load(statistic_ptr + 2))
    q_t = tl.exp(t * inverse_temperature - tl.load(statistic_ptr + 4))
    others = p_t * p_s + difference_scale * (q_s - q_t)
    grad = tl.load(grad_ptr).to(tl.float32) / B
    dstudent = grad * tl.where(k == label, p_t * (p_s - 1.0), others)
    tl.store(dstudent_ptr + row * K + k, dstudent.to(dstudent_ptr.dtype.element_ty), mask=k < K)


@torch.library.custom_op("visionkernels::nkd_loss_fwd", mutates_args=())
def _forward_op(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float
) -> tuple[Tensor, Tensor]:
    batch, classes = student.shape
    losses = student.new_empty(batch, dtype=torch.float32)
    statistics = student.new_empty(batch, 6, dtype=torch.float32)
    _nkd_loss_fwd_kernel[(batch,)](
        student.contiguous(), teacher.contiguous(), labels.contiguous(), losses, statistics, classes, 1 / temperature,
        alpha * temperature**2, BLOCK_K=_block(classes),
    )  # fmt: skip
    return losses.mean(), statistics


@torch.library.custom_op("visionkernels::nkd_loss_bwd", mutates_args=())
def _backward_op(
    grad: Tensor, student: Tensor, teacher: Tensor, labels: Tensor, statistics: Tensor, alpha: float,
    temperature: float,
) -> Tensor:  # fmt: skip
    batch, classes = student.shape
    block = _block(classes)
    grad_student = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _nkd_loss_bwd_kernel[(batch * triton.cdiv(classes, block),)](
        student.contiguous(), teacher.contiguous(), labels.contiguous(), statistics, grad.contiguous(), grad_student,
        batch, classes, 1 / temperature, alpha * temperature, BLOCK_K=block,
    )  # fmt: skip
    return grad_student


def _block(classes: int) -> int:
    return min(_BLOCK, max(16, triton.next_power_of_2(classes)))


@_forward_op.register_fake
def _(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float) -> tuple[Tensor, Tensor]:
    return student.new_empty((), dtype=torch.float32), student.new_empty(len(student), 6, dtype=torch.float32)


@_backward_op.register_fake
def _(
    grad: Tensor, student: Tensor, teacher: Tensor, labels: Tensor, statistics: Tensor, alpha: float,
    temperature: float,
) -> Tensor:  # fmt: skip
    return student.new_empty(student.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, labels, ctx.alpha, ctx.temperature = inputs
    ctx.save_for_backward(student, teacher, labels, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _grad_statistics: Tensor) -> tuple[Any, ...]:
    return _backward_op(grad, *ctx.saved_tensors, ctx.alpha, ctx.temperature), None, None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


def aot_cases(*, is_hip: bool) -> list[AotCase]:
    """Return the cases of the ahead-of-time check: both kernels, for logits of each dtype."""
    cases = []
    for kind in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(("student_ptr", "teacher_ptr", "dstudent_ptr"), f"*{kind}") | {"label_ptr": "*i64"}
        types |= dict.fromkeys(("loss_ptr", "statistic_ptr", "grad_ptr"), "*fp32") | {"inverse_temperature": "fp32"}
        constants = {"BLOCK_K": _BLOCK}
        for kernel in (_nkd_loss_fwd_kernel, _nkd_loss_bwd_kernel):
            cases.append(AotCase(kernel=kernel, config=kind, types=types, constants=constants))
    return cases


def rooflines() -> list[Roofline]:
    """Return the least work for ImageNet's 1000 classes, batch 1024, bfloat16."""
    size = 1024 * 1000
    # an exponential counts as one operation
    return [
        Roofline(op="nkd_loss", config="ImageNet forward", operations=12 * size, bytes_moved=4 * size),
        Roofline(op="nkd_loss", config="ImageNet backward", operations=10 * size, bytes_moved=6 * size),
    ]
