"""Teachers other than masked autoencoders: any ViT of timm that gives tokens, such as DINOv2, CLIP, DeiT3 and EVA02."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from g2sd.masking import PatchMask
from visionkernels import models
from visionkernels.checks import InputError, check
from visionkernels.tasks.teachers import Teacher
from visionkernels.weights import load_strict, read_checkpoint

__all__ = ["TokenTeacher", "token_teacher"]


class TokenTeacher(nn.Module):
    """Gives the tokens of whole images after one block, in the order of a mask: [masks, 1 + patches, width].

    `model` is a ViT of timm with a class token. Unlike a masked autoencoder it sees the removed patches. Images of
    another size than the model takes are resized, so that teacher and student may have patches of other sizes, and are
    normalised anew where `mean` and `std`, by which they are, are not the model's.

    Args:
        model: the frozen model
        layer: block whose output is the target, from 1; by default the last one
        mean: of the channels of the images in 0..1; None: images are normalised as the model takes them
        std: the same

    Raises InputError for a model without patches, blocks or class token, and for a layer that it does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layer: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        embed: Any = getattr(model, "patch_embed", None)
        blocks: Any = getattr(model, "blocks", None)
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        has_class_token = getattr(model, "cls_token", None) is not None
        if embed is None or blocks is None or not hasattr(model, "forward_intermediates") or not has_class_token:
            raise InputError(f"{type(model).__name__} is no ViT of timm with patches, blocks and a class token")
        layer = len(blocks) if layer is None else layer
        check(1 <= layer <= len(blocks), "layer", layer, f"1 to {len(blocks)}, blocks of {type(model).__name__}")
        self.model, self.layer, self.num_prefix_tokens = model, layer, prefix
        self.input = Teacher(model, mean=mean, std=std)
        self.grid: tuple[int, int] = tuple(embed.grid_size)
        self.size: tuple[int, int] = tuple(embed.img_size)
        self.width = int(getattr(model, "embed_dim"))  # noqa: B009 - nn.Module has no such attribute

    def forward(
        self, images: Float[Tensor, "batch channels height width"], mask: PatchMask
    ) -> Float[Tensor, "masks tokens embed_dim"]:
        """Return class and patch tokens; further tokens of the model (registers) are left out."""
        images = self.input.prepare(images)
        if tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        model: Any = self.model
        tokens, prefix = model.forward_intermediates(
            images, indices=[self.layer - 1], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True,
            stop_early=True,
        )[0]  # fmt: skip
        copies = len(mask.ids_shuffle) // len(images)
        tokens, first = tokens.repeat(copies, 1, 1), prefix[:, :1].repeat(copies, 1, 1)
        patches = tokens.gather(1, mask.ids_shuffle[:, :, None].expand(-1, -1, tokens.shape[2]))
        return torch.cat([first, patches], 1)


def token_teacher(
    name: str,
    checkpoint: str | Path | None = None,
    *,
    grid: tuple[int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> TokenTeacher:
    """Return a ViT of timm as a teacher of students with `grid` (rows, columns) of patches.

    `name` is timm's, with or without "timm:"; its weights are those of the file `checkpoint`, in timm's or the original
    layout, or else the published ones. Raises InputError for a name that is no ViT, and CheckpointError.
    """
    plain = models.create(name, num_classes=0)
    embed: Any = getattr(plain, "patch_embed", None)
    if embed is None:
        raise InputError(f"teacher {name} is no ViT of timm, and no file")
    rows, columns = embed.patch_size
    options: dict[str, Any] = {"num_classes": 0, "img_size": (grid[0] * rows, grid[1] * columns)}
    if checkpoint is None:
        return TokenTeacher(models.create(name, pretrained=True, **options), mean=mean, std=std)
    model = models.create(name, **options)
    state: Any = read_checkpoint(checkpoint).state
    # timm's own way from the original layouts, which also resizes positions
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        state = convert(state, model)
    own = set(model.state_dict())
    state = {key: value for key, value in state.items() if key in own or not key.startswith(("head.", "fc_norm."))}
    load_strict(model, state, source=checkpoint)
    return TokenTeacher(model, mean=mean, std=std)
