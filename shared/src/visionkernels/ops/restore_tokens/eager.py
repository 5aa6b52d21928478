"""The decoder's input in plain ATen: one gather out of a table of all visible tokens and the mask token."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["restore_tokens"]


def restore_tokens(visible: Tensor, mask_token: Tensor, positions: Tensor, ids_restore: Tensor) -> Tensor:
    """Return the tokens [B, 1 + L, D]; see the public function."""
    out_dtype = torch.promote_types(torch.promote_types(visible.dtype, mask_token.dtype), positions.dtype)
    # gradients of all masked patches add up in one row
    dtype = torch.promote_types(out_dtype, torch.float32)
    batch, kept, _ = visible.shape
    table = torch.cat([visible.flatten(0, 1).to(dtype), mask_token.to(dtype)[None]])  # [B * (1 + K) + 1, D]
    row = F.pad(ids_restore.long() + 1, (1, 0))  # [B, 1 + L], of the image's own tokens
    first = torch.arange(batch, device=row.device)[:, None] * kept
    tokens = F.embedding(torch.where(row < kept, first + row, batch * kept), table)
    return (tokens + positions.to(dtype)).to(out_dtype)
