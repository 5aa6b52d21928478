"""Weights into segmentation models: encoders of earlier stages, official files (mmsegmentation), files of `train`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from g2sd.layouts import Contents, contents_of, encoder_heads
from g2sd.official import options_of, refuse_other_layouts, resized
from g2sd.positions import interpolate_positions
from g2sd.segmentation_backbone import SegmentationBackbone, interpolate_biases, num_biases, relative_index
from g2sd.upernet import SegmentationModel, in_windows, segmentation_model
from visionkernels.checks import check_choice
from visionkernels.pictures.recipes import SceneRecipe
from visionkernels.weights import Checkpoint, CheckpointError, load_strict, misfit, read_checkpoint

__all__ = ["check_segmenter", "load_official_segmentation", "load_segmentation_encoder"]

Part: TypeAlias = Literal["student", "teacher"]
State: TypeAlias = Mapping[str, Tensor]

# activations of the last batch, which the official distiller stores among its weights
_JUNK = ("student_decode_head_conv_seg", "teacher_decode_head_conv_seg")
_TABLE, _INDEX = "relative_position_bias_table", "relative_position_index"
_FIRST_TABLE = f"backbone.blocks.0.attn.{_TABLE}"
_NEEDED = ("backbone.patch_embed.proj.weight", "backbone.pos_embed", "decode_head.conv_seg.weight")


def load_official_segmentation(
    source: str | Path | Checkpoint,
    *,
    part: Part = "student",
    entry: str | None = None,
    img_size: int | None = None,
    out_indices: Sequence[int] | None = None,
    num_heads: int | None = None,
) -> SegmentationModel:
    """Return the model of an official file, or of one of `g2sd.segmentation.train`, in evaluation mode.

    Of a distiller's file, which has student and teacher, `part` is taken. The model takes images of the file's size,
    unless `img_size` is another, to which positions and biases are interpolated. Official files do not store
    `out_indices` of depths other than 12 and 24, nor `num_heads` of unusual models without relative positions. Raises
    CheckpointError for a damaged file, another kind, and keys or shapes that differ, with the first five.
    """
    check_choice("part", part, Part)
    checkpoint = read_checkpoint(source, entry=entry)
    path, trained = checkpoint.path, checkpoint.trained
    state = _part(checkpoint.state, part, path)
    contents = contents_of(state, path)
    grid = _square(contents, path)
    sizes = _sizes(state, contents, num_heads)
    if out_indices is None:
        out_indices = options_of(checkpoint).get("out_indices")
    if out_indices is not None:
        sizes["out_indices"] = tuple(out_indices)
    scene = None if trained is None or trained.inputs is None else SceneRecipe.of_inputs(trained.inputs)
    size = grid[0] * contents.patch_size[0] if img_size is None else img_size
    if scene is not None and scene.crop != size:
        scene = in_windows(size, scene)
    model = segmentation_model(img_size=size, scene=scene, **sizes)
    load_strict(model, _in_grid(state, model.backbone.grid, grid, path), source=path)
    return model.eval()


def check_segmenter(state: State, source: object) -> None:
    """Raise CheckpointError unless `state` has every tensor of its one or two models, and no other."""
    parts: list[Part] = ["student"]
    if any(key.startswith("teacher.") for key in state):
        parts.append("teacher")
    for part in parts:
        own = _part(state, part, source)
        contents = contents_of(own, source)
        grid = _square(contents, source)
        # neither the number of heads nor the maps that the decoder takes change a shape
        sizes = {**_sizes(own, contents, 1), "out_indices": (0, 1, 2, 3)}
        with torch.device("meta"):
            model = segmentation_model(img_size=grid[0] * contents.patch_size[0], **sizes)
        if fault := misfit(model, _in_grid(own, grid, grid, source)):
            raise CheckpointError(
                f"{source} seems to hold a segmentation model, and is not whole or something else: {fault}"
            )


def load_segmentation_encoder(
    backbone: SegmentationBackbone, source: str | Path | Checkpoint, *, entry: str | None = None
) -> str:
    """Copy the encoder of a file of MAE, generic distillation or a classifier; return a sentence about the result.

    Positions are interpolated to the backbone's grid. Up-sampling, layer scale and biases of attention stay as they
    are; weights other than blocks and embeddings are left out; all others must fit. Raises CheckpointError.
    """
    checkpoint = read_checkpoint(source, entry=entry)
    path, state = checkpoint.path, checkpoint.state
    contents = contents_of(state, path)
    refuse_other_layouts(contents, path)
    taken = {
        key: value
        for key, value in state.items()
        if key.startswith(("cls_token", "pos_embed", "patch_embed.", "blocks."))
    }
    own = ("gamma_1", "gamma_2", _TABLE)
    fresh = [name for name, _ in backbone.named_parameters() if name.endswith(own)]
    load_strict(backbone, resized(taken, backbone), source=path, keep=[*fresh, "fpn1", "fpn2"])
    return f"encoder of {path} ({contents.kind}); fresh: biases of attention, layer scale, up-sampling, heads"


def _part(state: State, part: Part, path: object) -> dict[str, Tensor]:
    """Return the state of one model: of a file of one it is the student."""
    if any(key.startswith("student.") for key in state):
        others = [key for key in state if not key.startswith(("student.", "teacher.")) and key not in _JUNK]
        if others:
            raise CheckpointError(f"{path} has {len(others)} keys of neither student nor teacher: {others[:5]}")
        state = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
    elif part == "teacher":
        raise CheckpointError(f"{path} holds one model and no teacher; take part='student'")
    missing = [key for key in _NEEDED if key not in state]
    if missing:
        kind = f"; it holds {contents_of(state, path).kind!r}" if len(missing) == len(_NEEDED) and state else ""
        raise CheckpointError(f"{path} holds no segmentation model of G2SD: {', '.join(missing)} missing{kind}")
    return dict(state)


def _square(contents: Contents, path: object) -> tuple[int, int]:
    side = round((contents.num_positions or 0) ** 0.5)
    if side**2 != contents.num_positions:
        raise CheckpointError(f"{path} has positions for {contents.num_positions} patches, which are no square")
    return side, side


def _sizes(state: State, contents: Contents, num_heads: int | None) -> dict[str, Any]:
    """Return the arguments of `segmentation_model` that follow from shapes."""
    auxiliary = state.get("auxiliary_head.conv_seg.weight")
    has_bias = _FIRST_TABLE in state
    return {
        "num_classes": contents.num_classes,
        "decoder_channels": state["decode_head.conv_seg.weight"].shape[1],
        "auxiliary_channels": None if auxiliary is None else auxiliary.shape[1],
        "patch_size": contents.patch_size,
        "in_chans": contents.in_chans,
        "embed_dim": contents.width,
        "depth": contents.depth,
        "num_heads": state[_FIRST_TABLE].shape[1] if has_bias else encoder_heads(contents.width, num_heads),
        "has_relative_bias": has_bias,
        "init_values": 1.0 if "backbone.blocks.0.gamma_1" in state else None,
    }


def _in_grid(state: State, grid: tuple[int, int], source: tuple[int, int], path: object) -> dict[str, Tensor]:
    """Return `state` with tables for `grid`, and without indices, which must be those that the model computes."""
    index = relative_index(source)
    fitting: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith(_INDEX):
            if value.shape != index.shape or not bool((value == index).all()):
                raise CheckpointError(f"{path}: {key} is not the index of a grid of {source[0]}x{source[1]} patches")
        elif key.endswith(_TABLE):
            # another table does not fit the model either, which load_strict says
            fits = len(value) == num_biases(source)
            fitting[key] = interpolate_biases(value, grid, source=source) if fits else value
        elif key == "backbone.pos_embed":
            fitting[key] = interpolate_positions(value, grid, source=source)
        else:
            fitting[key] = value
    return fitting
