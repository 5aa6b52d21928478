"""Alternatives to routed attention in a block: attention among all tokens (the last stage), and convolutions."""

from jaxtyping import Float
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from biformer.maps import DataFormat, checked_nhwc, convolve, depthwise, pointwise
from visionkernels.checks import InputError, check_choice

__all__ = ["ConvolutionalMixer", "FullAttention"]


@register_notrace_module
class FullAttention(nn.Module):
    """Attention among all tokens of the map, always with 8 heads: the last stage of every released model.

    Takes and returns the map in `data_format`. `side_dwconv` is the odd kernel of the local enhancement, 0 for none.
    It acts on the layer's input in the NHWC form and on the values in the NCHW form, as the released weights need it.
    """

    def __init__(self, dim: int, *, side_dwconv: int = 5, data_format: DataFormat = "NHWC") -> None:
        super().__init__()
        check_choice("data_format", data_format, DataFormat)
        self.num_heads = 8
        if dim % self.num_heads:
            raise InputError(f"dim={dim} is not divisible by the {self.num_heads} heads of full attention")
        self.dim, self.data_format = dim, data_format
        self.qkv = pointwise(dim, 3 * dim, data_format, bias=False)
        self.lepe = depthwise(dim, side_dwconv)
        self.proj = pointwise(dim, dim, data_format)

    def forward(self, x: Float[Tensor, "batch a b c"]) -> Float[Tensor, "batch a b c"]:
        """Attend within [B, H, W, dim], or [B, dim, H, W] for "NCHW"."""
        x = checked_nhwc(x, self.dim, self.data_format)
        is_nchw = self.data_format == "NCHW"
        qkv = self.qkv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if is_nchw else self.qkv(x)
        query, key, value = (
            part.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        if self.lepe is not None:
            attended = attended + convolve(self.lepe, qkv[..., 2 * self.dim :] if is_nchw else x)
        return self.proj(attended.permute(0, 3, 1, 2) if is_nchw else attended)


@register_notrace_module
class ConvolutionalMixer(nn.Module):
    """What a block holds at `topk=0`: 1x1, 5x5 depth-wise and 1x1 convolutions of [B, H, W, dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.conv_in = nn.Conv2d(dim, dim, 1)
        self.depthwise = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Float[Tensor, "batch height width dim"]) -> Float[Tensor, "batch height width dim"]:
        """Mix [B, H, W, dim]."""
        x = checked_nhwc(x, self.dim, "NHWC").permute(0, 3, 1, 2)
        return self.conv_out(self.depthwise(self.conv_in(x))).permute(0, 2, 3, 1)
