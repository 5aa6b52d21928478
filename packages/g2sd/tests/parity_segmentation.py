"""Runs the golden cases of the official segmentation model through this package's public API."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from g2sd.upernet import SegmentationModel, segmentation_model
from visionkernels.tasks.segmentation import SegmentationTask
from visionkernels.testing.golden import make_input, recipe_weights

Case = Mapping[str, Any]

# what the models have and no argument changes
_FIXED = {"eps": 1e-6, "bn_eps": 1e-5, "align_corners": False}


def run_segmentation(case: Case) -> dict[str, Tensor]:
    """Return maps of the backbone, logits of both heads, losses and accuracy of a case of kind `seg_model`."""
    config = case["config"]
    changed = {name: config[name] for name, value in _FIXED.items() if config.get(name, value) != value}
    if changed:
        raise ValueError(f"the model has {_FIXED}, and not {changed}")
    model = _model(config)
    model.load_state_dict(recipe_weights(model.state_dict(), case.get("kept_buffers", [])))
    spec = case["inputs"]["images"]
    images = make_input(spec) * spec.get("scale", 1) + spec.get("add", 0)
    labels = _labels(case["inputs"]["labels"])
    main_weight, auxiliary_weight = config["loss_weights"]
    # the model gives all its logits in training; its parts stay in evaluation mode
    model.eval().training = True
    with torch.no_grad():
        maps = model.backbone(images)
        logits, auxiliary = model.class_maps(images)
        losses = SegmentationTask(model, auxiliary_weight=auxiliary_weight)(images, labels)
    enlarged = losses["output"]
    right = (enlarged.argmax(1) == labels).sum()
    return {
        **{f"feat{level}": each for level, each in enumerate(maps)},
        "logits": logits,
        "aux_logits": auxiliary,
        "resized_logits": enlarged,
        "loss_decode": main_weight * losses["main_loss"].reshape(1),
        "loss_aux_weighted": (losses["loss"] - losses["main_loss"]).reshape(1),
        "acc_decode": (100 * right / labels.numel()).reshape(1),
    }


def _model(config: Mapping[str, Any]) -> SegmentationModel:
    return segmentation_model(
        **config["backbone"],
        num_classes=config["num_classes"],
        init_values=config["init_values"],
        has_relative_bias=config["use_rel_pos_bias"],
        decoder_channels=config["decode_channels"],
        auxiliary_channels=config["aux_channels"],
    )


def _labels(spec: Mapping[str, Any]) -> Tensor:
    labels = np.random.RandomState(spec["seed"]).randint(spec["low"], spec["high"], spec["shape"])
    if "rows_to" in spec:
        rows, value = spec["rows_to"]
        labels[..., :rows, :] = value
    return torch.from_numpy(labels).long()[:, 0]
