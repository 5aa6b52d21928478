"""Conversion of official checkpoints to our keys, or to the other form of an STL model."""

from pathlib import Path
from typing import Literal

from biformer.official import convert_stl, open_official
from visionkernels.weights import CheckpointError, read_checkpoint, save_weights

__all__ = ["convert_checkpoint"]


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    to: Literal["ours", "stl", "stl_nchw"],
    allow_inexact: bool = False,
    overwrite: bool = False,
) -> str:
    """Write the official checkpoint `source` as safetensors and return a line that describes the file.

    "ours" writes this package's keys and opens like a file of `biformer train`; "stl" and "stl_nchw" keep official keys
    and change the form of an STL model, which is exact except for the last stage: see `convert_stl`. Raises
    CheckpointError for another source, and for one that already has this form.
    """
    checkpoint = read_checkpoint(source)
    if to == "ours":
        opened = open_official(checkpoint)
        assert opened is not None
        state, name = opened.model.state_dict(), opened.trained.model
        opened.trained.save(target, state, overwrite=overwrite)
        return f"{target}: {name}, {opened.trained.options['num_classes']} classes, {len(state)} tensors"
    is_nchw = any(key.endswith("attn.qkv_linear.weight") for key in checkpoint.state)
    if is_nchw == (to == "stl_nchw"):
        raise CheckpointError(f"{source} has no form other than biformer_{to} to convert from")
    state = convert_stl(checkpoint.state, allow_inexact=allow_inexact)
    save_weights(target, state, metadata={}, overwrite=overwrite)
    return f"{target}: biformer_{to}, {len(state)} tensors under official keys"
