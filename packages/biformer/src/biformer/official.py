"""Official BiFormer weights, conversion between the two STL forms, and weights files of earlier releases."""

import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from biformer.attention import BiLevelRoutingAttention
from biformer.full_attention import ConvolutionalMixer
from biformer.model import BiFormer, BiFormerBackbone, BiFormerSTL
from visionkernels.checks import InputError
from visionkernels.tasks.classification import as_classifier
from visionkernels.weights import (
    Checkpoint,
    CheckpointError,
    KeyRules,
    Trained,
    TrainedModel,
    load_strict,
    open_trained,
    read_checkpoint,
)

__all__ = [
    "MODEL_NAMES",
    "convert_stl",
    "load_model",
    "load_official",
    "official_block_rules",
    "official_rules",
    "open_official",
    "upgrade",
]

MODEL_NAMES = ("biformer_tiny", "biformer_small", "biformer_base", "biformer_stl", "biformer_stl_nchw")


def load_official(
    source: str | Path | Checkpoint, name: str | None = None, *, weights: str = "auto", **options: Any
) -> BiFormer:
    """Return the model of an official checkpoint, in evaluation mode.

    `name` ("biformer_small") is by default recognised by the keys, as the number of classes always is; `options` go to
    `timm.create_model`. `weights` chooses "model" or "ema" if a file has both. Raises CheckpointError for a file that
    is damaged or fits no model, with the first five keys that differ and the model that it would fit.
    """
    checkpoint = read_checkpoint(source, weights=weights)  # type: ignore[arg-type]
    head = checkpoint.state.get("head.weight")
    if head is not None and (head.ndim != 2 or not head.numel()):
        raise CheckpointError(f"{checkpoint.path} is damaged: head.weight has shape {list(head.shape)}")
    classes = 0 if head is None else len(head)
    name = _name_of(checkpoint, classes) if name is None else name
    model = _create(name, **({"num_classes": classes} | options))
    _load_official_state(model, checkpoint.state, checkpoint.path)
    return model.eval()


def open_official(checkpoint: Checkpoint, name: str | None = None) -> TrainedModel | None:
    """Return the classifier of an official checkpoint with its record; None for other models than BiFormers by `name`.

    Raises CheckpointError as `load_official`.
    """
    if name is not None and (name not in MODEL_NAMES or "head.fc.weight" in checkpoint.state):
        return None
    model = load_official(checkpoint, name)
    name = cast(str, cast(Any, model.pretrained_cfg)["architecture"])
    return as_classifier(model, name, model.num_classes, package="biformer", source=str(checkpoint.path))


def load_model(source: str | Path | Checkpoint) -> nn.Module:
    """Return the model of a weights file, of `biformer train` or an official one, in evaluation mode.

    Raises as `visionkernels.weights.open_trained`.
    """
    return open_trained(source, package="biformer").model


def upgrade(metadata: Mapping[str, str], state: Mapping[str, Tensor]) -> Trained | None:
    """Return the record of a weights file of biformer 0.1, or None for another file."""
    versions = {"biformer": metadata["biformer"]} if "biformer" in metadata else {}
    common: dict[str, Any] = {"package": "biformer", "versions": versions}
    if "settings" in metadata:
        common["settings"] = json.loads(metadata["settings"])
    for kind, key in (("segmenter", "segmentation_model"), ("detector", "detection_model")):
        if key in metadata:
            options = json.loads(metadata[key])
            inputs = json.loads(metadata["scene"]) if kind == "segmenter" else None
            return Trained(kind=kind, model=options.pop("name"), options=options, inputs=inputs, **common)
    if not metadata.get("model_name", "").startswith("biformer_"):
        return None
    options = json.loads(metadata["model_options"])
    overlay = options.pop("pretrained_cfg_overlay", None)
    if overlay is not None:
        size = overlay["input_size"][1]
        names = ("interpolation", "mean", "std")
        inputs = {"size": size, "resize": round(size / overlay["crop_pct"]), **{name: overlay[name] for name in names}}
        common |= {"inputs": inputs, "class_names": tuple(overlay["label_names"])}
    return Trained(kind="classifier", model=metadata["model_name"], options=options, **common)


def official_rules(model: BiFormer | BiFormerBackbone) -> KeyRules:
    """Return the rules from official keys to those of `model`; `.inverse()` goes back."""
    core, prefix = (model.model, "model.") if isinstance(model, BiFormerBackbone) else (model, "")
    rules = {"downsample_layers.{rest*}": "downsample_layers.{rest*}"}
    if prefix:
        rules["extra_norms.{i}.{p}"] = "extra_norms.{i}.{p}"
    else:
        rules |= {"norm.{p}": "norm.{p}", "head.{p}": "head.fc.{p}"}
    blocks = "blocks." if isinstance(core, BiFormerSTL) else ""
    for stage, layers in enumerate(core.stages):
        for official, ours in official_block_rules(next(iter(layers.children())), is_stl=bool(blocks)).items():
            rules[f"stages.{stage}.{blocks}{{j}}.{official}"] = f"stages.{stage}.{{j}}.{ours}"
    return KeyRules({key: ours if key.startswith("extra") else prefix + ours for key, ours in rules.items()})


def official_block_rules(block: nn.Module, *, is_stl: bool = False) -> dict[str, str]:
    """Return our names of one block's parameters by official name; STL models number their MLP differently."""
    same = ("pos_embed.{p}", "norm1.{p}", "norm2.{p}", "gamma1", "gamma2")
    rules = {name: name for name in same}
    rules |= {"mlp.0.{p}": "mlp.fc1.{p}", f"mlp.{2 if is_stl else 3}.{{p}}": "mlp.fc2.{p}"}
    if not is_stl:
        rules["mlp.1.dwconv.{p}"] = "mlp.depthwise.{p}"
    match block.attn:
        case ConvolutionalMixer():
            names = ("conv_in", "depthwise", "conv_out")
            return rules | {f"attn.{number}.{{p}}": f"attn.{name}.{{p}}" for number, name in enumerate(names, 1)}
        case BiLevelRoutingAttention(data_format="NCHW"):
            attention = {"qkv_linear.{p}": "qkv.{p}", "output_linear.{p}": "proj.{p}"}
        case BiLevelRoutingAttention():
            attention = {"qkv.qkv.{p}": "qkv.{p}", "wo.{p}": "proj.{p}", "router.emb.{p}": "router.{p}"}
        case _:
            attention = {"qkv.{p}": "qkv.{p}", "proj.{p}": "proj.{p}"}
    attention["lepe.{p}"] = "lepe.{p}"
    return rules | {f"attn.{official}": f"attn.{ours}" for official, ours in attention.items()}


def convert_stl(state: Mapping[str, Tensor], *, allow_inexact: bool = False) -> dict[str, Tensor]:
    """Convert official weights of `biformer_stl` to those of `biformer_stl_nchw`, or back.

    Only the last stage is inexact: the NHWC form enhances the layer's input, the NCHW form its values, so that no
    conversion gives the same outputs. Raises CheckpointError for it unless `allow_inexact`.
    """
    to_nchw = any(key.endswith("attn.qkv.qkv.weight") for key in state)
    if not to_nchw and not any(key.endswith("attn.qkv_linear.weight") for key in state):
        raise CheckpointError("the file holds neither biformer_stl nor biformer_stl_nchw: no routed attention found")
    if not allow_inexact and any(key.startswith("stages.3.") for key in state):
        raise CheckpointError(
            "the last stage of biformer_stl and of biformer_stl_nchw computes its local enhancement from different "
            "tensors, so outputs will differ; pass --allow-inexact to convert anyway"
        )
    renames = {"attn.qkv.qkv.": "attn.qkv_linear.", "attn.wo.": "attn.output_linear."}
    if not to_nchw:
        renames = {new: old for old, new in renames.items()}
    pointwise = ("attn.qkv", "attn.wo", "attn.output_linear", "attn.proj", "mlp.")
    converted = {}
    for key, tensor in state.items():
        name = key
        for old, new in renames.items():
            name = name.replace(old, new)
        if key.endswith(".weight") and any(part in key for part in pointwise):
            tensor = tensor[..., None, None] if to_nchw else tensor.flatten(1)
        converted[name] = tensor
    return converted


def _create(name: str, **options: Any) -> BiFormer:
    model = timm.create_model(name, **options)
    if not isinstance(model, BiFormer):
        raise InputError(f"{name} is not a BiFormer; use one of {', '.join(MODEL_NAMES)}")
    return model


def _load_official_state(model: BiFormer, state: Mapping[str, Tensor], source: str | Path) -> None:
    rules = official_rules(model)
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        try:
            renamed |= rules.rename({key: value})
        except CheckpointError:
            # an unknown key keeps its name, so that the strict load reports all differences at once
            renamed[key] = value
    keep = ["head.fc"] if model.num_classes == 0 else []
    load_strict(model, renamed, source=source, candidates=_candidates(model.num_classes, ours=True), keep=keep)


def _name_of(checkpoint: Checkpoint, classes: int) -> str:
    shapes = {key: tuple(value.shape) for key, value in checkpoint.state.items()}
    for name, official_shapes in _candidates(classes).items():
        if official_shapes() == shapes:
            return name
    raise CheckpointError(
        f"{checkpoint.path} fits none of {', '.join(MODEL_NAMES)}; name its model to see what differs (--model NAME)"
    )


def _candidates(classes: int, *, ours: bool = False) -> dict[str, Callable[[], dict[str, tuple[int, ...]]]]:
    return {name: partial(_shapes, name, classes, ours) for name in MODEL_NAMES}


@cache
def _shapes(name: str, classes: int, ours: bool) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = _create(name, num_classes=classes)
    state = model.state_dict() if ours else official_rules(model).inverse().rename(model.state_dict())
    return {key: tuple(value.shape) for key, value in state.items()}
