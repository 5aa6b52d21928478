"""Losses between maps [B, C, H, W] that look at one stage at a time."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diswot.losses.distiller import Agreement, Distiller, Source, common_size
from diswot.similarity import relation_loss, semantic_loss
from visionkernels.checks import check_choice

__all__ = ["AT", "FT", "ICKD", "NST", "SP", "Hint", "Unified", "attention"]

# B batch, C channels, P positions of a map


class Hint(Distiller):
    """Mean squared difference of the middle maps (FitNets, Romero et al., 2015).

    Example features add the regressor: a 3x3 convolution to the teacher's channels, batch norm, and averaging to the
    teacher's size. Without them shapes must be equal.
    """

    source: ClassVar[Source] = "middle_map"
    beta: ClassVar[float | None] = 100.0
    needs: Agreement = "shape"

    def adapt(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        """Add the regressor, also where shapes are equal."""
        channels, *size = teacher[0].shape[1:]
        layers = nn.Conv2d(student[0].shape[1], channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.adapters.append(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(tuple(size))))

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of maps [B, C, H, W]."""
        return F.mse_loss(student, teacher)


def attention(maps: Tensor) -> Tensor:
    """Return where maps [B, C, H, W] are active: the mean of f^2 over channels, of unit length, [B, H W]."""
    return F.normalize(maps.square().mean(1).flatten(1))


class AT(Distiller):
    """Attention transfer: sum over stages of the mean squared difference of attention (Zagoruyko, Komodakis, 2017).

    The larger of two maps is averaged to the size of the smaller one. Channels may differ.
    """

    source: ClassVar[Source] = "stage_maps"
    beta: ClassVar[float | None] = 1000.0

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of one stage."""
        student, teacher = common_size(student, teacher)
        return F.mse_loss(attention(student), attention(teacher))


class FT(Distiller):
    """Factor transfer: the mean of |difference|^p of the attention of factors (Kim et al., 2018), p = 1 or 2.

    The paper's factors are outputs of a paraphraser of the teacher and a translator of the student. Here the teacher's
    factor is its map, and example features of different shape add a translator: a 1x1 convolution. The larger map is
    averaged to the size of the smaller one.
    """

    source: ClassVar[Source] = "last_map"
    beta: ClassVar[float | None] = 200.0

    def __init__(self, *, p: Literal[1, 2] = 1) -> None:
        super().__init__()
        check_choice("p", p, Literal[1, 2])
        self.p = p

    def adapt(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        """Add the translator where shapes differ."""
        if student[0].shape[1:] != teacher[0].shape[1:]:
            self.adapters.append(self.adapter(student[0].shape[1], teacher[0].shape[1]))

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of maps [B, C, H, W]."""
        student, teacher = (attention(maps) for maps in common_size(student, teacher))
        return F.l1_loss(student, teacher) if self.p == 1 else F.mse_loss(student, teacher)


class SP(Distiller):
    """Similarity-preserving distillation (Tung and Mori, 2019): `diswot.similarity.relation_loss`."""

    source: ClassVar[Source] = "last_map"
    beta: ClassVar[float | None] = 3000.0

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of maps [B, C, H, W], whose shapes may differ."""
        return relation_loss(student, teacher)


class ICKD(Distiller):
    """Inter-channel correlation (Liu et al., 2021): `diswot.similarity.semantic_loss`.

    Sizes may differ. Example features of different channels add a 1x1 convolution on the student's.
    """

    source: ClassVar[Source] = "last_map"
    needs: Agreement = "channels"

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of maps [B, C, H, W]."""
        return semantic_loss(student, teacher)


class NST(Distiller):
    """Neuron selectivity (Huang and Wang, 2017): maximum mean discrepancy between the channels of a sample's maps.

    mean k(t, t) + mean k(s, s) - 2 mean k(s, t) over pairs of channels, k(a, b) = (a . b)^2, with channels of unit
    length over space; mean over samples, sum over stages. The larger map is averaged to the size of the smaller one.
    """

    source: ClassVar[Source] = "stage_maps"
    beta: ClassVar[float | None] = 50.0

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of one stage."""
        student, teacher = (F.normalize(maps.flatten(2), dim=2) for maps in common_size(student, teacher))
        if student.shape[2] <= max(student.shape[1], teacher.shape[1]):
            # sum of k(a, b) over channels is <A^T A, B^T B> over positions, which completes a square
            ours, theirs = 1 / student.shape[1], 1 / teacher.shape[1]
            difference = torch.baddbmm(teacher.mT @ teacher, student.mT, student, alpha=ours, beta=-theirs)  # [B, P, P]
            return difference.square().sum() / len(student)
        kernels = (
            (left @ right.mT).square().mean()
            for left, right in ((teacher, teacher), (student, student), (student, teacher))
        )
        among_teachers, among_students, across = kernels
        return among_teachers + among_students - 2 * across


UnifiedMode = Literal["batch_l2", "batch_kl", "channel_l2", "channel_l2_cross", "channel_kl", "att_l2"]


class Unified(Distiller):
    """One comparison of the last map, over the batch, the channels or the space.

    - batch_l2: SP. batch_kl: sum KL(softmax_batch t || softmax_batch s) / (B C), of each element over the batch.
    - channel_l2: ICKD. channel_kl: the same sum, of each channel over space.
    - channel_l2_cross: ICKD with the teacher's E replaced by f_s f_t^T, which the official code compares with.
    - att_l2: FT with p = 2.
    """

    source: ClassVar[Source] = "last_map"
    beta: ClassVar[float | None] = 100.0

    def __init__(self, *, mode: UnifiedMode = "batch_l2") -> None:
        super().__init__()
        check_choice("mode", mode, UnifiedMode)
        self.mode = mode
        free: dict[str, Agreement] = {"batch_l2": "batch", "att_l2": "batch", "channel_l2": "channels"}
        self.needs = free.get(mode, "shape")

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of maps [B, C, H, W]."""
        match self.mode:
            case "batch_l2":
                return relation_loss(student, teacher)
            case "channel_l2":
                return semantic_loss(student, teacher)
            case "channel_l2_cross":
                student, teacher = student.flatten(2), teacher.flatten(2)
                own, across = (F.normalize(student @ maps.mT, dim=-1) for maps in (student, teacher))
                return (own - across).square().sum() / student.shape[:2].numel()
            case "att_l2":
                student, teacher = common_size(student, teacher)
                return F.mse_loss(attention(student), attention(teacher))
        axis = 0 if self.mode == "batch_kl" else 2
        student, teacher = (F.log_softmax(maps.flatten(2), dim=axis) for maps in (student, teacher))
        return F.kl_div(student, teacher, reduction="sum", log_target=True) / student.shape[:2].numel()
