"""A plain implementation of the official algorithm, for the bench."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["dense_semantic", "looped_nst", "plain_score"]


def plain_score(teacher: nn.Module, student: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return semantic and relation scores by a forward and backward pass of both networks.

    Both networks have a classifier `fc` and are in training mode.
    """
    gradients: list[Tensor | None] = []
    maps: list[Tensor] = []
    for network in (student, teacher):
        kept: list[Tensor] = []
        handle = network.get_submodule("layer3").register_forward_hook(partial(_keep, kept))
        network.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        handle.remove()
        gradients.append(network.get_parameter("fc.weight").grad)
        maps.append(kept[0].detach().flatten(1))
    similarities = [F.normalize(features @ features.T, dim=1) for features in maps]
    relation = (similarities[0] - similarities[1]).square().sum() / len(images) ** 2
    assert gradients[0] is not None and gradients[1] is not None
    return -float(dense_semantic(gradients[0], gradients[1])), -float(relation)


def _keep(kept: list[Tensor], module: nn.Module, inputs: Any, output: Tensor) -> None:
    kept.append(output)


def dense_semantic(student: Tensor, teacher: Tensor, classes_at_once: int = 100) -> Tensor:
    """Return the semantic loss of [classes, channels] with its matrices [channels, channels], some classes at once."""
    total = torch.zeros(())
    for start in range(0, len(student), classes_at_once):
        ours, theirs = (
            F.normalize(gradient[:, :, None] * gradient[:, None], dim=2)
            for gradient in (student[start : start + classes_at_once], teacher[start : start + classes_at_once])
        )
        total = total + (ours - theirs).square().sum()
    return total / student.numel()


def looped_nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the loss of neuron selectivity of maps [B, C, H, W] with the products of all channels at full size."""
    ours, theirs = (F.normalize(maps.flatten(2), dim=2) for maps in (student, teacher))

    def kernel(left: Tensor, right: Tensor) -> Tensor:
        return (left[:, :, None] * right[:, None]).sum(3).square().mean()

    return kernel(theirs, theirs) + kernel(ours, ours) - 2 * kernel(ours, theirs)
