"""Weights into the layouts of other projects, and back where nothing is lost."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from g2sd.huggingface import from_huggingface, write_huggingface
from g2sd.layouts import Kind, contents_of
from g2sd.whole import check_whole
from visionkernels.checks import InputError, check_choice
from visionkernels.files import replace_file
from visionkernels.weights import Checkpoint, CheckpointError, Trained, read_checkpoint, save_weights

__all__ = ["Target", "convert_file"]

Target: TypeAlias = Literal["mae", "timm", "hf", "vitdet", "mmseg"]

_DECODER = ("decoder", "mask_token", "encoderfeature_pred")
_HEADS = ("head", "head_dist", "dist_token", "fc_norm")


def convert_file(source: str | Path, out: str | Path, *, to: Target, overwrite: bool = False) -> str:
    """Write the weights of `source` in another project's layout, and return a sentence on what was done.

    "mae": {"model": ...} of MAE's and G2SD's scripts; "timm": for `timm.create_model`; "hf": a folder for
    `from_pretrained` of Hugging Face transformers; "vitdet" and "mmseg": the backbone's part for detectron2 and
    mmsegmentation, which start the rest afresh, and a whole detector or segmentation model as it is. `source` is any
    file of the family, or a file of transformers. `out` ends in .pth or .safetensors, and is a folder for "hf". Raises
    CheckpointError for weights that the other layout cannot hold, ValueError for another suffix, FileExistsError unless
    `overwrite`.
    """
    check_choice("to", to, Target)
    out = Path(out)
    if to != "hf" and out.suffix not in (".pth", ".safetensors"):
        raise InputError(f"out={out} must end in .pth or .safetensors")
    checkpoint = read_checkpoint(source)
    contents = contents_of(checkpoint.state, source)
    check_whole(checkpoint.state, contents, source, is_recorded=checkpoint.trained is not None)
    is_distiller = any(key.startswith("student.") for key in checkpoint.state)
    if contents.kind == to and contents.kind in ("vitdet", "mmseg") and not is_distiller:
        _write(out, checkpoint.state, checkpoint.trained, overwrite=overwrite)
        return f"{out}: {len(checkpoint.state)} tensors, as they were"
    if contents.kind in ("vitdet", "mmseg", "probe"):
        raise CheckpointError(
            f"{source} holds {contents.kind!r}, whose relative positions or statistics have no place in {to!r}"
        )
    state = from_huggingface(checkpoint.state) if contents.kind == "hf" else dict(checkpoint.state)
    kind = contents_of(state, source).kind
    if to == "hf":
        return write_huggingface(out, state, source, checkpoint.trained, overwrite=overwrite)
    converted, left_out = _CONVERTERS[to](state, kind, source)
    _write(out, converted, _record_of(checkpoint, converted, to), overwrite=overwrite)
    without = f", without {', '.join(left_out)}" if left_out else ""
    return f"{out}: {len(converted)} tensors in the layout of {to}{without}"


def _as_mae(state: dict[str, Tensor], kind: Kind, source: object) -> tuple[dict[str, Tensor], list[str]]:
    return state, []


def _as_timm(state: dict[str, Tensor], kind: Kind, source: object) -> tuple[dict[str, Tensor], list[str]]:
    kept, left_out = _without(state, _DECODER)
    if kind == "distilled":
        # timm's distillation token is second and has a position: that of ours is 0
        table = kept["pos_embed"]
        kept["pos_embed"] = torch.cat([table[:, :1], torch.zeros_like(table[:, :1]), table[:, 1:]], 1)
    return kept, left_out


def _as_vitdet(state: dict[str, Tensor], kind: Kind, source: object) -> tuple[dict[str, Tensor], list[str]]:
    kept, left_out = _without(state, (*_DECODER, *_HEADS, "cls_token", "norm"))
    return {f"backbone.net.{key}": value for key, value in kept.items()}, left_out


def _as_mmseg(state: dict[str, Tensor], kind: Kind, source: object) -> tuple[dict[str, Tensor], list[str]]:
    kept, left_out = _without(state, (*_DECODER, *_HEADS, "norm"))
    return {f"backbone.{key}": value for key, value in kept.items()}, left_out


_CONVERTERS = {"mae": _as_mae, "timm": _as_timm, "vitdet": _as_vitdet, "mmseg": _as_mmseg}


def _without(state: Mapping[str, Tensor], parts: Iterable[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the keys of other parts, and which parts were there."""

    def is_of(key: str, part: str) -> bool:
        return key.startswith(part) if part == "decoder" else f"{key}.".startswith(f"{part}.")

    left_out = [part for part in parts if any(is_of(key, part) for key in state)]
    return {key: value for key, value in state.items() if not any(is_of(key, part) for part in left_out)}, left_out


def _write(out: Path, state: Mapping[str, Tensor], trained: Trained | None, *, overwrite: bool) -> None:
    metadata = {} if trained is None else trained.metadata()
    if out.suffix == ".safetensors":
        save_weights(out, state, metadata=metadata, overwrite=overwrite)
        return
    with replace_file(out, overwrite=overwrite) as temporary:
        weights = {key: value.contiguous() for key, value in state.items()}
        torch.save({**metadata, "model": weights}, temporary)


def _record_of(checkpoint: Checkpoint, state: Mapping[str, Tensor], to: Target) -> Trained | None:
    """Return the metadata that weights keep in another layout: numbers of heads, which shapes do not show."""
    trained = checkpoint.trained
    if trained is None or set(state) == set(checkpoint.state):
        return trained
    heads = {name: value for name, value in trained.options.items() if name in ("num_heads", "decoder_num_heads")}
    return Trained(kind="encoder", package="g2sd", options=heads, details={"layout": to})
