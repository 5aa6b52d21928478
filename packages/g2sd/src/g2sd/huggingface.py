"""Weights for Hugging Face transformers' ViTMAE, ViT and DeiT: names, configuration, image processor; and back."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from g2sd.layouts import Contents, Kind, contents_of, decoder_heads, encoder_heads
from visionkernels.checks import InputError
from visionkernels.files import write_json
from visionkernels.pictures.recipes import PictureRecipe
from visionkernels.tasks.classification import readable_names
from visionkernels.weights import CheckpointError, KeyRules, Trained, save_weights

__all__ = ["from_huggingface", "to_huggingface", "write_huggingface"]

_PROJECTIONS = ("query", "key", "value")
_RESAMPLING = {"bilinear": 2, "bicubic": 3}  # as Pillow numbers them


def write_huggingface(
    out: Path, state: Mapping[str, Tensor], source: object, trained: Trained | None, *, overwrite: bool
) -> str:
    """Write a folder for `from_pretrained`, of the model and its image processor; return a sentence on it."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out={out} is a file; transformers' weights need a folder")
    options = {} if trained is None else trained.options
    heads = (options.get("num_heads"), options.get("decoder_num_heads"))
    renamed, config = to_huggingface(
        state, source, heads=heads, class_names=() if trained is None else trained.class_names
    )
    out.mkdir(parents=True, exist_ok=True)
    save_weights(out / "model.safetensors", renamed, metadata={}, overwrite=overwrite)
    write_json(out / "config.json", config, overwrite=overwrite)
    done = f"{out}: folder for transformers' from_pretrained"
    if config["num_channels"] != 3:
        return f"{done}, without an image processor, as transformers has none for {config['num_channels']} channels"
    write_json(out / "preprocessor_config.json", _image_processor(config["image_size"], trained), overwrite=overwrite)
    return done


def _image_processor(size: int, trained: Trained | None) -> dict[str, Any]:
    """Return the processor of transformers that resizes the shorter side and crops the centre, as evaluation does."""
    if trained is not None and trained.inputs is not None:
        pictures = PictureRecipe.of_inputs(trained.inputs)
    else:  # as MAE's and G2SD's scripts evaluate
        pictures = PictureRecipe(size=size, resize=round(size * 256 / 224))
    return {
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"shortest_edge": pictures.resize}, "resample": _RESAMPLING[pictures.interpolation],
        "do_center_crop": True, "crop_size": {"height": pictures.size, "width": pictures.size}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": pictures.mean, "image_std": pictures.std,
    }  # fmt: skip


def to_huggingface(
    state: Mapping[str, Tensor],
    source: object,
    *,
    heads: tuple[int | None, int | None] = (None, None),
    class_names: Sequence[str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights and the configuration of transformers' ViTMAE, ViT or DeiT.

    Students of generic distillation become the encoder (ViTModel) that they are for. A classifier of 1,000 classes
    without `class_names` gets those of ImageNet. Raises CheckpointError for
    classifiers of the mean of the patches, which transformers has no model for.
    """
    contents = contents_of(state, source)
    if contents.kind == "average":
        raise CheckpointError(
            f"{source} classifies the mean of the patches, and transformers' ViT the class token; convert to timm"
        )
    kept = dict(state)
    if contents.kind == "generic":
        decoder = ("decoder", "mask_token", "encoderfeature_pred.")
        kept = {key: value for key, value in kept.items() if not key.startswith(decoder)}
    elif contents.kind == "distilled":
        table = kept["pos_embed"]
        kept["pos_embed"] = torch.cat([table[:, :1], torch.zeros_like(table[:, :1]), table[:, 1:]], 1)
    return _rules(contents.kind).rename(_split(kept)), _config(contents, source, heads, class_names)


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of transformers' ViTMAE, ViT or DeiT under the names of this package, DeiT's tokens too.

    Poolers are left out. Raises CheckpointError for other keys.
    """
    kept = {key: value for key, value in state.items() if ".pooler." not in f".{key}"}
    kinds: dict[str, Kind] = {
        "decoder.mask_token": "mae", "cls_classifier.weight": "distilled", "classifier.weight": "class"
    }  # fmt: skip
    kind: Kind = next((kind for key, kind in kinds.items() if key in kept), "encoder")
    if kind == "encoder":
        kept = {key.removeprefix("vit."): value for key, value in kept.items()}
    renamed = _joined(_rules(kind).inverse().rename(kept))
    if kind == "distilled":
        table = renamed["pos_embed"]
        renamed["dist_token"] = renamed["dist_token"] + table[:, 1:2]
        renamed["pos_embed"] = torch.cat([table[:, :1], table[:, 2:]], 1)
    return renamed


def _rules(kind: Kind) -> KeyRules:
    """Return the table of our names, projections split, and those of transformers' model for this kind."""
    prefix = {"mae": "vit.", "class": "vit.", "distilled": "deit."}.get(kind, "")
    names = {
        "cls_token": f"{prefix}embeddings.cls_token",
        "pos_embed": f"{prefix}embeddings.position_embeddings",
        "patch_embed.proj.{p}": f"{prefix}embeddings.patch_embeddings.projection.{{p}}",
        "norm.{p}": f"{prefix}layernorm.{{p}}",
        **_block_rules("blocks", f"{prefix}encoder.layer"),
    }
    if kind == "mae":
        same = ("mask_token", "decoder_pos_embed", "decoder_embed.{p}", "decoder_norm.{p}", "decoder_pred.{p}")
        names |= {name: f"decoder.{name}" for name in same} | _block_rules("decoder_blocks", "decoder.decoder_layers")
    elif kind == "class":
        names["head.{p}"] = "classifier.{p}"
    elif kind == "distilled":
        names |= {
            "dist_token": f"{prefix}embeddings.distillation_token",
            "head.{p}": "cls_classifier.{p}",
            "head_dist.{p}": "distillation_classifier.{p}",
        }
    return KeyRules(names)


def _block_rules(ours: str, theirs: str) -> dict[str, str]:
    parts = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
        **{f"attn.{name}": f"attention.attention.{name}" for name in _PROJECTIONS},
    }  # fmt: skip
    return {f"{ours}.{{i}}.{mine}.{{p}}": f"{theirs}.{{i}}.{other}.{{p}}" for mine, other in parts.items()}


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with queries, keys and values apart."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            names = (key.replace(".qkv.", f".{name}.") for name in _PROJECTIONS)
            renamed |= dict(zip(names, value.chunk(3), strict=True))
        else:
            renamed[key] = value
    return renamed


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `_split`."""
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".attn.query." in key:
            parts = [state[key.replace(".query.", f".{name}.")] for name in _PROJECTIONS]
            renamed[key.replace(".query.", ".qkv.")] = torch.cat(parts)
        elif not (".attn.key." in key or ".attn.value." in key):
            renamed[key] = value
    return renamed


def _config(
    contents: Contents, source: object, heads: tuple[int | None, int | None], class_names: Sequence[str] | None
) -> dict[str, Any]:
    architectures = {
        "mae": ("vit_mae", "ViTMAEForPreTraining"),
        "class": ("vit", "ViTForImageClassification"),
        "distilled": ("deit", "DeiTForImageClassificationWithTeacher"),
    }
    model_type, architecture = architectures.get(contents.kind, ("vit", "ViTModel"))
    rows, columns = contents.patch_size
    side = round((contents.num_positions or 0) ** 0.5)
    if rows != columns or side**2 != contents.num_positions:
        raise CheckpointError(f"{source} has no square patches in a square image, as transformers' ViT needs")
    config: dict[str, Any] = {
        "model_type": model_type, "architectures": [architecture], "hidden_size": contents.width,
        "num_hidden_layers": contents.depth, "num_attention_heads": encoder_heads(contents.width, heads[0]),
        "intermediate_size": 4 * contents.width, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "layer_norm_eps": 1e-6, "image_size": side * rows, "patch_size": rows,
        "num_channels": contents.in_chans, "qkv_bias": True,
    }  # fmt: skip
    if contents.kind == "mae":
        assert contents.decoder_width is not None
        config |= {
            "decoder_hidden_size": contents.decoder_width, "decoder_num_hidden_layers": contents.decoder_depth,
            "decoder_num_attention_heads": decoder_heads(contents.decoder_width, heads[1]),
            "decoder_intermediate_size": 4 * contents.decoder_width, "mask_ratio": 0.75, "norm_pix_loss": True,
        }  # fmt: skip
    if contents.num_classes is not None:
        names = readable_names(contents.num_classes, class_names)
        if len(set(names)) < len(names):  # two of ImageNet's classes are described alike
            times = Counter(names)
            names = [name if times[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]
        config["id2label"] = {str(number): name for number, name in enumerate(names)}
        config["label2id"] = {name: number for number, name in enumerate(names)}
    return config
