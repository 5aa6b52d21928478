"""Imitation of a teacher detector where it sees objects: its pyramid and its objectness (G2SD, sec. 3.3)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visionkernels.checks import InputError, check

__all__ = ["FeatureAdapter", "ImitationLosses", "objectness_weighted_losses"]


class FeatureAdapter(nn.Module):
    """A 3x3 convolution for each level of a student's pyramid, towards the teacher's."""

    def __init__(self, channels: int = 256, num_levels: int = 5, teacher_channels: int | None = None) -> None:
        super().__init__()
        target = channels if teacher_channels is None else teacher_channels
        check(target >= 1, "teacher_channels", teacher_channels, "at least 1")
        self.conv = nn.ModuleList(nn.Conv2d(channels, target, 3, padding=1) for _ in range(num_levels))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return adapted maps. Raises ValueError for another number of levels."""
        if len(features) != len(self.conv):
            raise InputError(f"features have {len(features)} levels; the adapter is for {len(self.conv)}")
        return [conv(feature) for conv, feature in zip(self.conv, features, strict=True)]


class ImitationLosses(NamedTuple):
    """Sums over levels."""

    features: Float[Tensor, ""]
    objectness: Float[Tensor, ""]


def objectness_weighted_losses(
    student_features: Sequence[Float[Tensor, "batch channels _height _width"]],
    teacher_features: Sequence[Float[Tensor, "batch channels _height _width"]],
    student_objectness: Sequence[Float[Tensor, "batch anchors _height _width"]],
    teacher_objectness: Sequence[Float[Tensor, "batch anchors _height _width"]],
) -> ImitationLosses:
    """Compare pyramids (the student's adapted) and objectness logits, level by level.

    With m the largest of the teacher's probabilities over the anchors of a place:
    features = sum over levels of sum(m (t - s)^2) / sum(m), channels summed too; objectness = the same of the binary
    cross-entropy with the teacher's probabilities, anchors summed. A level without any object counts 0. Float32
    (float64 for float64); the teacher gets no gradient. Raises ValueError for numbers of levels or shapes that differ.
    """
    _check(student_features, teacher_features, student_objectness, teacher_objectness)
    features, objectness = [], []
    levels = zip(student_features, teacher_features, student_objectness, teacher_objectness, strict=True)
    for ours, theirs, our_logits, their_logits in levels:
        dtype = torch.promote_types(ours.dtype, torch.float32)
        ours, theirs, our_logits, their_logits = (
            value.to(dtype) for value in (ours, theirs.detach(), our_logits, their_logits.detach())
        )
        target = their_logits.sigmoid()
        weight = target.amax(1, keepdim=True)
        total = weight.sum().clamp_min(torch.finfo(dtype).tiny)
        features.append((weight * (theirs - ours).square()).sum() / total)
        entropy = F.binary_cross_entropy_with_logits(our_logits, target, reduction="none")
        objectness.append((weight * entropy).sum() / total)
    return ImitationLosses(torch.stack(features).sum(), torch.stack(objectness).sum())


def _check(*pyramids: Sequence[Tensor]) -> None:
    counts = [len(pyramid) for pyramid in pyramids]
    if len(set(counts)) > 1 or not counts[0]:
        raise InputError(f"features and objectness have {counts} levels; they must have as many, one or more")
    for level, (ours, theirs, our_logits, their_logits) in enumerate(zip(*pyramids, strict=True)):
        if ours.shape != theirs.shape or our_logits.shape != their_logits.shape:
            raise InputError(
                f"level {level} has features {list(ours.shape)} and {list(theirs.shape)}, objectness "
                f"{list(our_logits.shape)} and {list(their_logits.shape)}; student and teacher must agree"
            )
        if ours.shape[2:] != our_logits.shape[2:] or len(ours) != len(our_logits):
            raise InputError(f"level {level} has features {list(ours.shape)} but objectness {list(our_logits.shape)}")
