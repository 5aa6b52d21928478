"""Whether a file is all of the model that its first keys suggest, and nothing else: for every kind of file.

A foreign file shares many keys with this family. To report or to convert it by these alone would be wrong in silence.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from g2sd.detection_checkpoint import check_detector, is_detector
from g2sd.huggingface import from_huggingface
from g2sd.layouts import Contents, contents_of
from g2sd.official import check_vit, create_model
from g2sd.segmentation_checkpoint import check_segmenter
from visionkernels.weights import CheckpointError, misfit

__all__ = ["check_whole"]

_NET = "backbone.net."


def check_whole(state: Mapping[str, Tensor], contents: Contents, source: object, *, is_recorded: bool) -> None:
    """Raise CheckpointError unless a file has every tensor of the model that it seems to hold, and no other.

    `is_recorded` tells a file of `g2sd train`, whose images need not be squares.
    """
    if contents.kind == "mmseg":
        check_segmenter(state, source)
    elif contents.kind == "hf":
        renamed = from_huggingface(state)
        check_vit(renamed, contents_of(renamed, source), source, is_recorded=is_recorded)
    elif contents.kind != "vitdet":
        check_vit(state, contents, source, is_recorded=is_recorded)
    elif is_detector(state):
        check_detector(state, contents, source)
    else:
        _check_backbone(state, contents, source)


def _check_backbone(state: Mapping[str, Tensor], contents: Contents, source: object) -> None:
    """Check the backbone of a detector, which is an encoder of MAE with more and with less."""
    rows, columns = contents.patch_size
    with torch.device("meta"):
        size = (rows, columns * (contents.num_positions or 1))
        net: Any = create_model(replace(contents, kind="encoder"), img_size=size, num_heads=1, source=source)
    net.cls_token, net.norm = None, nn.Identity()
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"net": net})})
    added = ("backbone.simfp_", *(f"{_NET}blocks.{block}.attn.rel_pos_" for block in range(contents.depth)))
    if fault := misfit(model, {key: value for key, value in state.items() if not key.startswith(added)}):
        raise CheckpointError(f"{source} holds no whole backbone of a detector, or something else: {fault}")
