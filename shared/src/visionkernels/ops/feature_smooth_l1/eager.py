"""Smooth L1 loss to normalised features by ATen's two kernels: on a CPU faster than any split of them into rows."""

import torch
from torch import Tensor
from torch.nn import functional as F

from visionkernels.ops.feature_smooth_l1.reference import LARGE, scale_of_large_rows

__all__ = ["feature_smooth_l1"]


def feature_smooth_l1(prediction: Tensor, hidden: Tensor, beta: float, eps: float) -> Tensor:
    """Return the loss; see the public function."""
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, hidden.dtype), torch.float32)
    hidden = hidden.to(dtype)
    if _may_be_large(hidden):
        hidden = hidden * scale_of_large_rows(hidden)
    target = F.layer_norm(hidden, hidden.shape[-1:], eps=eps)
    return F.smooth_l1_loss(prediction.to(dtype), target, beta=beta)


def _may_be_large(hidden: Tensor) -> bool:
    """Whether rows must be scaled; on a CPU a look at the values is a tenth of the price of scaling them."""
    is_readable = hidden.is_cpu and not torch.compiler.is_compiling()
    if not is_readable or torch._C._functorch.is_functorch_wrapped_tensor(hidden):
        return True
    low, high = hidden.aminmax()
    # NaN counts as large
    return not bool(low >= -LARGE and high <= LARGE)
