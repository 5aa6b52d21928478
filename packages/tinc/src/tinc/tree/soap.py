"""SOAP for stacks of small matrices: Adam in the basis in which a gradient's rows and columns are uncorrelated.

Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam" (2024). torch.optim and timm have no such optimiser,
and a tree's layers are stacks [nodes, inputs, outputs] that a matrix optimiser would take apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BatchedSoap"]


@dataclass
class _State:
    momentum: Tensor
    second: Tensor
    rows: Tensor
    columns: Tensor
    row_basis: Tensor
    column_basis: Tensor


class BatchedSoap:
    """Steps of tensors [N, K, M], each of the N matrices with bases of its own; gradients are given to `step`."""

    def __init__(
        self, parameters: Sequence[Tensor], *, betas: tuple[float, float] = (0.95, 0.95), refresh: int = 10
    ) -> None:
        """`refresh` is in how many steps the bases are computed anew."""
        self.parameters = list(parameters)
        self.betas, self.refresh = betas, refresh
        self.count = 0
        self.states: list[_State] = []

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], learning_rate: float) -> None:
        """Move the parameters; the first call only looks at the gradients."""
        self.count += 1
        if not self.states:
            self.states = [self._start(gradient) for gradient in gradients]
            return
        for parameter, gradient, state in zip(self.parameters, gradients, self.states, strict=True):
            parameter.sub_(self._direction(gradient, state), alpha=learning_rate)
            self._follow(gradient, state)

    def _start(self, gradient: Tensor) -> _State:
        rows, columns = gradient @ gradient.mT, gradient.mT @ gradient
        weight = 1 - self.betas[1]
        return _State(
            torch.zeros_like(gradient),
            torch.zeros_like(gradient),
            rows * weight,
            columns * weight,
            torch.linalg.eigh(rows)[1].flip(-1),
            torch.linalg.eigh(columns)[1].flip(-1),
        )

    def _direction(self, gradient: Tensor, state: _State) -> Tensor:
        first, second = self.betas
        left, right = state.row_basis, state.column_basis
        state.momentum.lerp_(gradient, 1 - first)
        turned = left.mT @ gradient @ right
        state.second.mul_(second).addcmul_(turned, turned, value=1 - second)
        spread = (state.second / (1 - second**self.count)).sqrt_().add_(1e-8)
        moved = (left.mT @ state.momentum @ right).div_(1 - first**self.count).div_(spread)
        return left @ moved @ right.mT

    def _follow(self, gradient: Tensor, state: _State) -> None:
        weight = 1 - self.betas[1]
        state.rows.lerp_(gradient @ gradient.mT, weight)
        state.columns.lerp_(gradient.mT @ gradient, weight)
        if self.count % self.refresh:
            return
        state.row_basis, order = _power_step(state.rows, state.row_basis)
        state.second = state.second.gather(1, order[:, :, None].expand_as(state.second))
        state.column_basis, order = _power_step(state.columns, state.column_basis)
        state.second = state.second.gather(2, order[:, None].expand_as(state.second))


def _power_step(covariance: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return the basis after one step of orthogonal iteration, and the order in which its vectors were taken."""
    order = (basis * (covariance @ basis)).sum(-2).argsort(-1, descending=True)
    basis = basis.gather(2, order[:, None].expand_as(basis))
    return torch.linalg.qr(covariance @ basis)[0], order
