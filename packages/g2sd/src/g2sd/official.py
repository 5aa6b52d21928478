"""Models from weights files of the MAE family: official ones of every stage, and those of `g2sd train`.

The models have the official names of parameters; loading is strict.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from g2sd.layouts import Contents, Kind, contents_of, decoder_heads, encoder_heads
from g2sd.mae import MaskedAutoencoder
from g2sd.positions import interpolate_positions
from g2sd.vit import DistilledViT
from visionkernels.checks import InputError
from visionkernels.tasks.classification import describe_inputs
from visionkernels.weights import Checkpoint, CheckpointError, load_strict, misfit, read_checkpoint

__all__ = [
    "check_vit",
    "create_model",
    "load_classifier",
    "load_encoder",
    "load_official",
    "load_teacher",
    "options_of",
    "refuse_other_layouts",
    "resized",
    "square_size",
]

FULL_TEACHER = "mae_pretrain_vit_base_full.pth"
_CLASSIFIERS = ("distilled", "average", "class")
_AUTOENCODERS = ("mae", "generic")


def load_official(
    source: str | Path | Checkpoint,
    *,
    kind: Kind | None = None,
    entry: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
) -> nn.Module:
    """Return the model of a .pth or .safetensors file in evaluation mode: an autoencoder or a classifier.

    The kind of model is inferred from keys and shapes. Detectors and segmentation models have their own loaders,
    encoders without a head `load_encoder`.

    Args:
        source: of MAE, of any stage of G2SD, or of `g2sd train`
        kind: what the file must hold
        entry: name of the weights within the file
        img_size: height and width in pixels, by default those of the file's positions, taken for a square; learned
            positions are interpolated to another size, fixed ones computed
        num_heads: attention heads of an encoder of unusual width, which official files do not say
        decoder_num_heads: the same of a decoder

    Raises CheckpointError for a damaged file, another kind, and keys or shapes that differ, with the first five.
    """
    checkpoint = read_checkpoint(source, entry=entry)
    path, state, options = checkpoint.path, checkpoint.state, options_of(checkpoint)
    contents = contents_of(state, path)
    if kind is not None and contents.kind != kind:
        raise CheckpointError(f"{path} holds {contents.kind!r}, not {kind!r}; run `g2sd inspect {path}`")
    if contents.kind not in (*_AUTOENCODERS, *_CLASSIFIERS):
        raise CheckpointError(f"{path} holds {contents.kind!r}; run `g2sd inspect {path}`")
    check_vit(state, contents, path, is_recorded=checkpoint.trained is not None)
    model = create_model(
        contents,
        img_size=img_size,
        num_heads=options.get("num_heads") if num_heads is None else num_heads,
        decoder_num_heads=options.get("decoder_num_heads") if decoder_num_heads is None else decoder_num_heads,
        source=path,
    )
    load_strict(model, resized(state, model), source=path)
    if isinstance(model, DistilledViT) and checkpoint.trained is not None:
        model.eval_head = checkpoint.trained.details.get("eval_head", model.eval_head)
    return model.eval()


def options_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the model options that a file of `g2sd train` stores; an empty mapping for other files."""
    return {} if checkpoint.trained is None else checkpoint.trained.options


def load_classifier(source: str | Path | Checkpoint) -> nn.Module:
    """Return a classifier in evaluation mode, whose `pretrained_cfg` says how images are prepared.

    A file of `g2sd train` says it itself; others take images as ImageNet's, bicubic, 256 pixels, of which 224. Raises
    CheckpointError for a file that is no classifier, and as `load_official`.
    """
    checkpoint = read_checkpoint(source)
    model: Any = load_official(checkpoint)
    if not hasattr(model, "head"):
        path = checkpoint.path
        raise CheckpointError(f"{path} has no classification head; run `g2sd inspect {path}`")
    size = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": size}
    describe_inputs(model, checkpoint.trained)
    return cast(nn.Module, model)


def load_teacher(source: str | Path | Checkpoint, **options: Any) -> MaskedAutoencoder:
    """Return the masked autoencoder of a file as a teacher of generic distillation.

    `options` as for `load_official`. Raises CheckpointError for a file without a whole decoder: training against a
    decoder of random weights ends, unnoticed, with a useless student.
    """
    checkpoint = read_checkpoint(source, entry=options.pop("entry", None))
    contents = contents_of(checkpoint.state, checkpoint.path)
    if contents.kind not in _AUTOENCODERS:
        what = "an encoder without its decoder" if contents.kind == "encoder" else f"{contents.kind!r}"
        raise CheckpointError(
            f"{checkpoint.path} holds {what}; generic distillation needs encoder and decoder, as in {FULL_TEACHER} "
            "(MAE's repository, issue 8: pre-trained on normalised pixels)"
        )
    model = load_official(checkpoint, **options)
    assert isinstance(model, MaskedAutoencoder)
    return model


def load_encoder(model: VisionTransformer, source: str | Path | Checkpoint, *, entry: str | None = None) -> str:
    """Copy the encoder of any file of the family into a classifier, and return a sentence about the result.

    Heads, tokens of heads and the norm that a classifier of patches has in its place stay as they are; everything else
    must be there. Positions are interpolated to the model's grid. Raises CheckpointError.
    """
    checkpoint = read_checkpoint(source, entry=entry)
    path, state = checkpoint.path, checkpoint.state
    contents = contents_of(state, path)
    heads: Any = model.blocks[0]
    num_heads = options_of(checkpoint).get("num_heads")
    if contents.width == model.embed_dim and num_heads not in (None, heads.attn.num_heads):
        raise CheckpointError(
            f"{path} is of num_heads={num_heads}, the model of {heads.attn.num_heads}; they must agree"
        )
    refuse_other_layouts(contents, path)
    check_vit(state, contents, path, is_recorded=checkpoint.trained is not None)
    own = ("head", "head_dist", "dist_token", "fc_norm")
    others = ("decoder", "mask_token", "encoderfeature_pred", *own)
    # a classifier of patches norms their mean instead of all tokens
    norm = () if isinstance(model.norm, nn.Identity) else ("norm",)
    source_norm = "norm" if "norm.weight" in state else "fc_norm"
    kept: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(f"{source_norm}."):
            kept |= {key.replace(source_norm, "norm", 1): value} if norm else {}
        elif not key.startswith(others):
            kept[key] = value
    present = [name for name in own if hasattr(model, name) and any(k.startswith(name) for k in model.state_dict())]
    load_strict(model, resized(kept, model), source=path, keep=present)
    return f"encoder of {path} ({contents.kind}); fresh: {', '.join(present) or 'nothing'}"


def check_vit(state: Mapping[str, Tensor], contents: Contents, source: object, *, is_recorded: bool) -> None:
    """Raise CheckpointError unless a file has every tensor of the model that it seems to hold, and no other.

    `contents` are of an autoencoder, a classifier, an encoder or a probe; `g2sd.whole` has the check of every kind.
    `is_recorded` tells a file of `g2sd train`, whose images need not be squares.
    """
    kind, count = contents.kind, contents.num_positions
    if kind == "probe":
        state = {key: value for key, value in state.items() if key not in _PROBE}
        contents = replace(contents, kind="encoder", num_classes=None)
    rows, columns = contents.patch_size
    with torch.device("meta"):
        # neither the grid nor the heads show in the shapes
        model = create_model(
            contents, img_size=(rows, columns * (count or 1)), num_heads=1, decoder_num_heads=1, source=source
        )
    if fault := misfit(model, state):
        raise CheckpointError(f"{source} seems to hold {kind!r}, and is not whole or something else: {fault}")
    if kind == "distilled" and not is_recorded and count is not None and not _is_grid(count) and _is_grid(count - 1):
        raise CheckpointError(
            f"{source} has a position for its distillation token, as in timm's and DeiT's files; here it has "
            "none: add it to dist_token, and take it out of pos_embed"
        )


_PROBE = {
    "head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked", "head.1.weight", "head.1.bias",
}  # fmt: skip


def _is_grid(count: int) -> bool:
    """Whether so many patches are of an image whose sides are at most as one to four."""
    return any(count % rows == 0 and count <= 4 * rows**2 for rows in range(1, math.isqrt(count) + 1))


def refuse_other_layouts(contents: Contents, path: str | Path, *, allowed: Kind | None = None) -> None:
    """Raise CheckpointError for a file whose encoder has other names or relative positions, unless it is `allowed`."""
    if contents.kind == "hf":
        raise CheckpointError(f"{path} holds 'hf'; convert it first: g2sd convert {path} --to timm --out OUT")
    if contents.kind in ("vitdet", "mmseg") and contents.kind != allowed:
        raise CheckpointError(f"{path} holds {contents.kind!r}, whose encoder starts no other kind of model")


def create_model(
    contents: Contents,
    *,
    img_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    decoder_num_heads: int | None = None,
    source: object = "the file",
) -> nn.Module:
    """Return a model with random weights of the sizes of a file: an autoencoder or a classifier."""
    sizes: dict[str, Any] = {
        "img_size": square_size(contents, source) if img_size is None else img_size,
        "patch_size": contents.patch_size,
        "in_chans": contents.in_chans,
        "embed_dim": contents.width,
        "depth": contents.depth,
        "num_heads": encoder_heads(contents.width, num_heads),
    }
    if contents.decoder_width is not None and contents.decoder_depth is not None:
        return MaskedAutoencoder(
            **sizes,
            decoder_embed_dim=contents.decoder_width,
            decoder_depth=contents.decoder_depth,
            decoder_num_heads=decoder_heads(contents.decoder_width, decoder_num_heads),
            teacher_width=contents.teacher_width,
            teacher_decoder_width=contents.teacher_decoder_width,
        )
    pooling = {} if contents.kind == "distilled" else {"global_pool": "avg" if contents.kind == "average" else "token"}
    model: nn.Module = timm.create_model(
        "g2sd_vit_tiny_patch16_224",
        distilled=contents.kind == "distilled",
        num_classes=contents.num_classes or 0,
        **(sizes | pooling),
    )
    return model


def square_size(contents: Contents, source: object) -> tuple[int, int]:
    """Return (height, width) of the images that a file is for, taken for squares. Raises ValueError."""
    side = round((contents.num_positions or 0) ** 0.5)
    if side**2 != contents.num_positions or side == 0:
        raise InputError(
            f"{source} has positions for {contents.num_positions} patches, which are no square; give img_size as "
            f"(height, width), multiples of {contents.patch_size[0]}x{contents.patch_size[1]} pixels"
        )
    return side * contents.patch_size[0], side * contents.patch_size[1]


def resized(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return a state dict with positions for the grid of `model`: fixed ones are the model's, others interpolated."""
    state = dict(state)
    own = model.state_dict()
    for key in ("pos_embed", "decoder_pos_embed"):
        table = state.get(key)
        if table is None or key not in own or table.shape == own[key].shape:
            continue
        if table.ndim != 3 or table.shape[2] != own[key].shape[2] or not table.numel():
            continue  # the strict load names it
        is_fixed = isinstance(model, MaskedAutoencoder)
        state[key] = own[key] if is_fixed else interpolate_positions(table, tuple(model.patch_embed.grid_size))
    return state
