"""Losses between pooled vectors [B, C]: relations of samples, and congruence of neighbours in the batch."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diswot.losses.distiller import Distiller, Source, require_equal, unit_vectors

__all__ = ["CC", "PKT", "RKD", "Embed"]


class CC(Distiller):
    """Correlation congruence (Peng et al., 2019), in its form between neighbours of the batch.

    With delta = |s - t| of the embedded vectors [B, D]: the mean over i < B - 1 of sum_d delta_i,d delta_i+1,d; 0 for
    one sample. Example features add a linear embedding of either to `width`; without them the vectors are compared as
    they are, and ValueError is raised where their widths differ.
    """

    source: ClassVar[Source] = "pooled"
    beta: ClassVar[float | None] = 0.02

    def __init__(self, *, width: int = 128) -> None:
        super().__init__()
        self.width = width
        self.embed_s: nn.Module = nn.Identity()
        self.embed_t: nn.Module = nn.Identity()

    def adapt(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        """Add both embeddings."""
        self.embed_s, self.embed_t = (Embed(example[0].shape[1], self.width) for example in (student, teacher))

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of vectors [B, C]."""
        student, teacher = self.embed_s(student), self.embed_t(teacher)
        require_equal("CC", student, teacher, "shape")
        delta = (student - teacher).abs()
        return (delta[:-1] * delta[1:]).sum() / max(len(delta) - 1, 1)


class Embed(nn.Module):
    """A linear layer on features flattened to [B, C]."""

    def __init__(self, num_features: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, width)

    def forward(self, features: Tensor) -> Tensor:
        """Take [B, ...], return [B, width]."""
        return self.linear(features.flatten(1))


class RKD(Distiller):
    """Relations of pairs and triples of samples (Park et al., 2019).

    distance_weight * smoothL1 of the distances of all B^2 pairs, each over the mean of the positive ones, plus
    angle_weight * smoothL1 of the cosines at x_i between x_j and x_k for all B^3 triples. Distances are at least 1e-6
    but 0 of a sample to itself; coinciding samples have no direction. Widths may differ. Memory is B^2 (B + C).
    """

    source: ClassVar[Source] = "pooled"
    beta: ClassVar[float | None] = 1.0

    def __init__(self, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> None:
        super().__init__()
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of vectors [B, C]."""
        (distances, cosines), (their_distances, their_cosines) = _relations(student), _relations(teacher)
        distance = F.smooth_l1_loss(distances, their_distances)
        return self.distance_weight * distance + self.angle_weight * F.smooth_l1_loss(cosines, their_cosines)


def _relations(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the relative distances [B, B] and the cosines [B, B, B] at the first sample."""
    differences = vectors[None] - vectors[:, None]  # [B, B, C]
    lengths = differences.square().sum(-1).clamp_min(1e-12).sqrt()
    lengths = lengths * (1 - torch.eye(len(vectors)).to(lengths))
    mean = lengths.sum() / (lengths > 0).sum().clamp_min(1)
    # zero only for one sample
    relative = lengths / mean.clamp_min(1e-12)
    units = unit_vectors(differences)
    return relative, units @ units.mT


class PKT(Distiller):
    """Similarities of samples as probabilities (Passalis and Tefas, 2018).

    K = (cosines + 1) / 2 [B, B], p = K with rows of sum 1: mean p_t log((p_t + 1e-7) / (p_s + 1e-7)). Widths may
    differ. A zero vector has cosine 0 with all.
    """

    source: ClassVar[Source] = "pooled"
    beta: ClassVar[float | None] = 30000.0

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of vectors [B, C]."""
        ours, theirs = _probabilities(student), _probabilities(teacher)
        return (theirs * ((theirs + 1e-7) / (ours + 1e-7)).log()).mean()


def _probabilities(vectors: Tensor) -> Tensor:
    units = unit_vectors(vectors, eps=1e-7)
    kernel = (units @ units.mT + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)
