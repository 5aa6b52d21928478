"""Operations on maps that all layers share: check and reorder axes, pad, project and convolve in either layout."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionkernels.checks import InputError

__all__ = [
    "DataFormat",
    "checked_nhwc",
    "convolve",
    "depthwise",
    "grid_of",
    "pad_to_multiple",
    "pointwise",
]

DataFormat = Literal["NHWC", "NCHW"]


def checked_nhwc(x: Tensor, dim: int, data_format: DataFormat) -> Tensor:
    """Check a map in `data_format` and return it channels last."""
    layout = "[batch, height, width, dim]" if data_format == "NHWC" else "[batch, dim, height, width]"
    if x.ndim != 4:
        raise InputError(f"input has shape {list(x.shape)}; expected {layout}")
    if not x.is_floating_point():
        raise TypeError(f"input is {x.dtype}; expected a floating-point map")
    nhwc = x if data_format == "NHWC" else x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    if nhwc.shape[-1] != dim:
        raise InputError(f"input has {nhwc.shape[-1]} channels; expected {layout} with dim={dim}")
    if not nhwc.shape[1] or not nhwc.shape[2]:
        raise InputError(f"input has empty spatial size {nhwc.shape[1]}x{nhwc.shape[2]}")
    return nhwc


def pointwise(dim_in: int, dim_out: int, data_format: DataFormat, *, bias: bool = True) -> nn.Linear | nn.Conv2d:
    if data_format == "NHWC":
        return nn.Linear(dim_in, dim_out, bias=bias)
    return nn.Conv2d(dim_in, dim_out, 1, bias=bias)


def depthwise(dim: int, kernel: int) -> nn.Conv2d | None:
    if kernel <= 0:
        return None
    if kernel % 2 == 0:
        raise InputError(f"side_dwconv={kernel} is even; the local enhancement needs an odd kernel, or 0 for none")
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)


def convolve(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve [B, H, W, C] in channels-last memory, the fastest layout for depth-wise convolutions."""
    return convolution(x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)


def grid_of(feature: Tensor, region_size: tuple[int, int]) -> tuple[int, int]:
    return feature.shape[1] // region_size[0], feature.shape[2] // region_size[1]


def pad_to_multiple(feature: Tensor, region_size: tuple[int, int]) -> Tensor:
    return F.pad(feature, (0, 0, 0, -feature.shape[2] % region_size[1], 0, -feature.shape[1] % region_size[0]))
