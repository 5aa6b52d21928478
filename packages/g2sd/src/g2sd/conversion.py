"""Weights into the layouts of other projects, and back where nothing is lost."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from g2sd.layouts import Contents, Kind, contents_of, decoder_heads, encoder_heads
from g2sd.official import check_whole, options_of
from visionkernels.checks import InputError, check_choice
from visionkernels.files import replace_file, write_json
from visionkernels.weights import Checkpoint, CheckpointError, KeyRules, Trained, read_checkpoint, save_weights

__all__ = ["Target", "convert_file", "from_huggingface", "to_huggingface"]

Target: TypeAlias = Literal["mae", "timm", "hf", "vitdet", "mmseg"]

_DECODER = ("decoder", "mask_token", "encoderfeature_pred")
_HEADS = ("head", "head_dist", "dist_token", "fc_norm")
_PROJECTIONS = ("query", "key", "value")


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
    is_distiller = any(key.startswith("student.") for key in checkpoint.state)
    if contents.kind == to and contents.kind in ("vitdet", "mmseg") and not is_distiller:
        _write(out, checkpoint.state, checkpoint.trained, overwrite=overwrite)
        return f"{out}: {len(checkpoint.state)} tensors, as they were"
    if contents.kind in ("vitdet", "mmseg", "probe"):
        raise CheckpointError(
            f"{source} holds {contents.kind!r}, whose relative positions or statistics have no place in {to!r}"
        )
    state = from_huggingface(checkpoint.state) if contents.kind == "hf" else dict(checkpoint.state)
    contents = contents_of(state, source)
    check_whole(state, contents, source, is_recorded=checkpoint.trained is not None)
    kind = contents.kind
    if to == "hf":
        options = options_of(checkpoint)
        _write_folder(
            out,
            *to_huggingface(state, source, heads=(options.get("num_heads"), options.get("decoder_num_heads"))),
            overwrite=overwrite,
        )
        return f"{out}: folder for transformers' from_pretrained"
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


def to_huggingface(
    state: Mapping[str, Tensor], source: object, *, heads: tuple[int | None, int | None] = (None, None)
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights and the configuration of transformers' ViTMAE, ViT or DeiT.

    Students of generic distillation become the encoder (ViTModel) that they are for. Raises CheckpointError for
    classifiers of the mean of the patches, which transformers has no model for.
    """
    contents = contents_of(state, source)
    if contents.kind == "average":
        raise CheckpointError(
            f"{source} classifies the mean of the patches, and transformers' ViT the class token; convert to timm"
        )
    kept = dict(state)
    if contents.kind == "generic":
        kept, _ = _without(kept, _DECODER)
    elif contents.kind == "distilled":
        table = kept["pos_embed"]
        kept["pos_embed"] = torch.cat([table[:, :1], torch.zeros_like(table[:, :1]), table[:, 1:]], 1)
    return _rules(contents.kind).rename(_split(kept)), _config(contents, source, heads)


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


def _config(contents: Contents, source: object, heads: tuple[int | None, int | None]) -> dict[str, Any]:
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
        config["id2label"] = {str(number): f"LABEL_{number}" for number in range(contents.num_classes)}
    return config


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


def _write_folder(out: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], *, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"out={out} is a file; transformers' weights need a folder")
    out.mkdir(parents=True, exist_ok=True)
    save_weights(out / "model.safetensors", state, metadata={}, overwrite=overwrite)
    write_json(out / "config.json", config, overwrite=overwrite)
