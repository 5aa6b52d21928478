"""Models from official weights files, and records for files of earlier releases."""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from g2sd.detection_checkpoint import load_official_detection
from g2sd.layouts import contents_of
from g2sd.official import load_classifier, load_official
from g2sd.segmentation_checkpoint import load_official_segmentation
from visionkernels.weights import Checkpoint, CheckpointError, Trained, TrainedModel

__all__ = ["open_converted", "open_official", "open_students", "upgrade"]

_KINDS = {"mae": "autoencoder", "generic": "autoencoder", "probe": "probe", "mmseg": "segmenter", "vitdet": "detector"}


def open_official(checkpoint: Checkpoint, name: str | None = None) -> TrainedModel | None:
    """Return the model of an official file of any stage with its record; None where its `name` is given.

    Raises CheckpointError as the loaders do.
    """
    if name is not None:
        return None
    contents = contents_of(checkpoint.state, checkpoint.path)
    kind = _KINDS.get(contents.kind, "classifier")
    load: Any = {
        "segmenter": load_official_segmentation, "detector": load_official_detection, "autoencoder": load_official
    }.get(kind, load_classifier)  # fmt: skip
    model = load(checkpoint)
    # detectron2 numbers classes by the places of the categories
    details = {"is_ranked": True} if kind == "detector" else {}
    options = {"num_classes": getattr(model, "num_classes", None)}
    trained = Trained(kind=kind, package="g2sd", options=options, details=details)
    return TrainedModel(model, trained, str(checkpoint.path))


def open_converted(checkpoint: Checkpoint) -> nn.Module:
    """Return the model of a file of `g2sd convert`, whose record stores only the numbers of heads."""
    opened = open_official(checkpoint)
    assert opened is not None
    return opened.model


def open_students(checkpoint: Checkpoint) -> Any:
    """Raise CheckpointError: a file of several students cannot be opened as one model."""
    raise CheckpointError(
        f"{checkpoint.path} holds several students; open the file of one beside it, student-0.safetensors ..."
    )


def upgrade(metadata: Mapping[str, str], state: Mapping[str, Tensor]) -> Trained | None:
    """Return the record of a file of an early g2sd 0.1, which has none, or None for another file."""
    is_probe = {"settings", "num_heads", "class_names"} <= set(metadata) and "head.1.weight" in state
    if "g2sd" not in metadata and not is_probe:
        return None
    values: dict[str, Any] = {name: json.loads(value) for name, value in metadata.items() if name in _JSON}
    settings = values["settings"]
    kind = {"segmentation": "segmenter", "detection": "detector"}.get(metadata.get("task", ""))
    if kind is None:
        # several students have their places before their keys
        stored = "students" if "0.cls_token" in state else contents_of(state, "the file").kind if state else "class"
        kind = stored if stored == "students" else _KINDS.get(stored, "classifier")
    options: dict[str, Any] = {
        name: values[name] for name in ("num_heads", "decoder_num_heads", "out_indices") if name in values
    }
    sizes = settings.get("model", {})
    if "class_names" in values or "num_classes" in sizes:
        options["num_classes"] = len(values["class_names"]) if "class_names" in values else sizes["num_classes"]
    details = {name: metadata[name] for name in ("eval_head", "started_from", "teacher") if name in metadata}
    if kind == "detector":
        details["is_ranked"] = settings["is_ranked"]
    if values.get("category_ids") is not None:
        details["category_ids"] = values["category_ids"]
    return Trained(
        kind=kind,
        package="g2sd",
        model=metadata.get("model_name", sizes.get("name")),
        options=options,
        inputs=values.get("scene", settings.get("pictures")),
        class_names=values.get("class_names"),
        data=settings["data"],
        settings=settings,
        details=details,
        versions={"g2sd": metadata["g2sd"]} if "g2sd" in metadata else {},
    )


_JSON = ("settings", "scene", "class_names", "category_ids", "out_indices", "num_heads", "decoder_num_heads")
