"""Training a classifier by a recipe, on the loop that all packages share."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.task import TrainingTask
from torch import nn
from torch.utils.data import Dataset

from biformer.cell_labels import CellLabelledPictures
from biformer.checkpoint import load_model
from biformer.model import BiFormer
from biformer.recipes import ClassificationRecipe
from biformer.task import CellClassifier, ClassifierTask, Teacher, TokenLabellingTask
from visionkernels.checkpoints import load_strict
from visionkernels.classification import evaluate
from visionkernels.extras import require
from visionkernels.pictures.labelled import LabelledPictures, open_pictures
from visionkernels.pictures.transforms import (
    LabelMixing,
    evaluation_transform,
    repeated_augmentation_order,
    training_transform,
)
from visionkernels.recipes import data_of, settings
from visionkernels.training import FitResult, TrainingData, fit

__all__ = ["create_model", "train"]


def train(
    recipe: ClassificationRecipe,
    data: str | Path | None,
    run_dir: str | Path,
    *,
    checkpoint: str | Path | None = None,
) -> FitResult:
    """Train a classifier; a run that `run_dir` holds goes on where it stopped.

    `data` is as for `visionkernels.pictures.labelled.open_pictures`, by default the recipe's own. The model gets as
    many classes as the data has. `checkpoint` gives the weights to start from; its classifier is left out where the
    classes differ. `run_dir/weights.safetensors` opens with `biformer.checkpoint.load_model`. The metrics are those of
    `visionkernels.classification`. Errors as for `open_pictures`, `load_model` and `visionkernels.training.fit`.
    """
    require("accelerate", "biformer[train]")
    require("torchmetrics", "biformer[train]")
    data = data_of(recipe, data)
    train_set = open_pictures(data, "train", training_transform(recipe.pictures, recipe.augmentation))
    names = train_set.class_names
    val_set = open_pictures(data, "validation", evaluation_transform(recipe.pictures), class_names=names)
    recipe = replace(recipe, model=replace(recipe.model, num_classes=len(names)))
    torch.manual_seed(recipe.fit.seed)
    model = create_model(recipe, names)
    if checkpoint is not None:
        _start_from(model, checkpoint, recipe)
    task, samples, transform = _task(recipe, model, train_set)
    order: Callable[[int], Any] | None = None
    # the sampler cuts an epoch to whole groups of 256 pictures
    if recipe.augmentation.repeats > 1 and len(train_set) >= 256:
        order = partial(repeated_augmentation_order, len(train_set), repeats=recipe.augmentation.repeats)
    return fit(
        task,
        recipe.fit,
        TrainingData(
            train=samples,
            evaluate=partial(_metrics, pictures=val_set, workers=recipe.fit.num_workers),
            batch_transform=transform,
            order=order,
        ),
        run_dir,
        details=_details(recipe, names, checkpoint),
    )


def create_model(recipe: ClassificationRecipe, class_names: tuple[str, ...] | None = None) -> BiFormer:
    """Return the recipe's model with random weights; its `pretrained_cfg` tells how to prepare pictures."""
    return cast(BiFormer, timm.create_model(recipe.model.name, **_model_options(recipe, class_names)))


def _model_options(recipe: ClassificationRecipe, class_names: tuple[str, ...] | None) -> dict[str, Any]:
    pictures = recipe.pictures
    overlay: dict[str, Any] = {
        "input_size": (3, pictures.size, pictures.size),
        "crop_pct": pictures.size / pictures.resize,
        "interpolation": pictures.interpolation,
        "mean": pictures.mean,
        "std": pictures.std,
    }
    if class_names is not None:
        overlay["label_names"] = class_names
    return recipe.model.options() | {"pretrained_cfg_overlay": overlay}


def _details(
    recipe: ClassificationRecipe, class_names: tuple[str, ...], checkpoint: str | Path | None
) -> dict[str, Any]:
    """What run.json and the weights say besides the run itself; `load_model` reads the first two."""
    start = {} if checkpoint is None else {"started_from": str(checkpoint)}
    return {
        "model_name": recipe.model.name,
        "model_options": json.dumps(_model_options(recipe, class_names)),
        "biformer": version("biformer"),
        "settings": settings(recipe),
        **start,
    }


def _start_from(model: BiFormer, checkpoint: str | Path, recipe: ClassificationRecipe) -> None:
    options = {key: value for key, value in recipe.model.options().items() if key != "num_classes"}
    loaded = load_model(checkpoint, recipe.model.name, **options)
    keep = [] if loaded.num_classes == model.num_classes else ["head.fc"]
    load_strict(model, loaded.state_dict(), source=checkpoint, keep=keep)


def _task(
    recipe: ClassificationRecipe, model: BiFormer, train_set: LabelledPictures
) -> tuple[TrainingTask, Dataset, Callable[[Any], Any] | None]:
    """Return the task, what it trains on, and what makes its arguments of a batch."""
    augmentation = recipe.augmentation
    if (tokens := recipe.token_labelling) is not None:
        teacher = None if tokens.teacher is None else _teacher(tokens.teacher, recipe)
        task = TokenLabellingTask(CellClassifier(model), tokens, smoothing=augmentation.smoothing, teacher=teacher)
        if tokens.labels is None:
            return task, train_set, None
        return task, CellLabelledPictures(train_set, Path(tokens.labels), recipe.pictures, augmentation), None
    distillation = recipe.distillation
    if distillation is not None and distillation.kind == "none":
        distillation = None
    teacher = None if distillation is None else _teacher(distillation.teacher, recipe)
    mixing = LabelMixing(augmentation, recipe.model.num_classes)
    return ClassifierTask(model, teacher=teacher, distillation=distillation), train_set, mixing


def _teacher(name: str, recipe: ClassificationRecipe) -> Teacher:
    if Path(name).is_file():
        model: nn.Module = load_model(name)
    else:
        if not timm.is_model(name):
            raise ValueError(f"teacher {name!r} is neither a file nor a model of timm")
        model = timm.create_model(name, pretrained=True)
    classes, wanted = cast(int, model.num_classes), recipe.model.num_classes
    if classes != wanted:
        raise ValueError(f"teacher {name} has {classes} classes, the data {wanted}")
    return Teacher(model, mean=recipe.pictures.mean, std=recipe.pictures.std)


def _metrics(model: nn.Module, pictures: LabelledPictures, workers: int) -> Mapping[str, float]:
    if isinstance(model, CellClassifier):
        model = model.model.eval()
    return evaluate(model, pictures, workers=workers).metrics()
