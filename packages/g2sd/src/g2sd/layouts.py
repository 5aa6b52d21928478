"""The contents of a weights file of the MAE family, inferred from names and shapes of its tensors (spec of the files:
G2SD's and MAE's repositories)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from visionkernels.checks import InputError
from visionkernels.weights import CheckpointError

__all__ = ["Contents", "Kind", "contents_of", "decoder_heads", "encoder_heads"]

Kind: TypeAlias = Literal[
    "mae", "generic", "encoder", "distilled", "average", "class", "probe", "vitdet", "mmseg", "hf"
]
"""mae: masked autoencoder; generic: student of generic distillation; encoder: no head and no decoder; distilled: class
and distillation heads; average: classifies the mean of the patches; class: classifies the class token; probe: linear
probe; vitdet: detector; mmseg: segmentation model; hf: ViT of Hugging Face transformers."""

_ENCODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_DECODER_HEADS = {64: 4, 128: 4, 192: 8, 256: 8, 512: 16}


@dataclass(frozen=True)
class Contents:
    """A kind and its sizes; sizes that do not apply are None."""

    kind: Kind
    width: int
    depth: int
    patch_size: tuple[int, int]
    in_chans: int
    num_positions: int | None
    """Patches that the positional table is for."""
    decoder_width: int | None = None
    decoder_depth: int | None = None
    teacher_width: int | None = None
    teacher_decoder_width: int | None = None
    num_classes: int | None = None


def contents_of(state: Mapping[str, Tensor], source: object) -> Contents:
    """Return the contents of a state dict. Raises CheckpointError, which names `source`, for any other kind of file."""
    read = _Reader(state, source)
    if "backbone.net.patch_embed.proj.weight" in state:
        rows = read.rows("roi_heads.box_predictor.cls_score.weight")
        return read.encoder("vitdet", "backbone.net.", num_classes=None if rows is None else rows - 1)
    for prefix in ("student.", ""):
        parts = (f"{prefix}decode_head.conv_seg.weight", f"{prefix}backbone.patch_embed.proj.weight")
        if all(part in state for part in parts):
            classes = read.shape(f"{prefix}decode_head.conv_seg.weight", 4)[0]
            return read.encoder("mmseg", f"{prefix}backbone.", num_classes=classes)
    for prefix in ("vit.", "deit.", ""):
        if f"{prefix}embeddings.patch_embeddings.projection.weight" in state:
            return read.huggingface(prefix)
    if "patch_embed.proj.weight" not in state or not any(key.startswith("blocks.0.") for key in state):
        first = ", ".join(list(state)[:3])
        raise CheckpointError(f"{source} holds no vision transformer of MAE's family (its first keys are {first})")
    if "decoder_embed.weight" in state:
        return read.encoder(
            "generic" if "decoderfeature_pred.fc2.weight" in state else "mae",
            decoder_width=read.rows("decoder_embed.weight"), decoder_depth=_count(state, "decoder_blocks."),
            teacher_width=read.rows("encoderfeature_pred.fc2.weight"),
            teacher_decoder_width=read.rows("decoderfeature_pred.fc2.weight"),
        )  # fmt: skip
    kinds: dict[str, Kind] = {"dist_token": "distilled", "fc_norm.weight": "average", "head.1.weight": "probe"}
    kind = next((kind for key, kind in kinds.items() if key in state), "class" if "head.weight" in state else "encoder")
    return read.encoder(kind, num_classes=read.rows("head.1.weight" if kind == "probe" else "head.weight"))


@dataclass(frozen=True)
class _Reader:
    """Sizes from the shapes of a state dict, which may be anything."""

    state: Mapping[str, Tensor]
    source: object

    def shape(self, key: str, axes: int) -> tuple[int, ...]:
        value = self.state.get(key)
        if value is None or value.ndim != axes or not value.numel():
            fault = "is missing" if value is None else f"has shape {list(value.shape)}"
            raise CheckpointError(f"{self.source} is damaged: {key} {fault}; it must have {axes} axes, none of them 0")
        return tuple(value.shape)

    def rows(self, key: str) -> int | None:
        return self.shape(key, 2)[0] if key in self.state else None

    def encoder(self, kind: Kind, prefix: str = "", **others: int | None) -> Contents:
        width, channels, rows, columns = self.shape(f"{prefix}patch_embed.proj.weight", 4)
        positions = f"{prefix}pos_embed"
        count = self.shape(positions, 3)[1] - 1 if positions in self.state else None
        depth = _count(self.state, f"{prefix}blocks.")
        return Contents(kind, width, depth, (rows, columns), channels, count, **others)

    def huggingface(self, prefix: str) -> Contents:
        width, channels, rows, columns = self.shape(f"{prefix}embeddings.patch_embeddings.projection.weight", 4)
        count = self.shape(f"{prefix}embeddings.position_embeddings", 3)[1] - 1
        depth = _count(self.state, f"{prefix}encoder.layer.")
        classes = self.rows("classifier.weight")
        return Contents("hf", width, depth, (rows, columns), channels, count, num_classes=classes)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    numbers = {key.removeprefix(prefix).partition(".")[0] for key in state if key.startswith(prefix)}
    return len(numbers)


def encoder_heads(width: int, given: int | None = None) -> int:
    """Return the attention heads of an encoder, which files do not store. Raises ValueError for unusual widths."""
    return _heads(width, given, _ENCODER_HEADS, "num_heads")


def decoder_heads(width: int, given: int | None = None) -> int:
    """Return the attention heads of a decoder, as `encoder_heads` does."""
    return _heads(width, given, _DECODER_HEADS, "decoder_num_heads")


def _heads(width: int, given: int | None, known: Mapping[int, int], argument: str) -> int:
    if given is None and width not in known:
        widths: Sequence[int] = list(known)
        raise InputError(
            f"a file of width {width} has no known number of heads (known widths: {widths}); give {argument}"
        )
    return known[width] if given is None else given
