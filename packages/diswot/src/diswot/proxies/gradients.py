"""Proxies of one backward pass: how much the loss depends on the weights (zero-cost-nas, SNIP, GraSP, SynFlow, Fisher).

Sums are over all convolutions and linear layers, in the order of modules.
"""

# W weight of a layer, g = dL / dW

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diswot.observation import cross_entropy

__all__ = ["backward", "grasp", "l2_norm", "layers_of", "synflow"]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the convolutions and linear layers."""
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def _weights(model: nn.Module) -> list[nn.Parameter]:
    return [module.weight for module in layers_of(model)]  # type: ignore[misc]


def backward(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Return what the gradient of the mean cross-entropy says.

    grad_norm: sum of |g|; grad_norm_all: |g| over all parameters at once; snip: sum |W g|; plain: sum W g;
    snip_mean: -sum over layers of the mean over output channels of sum |W g|; fisher: for each output channel
    1/2 mean over the batch of (sum over positions of activation * its gradient)^2, once for each weight of the channel.
    """
    calls: list[tuple[nn.Module, Tensor]] = []
    with ExitStack() as stack:
        for module in layers_of(model):
            stack.callback(module.register_forward_hook(partial(_note, calls)).remove)
        loss = cross_entropy(model(images), labels)
    weights, others = _weights(model), [weight for weight in model.parameters() if weight.requires_grad]
    all_gradients = torch.autograd.grad(loss, [*weights, *others, *(output for _, output in calls)], allow_unused=True)
    gradients = all_gradients[: len(weights)]
    pairs = [(weight, gradient) for weight, gradient in zip(weights, gradients, strict=True) if gradient is not None]
    products = [weight * gradient for weight, gradient in pairs]
    whole = [gradient for gradient in all_gradients[len(weights) : len(weights) + len(others)] if gradient is not None]
    return {
        "grad_norm": sum(gradient.norm().item() for _, gradient in pairs),
        "grad_norm_all": torch.stack([gradient.norm() for gradient in whole]).norm().item(),
        "snip": sum(product.abs().sum().item() for product in products),
        "plain": sum(product.sum().item() for product in products),
        "snip_mean": -sum(product.abs().flatten(1).sum(1).mean().item() for product in products),
        "fisher": sum(map(_fisher, calls, all_gradients[len(weights) + len(others) :])),
    }


def _note(calls: list[tuple[nn.Module, Tensor]], layer: nn.Module, _: object, output: Tensor) -> Tensor:
    calls.append((layer, output))
    # an activation in place changes the copy
    return output.clone()


def _fisher(call: tuple[nn.Module, Tensor], gradient: Tensor | None) -> float:
    if gradient is None:
        return 0.0
    layer, output = call
    product = output * gradient
    if isinstance(layer, nn.Conv2d):
        by_channel = product.flatten(2).sum(2)
    else:  # of a linear layer channels are last, and there may be positions
        by_channel = product.reshape(len(product), -1, product.shape[-1]).sum(1)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return (0.5 * by_channel.square().mean(0).sum() * (weight.numel() // len(weight))).item()


def grasp(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return -sum W (H g): by how much the gradient would shrink without the weights."""
    weights = _weights(model)
    # the fast kernels of attention have no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        loss = cross_entropy(model(images), labels)
    gradients = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    used = [(weight, gradient) for weight, gradient in zip(weights, gradients, strict=True) if gradient is not None]
    product = sum((gradient.detach() * gradient).sum() for _, gradient in used)
    assert isinstance(product, Tensor)
    curved = torch.autograd.grad(product, [weight for weight, _ in used], allow_unused=True)
    return -sum(
        (weight * product).sum().item()
        for (weight, _), product in zip(used, curved, strict=True)
        if product is not None
    )


def l2_norm(model: nn.Module) -> float:
    """Return the sum of |W|."""
    return sum(weight.norm().item() for weight in _weights(model))


def synflow(model: nn.Module, images: Tensor, *, with_norms: bool = False) -> float:
    """Return sum |W dR/dW| for R, the sum of outputs at an image of ones, with all weights positive, in float64.

    Norms are bypassed unless `with_norms`. Values are huge: rank by them, or by their logarithm.
    """
    model = model.double()
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point():
                tensor.abs_()
    ones = torch.ones(1, *images.shape[1:], dtype=torch.float64, device=images.device)
    with ExitStack() as stack:
        if not with_norms:
            stack.enter_context(_without_norms(model))
        outputs = model(ones)
    weights = _weights(model)
    gradients = torch.autograd.grad(outputs.sum(), weights, allow_unused=True)
    return sum(
        (weight * gradient).abs().sum().item()
        for weight, gradient in zip(weights, gradients, strict=True)
        if gradient is not None
    )


@contextmanager
def _without_norms(model: nn.Module) -> Iterator[None]:
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        # timm's norms may have an activation, which stays; a module here would be a part and no method
        norm.forward = getattr(norm, "act", nn.Identity()).forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
