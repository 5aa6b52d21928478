"""Evaluation of trained weights, and records of weights files of earlier releases."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradfilter.digits import digits
from gradfilter.digits import evaluate as evaluate_digits
from visionkernels import tasks
from visionkernels.checks import check
from visionkernels.weights import Trained, TrainedModel

__all__ = ["evaluate", "upgrade"]


def evaluate(
    opened: TrainedModel, data: str | Path | None, *, device: torch.device, workers: int = 0, batch_size: int = 64
) -> Mapping[str, float]:
    """Return the metrics of trained weights on the validation data, as `visionkernels.tasks.evaluate` does.

    Networks trained on digits are measured on the built-in turned test digits.
    """
    if opened.trained.kind != "digits":
        return tasks.evaluate(opened, data, device=device, workers=workers, batch_size=batch_size)
    check(data in (None, "mnist5k"), "data", data, f"left out: {opened.source} was trained on built-in digits")
    return evaluate_digits(opened.model.to(device), digits("test"))


def upgrade(metadata: Mapping[str, str], state: Mapping[str, Tensor]) -> Trained | None:
    """Return the record of a weights file of gradfilter 0.1, or None for another file."""
    common: dict[str, Any] = {"package": "gradfilter", "versions": {"gradfilter": metadata.get("gradfilter", "")}}
    if "settings" in metadata:
        common["settings"] = json.loads(metadata["settings"])
    if metadata.get("model_name") == "tinyconv":
        options = {name: json.loads(metadata[name]) for name in ("widths", "reduction") if name in metadata}
        return Trained(kind="digits", model="tinyconv", options=options, data="mnist5k", **common)
    if "network" not in metadata:
        return None
    network = json.loads(metadata["network"])
    if "head" in network:
        inputs = json.loads(metadata["scene"])
        return Trained(kind="segmenter", model=network.pop("encoder"), options=network, inputs=inputs, **common)
    return Trained(
        kind="classifier", model=network.pop("name"), options=network, inputs=json.loads(metadata["pictures"]),
        class_names=tuple(json.loads(metadata["class_names"])), **common,
    )  # fmt: skip
