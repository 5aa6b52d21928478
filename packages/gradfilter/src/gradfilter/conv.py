"""Convolution layers whose forward pass is exact and whose gradients are filtered (sec. 3)."""

import sys
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gradfilter.compact import guard_optimizers, mark_compact
from visionkernels.checks import InputError
from visionkernels.ops import Backend
from visionkernels.ops.filtered_conv import Border, Radius, check_border, check_radius, filtered_conv2d, kernel_sum

__all__ = [
    "BEFORE_CONVERSION",
    "CompactConv2d",
    "FilteredConv2d",
    "as_exact",
    "as_filtered",
    "pad_first",
    "pads_to_same",
    "timm_layer",
    "why_unfilterable",
]

BEFORE_CONVERSION = "_before_conversion"
"""Attribute of a module that holds its state before `convert`."""


class FilteredConv2d(nn.Conv2d):
    """`nn.Conv2d` with filtered gradients: parameters, state dict and forward pass are the same.

    `radius`, `border`, `backend` and `exportable` (its `straight_through`, with second derivatives) are those of
    `visionkernels.ops.filtered_conv.filtered_conv2d`. Raises ValueError for a wrong radius or border.
    """

    radius: tuple[int, int]
    border: Border = "plain"
    exportable: bool = False
    backend: Backend = "auto"
    pads_to_same: bool = False  # as timm's Conv2dSame: for any stride, with the odd pixel at the bottom and right

    def __init__(self, *args: Any, radius: Radius = 2, border: Border = "plain", **kwargs: Any) -> None:
        check_border(border)
        super().__init__(*args, **kwargs)
        self.radius, self.border = check_radius(radius), border

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, radius: Radius = 2, *, border: Border = "plain") -> "FilteredConv2d":
        """Return a filtered layer that shares the parameters of `conv` and nothing else.

        Raises TypeError for a layer that does more than convolve with its weight (see `why_unfilterable`), and
        ValueError for a wrong radius or border.
        """
        if (reason := why_unfilterable(conv)) is not None:
            raise TypeError(
                f"{reason}, which a filtered layer would not; pass an nn.Conv2d or timm's Conv2dSame whose weight is a "
                "Parameter"
            )
        check_border(border)
        layer = nn.Conv2d.__new__(cls)
        for name, value in conv.__dict__.items():
            # containers hold hooks and the like, which the layers must not share
            layer.__dict__[name] = value.copy() if isinstance(value, dict | list | set) else value
        layer.__dict__.pop(BEFORE_CONVERSION, None)
        layer.radius, layer.border, layer.pads_to_same = check_radius(radius), border, pads_to_same(conv)
        return layer

    def forward(self, input: Float[Tensor, "*batch channels height width"]) -> Tensor:
        """Convolve; backward gives filtered gradients."""
        return self._convolve(input, self.weight, None)

    def _convolve(self, x: Tensor, weight: Tensor, kernel: Tensor | None) -> Tensor:
        x, padding = pad_first(self, x)
        return filtered_conv2d(
            x, weight, self.bias, self.stride, padding, self.dilation, self.groups, self.radius,  # type: ignore[arg-type]
            border=self.border, kernel=kernel, straight_through=self.exportable, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Add the radius to the representation."""
        return f"{super().extra_repr()}, radius={self.radius}"


def why_unfilterable(conv: nn.Conv2d) -> str | None:
    """Return why filtering would change what `conv` computes; None for a layer that convolves with its weight as it is.

    A filtered layer is another class with the same parameters, so that whatever stands beside them must stay exact.
    """
    # parametrizations change the class; older norms and pruning replace the Parameter by a plain tensor
    is_known = type(conv) in (nn.Conv2d, FilteredConv2d, timm_layer("Conv2dSame"))
    if not is_known or conv._parameters.get("weight") is None:
        return f"{type(conv).__name__} computes its weight at each call"
    if "forward" in vars(conv):
        return "its forward is replaced, as by offloading"
    return None


def as_filtered(conv: nn.Conv2d, radius: Radius, *, border: Border = "plain", exportable: bool = False) -> None:
    """Turn a plain convolution into a `FilteredConv2d` in place, so that all references see the filtered layer.

    A layer that is already filtered keeps its class.
    """
    values = {"radius": check_radius(radius), "border": border, "exportable": exportable}
    conv.__dict__.update(values, pads_to_same=pads_to_same(conv))
    if not isinstance(conv, FilteredConv2d):
        conv.__class__ = FilteredConv2d


def as_exact(conv: FilteredConv2d) -> None:
    """Turn a filtered layer into the stock convolution with the same weights, in place."""
    if isinstance(conv, CompactConv2d):
        conv.fold()
    kind: type[nn.Module] = nn.Conv2d
    if conv.pads_to_same:
        from timm.layers import Conv2dSame

        kind = Conv2dSame
    conv.__class__ = kind  # type: ignore[assignment]


def timm_layer(name: str) -> type[nn.Module] | None:
    """Return a class of `timm.layers`, or None if that module is not imported, so that no model has a layer of it.

    The import takes seconds and most models do not need it.
    """
    return getattr(sys.modules.get("timm.layers"), name, None)


def pad_first(conv: nn.Conv2d, x: Tensor) -> tuple[Tensor, Any]:
    """Apply padding that is not zeros or that timm's "same" computes; return the input and the padding that is left."""
    if pads_to_same(conv):
        from timm.layers import pad_same  # the layer itself has imported it

        return pad_same(x, list(conv.kernel_size), list(conv.stride), list(conv.dilation)), 0
    if conv.padding_mode != "zeros":
        return F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
    return x, conv.padding


def pads_to_same(conv: nn.Conv2d) -> bool:
    """Tell whether the layer pads as timm's Conv2dSame: as much as the map needs at its stride."""
    return conv.pads_to_same if isinstance(conv, FilteredConv2d) else type(conv) is timm_layer("Conv2dSame")


class _Compose(torch.autograd.Function):
    """Return scale * base + offset, computed as `weight`; `offset` gets the gradient of one tap."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        ctx.scale = scale.detach()
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        # zero rather than None, so that optimisers decay and update `scale` as they do the weight
        return torch.zeros_like(ctx.scale), grad[:, :, 0, 0], None


class CompactConv2d(FilteredConv2d):
    """A filtered convolution that trains in the form weight = scale * base + offset, the same offset for every tap.

    Filtered gradients are the same for all taps, so SGD, Adam and similar optimisers keep the weight in this form.
    `offset` [out_channels, in_channels / groups], its gradient and the optimiser's state are Kh Kw times smaller than
    those of the weight. `scale` starts at 1 and absorbs weight decay. `offset.grad` holds the gradient of one tap, not
    the sum over taps, so that stock optimisers change the weight as in ordinary training: SGD (momentum, Nesterov,
    decay), Adam without decay, AdamW, RMSprop, Adagrad. Adam with coupled decay is not equivalent, nor are optimisers
    that use a whole tensor: see `gradfilter.compact.check_optimizer`, which runs before each step. A gradient norm
    counts `offset` once instead of Kh Kw times. The weight is composed at each call; `base` may change only where
    autograd sees it, as by loading a state dict, and not through `.data`.
    """

    scale: nn.Parameter
    offset: nn.Parameter
    base: Tensor
    _kept_sum: tuple[Any, Tensor] | None

    def __init__(self, *args: Any, radius: Radius = 2, **kwargs: Any) -> None:
        super().__init__(*args, radius=radius, **kwargs)
        self._split()

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, radius: Radius = 2, *, border: Border = "plain") -> "CompactConv2d":
        """Return a compact layer whose base is the weight of `conv`; this freezes that weight."""
        layer = cast(CompactConv2d, super().from_conv(conv, radius, border=border))
        layer._split()
        return layer

    @staticmethod
    def from_filtered(conv: nn.Conv2d) -> None:
        """Turn a `FilteredConv2d` into a compact layer in place."""
        conv.__class__ = CompactConv2d
        cast(CompactConv2d, conv)._split()

    def _split(self) -> None:
        """Replace the weight by base, scale and offset."""
        if self.border != "plain":
            raise InputError(f"border={self.border!r} is not exact for a compact layer; it takes 'plain'")
        weight, is_trained = self.weight, self.weight.requires_grad
        self._kept_sum = None
        # the base is the same Parameter, frozen, so that other references see the weight when it is folded back
        parts = {
            "base": weight.requires_grad_(False),
            "scale": nn.Parameter(weight.new_ones(()), is_trained),
            "offset": nn.Parameter(weight.new_zeros(weight.shape[:2]), is_trained),
        }
        _replace_parameters(self, ("weight",), parts)
        self._guard()

    def _guard(self) -> None:
        for parameter in (self.scale, self.offset):
            mark_compact(parameter)
        guard_optimizers()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._guard()  # copying a Parameter loses its mark

    def fold(self) -> None:
        """Become a plain `FilteredConv2d` again, with the trained weight in the original Parameter."""
        with torch.no_grad():
            weight = self.base.copy_(self._compose()[0])
        weight.requires_grad_(self.offset.requires_grad)
        _replace_parameters(self, ("base", "scale", "offset"), {"weight": cast(nn.Parameter, weight)})
        del self._kept_sum
        self.__class__ = FilteredConv2d  # type: ignore[assignment]

    @torch.no_grad()
    def _compose(self) -> tuple[Tensor, Tensor]:
        """Return the weight and its sum over the taps."""
        weight = torch.addcmul(self.offset[:, :, None, None], self.base, self.scale)
        return weight, self._base_sum() * self.scale + self.kernel_size[0] * self.kernel_size[1] * self.offset

    def _base_sum(self) -> Tensor:
        """Return the sum of the base over its taps, computed again only if the base has changed."""
        if torch.compiler.is_compiling():
            return kernel_sum(self.base)
        state = (self.base._version, self.base.data_ptr())
        if self._kept_sum is None or self._kept_sum[0] != state:
            with torch.inference_mode(False):  # the next training step saves for backward what an evaluation keeps
                self._kept_sum = (state, kernel_sum(self.base))
        return self._kept_sum[1]

    def forward(self, input: Float[Tensor, "*batch channels height width"]) -> Tensor:
        """Convolve with scale * base + offset; backward gives filtered gradients."""
        weight, kernel = self._compose()
        return self._convolve(input, _Compose.apply(self.scale, self.offset, weight), kernel)


def _replace_parameters(module: nn.Module, old: Collection[str], new: Mapping[str, Tensor]) -> None:
    """Replace parameters in their place, since optimisers load their state by the order of parameters."""
    parameters = dict(module._parameters)
    module._parameters.clear()
    for name, parameter in parameters.items():
        if name not in old:
            module._parameters[name] = parameter
        elif not new.keys() & module._parameters.keys():
            module._parameters.update(cast(Mapping[str, nn.Parameter], new))
