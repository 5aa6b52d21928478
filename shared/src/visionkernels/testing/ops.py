"""What the tests of all ops share: backends are compared with the float64 reference, by one table of tolerances."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils import deterministic

__all__ = [
    "BACKENDS",
    "DEVICE",
    "TOLERANCES",
    "check_backend",
    "check_compiled",
    "gradients",
    "over_backends",
    "poisoned_empty",
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["eager", "triton"]

TOLERANCES = {
    # dtype: (rtol, atol) of single elements, (rtol, atol) after long sums
    torch.float64: ((1e-10, 1e-12), (1e-10, 1e-12)),
    torch.float32: ((1e-5, 1e-6), (1e-4, 1e-5)),
    torch.float16: ((2e-3, 1e-3), (2e-3, 1e-3)),
    torch.bfloat16: ((1.6e-2, 1e-2), (1.6e-2, 1e-2)),
}


def over_backends(
    cases: Iterable[str], *, half: Collection[str], half_dtypes: Sequence[torch.dtype] = (torch.float16, torch.bfloat16)
) -> pytest.MarkDecorator:
    """Parametrise a test by `backend`, `case` and `dtype`.

    Eager takes every case in every dtype; Triton takes float32, and `half_dtypes` for the cases in `half`.
    """
    triples = [("eager", case, dtype) for case in cases for dtype in TOLERANCES] + [
        ("triton", case, dtype) for case in cases for dtype in (torch.float32, *(half_dtypes if case in half else ()))
    ]
    return pytest.mark.parametrize(("backend", "case", "dtype"), triples, ids=str)


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor | None = None) -> list[Tensor]:
    """Return the gradients of the floating `inputs` for the output gradient `grad`, by default ones."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    out = function(*leaves)
    floating = [leaf for leaf in leaves if leaf.is_floating_point()]
    return list(torch.autograd.grad(out, floating, torch.ones_like(out) if grad is None else grad))


def check_backend(
    run: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    *,
    is_reduction: bool = True,
) -> None:
    """Assert that `run(*inputs)` and its gradients equal those of `reference` on the same inputs in float64.

    So the rounding of the inputs does not count. The output gradients are fixed pseudo-random tensors. Inputs that are
    not floating (indices, masks) are passed on, such outputs compared exactly. All floating tensors must have the dtype
    of the first, and are compared by TOLERANCES, with atol times the tensor's largest number where that is above one:
    an element near zero that is a sum of large ones has the rounding of the large ones.
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


def check_compiled(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Assert that torch.compile and torch.export give the values of `function`, and torch.compile its gradients."""

    class Module(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return function(*inputs)

    torch._dynamo.reset()  # else sizes that differ from an earlier test's are compiled as symbols, ten times slower
    compiled = torch.compile(Module(), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Module(), tuple(inputs)).module()
    for ours in (compiled, exported):
        torch.testing.assert_close(ours(*inputs), function(*inputs))
    torch.testing.assert_close(gradients(compiled, inputs), gradients(function, inputs))


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
    weights = [torch.randn(x.shape, generator=generator).to(rounded).to(x) for x in outputs]
    differentiable = [i for i, x in enumerate(outputs) if x.requires_grad]
    torch.autograd.backward([outputs[i] for i in differentiable], [weights[i] for i in differentiable])
    results = {f"output {i}": x.detach() for i, x in enumerate(outputs)}
    for i, leaf in enumerate(leaves):
        if leaf.is_floating_point():
            assert leaf.grad is not None, f"input {i} has no gradient"
            results[f"gradient {i}"] = leaf.grad
    return results


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill the tensors of torch.empty and its kin with NaN, so that a kernel that leaves a hole fails."""
    previous = torch.are_deterministic_algorithms_enabled()
    filled = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous)
        deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
