"""Plain implementations of the official algorithms on the same weights, for the bench and the tests."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from g2sd.generic import GenericDistiller
from g2sd.mae import MaskedAutoencoder
from g2sd.masking import PatchMask, mask_patches

__all__ = [
    "plain_attention",
    "plain_biased_attention",
    "plain_channel_wise",
    "plain_decode",
    "plain_encode",
    "plain_generic_loss",
    "two_softmax_channel_wise",
]


def plain_generic_loss(distiller: GenericDistiller, images: Tensor, noise: Tensor) -> Tensor:
    """Return the loss on all tokens of the distiller's first student.

    Attention keeps its scores, clamps them and hands out queries, keys and values; tokens are brought into the order of
    the image before the decoders; and the student's encoder head, whose weight is 0, runs.
    """
    teacher: Any = distiller.teacher
    student: Any = distiller.students.members[0]
    mask = mask_patches(noise, distiller.mask_ratio)
    with torch.no_grad():
        before = plain_encode(teacher, images, mask)
        hidden = plain_decode(teacher, before, mask, distiller.teacher_layer)
        target = F.layer_norm(_wide(hidden), hidden.shape[-1:], eps=1e-6)
        encoder_target = F.layer_norm(_wide(before), before.shape[-1:], eps=1e-6)
    encoded = plain_encode(student, images, mask)
    prediction = student.decoderfeature_pred(plain_decode(student, encoded, mask, len(student.decoder_blocks)))
    loss = F.smooth_l1_loss(_wide(prediction), target, beta=distiller.beta)
    if student.encoderfeature_pred is None:
        return loss
    features = student.encoderfeature_pred(student.norm(encoded))
    return loss + 0 * F.smooth_l1_loss(_wide(features), encoder_target, beta=distiller.beta)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def plain_encode(model: MaskedAutoencoder, images: Tensor, mask: PatchMask) -> Tensor:
    x = model.patch_embed(images) + model.pos_embed[:, 1:]
    x = x.gather(1, mask.visible[:, :, None].expand(-1, -1, x.shape[2]))
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
    for block in model.blocks:
        x = _block(block, x)
    return x


def plain_decode(model: MaskedAutoencoder, encoded: Tensor, mask: PatchMask, num_blocks: int) -> Tensor:
    x = model.decoder_embed(model.norm(encoded))
    removed = model.mask_token.expand(len(x), mask.ids_shuffle.shape[1] - mask.num_visible, -1)
    ids = mask.ids_restore[:, :, None].expand(-1, -1, x.shape[2])
    patches = torch.cat([x[:, 1:], removed.to(x.dtype)], 1).gather(1, ids)
    x = torch.cat([x[:, :1], patches], 1) + model.decoder_pos_embed
    for block in model.decoder_blocks[:num_blocks]:
        x = _block(block, x)
    return x


def _block(block: Any, x: Tensor) -> Tensor:
    mixed, *_ = plain_attention(block.attn, block.norm1(x))
    x = x + mixed
    mlp = block.mlp
    return x + mlp.fc2(F.gelu(mlp.fc1(block.norm2(x))))


def plain_attention(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output of attention and its queries, keys and values, with heads concatenated."""
    batch, tokens, width = x.shape
    projected = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, -1)
    query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
    scores = (query @ key.transpose(-2, -1)) * attention.scale
    limits = torch.finfo(torch.float32)
    weights = _wide(scores).clamp(limits.min, limits.max).softmax(-1).to(value.dtype)
    mixed = (weights @ value).transpose(1, 2).reshape(batch, tokens, width)
    copies = [part.transpose(1, 2).reshape(batch, tokens, width) for part in (query, key, value)]
    return attention.proj(mixed), copies[0], copies[1], copies[2]


def plain_biased_attention(attention: Any, x: Tensor, index: Tensor) -> Tensor:
    """Return attention with relative position biases, gathered at each call."""
    batch, tokens, width = x.shape
    projected = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, -1)
    query, key, value = projected.permute(2, 0, 3, 1, 4).unbind(0)
    bias = attention.relative_position_bias_table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1).contiguous()
    weights = ((query * attention.scale) @ key.transpose(-2, -1) + bias).softmax(-1)
    return attention.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, width))


def plain_channel_wise(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return channel-wise distillation from maps of full size, with a student's softmax that nothing uses."""
    rows = student.shape[0] * student.shape[1]
    ours, theirs = (maps.reshape(rows, -1) / temperature for maps in (student, teacher))
    target = F.softmax(theirs, 1)
    F.softmax(ours, 1)
    return torch.sum(-target * F.log_softmax(ours, 1)) * temperature**2 / rows


def two_softmax_channel_wise(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return channel-wise distillation from one softmax and one log-softmax."""
    rows = student.shape[0] * student.shape[1]
    ours, theirs = (maps.reshape(rows, -1) / temperature for maps in (student, teacher))
    return -(F.softmax(theirs, 1) * F.log_softmax(ours, 1)).sum() * temperature**2 / rows
