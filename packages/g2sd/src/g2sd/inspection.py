"""Inspect a weights file: its contents, what is missing, and which command takes it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from g2sd.layouts import Contents, Kind, contents_of
from g2sd.official import FULL_TEACHER
from g2sd.whole import check_whole
from visionkernels.weights import read_checkpoint
from visionkernels.weights.reading import first_names

__all__ = ["Inspection", "inspect_file"]

_IS: dict[Kind, str] = {
    "mae": "masked autoencoder: encoder and decoder",
    "generic": "student of generic distillation: encoder, decoder and feature heads",
    "encoder": "encoder alone",
    "distilled": "classifier with a distillation token",
    "average": "classifier of the mean of the patches",
    "class": "classifier of the class token",
    "probe": "encoder with a linear probe",
    "vitdet": "ViTDet detector in detectron2's layout",
    "mmseg": "UperNet segmentation model in mmsegmentation's layout",
    "hf": "ViT in the layout of Hugging Face transformers",
}
_CLASSIFIER_USES = (
    "teacher of `g2sd distill specific --teacher FILE`, of as many classes as the data",
    "`g2sd eval --checkpoint FILE`, `g2sd export --checkpoint FILE`",
    "start of `g2sd finetune` and `g2sd distill specific --init FILE`, without its head",
)
_USES: dict[Kind, tuple[str, ...]] = {
    "mae": (
        "teacher of `g2sd distill generic --teacher FILE`",
        "start of `g2sd finetune` and `g2sd distill specific --init FILE`",
    ),
    "generic": ("start of `g2sd distill specific` and `g2sd finetune --init FILE`",),
    "encoder": ("start of `g2sd finetune` and `g2sd distill specific --init FILE`",),
    "distilled": _CLASSIFIER_USES,
    "average": _CLASSIFIER_USES,
    "class": _CLASSIFIER_USES,
    "probe": ("start of `g2sd finetune --init FILE`, without its probe",),
    "vitdet": (
        "teacher of `g2sd distill specific --teacher FILE` for detection, of as many pixels as the student",
        "`g2sd eval --checkpoint FILE`",
        "start of a detector's `g2sd finetune` and `g2sd distill specific --init FILE`",
    ),
    "mmseg": (
        "teacher of `g2sd distill specific --teacher FILE` for segmentation, of as many classes as the data",
        "`g2sd eval --checkpoint FILE`",
    ),
    "hf": ("`g2sd convert FILE --to mae --out OUT`, then inspect OUT",),
}
_LACKS: dict[Kind, str] = {
    "encoder": f"a decoder: generic distillation needs one, as in {FULL_TEACHER}",
    "generic": "a head: fine-tune it first",
    "mae": "a classification head",
}
_BACKBONE_USES = (
    "start of ViTDet in detectron2",
    "start of a detector's `g2sd finetune` and `g2sd distill specific --init FILE`",
)


@dataclass(frozen=True)
class Inspection:
    """A file of the family of MAE."""

    contents: Contents
    taken_from: str
    """Entry of the file that holds the weights; "" for the file itself."""
    num_tensors: int
    num_values: int
    bad_tensors: tuple[str, ...]
    """Tensors with NaN or infinite values."""
    other_entries: tuple[str, ...]
    """Further sets of weights in the file, which `entry` takes."""
    what: str
    lacks: str
    """Weights that users often expect in it; "" if none are missing."""
    uses: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the lines of the report."""
        contents = self.contents
        patch = _pixels(contents.patch_size)
        sizes = f"encoder {contents.width} channels, {contents.depth} blocks, patches of {patch} pixels"
        if contents.num_positions is not None:
            sizes += f", positions for {contents.num_positions} patches"
        report = [self.what, sizes]
        if contents.decoder_width is not None:
            report.append(f"decoder {contents.decoder_width} channels, {contents.decoder_depth} blocks")
        if contents.teacher_decoder_width is not None:
            report.append(f"feature head for a teacher's decoder of {contents.teacher_decoder_width} channels")
        if contents.num_classes is not None:
            report.append(f"{contents.num_classes} classes")
        where = f"entry {self.taken_from!r}" if self.taken_from else "the file itself"
        report.append(f"{self.num_tensors} tensors, {self.num_values / 1e6:.3f} M values, in {where}")
        report += [f"lacks {self.lacks}"] if self.lacks else []
        if bad := self.bad_tensors:
            report.append(f"{len(bad)} tensors have NaN or infinite values (first: {first_names(bad)})")
        if self.other_entries:
            report.append(f"other entries with weights: {first_names(self.other_entries)} (--entry NAME)")
        return report + [f"use: {use}" for use in self.uses]


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def inspect_file(path: str | Path, *, entry: str | None = None) -> Inspection:
    """Report the contents of a .pth or .safetensors file without running code in it.

    `entry` names the weights where a file has several. Raises FileNotFoundError, and CheckpointError for a damaged file
    and for one of another family.
    """
    checkpoint = read_checkpoint(path, entry=entry)
    contents = contents_of(checkpoint.state, path)
    check_whole(checkpoint.state, contents, path, is_recorded=checkpoint.trained is not None)
    is_backbone = contents.kind == "vitdet" and contents.num_classes is None
    return Inspection(
        contents,
        checkpoint.taken_from,
        len(checkpoint.state),
        sum(value.numel() for value in checkpoint.state.values()),
        tuple(key for key, value in checkpoint.state.items() if not bool(torch.isfinite(value).all())),
        tuple(name for name in checkpoint.entries if name != checkpoint.taken_from),
        _IS[contents.kind],
        "a detector's heads" if is_backbone else _LACKS.get(contents.kind, ""),
        _BACKBONE_USES if is_backbone else _USES[contents.kind],
    )
