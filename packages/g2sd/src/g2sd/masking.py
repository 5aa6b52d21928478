"""Which patches of an image stay visible: random noise, sorted (MAE, sec. 3)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from visionkernels.checks import InputError, check

__all__ = ["PatchMask", "count_visible", "draw_noise", "mask_patches"]


@dataclass(frozen=True)
class PatchMask:
    """A permutation of the patches of each image, the visible ones first."""

    ids_shuffle: Int[Tensor, "batch patches"]
    """Patch numbers, row by row in the image, in the order of the permutation."""
    num_visible: int

    @property
    def ids_restore(self) -> Int[Tensor, "batch patches"]:
        """Place of each patch in the permutation."""
        return self.ids_shuffle.argsort(1)

    @property
    def visible(self) -> Int[Tensor, "batch visible"]:
        """Numbers of the visible patches."""
        return self.ids_shuffle[:, : self.num_visible]

    @property
    def removed(self) -> Float[Tensor, "batch patches"]:
        """Return 1 for patches that are removed and 0 for visible ones, in the order of the image."""
        return (self.ids_restore >= self.num_visible).float()

    def unshuffle(self, tokens: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
        """Bring tokens [class, visible, removed] into the order of the image, the class token staying first."""
        ids = self.ids_restore[:, :, None].expand(-1, -1, tokens.shape[2])
        return torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, ids)], 1)


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """Return int(num_patches * (1 - mask_ratio)). Raises ValueError for a ratio outside [0, 1) or none visible."""
    check(0 <= mask_ratio < 1, "mask_ratio", mask_ratio, "in [0, 1)")
    visible = int(num_patches * (1 - mask_ratio))
    if visible < 1:
        raise InputError(f"mask_ratio={mask_ratio} leaves none of {num_patches} patches visible; use a smaller one")
    return visible


def draw_noise(
    batch: int, num_patches: int, *, generator: torch.Generator | None = None, device: torch.device | None = None
) -> Float[Tensor, "batch patches"]:
    """Return uniform noise in [0, 1), drawn on the CPU, so that it does not depend on the device."""
    return torch.rand(batch, num_patches, generator=generator).to(device)


def mask_patches(noise: Float[Tensor, "batch patches"], mask_ratio: float) -> PatchMask:
    """Keep the patches of least noise visible; of equal noise, the first ones.

    Raises ValueError as `count_visible`, and for noise that is not finite.
    """
    if noise.ndim != 2 or not noise.is_floating_point():
        raise InputError(f"noise is {noise.dtype} {list(noise.shape)}; it must be floating [batch, patches]")
    if not noise.isfinite().all():
        raise InputError("noise is not finite; it must be numbers to sort the patches by")
    return PatchMask(noise.argsort(dim=1, stable=True), count_visible(noise.shape[1], mask_ratio))
