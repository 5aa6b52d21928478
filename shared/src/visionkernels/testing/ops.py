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
    run: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    *,
    is_reduction: bool = True,
) -> None:
    """Assert that `run(*inputs)` and its gradients equal those of `reference` on the same inputs in float64.

    The inputs' own rounding is so taken out; the output gradients are fixed pseudo-random tensors. Inputs and outputs
    that are not floating (indices, masks) are passed on and compared exactly; the others must have one dtype, that of
    the first floating input. Those are compared by TOLERANCES, atol times the tensor's largest number where that is
    above one: an element near zero that is a sum of large ones has the rounding of the large ones.
    """
    dtype = next(tensor.dtype for tensor in inputs if tensor.is_floating_point())
    results = [_differentiate(run, inputs, dtype, dtype), _differentiate(reference, inputs, torch.float64, dtype)]
    assert results[0].keys() == results[1].keys(), f"{list(results[0])} instead of {list(results[1])}"
    rtol, atol = TOLERANCES[dtype][is_reduction]
    for name, expected in results[1].items():
        ours = results[0][name]
        if not expected.is_floating_point():
            torch.testing.assert_close(ours.cpu(), expected.cpu(), msg=partial(str.__add__, f"{name}: "))
            continue
        assert ours.dtype == dtype, f"{name} is {ours.dtype}"
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(
            ours.double().cpu(), expected.cpu(), rtol=rtol, atol=atol * scale, msg=partial(str.__add__, f"{name}: ")
        )


def _differentiate(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    rounded: torch.dtype,
) -> dict[str, Tensor]:
    """Return the outputs of `function` in `dtype` and the gradients of its floating inputs, by name."""
    leaves = [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = function(*leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(each.shape, generator=generator).to(rounded).to(each) for each in outputs]
    differentiable = [i for i, each in enumerate(outputs) if each.requires_grad]
    torch.autograd.backward([outputs[i] for i in differentiable], [weights[i] for i in differentiable])
    results = {f"output {i}": each.detach() for i, each in enumerate(outputs)}
    for i, leaf in enumerate(leaves):
        if leaf.is_floating_point():
            assert leaf.grad is not None, f"input {i} has no gradient"
            results[f"gradient {i}"] = leaf.grad
    return results


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
