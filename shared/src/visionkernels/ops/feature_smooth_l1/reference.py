"""Smooth L1 loss to normalised features by its definition (G2SD, sec. 3)."""

import torch
from torch import Tensor

__all__ = ["feature_smooth_l1"]


def feature_smooth_l1(prediction: Tensor, hidden: Tensor, beta: float, eps: float) -> Tensor:
    """Return the loss; see the public function."""
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, hidden.dtype), torch.float32)
    variance, mean = torch.var_mean(hidden.to(dtype), -1, correction=0, keepdim=True)
    error = prediction.to(dtype) - (hidden.to(dtype) - mean) / torch.sqrt(variance + eps)
    return torch.where(error.abs() < beta, error**2 / (2 * beta), error.abs() - beta / 2).mean()
