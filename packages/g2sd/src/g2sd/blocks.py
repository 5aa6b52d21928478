"""Transformer blocks of timm with an MLP that keeps less for the backward pass, and attention from given projections.

The keys of the weights are timm's, which are MAE's.
"""

from functools import partial
from typing import Any, cast

import torch
from timm.layers import Attention, LayerNorm, Mlp
from timm.models import register_notrace_module
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from visionkernels.checks import check
from visionkernels.modules import is_plain

__all__ = ["LeanAttention", "LeanMlp", "attend", "create_block", "norm_layer"]

norm_layer: Any = partial(LayerNorm, eps=1e-6)


def create_block(width: int, num_heads: int, mlp_ratio: float = 4.0, **options: Any) -> Block:
    """Return a pre-norm block: x += attention(norm1(x)), x += MLP(norm2(x)), with exact GELU and biases."""
    return Block(
        width, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer, attn_layer=LeanAttention,
        mlp_layer=LeanMlp, **options,
    )  # fmt: skip


def attend(block: Any, x: Tensor, projections: Tensor) -> Tensor:
    """Go on with a block from its input and the projections [batch, tokens, 3 * width] of norm1(x)."""
    x = x + block.attn.mix(projections)
    output: Tensor = x + block.mlp(block.norm2(x))
    return output


@register_notrace_module
class LeanAttention(Attention):
    """Attention without dropout, norms and gate, in the way that is faster where it runs.

    Arguments are timm's. Raises ValueError for those that it does not support.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        unused = {
            "qk_norm": not isinstance(self.q_norm, nn.Identity), "scale_norm": not isinstance(self.norm, nn.Identity),
            "gated": getattr(self, "gate", None) is not None, "attn_drop": self.attn_drop.p > 0,
            "proj_drop": self.proj_drop.p > 0,
        }  # fmt: skip
        for name, is_given in unused.items():
            check(not is_given, name, options.get(name), "left out: this attention has no dropout, norms or gate")

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend among tokens [batch, tokens, width]; masks are refused."""
        check(attn_mask is None and not is_causal, "attn_mask", "given", "None: no token is hidden from another")
        return self.mix(self.qkv(x))

    def mix(self, projections: Tensor) -> Tensor:
        """Attend with [batch, tokens, 3 * width] of queries, keys and values."""
        batch, tokens, _ = projections.shape
        heads = projections.view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        # on a CPU the backward pass of the fused form takes two to four times as long in bfloat16
        if query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.requires_grad:
            mixed = ((query * self.scale) @ key.transpose(2, 3)).softmax(3) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, self.attn_dim))


@register_notrace_module
class LeanMlp(Mlp):
    """fc2(GELU(fc1(x))), where the backward pass recomputes GELU instead of storing its output.

    Of the two tensors of hidden width that autograd would keep one remains. Settings other than those of
    `create_block`, and an fc2 that is no plain Linear (an adapter, for one), keep both.
    """

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        is_lean = (
            type(self.act) is nn.GELU and self.act.approximate == "none" and self.drop1.p == self.drop2.p == 0
            and isinstance(self.norm, nn.Identity) and is_plain(self.fc2, nn.Linear) and self.fc2.bias is not None
        )  # fmt: skip
        if not is_lean or not hidden.requires_grad or torch.compiler.is_compiling():
            return self.drop2(self.fc2(self.norm(self.drop1(self.act(hidden)))))
        # hidden has the precision of autocast already
        weight, bias = (value.to(hidden.dtype) for value in (self.fc2.weight, cast(Tensor, self.fc2.bias)))
        with torch.autocast(hidden.device.type, enabled=False):
            return _GeluLinear.apply(hidden, weight, bias)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return F.linear(F.gelu(hidden), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        rows = grad_output.flatten(0, -2)
        grad_hidden = torch.ops.aten.gelu_backward(grad_output @ weight, hidden)
        grad_weight = rows.mT @ F.gelu(hidden).flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None
