"""The two terms of DisWOT: how alike two networks see samples (relation) and channels or classes (semantic).

Both compare Gram matrices with rows of unit length (DisWOT, CVPR 2023, eq. 3-6, as its code computes them). Scores are
their negatives; as training losses they are SP and ICKD. What is compared is the caller's choice.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from visionkernels.checks import InputError

__all__ = ["relation_loss", "semantic_loss"]

EPS = 1e-12
"""The least length that a row is divided by. Saturated logits give rows below it, so that it moves scores."""

# n items, C channels, P positions


def relation_loss(
    student: Float[Tensor, "batch *student_axes"], teacher: Float[Tensor, "batch *teacher_axes"]
) -> Float[Tensor, ""]:
    r"""Compare the similarities of the samples of a batch, whatever the shapes of their features.

        G = F F^T [B, B],  Ĝ = G with each row over max(its L2 norm, 1e-12),  loss = sum (Ĝ_s - Ĝ_t)^2 / B^2

    with F the features flattened to [B, -1]. At least 0, and 0 for one sample that is not all zero. Computed in
    float32, in float64 for float64 input, also under autocast. Differentiable in both. Raises ValueError for different
    batch sizes.
    """
    student, teacher = _widened(student, teacher)
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        raise InputError(
            f"student {list(student.shape)} and teacher {list(teacher.shape)} must be features of the same samples, "
            "[batch, ...]"
        )
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = student.flatten(1), teacher.flatten(1)
        difference = _unit_rows(student @ student.mT) - _unit_rows(teacher @ teacher.mT)
        return difference.square().sum() / len(student) ** 2


def semantic_loss(
    student: Float[Tensor, "items channels *student_axes"], teacher: Float[Tensor, "items channels *teacher_axes"]
) -> Float[Tensor, ""]:
    r"""Compare the correlations of the channels of each item: a sample's map, or a class's row of a gradient.

        E = f f^T [C, C] per item,  Ê = E with each row over max(its L2 norm, 1e-12),
        loss = sum (Ê_s - Ê_t)^2 / (n C)

    with f an item's features flattened to [C, P]; P = 1 for [n, C] and may differ between the two. In 0 to 4. No
    [C, C] matrix is built for P = 1, nor for P well below C. Computed in float32, in float64 for float64 input, also
    under autocast. Differentiable in both. Raises ValueError for different numbers of items or channels.
    """
    student, teacher = _widened(student, teacher)
    _check_items(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        # [n, C, P]
        student, teacher = (
            values.flatten(2) if values.ndim > 2 else values[:, :, None] for values in (student, teacher)
        )
        num_channels, num_positions = student.shape[1], max(student.shape[2], teacher.shape[2])
        if num_positions == 1:
            total = _vectors_apart(student.squeeze(2), teacher.squeeze(2))
        else:
            # below that the thin products cost less than the square ones, measured on a CPU
            is_thin = 3 * num_positions <= num_channels
            total = (_thin_apart if is_thin else _dense_apart)(student, teacher)
    return total / (student.shape[0] * student.shape[1])


def _widened(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.to(dtype)


def _check_items(student: Tensor, teacher: Tensor) -> None:
    shapes = f"student {list(student.shape)} and teacher {list(teacher.shape)}"
    if student.ndim < 2 or teacher.ndim < 2:
        raise InputError(f"{shapes} must be [items, channels, ...]")
    if len(student) != len(teacher):
        raise InputError(f"{shapes} have {len(student)} and {len(teacher)} items (classes or samples); use the same")
    if student.shape[1] != teacher.shape[1]:
        raise InputError(
            f"{shapes} have {student.shape[1]} and {teacher.shape[1]} channels, which the semantic term cannot "
            'compare; use the relation term only, or project="pad" or project="class_gram"'
        )


def _unit_rows(matrix: Tensor) -> Tensor:
    return F.normalize(matrix, dim=-1, eps=EPS)


def _dense_apart(student: Tensor, teacher: Tensor) -> Tensor:
    return (_unit_rows(student @ student.mT) - _unit_rows(teacher @ teacher.mT)).square().sum()


def _thin_apart(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum |Ê_s|^2 + |Ê_t|^2 - 2 <Ê_s, Ê_t> of the rows, from products [P, P], such as |E_i|^2 = f_i (f^T f) f_i^T."""
    own_student, own_teacher, cross = (
        ((left @ (left.mT @ right)) * right).sum(-1)  # [n, C]
        for left, right in ((student, student), (teacher, teacher), (student, teacher))
    )
    lengths = own_student.clamp_min(EPS**2).sqrt() * own_teacher.clamp_min(EPS**2).sqrt()
    # |Ê|^2 is 1 where the row is not clamped, as a constant: a quotient would leave rounding errors in the gradient
    squares = (own_student / EPS**2).clamp_max(1) + (own_teacher / EPS**2).clamp_max(1)
    return (squares - 2 * cross / lengths).clamp_min(0).sum()


def _vectors_apart(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum the distances of Ê = w u^T, where u = f / |f| and w_i = f_i |f| / max(|f_i| |f|, EPS), for f [n, C].

    |w u^T - z v^T|^2 = |w - z|^2 + |u - v|^2 <w, z> for unit u, v: a sum without cancellation where <u, v> >= 0. It is
    made so by the sign of both z and v, which leaves z v^T.
    """
    (unit, weight), (other_unit, other_weight) = _factors(student), _factors(teacher)
    sign = torch.where((unit * other_unit).sum(-1, keepdim=True) < 0, -1.0, 1.0).to(unit)
    other_unit, other_weight = sign * other_unit, sign * other_weight
    inner = (weight * other_weight).sum(-1)
    apart = (weight - other_weight).square().sum(-1) + (unit - other_unit).square().sum(-1) * inner
    return apart.sum()


def _factors(features: Tensor) -> tuple[Tensor, Tensor]:
    length = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    # far below what the clamp leaves visible
    return features / length.clamp_min(1e-30), (features * length / EPS).clamp(-1, 1)
