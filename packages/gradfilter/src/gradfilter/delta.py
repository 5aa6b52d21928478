"""Changes by fine-tuning as a small file: one number for each pair of channels of a filtered convolution.

Filtered training moves a kernel to scale * kernel + offset with one offset for all taps, so a 3x3 layer's change takes
a ninth of its weights. Tensors that changed otherwise are kept as they are.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gradfilter.conv import CompactConv2d
from gradfilter.lean import FrozenBatchNorm2d
from visionkernels.weights import CheckpointError, read_checkpoint, save_weights

__all__ = ["apply_delta", "compute_delta", "read_delta", "save_delta", "trainable_delta"]

FORMAT = "gradfilter delta 1"
TOLERANCE = 1e-4
"""Largest share of a change's norm outside scale * kernel + offset; float32 training leaves about 1e-6."""
_SCALE, _OFFSET = ".scale", ".offset"

State = Mapping[str, Tensor]


def compute_delta(base: State, tuned: State) -> dict[str, Tensor]:
    """Return the changes from the state dict `base` to `tuned`.

    Unchanged tensors are left out. A kernel `x` of more than one tap that changed as filtered training changes it
    becomes `x.scale` [] and `x.offset` [out_channels, in_channels / groups]. Any other changed tensor is stored whole
    under its own name, also if its first axis changed, as for a classifier of other classes. Raises CheckpointError for
    other shapes and types, and for names that only one of the two has.
    """
    if set(base) != set(tuned):
        strange = sorted(set(base) ^ set(tuned))
        raise CheckpointError(f"base and tuned weights differ in {len(strange)} names; the first is {strange[0]}")
    delta: dict[str, Tensor] = {}
    for name, before in base.items():
        after = tuned[name]
        if not _differs_in_outputs_alone(before, after):
            raise CheckpointError(
                f"{name} is {list(before.shape)} in the base and {list(after.shape)} in the tuned weights"
            )
        if before.dtype != after.dtype:
            raise CheckpointError(f"{name} is {before.dtype} in the base and {after.dtype} in the tuned weights")
        if torch.equal(before, after):
            continue
        form = _fit(before, after)
        delta |= {name: after} if form is None else {name + _SCALE: form[0], name + _OFFSET: form[1]}
    return delta


def _differs_in_outputs_alone(before: Tensor, after: Tensor) -> bool:
    return before.ndim == after.ndim and before.shape[1:] == after.shape[1:]


def _fit(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return scale and offset by least squares, or None if the change does not fit that form."""
    if before.ndim != 4 or before.shape[2:].numel() == 1 or before.shape != after.shape:
        return None
    start, end = before.double(), after.double()
    centred = start - start.mean((2, 3), keepdim=True)
    spread = centred.square().sum()
    scale = (centred * end).sum() / spread if spread > 0 else torch.ones((), dtype=torch.float64)
    offset = (end - scale * start).mean((2, 3))
    rest = end - scale * start - offset[:, :, None, None]
    if rest.norm() > TOLERANCE * (end - start).norm():
        return None
    return scale.to(before.dtype), offset.to(before.dtype)


def trainable_delta(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained tensors of a converted model in the form of `compute_delta`; compact layers stay compact.

    It includes the buffers of norms whose running statistics change in training, whether the norm is trained or not.
    """
    delta: dict[str, Tensor] = {}
    compact = {name for name, module in model.named_modules() if isinstance(module, CompactConv2d)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, _, leaf = name.rpartition(".")
            is_part = layer in compact and leaf in ("scale", "offset")
            delta[f"{layer}.weight.{leaf}" if is_part else name] = parameter.detach().clone()
    for name, module in model.named_modules():
        if getattr(module, "track_running_stats", False) and not isinstance(module, FrozenBatchNorm2d):
            delta |= {f"{name}.{key}": value.detach().clone() for key, value in module.named_buffers(recurse=False)}
    return delta


def apply_delta(base: State, delta: State) -> dict[str, Tensor]:
    """Return `base` with the changes of `delta`.

    Raises CheckpointError if names or shapes do not fit, and for a scale or an offset without the other.
    """
    tuned = dict(base)
    for name, value in delta.items():
        kernel = name.removesuffix(_SCALE).removesuffix(_OFFSET)
        if name in base and _differs_in_outputs_alone(base[name], value):
            tuned[name] = value
        elif name in base or kernel not in base:
            raise CheckpointError(f"the delta's {name} {list(value.shape)} fits no tensor of the base")
        elif missing := [other for other in (kernel + _SCALE, kernel + _OFFSET) if other not in delta]:
            raise CheckpointError(f"the delta has {name} without {missing[0]}")
        else:
            tuned[kernel] = _move(kernel, base[kernel], delta[kernel + _SCALE], delta[kernel + _OFFSET])
    return tuned


def _move(name: str, start: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    if start.ndim != 4 or offset.shape != start.shape[:2]:
        raise CheckpointError(f"{name}{_OFFSET} is {list(offset.shape)}; the base's kernel is {list(start.shape)}")
    if scale.ndim:
        raise CheckpointError(f"{name}{_SCALE} is {list(scale.shape)}; it must be one number, []")
    return (scale.double() * start.double() + offset.double()[:, :, None, None]).to(start.dtype)


def save_delta(path: str | Path, base: State, delta: State, *, overwrite: bool = False) -> None:
    """Write a delta as safetensors, with a digest of the tensors of the base that it changes.

    An empty delta is stored as the base's smallest tensor, since a weights file must hold one.
    """
    if not delta:
        smallest = min(base, key=lambda name: base[name].numel())
        delta = {smallest: base[smallest]}
    metadata = {"format": FORMAT, "base": _digest(base, delta)}
    save_weights(path, delta, metadata=metadata, overwrite=overwrite)


def read_delta(path: str | Path, base: State) -> dict[str, Tensor]:
    """Return the delta of a file; raise CheckpointError for other files, and for a delta of another base."""
    checkpoint = read_checkpoint(path)
    if checkpoint.metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a file of `gradfilter delta save`")
    if checkpoint.metadata.get("base") != _digest(base, checkpoint.state):
        raise CheckpointError(f"{path} was made from other base weights than those given")
    return dict(checkpoint.state)


def _digest(base: State, delta: State) -> str:
    names = sorted({name.removesuffix(_SCALE).removesuffix(_OFFSET) for name in delta})
    digest = hashlib.sha256()
    for name in names:
        tensor = base.get(name)
        header = [name, None if tensor is None else [str(tensor.dtype), *tensor.shape]]
        digest.update(json.dumps(header).encode())
        if tensor is not None:
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
