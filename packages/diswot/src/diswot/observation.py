"""The inputs of scoring from one forward pass: the last map, and the gradient of the classifier's weight."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import timm.layers
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from visionkernels.checks import InputError

__all__ = ["DEFAULT_READING", "Observation", "Reading", "check_batch", "cross_entropy", "observe", "read_map"]


@dataclass(frozen=True)
class Reading:
    """Which parts of a network are read, and how it runs."""

    feature: str = "auto"
    """Module whose output is the last map; "auto": the output of `forward_features` (timm), else the last output of a
    module before the classifier that has positions."""
    head: str = "auto"
    """The linear classifier; "auto": the result of `get_classifier` (timm), else the linear layer that runs last."""
    mode: Literal["train", "eval"] = "train"
    """Mode of the network: norms use the statistics of the batch, or running ones."""

    def __post_init__(self) -> None:
        if self.mode not in ("train", "eval"):
            raise InputError(f"mode={self.mode!r} must be 'train' or 'eval'")


DEFAULT_READING = Reading()
# the norm of a row of a Gram matrix holds fourth powers of features, and float32 ends at 3e38
_LARGE = 1e5


@dataclass(frozen=True)
class Observation:
    """Features of one network on one batch, in float32 or more, and in float64 where fourth powers overflow float32."""

    map: Float[Tensor, "batch channels *positions"]
    """Map before global pooling, with channels second in any layout of the network."""
    pooled: Tensor
    """Input of the classifier, [batch, channels] or, for classifiers of positions, [batch, ..., channels]."""
    logits: Float[Tensor, "batch classes"]
    gradient: Float[Tensor, "classes channels"]
    """Gradient of the mean cross-entropy with respect to the classifier's weight."""


def observe(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    labels: Int[Tensor, " batch"],
    reading: Reading = DEFAULT_READING,
) -> Observation:
    """Run a network once, forward only; backward goes through its last layer and no further.

    Buffers of norms move and modes change; see `diswot.initialisation.preserved`. Raises ValueError for a batch that
    does not fit, for a network without a linear classifier or without the named modules, and for a batch of one in
    training mode where the network has batch norms.
    """
    check_batch(images, labels)
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if len(images) == 1 and reading.mode == "train" and has_batch_norm:
        raise InputError("images are a batch of 1, and batch norms in training mode need at least 2")
    heads = _find_heads(model, reading)
    model.train(reading.mode == "train")
    # convolutions are faster so, and the weights' layout stays
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.enable_grad():
        name, head, seen, logits = _run(model, images, heads, reading.feature)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"{type(model).__name__} gives {what}; it must give logits [batch, classes]")
        loss = cross_entropy(logits, labels)
        is_used = loss.requires_grad
        (gradient,) = torch.autograd.grad(loss, seen["weight"], allow_unused=True) if is_used else (None,)
    if gradient is None or len(gradient) != logits.shape[1]:
        raise InputError(f"head={name!r} does not give the logits [batch, {logits.shape[1]}]; {_candidates(model)}")
    last_map = _last_map(model, head, seen, reading.feature)
    return Observation(last_map, seen["pooled"], logits.detach(), _promote_if_large(gradient))


def read_map(model: nn.Module, images: Tensor, feature: str = "auto") -> Float[Tensor, "batch channels *positions"]:
    """Return the last map of one forward pass in the model's own mode, without gradients; see `Reading.feature`."""
    with torch.no_grad():
        _, head, seen, _ = _run(model, images, _find_heads(model, Reading(feature)), feature)
    return _last_map(model, head, seen, feature)


def check_batch(images: Tensor, labels: Tensor) -> None:
    """Raise ValueError unless images are [B, C, H, W] and labels B whole numbers."""
    if images.ndim != 4 or not len(images) or not images.is_floating_point():
        raise InputError(
            f"images are {images.dtype} {list(images.shape)}; they must be floating [batch, channels, height, width]"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise InputError(
            f"labels are {labels.dtype} {list(labels.shape)}; they must be int64 [{len(images)}], one an image"
        )


def cross_entropy(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy. Raises ValueError for labels outside the classes."""
    low, high, classes = int(labels.min()), int(labels.max()), logits.shape[1]
    if low < 0 or high >= classes:
        raise InputError(f"labels reach from {low} to {high}; the network has {classes} classes, 0 to {classes - 1}")
    return F.cross_entropy(logits, labels)


def _find_heads(model: nn.Module, reading: Reading) -> dict[str, nn.Linear]:
    """Return the layers of which the one that runs last is the classifier."""
    modules = dict(model.named_modules())
    if reading.feature != "auto" and reading.feature not in modules:
        raise InputError(
            f"feature={reading.feature!r} is no module of {type(model).__name__}; {_near(reading.feature, modules)}"
        )
    if reading.head != "auto":
        head = modules.get(reading.head)
        if head is None or not _is_linear(head):
            raise InputError(f"head={reading.head!r} is no linear layer; {_candidates(model)}")
        return {reading.head: cast(nn.Linear, head)}
    classifier = getattr(model, "get_classifier", None)
    holder = classifier() if callable(classifier) else model
    # timm models return a layer, a module with a norm before it, or one layer for each of two heads
    inside = {part for head in (holder if isinstance(holder, tuple) else (holder,)) for part in head.modules()}
    heads = {
        name: cast(nn.Linear, module) for name, module in modules.items() if module in inside and _is_linear(module)
    }
    if not heads:
        raise InputError(f"{type(model).__name__} has no linear classifier (head); {_candidates(model)}")
    return heads


def _is_linear(module: nn.Module) -> bool:
    # subclasses may compute something else
    return isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, timm.layers.Linear.forward)


def _run(
    model: nn.Module, images: Tensor, heads: Mapping[str, nn.Linear], feature: str
) -> tuple[str, nn.Linear, dict[str, Tensor], Any]:
    """Return the classifier by name, what was seen, and the outputs."""
    name = list(heads)[-1]
    # again, if another one of them runs last
    for _ in range(2):
        seen: dict[str, Tensor] = {}
        order: list[str] = []
        with _watching(model, heads[name], feature, seen), _noting_order(heads, order):
            try:
                outputs = model(images)
            except AssertionError as error:
                # raised by timm for a size that a network does not take
                what = f"images are {list(images.shape)}, which {type(model).__name__} does not take: {error}"
                raise InputError(what) from error
        if not order:
            raise InputError(f"head={name!r} has no part in what the network returns; {_candidates(model)}")
        if order[-1] == name:
            break
        name = order[-1]
    return name, heads[name], seen, outputs


@contextmanager
def _noting_order(heads: Mapping[str, nn.Linear], order: list[str]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, head in heads.items():
            stack.callback(head.register_forward_hook(lambda *_, name=name: order.append(name)).remove)
        yield


@contextmanager
def _watching(model: nn.Module, head: nn.Linear, feature: str, seen: dict[str, Tensor]) -> Iterator[None]:
    def classify(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
        seen["pooled"] = _wide(inputs[0])
        # one for all calls, if there are several
        weight = seen.setdefault("weight", head.weight.detach().to(seen["pooled"].dtype).requires_grad_())
        return F.linear(seen["pooled"], weight, None if head.bias is None else head.bias.detach().to(weight))

    def note(_: nn.Module, __: Any, output: Any) -> None:
        # after the classifier nothing is a feature; a map of one position is pooled already
        if not isinstance(output, Tensor) or output.ndim < 3 or "weight" in seen:
            return
        if feature != "auto" or output[0].numel() > output.shape[1]:
            seen["map"] = output.detach()

    def features(*args: Any, **options: Any) -> Any:
        output = forward_features(*args, **options)
        if isinstance(output, Tensor):
            seen["features"] = output.detach()
        return output

    forward_features: Any = getattr(model, "forward_features", None)
    if feature == "auto":
        watched = [module for module in model.modules() if not list(module.children()) and module is not head]
    else:
        watched = [model.get_submodule(feature)]
    with ExitStack() as stack:
        for module in watched:
            stack.callback(module.register_forward_hook(note).remove)
        stack.callback(head.register_forward_hook(classify).remove)
        if feature == "auto" and callable(forward_features):
            own = vars(model).get("forward_features")
            vars(model)["forward_features"] = features
            stack.callback(_set_back, vars(model), "forward_features", own)
        yield


def _set_back(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        del attributes[name]
    else:
        attributes[name] = value


def _last_map(model: nn.Module, head: nn.Linear, seen: Mapping[str, Tensor], feature: str) -> Tensor:
    last_map = seen.get("features", seen.get("map"))
    if last_map is None or last_map.ndim < 3:
        which = "no module" if feature == "auto" else f"feature={feature!r} is no module"
        raise InputError(
            f"{which} of {type(model).__name__} before the classifier with positions; name one by feature="
        )
    return _promote_if_large(_channels_second(_wide(last_map), head.in_features))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _promote_if_large(tensor: Tensor) -> Tensor:
    return tensor.double() if float(tensor.abs().max()) > _LARGE else tensor


def _channels_second(features: Tensor, channels: int) -> Tensor:
    """Return features with channels second: tokens and channels-last maps, which have them last, are turned."""
    second, last = features.shape[1] == channels, features.shape[-1] == channels
    # three axes are tokens, unless only the second has as many channels as the classifier
    is_turned = (last or not second) if features.ndim == 3 else (last and not second)
    return features.movedim(-1, 1) if is_turned else features


def _candidates(model: nn.Module) -> str:
    linears = [name for name, module in model.named_modules() if _is_linear(module)]
    layers = [name for name, module in model.named_modules() if name and not list(module.children())]
    if len(linears) > 8:
        return f"it has {len(linears)} linear layers, at last {', '.join(linears[-8:])}"
    return f"linear layers: {', '.join(linears)}" if linears else f"its last layers are {', '.join(layers[-3:])}"


def _near(name: str, modules: dict[str, nn.Module]) -> str:
    near = difflib.get_close_matches(name, modules, n=3)
    return f"near: {', '.join(near)}" if near else f"it has {', '.join(list(modules)[1:6])}, ..."
