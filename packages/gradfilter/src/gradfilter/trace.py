"""Trace a forward pass: the order and sizes of a model's layers, and activations that it calls as functions."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._pytree import tree_map_only

from visionkernels.checks import InputError
from visionkernels.modules import copy_module

__all__ = ["Call", "Trace", "call_model", "preserved_modes", "trace"]

_ACTIVATION_FUNCTIONS: dict[Callable[..., Any], str] = {
    function: name
    for name, functions in {
        "relu": (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
        "relu6": (F.relu6,),
        "hardswish": (F.hardswish,),
        "silu": (F.silu,),
        "dropout": (F.dropout, torch.dropout),
    }.items()
    for function in functions
}


@dataclass(frozen=True)
class Call:
    """One convolution in a forward pass; sizes are (batch, channels, height, width)."""

    name: str
    module: nn.Conv2d
    input_size: tuple[int, int, int, int]
    output_size: tuple[int, int, int, int]


@dataclass
class Trace:
    """The layers and calls of one forward pass."""

    calls: list[Call] = field(default_factory=list)
    """Every call of an `nn.Conv2d`, in order; a layer that runs twice is listed twice."""
    order: list[str] = field(default_factory=list)
    """Convolutions and modules without children, in the order of their calls; listed twice if called twice."""
    functions: list[str] = field(default_factory=list)
    """Activations that a module calls as functions, as "module: function"."""
    checkpointed: list[str] = field(default_factory=list)
    """Convolutions whose first call ran in an activation checkpoint."""

    @property
    def convolutions(self) -> list[Call]:
        """The first call of each `nn.Conv2d`, in order."""
        first: dict[str, Call] = {}
        for call in self.calls:
            first.setdefault(call.name, call)
        return list(first.values())


def trace(model: nn.Module, example_input: Any = None) -> Trace:
    """Run a copy of `model` once on the meta device and return its trace; the model itself does not change.

    `example_input` is a tensor, or a tuple or dict of the model's arguments; by default one image of the size that
    the model names in `pretrained_cfg`, or of 224 x 224 pixels. Functions registered as forward hooks do not run;
    forward pre-hooks do, since spectral norm computes its weight there. Raises ValueError if the model does not run.
    """
    if any(map(nn.parameter.is_lazy, model.parameters())):
        raise InputError(f"{type(model).__name__} has lazy parameters; run it once before converting it")
    device = torch.device("meta")
    twin = copy_module(model).to(device).eval()
    _remove_forward_hooks(twin)
    arguments, keywords = _arguments(_default_input(model) if example_input is None else example_input)
    arguments, keywords = tree_map_only(Tensor, lambda tensor: tensor.to(device), (arguments, keywords))
    recorder = _Recorder(twin, dict(model.named_modules()))
    try:
        with torch.no_grad(), device, recorder:
            twin(*arguments, **keywords)
    except Exception as error:
        given = "the default input" if example_input is None else "example_input"
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise InputError(f"{type(model).__name__} does not run on {given} ({reason}); pass example_input") from error
    return recorder.trace


def _remove_forward_hooks(twin: nn.Module) -> None:
    """Remove the hooks that a copy shares with its model, which would see a pass that the model never made.

    Bound methods were copied with their objects and stay: timm collects features with them.
    """
    for module in twin.modules():
        for key, hook in list(module._forward_hooks.items()):
            while isinstance(hook, partial):
                hook = hook.func
            if isinstance(hook, FunctionType | BuiltinFunctionType):
                del module._forward_hooks[key]


class _Recorder(TorchFunctionMode):
    """Context that records the modules and functions that run in it."""

    def __init__(self, twin: nn.Module, original: dict[str, nn.Module]) -> None:
        super().__init__()
        self.trace, self.running = Trace(), [""]
        self.original = original
        for name, module in twin.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name))
            module.register_forward_hook(lambda module, inputs, output, name=name: self._note(name, inputs, output))

    def _note(self, name: str, inputs: tuple[Any, ...], output: Any) -> None:
        self.running.pop()
        module = self.original[name]
        # a parametrised convolution has children, and is a layer all the same
        if next(module.children(), None) is not None and not isinstance(module, nn.Conv2d):
            return
        is_first_call = name not in self.trace.order
        self.trace.order.append(name)
        if isinstance(module, nn.Conv2d):
            self.trace.calls.append(Call(name, module, _image_size(inputs[0]), _image_size(output)))
            if is_first_call and _is_checkpointed():
                self.trace.checkpointed.append(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ACTIVATION_FUNCTIONS:
            caller = self.running[-1]
            entry = f"{caller or 'the model'}: {_ACTIVATION_FUNCTIONS[func]}"
            # an activation module calls its function itself
            is_module = type(self.original[caller]).__module__.endswith(("nn.modules.activation", "dropout", "lean"))
            if not is_module and entry not in self.trace.functions:
                self.trace.functions.append(entry)
        return func(*args, **(kwargs or {}))


def _is_checkpointed() -> bool:
    """Tell whether `torch.utils.checkpoint`, in either variant, is among the callers."""
    return any(frame.f_globals.get("__name__") == checkpoint.__name__ for frame, _ in traceback.walk_stack(None))


def call_model(model: nn.Module, example_input: Any) -> Any:
    """Call `model` on a tensor, or on a tuple or dict of its arguments."""
    arguments, keywords = _arguments(example_input)
    return model(*arguments, **keywords)


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Restore the modules' training and evaluation modes afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_input, dict):
        return (), example_input
    return (tuple(example_input) if isinstance(example_input, tuple | list) else (example_input,)), {}


def _default_input(model: nn.Module) -> Tensor:
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    cfg = cast(dict[str, Any], getattr(model, "pretrained_cfg", {}))
    channels, height, width = cfg.get("input_size", (3, 224, 224))
    channels = channels if first is None else first.in_channels
    parameter = next(model.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    return torch.empty(1, channels, height, width, dtype=dtype, device="meta")


def _image_size(x: Tensor) -> tuple[int, int, int, int]:
    return cast(tuple[int, int, int, int], tuple(x.shape if x.ndim == 4 else (1, *x.shape)))
