"""The layer: a convolution whose forward pass is exact and whose gradients are filtered (sec. 3)."""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.layers import Conv2dSame, pad_same
from torch import Tensor, nn
from torch.nn import functional as F

from gradfilter.compact import mark_compact
from visionkernels.ops import Backend
from visionkernels.ops.filtered_conv import Border, Radius, check_radius, filtered_conv2d, kernel_sum

__all__ = ["CompactConv2d", "FilteredConv2d", "as_filtered", "is_plain_convolution"]


class FilteredConv2d(nn.Conv2d):
    """`nn.Conv2d` with filtered gradients: parameters, state dict and forward pass are the same.

    `radius`, `border`, `backend` and `exportable` (the op's `straight_through`) are those of
    `visionkernels.ops.filtered_conv.filtered_conv2d`.
    """

    radius: tuple[int, int]
    border: Border = "plain"
    exportable: bool = False
    backend: Backend = "auto"
    pads_to_same: bool = False  # as timm's Conv2dSame: any stride, the odd pixel at the bottom and right

    def __init__(self, *args: Any, radius: Radius = 2, border: Border = "plain", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.radius, self.border = check_radius(radius), border

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, radius: Radius = 2) -> "FilteredConv2d":
        """Return a filtered layer that shares the parameters of `conv`."""
        layer = nn.Conv2d.__new__(cls)
        layer.__dict__.update(conv.__dict__)
        layer._parameters = dict(conv._parameters)
        layer.radius, layer.pads_to_same = check_radius(radius), isinstance(conv, Conv2dSame)
        return layer

    def forward(self, input: Float[Tensor, "*batch channels height width"]) -> Tensor:
        """Convolve; the gradients that follow are filtered."""
        return self._convolve(input, self.weight, None)

    def _convolve(self, x: Tensor, weight: Tensor, kernel: Tensor | None) -> Tensor:
        padding = cast(Any, self.padding)
        if self.pads_to_same:
            x, padding = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation)), 0
        elif self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return filtered_conv2d(
            x, weight, self.bias, self.stride, padding, self.dilation, self.groups, self.radius,  # type: ignore[arg-type]
            border=self.border, kernel=kernel, straight_through=self.exportable, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Name the radius as well."""
        return f"{super().extra_repr()}, radius={self.radius}"


def is_plain_convolution(conv: nn.Conv2d) -> bool:
    """Tell whether `conv` convolves with its weight as it is, and nothing else: what `as_filtered` takes."""
    return type(conv) in (nn.Conv2d, Conv2dSame, FilteredConv2d) and not nn.utils.parametrize.is_parametrized(conv)


def as_filtered(conv: nn.Conv2d, radius: Radius, *, border: Border = "plain", exportable: bool = False) -> None:
    """Turn a plain convolution into a `FilteredConv2d` in place, so that whoever holds it holds the filtered one."""
    values: dict[str, Any] = {"radius": check_radius(radius), "border": border, "exportable": exportable}
    if not isinstance(conv, FilteredConv2d):
        values |= {"pads_to_same": isinstance(conv, Conv2dSame), "_unconverted_class": type(conv)}
        conv.__class__ = FilteredConv2d
    conv.__dict__.update(values)


class _Compose(torch.autograd.Function):
    """scale * base + offset, given as the weight already: hands the gradient of one tap to `offset`."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, offset: Tensor, weight: Tensor) -> Tensor:
        ctx.scale = scale.detach()
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        # zero and not None, so that optimisers decay and move `scale` as they do the weight
        return torch.zeros_like(ctx.scale), grad[:, :, 0, 0], None


class CompactConv2d(FilteredConv2d):
    """A filtered convolution that trains in the form weight = scale * base + offset, the same offset for every tap.

    Filtered gradients are the same for all taps, so training by SGD, Adam and their kin moves the weight in this form
    only. `offset` [out_channels, in_channels / groups] is Kh Kw times smaller than the weight, and with it its
    gradient and the optimiser's state. `scale` starts at 1 and takes up weight decay. `offset.grad` holds the gradient
    of one tap, not the sum over taps, so that stock optimisers do what they would have done to the weight: SGD
    (momentum, Nesterov, decay), Adam without decay, AdamW, RMSprop, Adagrad. Adam with coupled decay is not
    equivalent: see `gradfilter.compact.check_optimizer`. A gradient norm counts `offset` once instead of Kh Kw times.
    """

    scale: nn.Parameter
    offset: nn.Parameter
    base: Tensor

    def __init__(self, *args: Any, radius: Radius = 2, **kwargs: Any) -> None:
        super().__init__(*args, radius=radius, **kwargs)
        self._split()

    def _split(self) -> None:
        """Part the weight in base, scale and offset."""
        weight = self.weight
        del self.weight
        # the base is the very Parameter, frozen: what else holds it goes on with it when it is folded back
        self.register_parameter("base", cast(nn.Parameter, weight.requires_grad_(False)))
        self.scale = nn.Parameter(weight.new_ones(()))
        self.offset = nn.Parameter(weight.new_zeros(weight.shape[:2]))
        for parameter in (self.scale, self.offset):
            mark_compact(parameter)
        self._kept: dict[str, tuple[Any, Any]] = {}

    @staticmethod
    def from_filtered(conv: nn.Conv2d) -> None:
        """Turn a `FilteredConv2d` into a compact layer in place."""
        conv.__class__ = CompactConv2d
        cast(CompactConv2d, conv)._split()

    def fold(self) -> None:
        """Become a plain `FilteredConv2d` again, with the trained weight in the original Parameter."""
        with torch.no_grad():
            weight = self.base.copy_(self._compose()[0])
        for name in ("base", "scale", "offset"):
            delattr(self, name)
        del self._kept
        self.__class__ = FilteredConv2d  # type: ignore[assignment]
        self.weight = cast(nn.Parameter, weight.requires_grad_())

    @torch.no_grad()
    def _compose(self) -> tuple[Tensor, Tensor]:
        """Return the weight and its sum over the taps."""
        base_sum = self._keep("base_sum", lambda: kernel_sum(self.base), self.base)
        weight = torch.addcmul(self.offset[:, :, None, None], self.base, self.scale)
        return weight, base_sum * self.scale + self.kernel_size[0] * self.kernel_size[1] * self.offset

    def _keep(self, name: str, compute: Callable[[], Any], *sources: Tensor) -> Any:
        """Return what `compute` gave last, unless a source has changed since."""
        if torch.compiler.is_compiling():
            return compute()
        state = [(source._version, source.data_ptr()) for source in sources]
        if name not in self._kept or self._kept[name][0] != state:
            self._kept[name] = (state, compute())
        return self._kept[name][1]

    def forward(self, input: Float[Tensor, "*batch channels height width"]) -> Tensor:
        """Convolve with scale * base + offset; the gradients that follow are filtered."""
        weight, kernel = self._keep("weight", self._compose, self.base, self.scale, self.offset)
        return self._convolve(input, _Compose.apply(self.scale, self.offset, weight), kernel)
