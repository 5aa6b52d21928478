"""Losses between the maps of several stages: what changes from stage to stage, or a weight for each."""

from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diswot.losses.distiller import Agreement, Distiller, Features, Source, common_size, unit_vectors
from visionkernels.checks import InputError

__all__ = ["AB", "FSP", "KDSVD", "RMI", "VID", "VariationalRegressor"]


class FSP(Distiller):
    """Flow of the solution procedure: products of consecutive maps (Yim et al., 2017), for a stage of pre-training.

    Per sample G = mean over space of f_i f_{i+1}^T [C_i, C_{i+1}], the larger map averaged to the size of the smaller
    one; sum over pairs of the mean of (G_s - G_t)^2. Example features of different channels add 1x1 convolutions.
    """

    source: ClassVar[Source] = "all_maps"
    beta: ClassVar[float | None] = 50.0
    needs: Agreement = "channels"

    def compare_all(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Return the loss of maps [B, C, H, W], at least two."""
        if len(student) < 2:
            raise InputError(f"FSP: needs at least 2 maps of consecutive stages, not {len(student)}")
        flows = zip(_flows(student), _flows(teacher), strict=True)
        return torch.stack([F.mse_loss(ours, theirs) for ours, theirs in flows]).sum()


def _flows(maps: list[Tensor]) -> list[Tensor]:
    pairs = (common_size(first, second) for first, second in pairwise(maps))
    return [first.flatten(2) @ second.flatten(2).mT / first.shape[2:].numel() for first, second in pairs]


class AB(Distiller):
    """Activation boundaries: which neurons fire, before the ReLU (Heo et al., 2019), for a stage of pre-training.

    Sum over neurons of (s + m)^2 where s > -m and t <= 0, and of (s - m)^2 where s <= m and t > 0, with margin m; times
    2^(i - n + 1) for map i of n, 3 / 1000, and 1 / B. Example features of different channels add connectors: 1x1
    convolutions with batch norm. Sizes must be equal.
    """

    source: ClassVar[Source] = "preactivations"
    needs: Agreement = "shape"

    def __init__(self, *, margin: float = 1.0) -> None:
        super().__init__()
        self.margin = margin

    def adapter(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """Return a connector."""
        return nn.Sequential(super().adapter(student_channels, teacher_channels), nn.BatchNorm2d(teacher_channels))

    def compare_all(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Return the loss of maps [B, C, H, W]."""
        losses = [self.compare(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]
        weighted = [loss * 2.0 ** (i - len(losses) + 1) for i, loss in enumerate(losses)]
        return torch.stack(weighted).sum() * 3 / 1000

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the mean over samples for one map."""
        is_firing = teacher > 0
        too_high = (student + self.margin).clamp_min(0).square()
        too_low = (self.margin - student).clamp_min(0).square()
        return torch.where(is_firing, too_low, too_high).sum() / len(student)


class VID(Distiller):
    """Variational information distillation (Ahn et al., 2019): a `VariationalRegressor` per map, summed.

    Takes the channels of each map.
    """

    source: ClassVar[Source] = "stage_maps"
    beta: ClassVar[float | None] = 1.0

    def __init__(self, student_channels: list[int], teacher_channels: list[int]) -> None:
        super().__init__()
        pairs = zip(student_channels, teacher_channels, strict=True)
        self.regressors = nn.ModuleList(VariationalRegressor(ours, theirs) for ours, theirs in pairs)

    @classmethod
    def build(
        cls, student: Features | None, teacher: Features | None, num_samples: int | None, **options: Any
    ) -> "VID":
        """Return the loss for features of these shapes; see `create`."""
        if student is None or teacher is None:
            raise InputError("vid: its regressors need example features, create('vid', student=[...], teacher=[...])")
        ours, theirs = cls.pairs(student, teacher)
        return cls([maps.shape[1] for maps in ours], [maps.shape[1] for maps in theirs], **options)

    def compare_all(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Return the loss of maps [B, C, H, W]."""
        if len(student) != len(self.regressors):
            raise InputError(f"VID: {len(student)} maps, but regressors for {len(self.regressors)}")
        triples = zip(self.regressors, student, teacher, strict=True)
        return torch.stack([regressor(ours, theirs) for regressor, ours, theirs in triples]).sum()


class VariationalRegressor(nn.Module):
    """Negative log likelihood of the teacher's map under a Gaussian that the student's map predicts.

    mean 0.5 ((mu(s) - t)^2 / v + log v), mu three 1x1 convolutions, v = softplus(log_scale) + 1e-5 per channel, 5 at
    first. The larger map is averaged to the size of the smaller one.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__()
        middle = [nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False) for _ in range(2)]
        first = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
        self.regressor = nn.Sequential(first, nn.ReLU(), middle[0], nn.ReLU(), middle[1])
        self.log_scale = nn.Parameter(torch.full((teacher_channels,), 5 - MIN_VARIANCE).expm1().log())

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of maps [B, C, H, W]."""
        student, teacher = common_size(student, teacher)
        variance = (F.softplus(self.log_scale) + MIN_VARIANCE)[:, None, None]
        return 0.5 * ((self.regressor(student) - teacher).square() / variance + variance.log()).mean()


MIN_VARIANCE = 1e-5


class RMI(Distiller):
    """Mutual information of representations (Zheng et al., 2022): sum over stages of 1 - linear CKA.

    CKA is the cosine of the two Gram matrices [B, B] of samples, both centred in rows and columns. Shapes may differ. A
    batch without differences has a zero matrix: 0 if that is so for both, else 1/2.
    """

    source: ClassVar[Source] = "stage_maps"

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of one stage."""
        student, teacher = (_centred_gram(maps) for maps in (student, teacher))
        # half the squared distance of unit vectors: no difference of two numbers near 1
        return (student - teacher).square().sum() / 2


def _centred_gram(maps: Tensor) -> Tensor:
    features = maps.flatten(1)
    features = features - features.mean(0)
    return unit_vectors((features @ features.mT).flatten())


class KDSVD(Distiller):
    """Leading singular vectors of each stage's map, related between stages (Lee et al., 2018).

    Per sample, the map as a matrix [H W, C]: the teacher's first right singular vector, and of the student's first four
    the one that is nearest to it, turned to the same side. For consecutive stages R = exp(-(a_p - b_q)^2 / 8) over all
    components of the two vectors [C_i, C_{i+1}]; sum of (R_s - R_t)^2 over all, / B. Channels must be equal: example
    features that differ add 1x1 convolutions. The sign of a teacher's vector is that which LAPACK gives.
    """

    source: ClassVar[Source] = "stage_maps"
    beta: ClassVar[float | None] = 1.0
    needs: Agreement = "channels"

    def compare_all(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Return the loss of maps [B, C, H, W], at least two."""
        if len(student) < 2:
            raise InputError(f"KDSVD: needs at least 2 maps of consecutive stages, not {len(student)}")
        vectors = [_aligned_vectors(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]
        losses = [
            (_rbf(ours, our_next) - _rbf(theirs, their_next)).square().sum() / len(ours)
            for (ours, theirs), (our_next, their_next) in pairwise(vectors)
        ]
        return torch.stack(losses).sum()


def _rbf(first: Tensor, second: Tensor) -> Tensor:
    return (-(first[:, :, None] - second[:, None]).square() / 8).exp()


def _aligned_vectors(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's vectors, [B, C] each."""
    matrix = student.flatten(2).mT  # [B, H W, C]
    with torch.no_grad():
        target = torch.linalg.svd(teacher.flatten(2).mT, full_matrices=False).Vh[:, 0]
        _, values, basis = torch.linalg.svd(matrix, full_matrices=False)  # [B, r], [B, r, C]
        cosines = (basis[:, :4] @ target[:, :, None]).squeeze(2)
        chosen = cosines.abs().argmax(1, keepdim=True)
        sign = torch.where(cosines.gather(1, chosen) < 0, -1.0, 1.0).to(target)
        vector = sign * basis.take_along_dim(chosen[:, :, None], 1).squeeze(1)
    return _with_gradient(vector, matrix, values.square(), basis, chosen), target


def _with_gradient(vector: Tensor, matrix: Tensor, values: Tensor, basis: Tensor, chosen: Tensor) -> Tensor:
    """Return `vector` with the derivative of an eigenvector v of G = matrix^T matrix: dv = (lambda I - G)^+ dG v.

    `values` [B, r] are the eigenvalues and `basis` [B, r, C] the eigenvectors. Those as good as equal to lambda, whose
    mixture is arbitrary, are left out, where the derivative of a whole decomposition would divide by zero.
    """
    product = (matrix.mT @ (matrix @ vector[:, :, None])).squeeze(2)
    change = product - product.detach()  # 0, with derivative dG v
    value = values.gather(1, chosen)
    least = 1e-6 * values[:, :1]
    inside = (basis @ change[:, :, None]).squeeze(2)  # [B, r]
    outside = change - (inside[:, None] @ basis).squeeze(1)
    moved = ((inside * _inverse(value - values, least))[:, None] @ basis).squeeze(1)
    return vector + moved + outside * _inverse(value, least)


def _inverse(gaps: Tensor, least: Tensor) -> Tensor:
    is_small = gaps.abs() <= least
    return torch.where(is_small, 0.0, 1 / torch.where(is_small, 1.0, gaps))
