"""The checks that every op's tests share: its backends against the float64 reference, by one table of tolerances."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.utils import deterministic

__all__ = ["TOLERANCES", "check_backend", "poisoned_empty"]

TOLERANCES = {
    # dtype: (rtol, atol) of single elements, (rtol, atol) after long sums
    torch.float64: ((1e-10, 1e-12), (1e-10, 1e-12)),
    torch.float32: ((1e-5, 1e-6), (1e-4, 1e-5)),
    torch.float16: ((2e-3, 1e-3), (2e-3, 1e-3)),
    torch.bfloat16: ((1.6e-2, 1e-2), (1.6e-2, 1e-2)),
}


def check_backend(
    run: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    is_reduction: bool = True,
) -> None:
    """Assert that `run(*inputs)` and its gradients equal those of `reference` on the same inputs in float64.

    The inputs' own rounding is so taken out; the output gradient is a fixed pseudo-random tensor. Outputs and
    gradients must have the dtype of the inputs, and are compared by TOLERANCES, scaled by the tensor's size.
    """
    outputs = []
    for function, dtype in ((run, inputs[0].dtype), (reference, torch.float64)):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        out = function(*leaves)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype)
        out.backward(weights.to(out))
        outputs.append([out, *(leaf.grad for leaf in leaves)])
    rtol, atol = TOLERANCES[inputs[0].dtype][is_reduction]
    names = ["output", *(f"gradient {i}" for i in range(len(inputs)))]
    for name, ours, expected in zip(names, *outputs, strict=True):
        assert ours.dtype == inputs[0].dtype, f"{name} is {ours.dtype}"
        prefix = f"{name}: "
        scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(
            ours.double().cpu(), expected.cpu(), rtol=rtol, atol=atol * scale, msg=partial(str.__add__, prefix)
        )


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN, so that a kernel that leaves a hole is found out."""
    previous = torch.are_deterministic_algorithms_enabled()
    filled = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous)
        deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
