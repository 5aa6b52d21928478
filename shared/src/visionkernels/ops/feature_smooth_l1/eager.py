"""Smooth L1 loss to normalised features by ATen's two kernels: on a CPU faster than any split of them into rows."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["feature_smooth_l1"]


def feature_smooth_l1(prediction: Tensor, hidden: Tensor, beta: float, eps: float) -> Tensor:
    """Return the loss; see the public function."""
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, hidden.dtype), torch.float32)
    target = F.layer_norm(hidden.to(dtype), hidden.shape[-1:], eps=eps)
    return F.smooth_l1_loss(prediction.to(dtype), target, beta=beta)
