"""The decoder's input by its definition: mask tokens behind the visible ones, then the order undone (MAE, sec. 3)."""

import torch
from torch import Tensor

__all__ = ["restore_tokens"]


def restore_tokens(visible: Tensor, mask_token: Tensor, positions: Tensor, ids_restore: Tensor) -> Tensor:
    """Return the tokens [B, 1 + L, D]; see the public function."""
    batch, patches = ids_restore.shape
    shuffled = torch.cat([visible, mask_token.expand(batch, 1 + patches - visible.shape[1], -1)], 1)
    image = torch.arange(batch, device=visible.device)[:, None]
    restored = torch.cat([shuffled[:, :1], shuffled[image, 1 + ids_restore.long()]], 1)
    return restored + positions
