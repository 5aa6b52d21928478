"""A second derivative is right or raises, also where the gradient that comes in is a constant."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from visionkernels.autograd import anchor_to, first_order_only
from visionkernels.ops.channel_wise_distillation import channel_wise_distillation
from visionkernels.ops.feature_smooth_l1 import feature_smooth_l1
from visionkernels.ops.filtered_conv import filtered_conv2d
from visionkernels.ops.nkd_loss import nkd_loss
from visionkernels.ops.region_attention import region_attention
from visionkernels.ops.restore_tokens import restore_tokens
from visionkernels.ops.siren_mlp import siren_mlp


def _attention(topk: int) -> Callable[..., Tensor]:
    def run(*maps: Tensor, backend: str) -> Tensor:
        # few of the 64 regions go the chunked way, all of them the dense one
        index = torch.arange(topk).expand(1, 64, topk)
        return region_attention(*maps, index, num_heads=1, query_grid=(8, 8), backend=backend)

    return run


FILTERED = partial(filtered_conv2d, padding=1)
LABELS, IDS = torch.tensor([1, 0]), torch.tensor([[2, 0, 1]])
# the op, the shapes of its inputs, and how many of them get a gradient
CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]], int]] = {
    "channel_wise_distillation": (channel_wise_distillation, [(1, 2, 3), (1, 2, 3)], 1),
    "feature_smooth_l1": (feature_smooth_l1, [(2, 4), (2, 4)], 1),
    "filtered_conv2d": (FILTERED, [(1, 2, 4, 4), (2, 2, 3, 3), (2,)], 3),
    "nkd_loss": (lambda *a, backend: nkd_loss(*a, LABELS, backend=backend), [(2, 3), (2, 3)], 1),
    "region_attention": (_attention(2), [(1, 8, 8, 1)] * 3, 3),
    "region_attention, dense": (_attention(64), [(1, 8, 8, 1)] * 3, 3),
    "restore_tokens": (lambda *a, backend: restore_tokens(*a, IDS, backend=backend), [(1, 2, 4), (4,), (4, 4)], 3),
    "siren_mlp": (lambda x, w, backend: siren_mlp(x, [w], backend=backend), [(3, 2), (1, 3, 2)], 2),
}


def second_derivatives(function: Callable[..., Tensor], inputs: list[Tensor], wrt: int) -> list[Tensor]:
    """Return the derivatives, by all inputs, of a fixed weighting of the gradient by input `wrt`."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    out = function(*leaves)
    (grad,) = torch.autograd.grad(
        (out * torch.linspace(0.5, 1, out.numel()).view_as(out)).sum(), leaves[wrt], create_graph=True
    )
    zeros = [torch.zeros_like(leaf) for leaf in leaves]
    if not grad.requires_grad:
        return zeros
    weights = torch.linspace(1, 2, grad.numel(), dtype=grad.dtype).view_as(grad)
    seconds = torch.autograd.grad((grad * weights).sum(), leaves, allow_unused=True)
    return [zero if second is None else second for zero, second in zip(zeros, seconds, strict=True)]


@pytest.mark.parametrize("backend", ["eager", "triton", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name, backend, monkeypatch):
    """Derivatives of every input's gradient by all inputs equal those of the reference in float64, or raise."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    op, shapes, num_trained = CASES[name]
    for wrt in range(num_trained):
        torch.manual_seed(0)
        inputs = [torch.randn(shape) for shape in shapes]
        try:
            ours = second_derivatives(lambda *a: op(*a, backend=backend), inputs, wrt)
        except (RuntimeError, NotImplementedError) as error:
            assert "second derivative" in str(error) or "backward" in str(error), error
            continue
        # filtered gradients are no derivatives, so that even the reference has none of its own
        assert op is not FILTERED
        exact = [value.double() for value in inputs]
        expected = second_derivatives(lambda *a: op(*a, backend="reference"), exact, wrt)
        for value, reference in zip(ours, expected, strict=True):
            torch.testing.assert_close(value.double(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_transforms(name, backend):
    """The transforms of torch.func and forward-mode derivatives are right, or refused by torch."""
    op, shapes, _ = CASES[name]
    torch.manual_seed(0)
    x, *others = (torch.randn(shape) for shape in shapes)
    tangent = torch.ones_like(x)

    def value(x: Tensor) -> Tensor:
        return op(x, *others, backend=backend).sum()

    def dual() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(value(forward_ad.make_dual(x, tangent))).tangent

    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(leaf), leaf)
    for transform, expected in (
        (lambda: torch.func.grad(value)(x), grad),
        (lambda: torch.vmap(value)(torch.stack([x, x])), value(x).expand(2)),
        (lambda: torch.func.jvp(value, (x,), (tangent,))[1], grad.sum()),
        (dual, grad.sum()),
    ):
        try:
            ours = transform()
        except (RuntimeError, NotImplementedError) as error:
            assert name not in ("restore_tokens", "siren_mlp", "feature_smooth_l1")
            # torch's words for a refusal, and its own fault of a forward derivative in two precisions
            refusals = "functorch transforms|data-dependent control flow|forward (mode )?AD|Double did not match"
            assert re.search(refusals, str(error))
            continue
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5, check_dtype=False)


class _Cube(torch.autograd.Function):
    """x ** 3 with a gradient that is computed in the forward pass, as losses on a CPU do."""

    @staticmethod
    def forward(ctx, x, anchor):
        ctx.save_for_backward(3 * x**2)
        ctx.anchor = anchor
        return x**3

    @staticmethod
    @first_order_only
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad * slope, None


def cube(x: Tensor) -> Tensor:
    return _Cube.apply(x, anchor_to("cube", x, advice="; write it out"))


class TestFirstOrderOnly:
    def test_first_order(self):
        x = torch.tensor([2.0, 3.0], requires_grad=True)
        assert torch.autograd.grad(cube(x).sum(), x)[0].tolist() == [12, 27]
        # a graph is built, and not followed
        (grad,) = torch.autograd.grad(cube(x).sum(), x, create_graph=True)
        assert grad.tolist() == [12, 27]
        cube(x).sum().backward()
        assert x.grad.tolist() == [12, 27]

    def test_hessian(self):
        with pytest.raises(RuntimeError, match=r"cube has no second derivative; write it out"):
            torch.autograd.functional.hessian(lambda x: cube(x).sum() + x.square().sum(), torch.tensor([2.0]))

    @pytest.mark.parametrize("chosen", [True, False])
    def test_penalty(self, chosen):
        """A gradient penalty beside a loss that reaches the same parameters."""
        x = torch.tensor([2.0], requires_grad=True)
        loss = cube(2 * x).sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="cube has no second derivative"):
            if chosen:
                torch.autograd.grad(loss + grad.square().sum(), x)
            else:
                (loss + grad.square().sum()).backward()

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpointed(self, use_reentrant):
        x = torch.tensor([2.0, 3.0], requires_grad=True)
        checkpoint(cube, x, use_reentrant=use_reentrant).sum().backward()
        assert x.grad.tolist() == [12, 27]

    def test_nothing_to_train(self):
        assert anchor_to("cube", torch.ones(1), None) is None
        with torch.no_grad():
            assert anchor_to("cube", torch.ones(1, requires_grad=True)) is None
