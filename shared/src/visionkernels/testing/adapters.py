"""Ways in which users change a layer, with which every model must still compute what its modules compute."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

__all__ = ["ADAPTERS", "LowRankAdapter"]


class LowRankAdapter(nn.Module):
    """A layer and a product of two random matrices beside it, as LoRA adds them (any layer that acts on channels)."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = layer
        shape = layer.weight.shape
        self.down = nn.Parameter(torch.randn(rank, shape[1:].numel()))
        self.up = nn.Parameter(torch.randn(shape[0], rank))

    def forward(self, x: Tensor) -> Tensor:
        change = (self.up @ self.down).view_as(self.base_layer.weight)
        if isinstance(self.base_layer, nn.Linear):
            return self.base_layer(x) + x @ change.T
        beside: Tensor = self.base_layer._conv_forward(x, change, None)
        return self.base_layer(x) + beside


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _adapt(parent: nn.Module, name: str) -> None:
    setattr(parent, name, LowRankAdapter(getattr(parent, name)))


def _parametrize(parent: nn.Module, name: str) -> None:
    parametrize.register_parametrization(getattr(parent, name), "weight", _Doubled())


def _prune(parent: nn.Module, name: str) -> None:
    prune.random_unstructured(getattr(parent, name), "weight", amount=0.5)


def _hook(parent: nn.Module, name: str) -> None:
    getattr(parent, name).register_forward_hook(lambda module, inputs, output: output.square())


def _replace_forward(parent: nn.Module, name: str) -> None:
    layer = getattr(parent, name)
    forward = layer.forward
    layer.forward = lambda x: forward(x).square()


ADAPTERS: dict[str, Callable[[nn.Module, str], None]] = {
    "adapter": _adapt, "parametrization": _parametrize, "pruning": _prune, "hook": _hook, "forward": _replace_forward,
}  # fmt: skip
"""Each changes the layer `name` of `parent` in place."""
