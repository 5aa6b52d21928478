"""Backward passes that have no derivative of their own say so instead of passing for constants.

torch's `once_differentiable` notices a second derivative only where the incoming gradient has a graph. With a constant
one, as in a Hessian or a gradient penalty, the gradient counts as a constant, and what should raise is zero in silence.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

__all__ = ["anchor_to", "first_order_only"]

Backward = Callable[..., tuple[Tensor | None, ...]]


def anchor_to(name: str, *inputs: Tensor | None, advice: str = "") -> Tensor | None:
    """Return an empty tensor that depends on `inputs`, for `first_order_only`; None where no gradient is wanted.

    The error that a second derivative raises names the function `name`, and ends with `advice`.
    """
    # compiled code refuses a second derivative itself
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    differentiable = [value for value in inputs if value is not None and value.requires_grad]
    return _Anchor.apply(f"{name} has no second derivative{advice}", *differentiable) if differentiable else None  # type: ignore[no-any-return]


def first_order_only(backward: Backward) -> Backward:
    """Run the `backward` of an autograd function without a graph; a derivative of its results raises RuntimeError.

    The forward keeps the result of `anchor_to` as `ctx.anchor`: saved tensors may be read but once under a checkpoint.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = backward(ctx, *grads)
        anchor: Tensor | None = ctx.anchor
        if anchor is None or not torch.is_grad_enabled():
            return results
        return tuple(value if value is None else _Anchored.apply(value, anchor) for value in results)

    return run


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, *inputs: Tensor) -> Tensor:
        ctx.message = message
        ctx.set_materialize_grads(False)
        return inputs[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, ...]:  # type: ignore[override]
        if grad is not None:
            raise RuntimeError(ctx.message)
        return (None,) * len(ctx.needs_input_grad)


class _Anchored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, grad.new_zeros(0)
