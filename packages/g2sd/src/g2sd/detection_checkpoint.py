"""Weights into detectors: encoders of earlier stages, and detectors in detectron2's layout, which ours are saved in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from g2sd.layouts import Contents, contents_of
from g2sd.mask_rcnn import MaskRCNN, detection_model
from g2sd.official import refuse_other_layouts
from g2sd.positions import interpolate_positions
from g2sd.vitdet import ViTDetBackbone, resize_relative
from visionkernels.weights import Checkpoint, CheckpointError, KeyRules, load_strict, misfit, read_checkpoint

__all__ = ["check_detector", "detector_rules", "is_detector", "load_detection_encoder", "load_official_detection"]

_NET = "backbone.net."
_NEEDED = ("roi_heads.box_predictor.cls_score.weight", "roi_heads.box_head.fc1.weight", "backbone.simfp_2.4.weight")


def detector_rules() -> KeyRules:
    """Return the table of detectron2's names, in which the background is the last class, and those of `MaskRCNN`."""
    names = {
        "backbone.{rest*}": "backbone.{rest*}",
        "proposal_generator.rpn_head.conv.conv{i}.{p}": "rpn.head.conv.{i}.0.{p}",
        "proposal_generator.rpn_head.objectness_logits.{p}": "rpn.head.cls_logits.{p}",
        "proposal_generator.rpn_head.anchor_deltas.{p}": "rpn.head.bbox_pred.{p}",
        "roi_heads.box_head.fc1.{p}": "roi_heads.box_head.5.{p}",
        "roi_heads.box_predictor.cls_score.{p}": "roi_heads.box_predictor.cls_score.{p}",
        "roi_heads.box_predictor.bbox_pred.{p}": "roi_heads.box_predictor.bbox_pred.{p}",
        "roi_heads.mask_head.deconv.{p}": "roi_heads.mask_predictor.conv5_mask.{p}",
        "roi_heads.mask_head.predictor.{p}": "roi_heads.mask_predictor.mask_fcn_logits.{p}",
    }
    for head, layer in (("box_head", "conv"), ("mask_head", "mask_fcn")):
        for i in range(4):
            names[f"roi_heads.{head}.{layer}{i + 1}.weight"] = f"roi_heads.{head}.{i}.0.weight"
            names[f"roi_heads.{head}.{layer}{i + 1}.norm.{{p}}"] = f"roi_heads.{head}.{i}.1.{{p}}"
    return KeyRules(
        names,
        transforms={
            "roi_heads.box_predictor.cls_score.{p}": (lambda rows: rows.roll(1, 0), lambda rows: rows.roll(-1, 0)),
            # detectron2 has no box and no mask of the background
            "roi_heads.box_predictor.bbox_pred.{p}": (lambda rows: _before(rows, 4), lambda rows: rows[4:]),
            "roi_heads.mask_head.predictor.{p}": (lambda rows: _before(rows, 1), lambda rows: rows[1:]),
        },
        ignored={
            "stu_adapter.{rest*}": "the adapter of distillation",
            "pixel_{statistic}": "constants of detectron2",
            "proposal_generator.anchor_generator.{rest*}": "computed from sizes",
        },
    )


def _before(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows.new_zeros(count, *rows.shape[1:]), rows])


def load_official_detection(source: str | Path | Checkpoint, *, entry: str | None = None) -> MaskRCNN:
    """Return the detector of an official file, or of one of `g2sd.detection.train`, in evaluation mode.

    All sizes are read off the file. Raises CheckpointError for a damaged file, another kind, and keys or shapes that
    differ, with the first five.
    """
    checkpoint = read_checkpoint(source, entry=entry)
    path, state = checkpoint.path, checkpoint.state
    contents = contents_of(state, path)
    if contents.kind != "vitdet" or not is_detector(state):
        what = "a backbone without heads" if contents.kind == "vitdet" else f"{contents.kind!r}"
        raise CheckpointError(f"{path} holds {what}, not a detector; run `g2sd inspect {path}`")
    model, renamed = _built(state, contents, path)
    load_strict(model, renamed, source=path)
    return model.eval()


def is_detector(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has heads of a detector, whole or not, beside the backbone."""
    return any(key.startswith(("roi_heads.", "proposal_generator.rpn_head.")) for key in state)


def check_detector(state: Mapping[str, Tensor], contents: Contents, source: object) -> None:
    """Raise CheckpointError unless `state` has every tensor of a detector, and no other, without its weights."""
    with torch.device("meta"):
        model, renamed = _built(state, contents, source)
    if fault := misfit(model, renamed):
        raise CheckpointError(f"{source} seems to hold a detector, and is not whole or something else: {fault}")


def _built(state: Mapping[str, Tensor], contents: Contents, source: object) -> tuple[MaskRCNN, dict[str, Tensor]]:
    """Return a detector of the sizes of a file, and the file's state under the detector's names."""
    if missing := [key for key in _NEEDED if key not in state]:
        raise CheckpointError(f"{source} is no whole detector: {', '.join(missing)} missing")
    try:
        return detection_model(**_sizes(state, contents.patch_size[0])), detector_rules().rename(state)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        # sizes inferred from shapes may be invalid, or exceed memory
        raise CheckpointError(f"{source} is damaged or no Mask R-CNN of ViTDet: {error}") from error


def _sizes(state: Mapping[str, Tensor], patch_size: int) -> dict[str, Any]:
    """Return the arguments of `detection_model` that follow from shapes."""
    width, head_dim = len(state[f"{_NET}patch_embed.proj.weight"]), state[f"{_NET}blocks.0.attn.rel_pos_h"].shape[1]
    sides: list[int] = []
    while (table := state.get(f"{_NET}blocks.{len(sides)}.attn.rel_pos_h")) is not None:
        sides.append((len(table) + 1) // 2)
    grid, window = max(sides), min(sides)
    return {
        "num_classes": len(state["roi_heads.box_predictor.cls_score.weight"]),
        "img_size": grid * patch_size,
        "pyramid_channels": len(state["backbone.simfp_2.4.weight"]),
        "head_width": len(state["roi_heads.box_head.fc1.weight"]),
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": len(sides),
        "num_heads": width // head_dim,
        "window_size": window,
        # a window as large as the image is no window
        "window_blocks": tuple(i for i, side in enumerate(sides) if side < grid),
        "pretrain_size": round((state[f"{_NET}pos_embed"].shape[1] - 1) ** 0.5) * patch_size,
    }


def load_detection_encoder(
    backbone: ViTDetBackbone, source: str | Path | Checkpoint, *, entry: str | None = None
) -> str:
    """Copy the encoder of a file of any stage into a detector's backbone; return a sentence about the result.

    Positions are interpolated to the backbone's grid; relative ones are a detector's alone, and stay as they are for
    other files. What a file has beyond blocks and embeddings is left out; everything else must fit. Raises
    CheckpointError.
    """
    checkpoint = read_checkpoint(source, entry=entry)
    path, state = checkpoint.path, checkpoint.state
    contents = contents_of(state, path)
    refuse_other_layouts(contents, path, allowed="vitdet")
    if contents.kind == "vitdet":
        state = {key.removeprefix(_NET): value for key, value in state.items() if key.startswith(_NET)}
    own, taken = backbone.state_dict(), {}
    for key, value in state.items():
        if key.startswith(("patch_embed.", "blocks.")):
            is_table = key.endswith(("rel_pos_h", "rel_pos_w")) and key in own and value.ndim == 2
            taken[key] = resize_relative(value, len(own[key])) if is_table else value
        elif key == "pos_embed":
            taken[key] = interpolate_positions(value, (backbone.pretrain_grid,) * 2)
    fresh = [key for key in own if "rel_pos" in key and key not in taken]
    load_strict(backbone, taken, source=path, keep=fresh)
    relative = "relative positions, " if fresh else ""
    return f"encoder of {path} ({contents.kind}); fresh: {relative}pyramid, heads"
