"""Multiply-adds of a network, fast enough to be asked for every candidate of a search."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diswot.networks.staged import BlockReLU
from visionkernels.checks import InputError, check

__all__ = ["count_macs"]

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_SHAPE_KEEPING = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, BlockReLU)


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Count the multiply-adds of `model` for one image of `input_size` (channels, height, width), as the paper does.

    Those are the multiply-adds of convolutions and linear layers, and one addition per output for a bias; norms,
    activations and pooling count nothing (section 3.5). `visionkernels.profiling.count_flops` leaves the biases out and
    takes many times as long. What is no convolution or Linear module (the products of an attention) is not seen. The
    model runs in evaluation mode on the meta device, which knows shapes only, and is left as it was.
    """
    holds = len(input_size) == 3 and all(size >= 1 for size in input_size)
    check(holds, "input_size", tuple(input_size), "channels, height and width, each at least 1")
    total = 0

    def add(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Linear):
            per_output = layer.in_features
        else:
            assert isinstance(layer, _Convolution)
            per_output = layer.weight[0].numel()
        total += output.numel() * (per_output + (layer.bias is not None))

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    shapes = {name: torch.empty_like(value, device="meta") for name, value in tensors.items()}
    images = torch.empty(1, *input_size, device="meta")
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.device("meta"))
        stack.enter_context(_evaluation(model))
        stack.enter_context(_shapes_only(model))
        for layer in model.modules():
            if isinstance(layer, _Convolution | nn.Linear):
                stack.callback(layer.register_forward_hook(add).remove)
        torch.func.functional_call(model, shapes, (images,))
    return total


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _shapes_only(model: nn.Module) -> Iterator[None]:
    """Let plain convolutions, norms and ReLUs tell their output's shape: on "meta", torch takes ten times as long."""
    changed: list[nn.Module] = []
    try:
        for layer in model.modules():
            # subclasses may compute something else, and a `forward` of its own is not ours to replace
            if "forward" in vars(layer):
                continue
            if type(layer) is nn.Conv2d and not isinstance(layer.padding, str):
                vars(layer)["forward"] = _Conv2dShape(layer)
            elif type(layer) in _SHAPE_KEEPING:
                vars(layer)["forward"] = _same
            else:
                continue
            changed.append(layer)
        yield
    finally:
        for layer in changed:
            del vars(layer)["forward"]


class _Conv2dShape:
    """Stands for the `forward` of a convolution."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.channels = layer.in_channels, layer.out_channels
        assert not isinstance(layer.padding, str)
        self.axes = list(zip(layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.channels[0]:
            raise InputError(f"a convolution of {self.channels[0]} channels got an input of shape {list(x.shape)}")
        sides = [
            (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for side, (kernel, stride, padding, dilation) in zip(x.shape[2:], self.axes, strict=True)
        ]
        if min(sides) < 1:
            raise InputError(f"a map of shape {list(x.shape)} is smaller than the kernel of its convolution")
        return x.new_empty((x.shape[0], self.channels[1], *sides))


def _same(x: Tensor) -> Tensor:
    return x
