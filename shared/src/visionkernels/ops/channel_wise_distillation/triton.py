"""Channel-wise distillation on GPUs: one pass over both maps forward, one backward.

Forward carries, for each row, both maxima, sums of exponentials and the cross term along the positions. Few rows are
split over programs, whose statistics are joined in a fixed order. Everything is relative to the maxima, so that an
offset of a map costs no digits. No matrices are multiplied, so there is no flop formula.
"""

# R rows (batch * channels), N positions, S splits of a row

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionkernels.ops._cases import AotCase, Roofline

__all__ = ["aot_cases", "channel_wise_distillation", "rooflines"]

_BLOCK = 2048
_PROGRAMS = 2048
"""Programs that about fill a GPU: rows are split until there are so many."""


def channel_wise_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the loss; see the public function."""
    loss, _ = _forward_op(student.flatten(2).flatten(0, 1), teacher.flatten(2).flatten(0, 1), temperature)
    return loss


@triton.jit
def _channel_wise_distillation_fwd_kernel(
    student_ptr, teacher_ptr, statistic_ptr,  # [R, N]; [R, N]; [5, R, S]
    N, SECTION, S, inverse_temperature, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store max x and log sum exp(x - max x) of both maps, and sum P_t log P_s, for one section of a row."""
    row, split = (tl.program_id(0) // S).to(tl.int64), tl.program_id(0) % S
    last = tl.minimum((split + 1) * SECTION, N)
    # a finite floor instead of the NaN of infinities
    s_top, t_top, s_sum, t_sum, cross = -1e30, -1e30, 0.0, 0.0, 0.0
    for start in range(split * SECTION, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        s = tl.load(student_ptr + row * N + n, mask=n < last, other=float("-inf")).to(tl.float32) * inverse_temperature
        t = tl.load(teacher_ptr + row * N + n, mask=n < last, other=float("-inf")).to(tl.float32) * inverse_temperature
        s_next, t_next = tl.maximum(s_top, tl.max(s, 0)), tl.maximum(t_top, tl.max(t, 0))
        s_exp, t_exp = tl.exp(s - s_next), tl.exp(t - t_next)
        product = tl.where(n < last, t_exp * (s - s_next), 0.0)
        # the cross term so far is about the old maxima
        cross = (cross - t_sum * (s_next - s_top)) * tl.exp(t_top - t_next) + tl.sum(product, 0)
        s_sum = s_sum * tl.exp(s_top - s_next) + tl.sum(s_exp, 0)
        t_sum = t_sum * tl.exp(t_top - t_next) + tl.sum(t_exp, 0)
        s_top, t_top = s_next, t_next
    statistic_ptr += row * S + split
    size = tl.num_programs(0).to(tl.int64)  # R * S
    tl.store(statistic_ptr, s_top)
    tl.store(statistic_ptr + size, tl.log(s_sum))
    tl.store(statistic_ptr + 2 * size, t_top)
    tl.store(statistic_ptr + 3 * size, tl.log(t_sum))
    tl.store(statistic_ptr + 4 * size, cross / t_sum - tl.log(s_sum))


@triton.jit
def _channel_wise_distillation_bwd_kernel(
    student_ptr, teacher_ptr, statistic_ptr, grad_ptr, dstudent_ptr,  # [R, N]; [R, N]; [4, R]; []; [R, N]
    R, N, inverse_temperature, grad_scale, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d student = grad * T / R * (P_s - P_t)."""
    blocks = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    s = tl.load(student_ptr + row * N + n, mask=n < N, other=0.0).to(tl.float32) * inverse_temperature
    t = tl.load(teacher_ptr + row * N + n, mask=n < N, other=0.0).to(tl.float32) * inverse_temperature
    s_top, s_log = tl.load(statistic_ptr + row), tl.load(statistic_ptr + R + row)
    t_top, t_log = tl.load(statistic_ptr + 2 * R + row), tl.load(statistic_ptr + 3 * R + row)
    grad = tl.load(grad_ptr).to(tl.float32) * grad_scale
    dstudent = grad * (tl.exp(s - s_top - s_log) - tl.exp(t - t_top - t_log))
    tl.store(dstudent_ptr + row * N + n, dstudent.to(dstudent_ptr.dtype.element_ty), mask=n < N)


@torch.library.custom_op("visionkernels::channel_wise_distillation_fwd", mutates_args=())
def _forward_op(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    rows, positions = student.shape
    splits = min(triton.cdiv(_PROGRAMS, rows), triton.cdiv(positions, _BLOCK))
    section = triton.cdiv(triton.cdiv(positions, splits), _BLOCK) * _BLOCK
    splits = triton.cdiv(positions, section)
    statistics = student.new_empty(5, rows, splits, dtype=torch.float32)
    _channel_wise_distillation_fwd_kernel[(rows * splits,)](
        student.contiguous(), teacher.contiguous(), statistics, positions, section, splits, 1 / temperature,
        BLOCK_N=_BLOCK,
    )  # fmt: skip
    s_top, s_log, t_top, t_log, cross = statistics
    joined = torch.stack([*_join(s_top, s_log), *_join(t_top, t_log)])
    whole_s_top, whole_s_log, whole_t_top, whole_t_log = joined[:, :, None]
    # each section's share of the teacher's weight, times the cross entropy there
    weight = (t_top - whole_t_top + t_log - whole_t_log).exp()
    entropies = (weight * (whole_s_top - s_top + whole_s_log - s_log - cross)).sum(-1)
    return entropies.mean() * temperature**2, joined


def _join(top: Tensor, log: Tensor) -> tuple[Tensor, Tensor]:
    whole = top.amax(-1)
    return whole, torch.logsumexp(top - whole[:, None] + log, -1)


@torch.library.custom_op("visionkernels::channel_wise_distillation_bwd", mutates_args=())
def _backward_op(grad: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, temperature: float) -> Tensor:
    rows, positions = student.shape
    grad_student = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    _channel_wise_distillation_bwd_kernel[(rows * triton.cdiv(positions, _BLOCK),)](
        student.contiguous(), teacher.contiguous(), statistics, grad.contiguous(), grad_student, rows, positions,
        1 / temperature, temperature / rows, BLOCK_N=_BLOCK,
    )  # fmt: skip
    return grad_student


@_forward_op.register_fake
def _(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return student.new_empty((), dtype=torch.float32), student.new_empty(4, len(student), dtype=torch.float32)


@_backward_op.register_fake
def _(grad: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, temperature: float) -> Tensor:
    return student.new_empty(student.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    student, teacher, ctx.temperature = inputs
    ctx.save_for_backward(student, teacher, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _grad_statistics: Tensor) -> tuple[Any, ...]:
    return _backward_op(grad, *ctx.saved_tensors, ctx.temperature), None, None


_forward_op.register_autograd(_backward, setup_context=_save)


def aot_cases(*, is_hip: bool) -> list[AotCase]:
    """Return the cases of the ahead-of-time check: both kernels, for maps of each dtype."""
    cases = []
    for kind in ("fp32", "bf16", "fp16"):
        types = dict.fromkeys(("student_ptr", "teacher_ptr", "dstudent_ptr"), f"*{kind}")
        types |= {"statistic_ptr": "*fp32", "grad_ptr": "*fp32", "inverse_temperature": "fp32"}
        constants = {"BLOCK_N": _BLOCK}
        for kernel in (_channel_wise_distillation_fwd_kernel, _channel_wise_distillation_bwd_kernel):
            cases.append(AotCase(kernel=kernel, config=kind, types=types, constants=constants))
    return cases


def rooflines() -> list[Roofline]:
    """Return the least work for ADE20K's 150 classes at 512 pixels, logits at stride 4, batch 16, bfloat16."""
    size = 16 * 150 * 128 * 128
    # an exponential counts as one operation
    return [
        Roofline(op="channel_wise_distillation", config="ADE20K forward", operations=8 * size, bytes_moved=4 * size),
        Roofline(op="channel_wise_distillation", config="ADE20K backward", operations=6 * size, bytes_moved=6 * size),
    ]
