"""Fresh weights for scoring, a function of seed and key alone, and a context that restores models."""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from visionkernels.checks import check_choice

__all__ = ["Draws", "Init", "draws_of", "generator_for", "initialise", "preserved", "undrawn"]

Init: TypeAlias = Literal["gaussian", "kaiming", "keep"]
Draws: TypeAlias = Literal["own", "shared"]
Draw: TypeAlias = Callable[[str], torch.Generator]
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def draws_of(seed: int, key: str, draws: Draws) -> Draw:
    """Return the generators of a network's weights by layer name: one for all, or one for each name.

    With "shared" all networks that have a layer of one name and shape have the same weights there, so that they differ
    by what they are and less by luck (common random numbers).
    """
    check_choice("draws", draws, Draws)
    own = generator_for(seed, key)
    return (lambda _: own) if draws == "own" else (lambda name: generator_for(seed, f"layer/{name}"))


def generator_for(seed: int, key: str) -> torch.Generator:
    """Return a generator whose draws depend on the seed and the key and on nothing else, such as the order of calls."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def initialise(model: nn.Module, init: Init, draw: Draw) -> None:
    """Draw the weights of all convolutions and linear layers, each from the generator that `draw` gives for its name.

    "gaussian": all from N(0, 1), as the official code does; "kaiming": convolutions from N(0, 2 / fan_out), linear
    layers as torch does by default. Their biases become 0 (with "kaiming" those of linear layers are drawn), norms the
    identity. Parameters of other layers keep their values; "keep" changes nothing. Raises ValueError for others.
    """
    check_choice("init", init, Init)
    if init == "keep":
        return
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS):
            generator = draw(name)
            _draw(module.weight, init, generator, is_linear=isinstance(module, nn.Linear))
            if module.bias is not None:
                bound = (
                    1 / math.sqrt(module.weight.shape[1]) if init == "kaiming" and isinstance(module, nn.Linear) else 0
                )
                module.bias.copy_(torch.empty(module.bias.shape).uniform_(-bound, bound, generator=generator))
        elif isinstance(module, _NORMS):
            if module.weight is not None:
                module.weight.fill_(1)
            if module.bias is not None:
                module.bias.zero_()


def undrawn(model: nn.Module, init: Init) -> list[Tensor]:
    """Return the parameters that `initialise` leaves as they are, and all buffers."""
    redrawn = () if init == "keep" else (*_LAYERS, *_NORMS)
    drawn = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, redrawn)
        for parameter in (module.weight, module.bias)
    }
    return [*(weight for weight in model.parameters() if id(weight) not in drawn), *model.buffers()]


def _draw(weight: Tensor, init: Init, generator: torch.Generator, *, is_linear: bool) -> None:
    # drawn on the CPU in float32, so that device and precision of the model do not matter
    drawn = torch.empty(weight.shape)
    if init == "gaussian":
        drawn.normal_(generator=generator)
    elif is_linear:
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    else:
        nn.init.kaiming_normal_(drawn, mode="fan_out", nonlinearity="relu", generator=generator)
    weight.copy_(drawn)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore weights, buffers, modes, `requires_grad` and the global random state at the end.

    Inside, no parameter requires a gradient.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    values = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    devices = [tensor.device for tensor, _ in values if tensor.is_cuda]
    with torch.random.fork_rng(devices=sorted({device.index for device in devices})):
        try:
            model.requires_grad_(False)
            yield
        finally:
            with torch.no_grad():
                for tensor, value in values:
                    tensor.copy_(value)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode
