"""Activations and norms that keep little for backward, to go with filtered convolutions.

A filtered convolution does not keep its input, but the ReLU before it keeps the same tensor as its output, and a norm
keeps its own input. These layers keep one bit per element (ReLU, ReLU6, dropout: exact), one byte (hard-swish, SiLU:
approximate), or one number per channel (batch norm with frozen statistics). Each replaces its stock class in place.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradfilter.conv import timm_layer
from visionkernels.autograd import anchor_to, first_order_only

__all__ = ["APPROXIMATE", "EXACT", "FrozenBatchNorm2d", "frozen_norms", "pack_bits", "unpack_bits"]

# one multiplication gathers the bits of eight bytes of 0 or 1 in the highest byte, another one spreads them again
_GATHER = 0x0102040810204080
_REPEAT = 0x0101010101010101
_SELECT = 0x8040201008040201 - (1 << 64)


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool tensor of any shape into uint8, eight elements per byte."""
    flat = mask.flatten()
    padded = F.pad(flat, (0, -flat.numel() % 8)).view(torch.uint8).view(torch.int64)
    return ((padded * _GATHER) >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor, shape: torch.Size) -> Tensor:
    """Return the bool tensor of `shape` that `pack_bits` packed."""
    spread = (packed.to(torch.int64) * _REPEAT) & _SELECT
    return spread.view(torch.uint8).ne(0)[: shape.numel()].view(shape)


class _Masked(torch.autograd.Function):
    """Return `value`; its gradient is passed on where `mask` is true, times `gain`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, mask: Tensor, gain: float) -> Tensor:
        ctx.save_for_backward(pack_bits(_in_memory_order(mask, x)))
        ctx.gain, ctx.layout = gain, _layout(x)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (packed,) = ctx.saved_tensors
        ordered = grad.contiguous(memory_format=ctx.layout)
        kept = unpack_bits(packed, _in_memory_order(ordered, ordered).shape)
        kept = kept if ctx.layout == torch.contiguous_format else kept.permute(0, 3, 1, 2)
        passed = ordered * kept
        return passed if ctx.gain == 1 else passed * ctx.gain, None, None, None


def _needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _layout(x: Tensor) -> torch.memory_format:
    is_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format


def _in_memory_order(values: Tensor, like: Tensor) -> Tensor:
    """Return `values` in the memory order of `like`, so that packing reads contiguous memory."""
    return values.permute(0, 2, 3, 1) if _layout(like) == torch.channels_last else values


class _Coded(torch.autograd.Function):
    """Return `value`; its derivative is kept in 256 steps from `low` to `high`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, value: Tensor, slope: Tensor, low: float, high: float, anchor: Tensor | None
    ) -> Tensor:
        # a code beyond 0 or 255 would wrap around
        code = (slope - low) * (255 / (high - low))
        ctx.save_for_backward(code.round_().clamp_(0, 255).to(torch.uint8))
        ctx.anchor, ctx.low, ctx.step = anchor, low, (high - low) / 255
        return value

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (code,) = ctx.saved_tensors
        return grad * (code.to(grad.dtype) * ctx.step + ctx.low), None, None, None, None, None


class LeanReLU(nn.ReLU):
    """ReLU that keeps one bit per element."""

    def forward(self, input: Tensor) -> Tensor:
        """Return max(x, 0)."""
        if not _needs_gradient(input):
            return torch.relu(input)
        x = input.detach()
        return _Masked.apply(input, torch.relu(x), ~(x <= 0), 1.0)  # type: ignore[no-any-return]


class LeanReLU6(nn.ReLU6):
    """ReLU6 that keeps one bit per element."""

    def forward(self, input: Tensor) -> Tensor:
        """Return min(max(x, 0), 6)."""
        if not _needs_gradient(input):
            return F.relu6(input)
        x = input.detach()
        return _Masked.apply(input, F.relu6(x), (x > 0) & (x < 6), 1.0)  # type: ignore[no-any-return]


class LeanDropout(nn.Dropout):
    """Dropout that keeps one bit per element."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements in training, and scale the others by 1 / (1 - p)."""
        if not self.training or self.p == 0 or not _needs_gradient(input):
            return F.dropout(input, self.p, self.training)
        x, gain = input.detach(), 1 / (1 - self.p) if self.p < 1 else 0.0
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - self.p)
        return _Masked.apply(input, x * mask * gain, mask, gain)  # type: ignore[no-any-return]


class LeanHardswish(nn.Hardswish):
    """Hard-swish that keeps its derivative as one byte per element; gradients err by at most 0.004 of the output's."""

    def forward(self, input: Tensor) -> Tensor:
        """Return x * min(max(x + 3, 0), 6) / 6."""
        if not _needs_gradient(input):
            return F.hardswish(input)
        x = input.detach()
        wide = x.float()
        slope = torch.where(wide.abs() < 3, wide / 3 + 0.5, (wide > 0).float())
        return _Coded.apply(input, F.hardswish(x), slope, -0.5, 1.5, anchor_to("LeanHardswish", input))  # type: ignore[no-any-return]


class LeanSiLU(nn.SiLU):
    """SiLU that keeps its derivative as one byte per element; gradients err by at most 0.0025 of the output's."""

    def forward(self, input: Tensor) -> Tensor:
        """Return x * sigmoid(x)."""
        if not _needs_gradient(input):
            return F.silu(input)
        x = input.detach()
        wide = x.float()
        gate = torch.sigmoid(wide)
        return _Coded.apply(input, F.silu(x), gate * (1 + wide * (1 - gate)), -0.1, 1.1, anchor_to("LeanSiLU", input))  # type: ignore[no-any-return]


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Frozen batch norm that uses its running statistics in training mode too; keeps one number per channel."""

    def forward(self, input: Tensor) -> Tensor:
        """Return weight * (x - running_mean) / sqrt(running_var + eps) + bias."""
        return _frozen_norm(self, input)


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """timm's batch norm with an activation, frozen, using its running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the activation of the normed map."""
        return self.act(self.drop(_frozen_norm(self, input)))  # type: ignore[no-any-return, operator]


def _frozen_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Normalise x [batch, channels, ...]; a former SyncBatchNorm takes any further axes."""
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        scale = torch.rsqrt(norm.running_var + norm.eps)
        if norm.affine:
            scale = scale * norm.weight
        shift = -norm.running_mean * scale
        if norm.affine:
            shift = shift + norm.bias
    # in half precision the two terms would cancel what the norm keeps
    precise = torch.promote_types(x.dtype, scale.dtype)
    scale, shift = (factor.view(-1, *[1] * (x.ndim - 2)) for factor in (scale, shift))
    return (x.to(precise) * scale + shift).to(x.dtype)


# stock class: its replacement
EXACT: dict[type[nn.Module], type[nn.Module]] = {
    nn.ReLU: LeanReLU,
    nn.ReLU6: LeanReLU6,
    nn.Dropout: LeanDropout,
}
APPROXIMATE: dict[type[nn.Module], type[nn.Module]] = {nn.Hardswish: LeanHardswish, nn.SiLU: LeanSiLU}


def frozen_norms() -> dict[type[nn.Module], type[nn.Module]]:
    """Return the replacements of batch norms whose statistics are frozen, by stock class."""
    # running statistics need not be shared between processes
    twins: dict[type[nn.Module], type[nn.Module]] = dict.fromkeys((nn.BatchNorm2d, nn.SyncBatchNorm), FrozenBatchNorm2d)
    with_activation = timm_layer("BatchNormAct2d")
    return twins if with_activation is None else twins | {with_activation: FrozenBatchNormAct2d}
