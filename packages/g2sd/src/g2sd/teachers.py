"""Teachers other than masked autoencoders: any model of timm that gives tokens, such as CLIP's or DINOv2's ViTs."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from g2sd.masking import PatchMask
from visionkernels.recipes import check

__all__ = ["TokenTeacher"]


class TokenTeacher(nn.Module):
    """Gives the tokens of whole images after one block, in the order of a mask: [masks, 1 + patches, width].

    `model` is a ViT of timm with a class token; `layer` counts its blocks from 1, by default the last one. Unlike a
    masked autoencoder it sees the removed patches. Raises ValueError for a model without tokens or class token, and
    for a layer that it does not have.
    """

    def __init__(self, model: nn.Module, *, layer: int | None = None) -> None:
        super().__init__()
        embed: Any = getattr(model, "patch_embed", None)
        blocks: Any = getattr(model, "blocks", None)
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        has_class_token = getattr(model, "cls_token", None) is not None
        if embed is None or blocks is None or not hasattr(model, "forward_intermediates") or not has_class_token:
            raise ValueError(f"{type(model).__name__} is no ViT of timm with patches, blocks and a class token")
        layer = len(blocks) if layer is None else layer
        check(1 <= layer <= len(blocks), "layer", layer, f"1 to {len(blocks)}, blocks of {type(model).__name__}")
        self.model, self.layer, self.num_prefix_tokens = model, layer, prefix
        self.grid: tuple[int, int] = tuple(embed.grid_size)
        self.width = int(getattr(model, "embed_dim"))  # noqa: B009 - nn.Module has no such attribute

    def forward(
        self, images: Float[Tensor, "batch channels height width"], mask: PatchMask
    ) -> Float[Tensor, "masks tokens embed_dim"]:
        """Return class and patch tokens; further tokens of the model (registers) are left out.

        Raises ValueError for images of another size than the model takes.
        """
        model: Any = self.model
        embed = model.patch_embed
        if getattr(embed, "strict_img_size", False) and tuple(images.shape[2:]) != tuple(embed.img_size):
            height, width = embed.img_size
            raise ValueError(
                f"images have shape {list(images.shape)}; the teacher takes {height}x{width} pixels: create it with "
                "their img_size"
            )
        found, prefix = model.forward_intermediates(
            images, indices=[self.layer - 1], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True,
            stop_early=True,
        )[0]  # fmt: skip
        copies = len(mask.ids_shuffle) // len(images)
        found, first = found.repeat(copies, 1, 1), prefix[:, :1].repeat(copies, 1, 1)
        patches = found.gather(1, mask.ids_shuffle[:, :, None].expand(-1, -1, found.shape[2]))
        return torch.cat([first, patches], 1)
