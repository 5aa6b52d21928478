"""Tasks on labelled images, written once: classification, segmentation, detection.

Each has data, a training task, training, evaluation and export. A package gives a model, and its paper's losses. Papers
whose data are no labelled images (rays, episodes, image to image, volumes) use `training` and `weights` alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from visionkernels.checks import InputError
from visionkernels.tasks import classification, detection, segmentation
from visionkernels.weights import TrainedModel

__all__ = ["evaluate", "export"]

_EVALUATE = {
    "classifier": classification.evaluate_trained,
    "probe": classification.evaluate_trained,
    "segmenter": segmentation.evaluate_trained,
    "detector": detection.evaluate_trained,
}


def evaluate(
    opened: TrainedModel, data: str | Path | None, *, device: torch.device, workers: int = 0, batch_size: int = 64
) -> Mapping[str, float]:
    """Return the metrics of trained weights on the validation data, by default that of their training.

    They are those of `evaluate` of the module for this kind of model; `batch_size` is a classifier's. Raises InputError
    for a kind that has no metric on labels, for no data, and as the functions that open data do.
    """
    kind = opened.trained.kind
    if kind not in _EVALUATE:
        raise InputError(f"{opened.source} holds {a_or_an(kind)}, which has no metric on labelled data")
    data = opened.trained.data if data is None else data
    if data is None:
        raise InputError(f"{opened.source} does not say its data; give --data FOLDER")
    opened.model.to(device)
    return _EVALUATE[kind](opened, data, workers=workers, batch_size=batch_size)


def export(
    opened: TrainedModel,
    path: Path,
    *,
    format: str | None = None,
    size: tuple[int, int] | None = None,
    install: str = "visionkernels[export]",
    overwrite: bool = False,
) -> str:
    """Write a classifier or a segmentation model for other runtimes; return the shapes that it takes and gives.

    `format` is "onnx" or "pt2", by default the suffix of `path`; images have `size`, by default the model's own, and
    come in any number. Raises InputError for other kinds and formats, ImportError that names the extra `install`, and
    FileExistsError unless `overwrite`.
    """
    options: dict[str, Any] = {"format": format, "size": size, "install": install, "overwrite": overwrite}
    match opened.trained.kind:
        case "classifier" | "probe":
            return classification.export(opened, path, **options)
        case "segmenter":
            return segmentation.export(opened, path, **options)
        case "detector":
            raise InputError(
                f"{opened.source} holds a detector, which is not exported: the number of its regions differs by image; "
                "its backbone goes through torch.export"
            )
        case kind:
            raise InputError(f"{opened.source} holds {a_or_an(kind)}, which is not exported; fine-tune it first")


def a_or_an(kind: str) -> str:
    """Return a kind of model with its article."""
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"
