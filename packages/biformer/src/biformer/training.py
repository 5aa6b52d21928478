"""Training and evaluating a classifier by a recipe, on the loop that all packages share."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from biformer.checkpoint import load_model
from biformer.data import (
    CellLabelledPictures,
    LabelledPictures,
    evaluation_transform,
    open_pictures,
    repeated_augmentation_order,
    training_transform,
)
from biformer.model import BiFormer
from biformer.recipes import ClassificationRecipe, settings
from biformer.task import CellClassifier, ClassifierTask, LabelMixing, Teacher, TokenLabellingTask
from visionkernels.checkpoints import load_strict, read_state, save_weights
from visionkernels.extras import require
from visionkernels.training import FitResult, TrainingData, fit

__all__ = ["Evaluation", "create_model", "evaluate", "train"]


@dataclass(frozen=True)
class Evaluation:
    """Of a classifier on a set; top-1 and top-5 are shares in percent."""

    top1: float
    top5: float
    """Of the five best classes, or of all where there are fewer."""
    loss: float
    """Mean cross-entropy."""
    majority_top1: float
    """Top-1 of always naming the most frequent class."""
    num_pictures: int


def train(
    recipe: ClassificationRecipe,
    data: str | Path | None,
    run_dir: str | Path,
    *,
    checkpoint: str | Path | None = None,
) -> FitResult:
    """Train a classifier; a run that `run_dir` holds goes on where it stopped.

    `data` is as for `biformer.data.open_pictures`, by default the recipe's own. The model gets as many classes as the
    data has. `checkpoint` gives the weights to start from; its classifier is left out where the classes differ.
    `run_dir/weights.safetensors` opens with `biformer.checkpoint.load_model`. The metrics are those of
    `Evaluation`, its loss as val_loss. Errors as for `open_pictures`, `load_model` and `visionkernels.training.fit`.
    """
    require("accelerate", "biformer[train]")
    require("torchmetrics", "biformer[train]")
    data = data or recipe.data
    if data is None:
        raise ValueError(f"recipe {recipe.name} has no data of its own; give --data FOLDER")
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
    result = fit(
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
    if recipe.token_labelling is not None:
        _drop_cell_classifier(result)
    return result


def evaluate(
    model: nn.Module, pictures: LabelledPictures, *, batch_size: int = 64, workers: int = 0, show_progress: bool = True
) -> Evaluation:
    """Measure a model in evaluation mode, on its device; several processes share the pictures.

    Raises ValueError for labels that the model does not have.
    """
    metrics = require("torchmetrics", "biformer[train]")
    device = next(model.parameters()).device
    num_classes = cast(int, model.num_classes)
    if max(pictures.labels) >= num_classes:
        raise ValueError(f"the data has class {max(pictures.labels)}, the model {num_classes} classes")
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, processes = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if shared else (0, 1)
    own = Subset(cast(Dataset, pictures), range(rank, len(pictures), processes))
    loader = DataLoader(own, batch_size=batch_size, num_workers=workers)
    accuracy = partial(metrics.classification.MulticlassAccuracy, num_classes, average="micro")
    top1, top5 = accuracy(top_k=1).to(device), accuracy(top_k=min(5, num_classes)).to(device)
    loss = metrics.MeanMetric().to(device)
    model.eval()
    with torch.inference_mode():
        for images, labels in tqdm(loader, desc="evaluating", disable=None if show_progress else True, leave=False):
            images, labels = images.to(device), labels.to(device)
            logits = model(images).float()
            for metric in (top1, top5):
                metric.update(logits, labels)
            losses = F.cross_entropy(logits, labels, reduction="none")
            loss.update(losses)
    majority = max(Counter(pictures.labels).values()) / len(pictures)
    best, best5 = (round(100 * float(metric.compute()), 4) for metric in (top1, top5))
    return Evaluation(best, best5, float(loss.compute()), 100 * majority, len(pictures))


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
    measured = evaluate(model, pictures, workers=workers)
    return {
        "top1": measured.top1,
        "top5": measured.top5,
        "val_loss": measured.loss,
        "majority_top1": measured.majority_top1,
    }


def _drop_cell_classifier(result: FitResult) -> None:
    """Leave the model alone in the finished weights, so that they load like any others."""
    for path in filter(None, (result.weights, result.ema_weights)):
        checkpoint = read_state(path)
        model: dict[str, Tensor] = {
            key.removeprefix("model."): value for key, value in checkpoint.state.items() if key.startswith("model.")
        }
        if model:
            save_weights(path, model, metadata=checkpoint.metadata, overwrite=True)
