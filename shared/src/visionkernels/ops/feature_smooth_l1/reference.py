"""Smooth L1 loss to normalised features by its definition (G2SD, sec. 3)."""

import torch
from torch import Tensor

__all__ = ["LARGE", "SCALED", "feature_smooth_l1", "scale_of_large_rows"]

# squares of numbers above 2**64 overflow float32
LARGE, SCALED = 2.0**40, 2.0**20


def feature_smooth_l1(prediction: Tensor, hidden: Tensor, beta: float, eps: float) -> Tensor:
    """Return the loss; see the public function."""
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, hidden.dtype), torch.float32)
    hidden = hidden.to(dtype)
    hidden = hidden * scale_of_large_rows(hidden)
    variance, mean = torch.var_mean(hidden, -1, correction=0, keepdim=True)
    error = prediction.to(dtype) - (hidden - mean) / torch.sqrt(variance + eps)
    return torch.where(error.abs() < beta, error**2 / (2 * beta), error.abs() - beta / 2).mean()


def scale_of_large_rows(hidden: Tensor) -> Tensor:
    """Return a factor for each row [*batch, 1]: 1, or one that brings numbers above LARGE to SCALED.

    A norm does not change with the scale of its input, but for `eps`, which is nothing beside such numbers.
    """
    peak = hidden.abs().amax(-1, keepdim=True)
    return torch.where(peak > LARGE, SCALED / peak, 1.0)
