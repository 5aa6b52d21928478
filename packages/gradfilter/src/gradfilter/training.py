"""Fine-tuning by a recipe: a trained network goes on in its last convolutions, with filtered gradients (sec. 4)."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn import functional as F

from gradfilter.checkpoint import load_official
from gradfilter.conv import CompactConv2d
from gradfilter.conversion import ConversionReport, choose, convert, restore
from gradfilter.models import create_classifier, create_segmenter
from gradfilter.picture_recipes import ClassificationRecipe, SegmentationRecipe
from gradfilter.recipes import FilterRecipe, Recipe
from gradfilter.trace import trace
from visionkernels import classification, segmentation
from visionkernels.checkpoints import load_strict, read_state, save_weights
from visionkernels.extras import require
from visionkernels.pictures.labelled import LabelledPictures, Split, open_pictures
from visionkernels.pictures.scenes import Scenes, open_scenes
from visionkernels.pictures.transforms import evaluation_transform, training_transform
from visionkernels.recipes import data_of, settings
from visionkernels.segmentation import SegmentationTask
from visionkernels.training import FitResult, TrainingData, fit

__all__ = ["ClassifierTask", "load_segmenter", "prepare", "store_plain", "train_classifier", "train_segmenter"]


class ClassifierTask(TrainingTask):
    """Cross-entropy of class indices, in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(verbose=False)
        self.trainable_module = model

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Take images and class indices; return the loss and the logits."""
        logits = self.trainable_module(images)
        return {"loss": F.cross_entropy(logits.float(), labels), "output": logits}


def prepare(model: nn.Module, recipe: FilterRecipe, example_input: Tensor) -> ConversionReport:
    """Convert `model` as the recipe says; "head" leaves the linear layers, or else the last convolution, trainable."""
    report = convert(model, **recipe.options(), example_input=example_input, warns=recipe.gradients == "filtered")
    if recipe.gradients == "head":
        linear: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Linear)]
        model.requires_grad_(False)
        for module in linear or [choose(trace(model, example_input), 1, None)[0].module]:
            module.requires_grad_(True)
    return report


def train_classifier(
    recipe: ClassificationRecipe,
    data: str | Path | None,
    run_dir: str | Path,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
) -> FitResult:
    """Fine-tune a classifier; a run that `run_dir` holds goes on where it stopped.

    It starts from `checkpoint` (any weights of the network, ours or official) or, with `pretrained`, from the published
    ones; a classifier of other classes is made anew. `data` is as for
    `visionkernels.pictures.labelled.open_pictures`. `run_dir/weights.safetensors` holds plain weights and opens with
    `gradfilter.evaluation.load_network`. Metrics are those of `visionkernels.classification`. Raises ValueError without
    weights to start from, and as `open_pictures`, `load_official` and `visionkernels.training.fit` do.
    """
    _require_extras()
    data = data_of(recipe, data)
    _check_start(recipe.name, checkpoint, pretrained)
    train_set = open_pictures(data, "train", training_transform(recipe.pictures, recipe.augmentation))
    names = train_set.class_names
    val_set = open_pictures(data, "validation", evaluation_transform(recipe.pictures), class_names=names)
    torch.manual_seed(recipe.fit.seed)
    network = {"name": recipe.model, "num_classes": len(names)}
    model = create_classifier(recipe.model, num_classes=len(names), pretrained=pretrained)
    if checkpoint is not None:
        load_official(model, checkpoint, num_classes=len(names))
    prepare(model, recipe.filter, val_set[0][0][None])
    result = fit(
        ClassifierTask(model), recipe.fit,
        TrainingData(train=train_set, evaluate=partial(_classifier_metrics, pictures=val_set, recipe=recipe)), run_dir,
        details={
            "task": "classification", "network": network, "pictures": asdict(recipe.pictures), "class_names": names,
            **_details(recipe, checkpoint),
        },
    )  # fmt: skip
    store_plain(result, model)
    return result


def train_segmenter(
    recipe: SegmentationRecipe,
    data: str | Path | None,
    run_dir: str | Path,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
) -> FitResult:
    """Fine-tune a segmentation model; a run that `run_dir` holds goes on where it stopped.

    It starts from `checkpoint`, weights of the whole model or of its encoder alone; with `pretrained` from an encoder
    with published weights; or from the recipe's own pre-training in `run_dir`/pretraining, of all layers. `data` is as
    for `visionkernels.pictures.scenes.open_scenes`. `run_dir/weights.safetensors` holds plain weights and opens with
    `gradfilter.evaluation.load_network`. Metrics are those of `visionkernels.segmentation`, after a pre-training also
    `miou_before` of what it left. Errors as for `train_classifier`, and ImportError without `gradfilter[dense]`.
    """
    _require_extras()
    data = data_of(recipe, data)
    if recipe.pretraining is None or (checkpoint is not None and pretrained):
        _check_start(recipe.name, checkpoint, pretrained)
    torch.manual_seed(recipe.fit.seed)
    model = create_segmenter(recipe.head, recipe.encoder, num_classes=recipe.num_classes, pretrained=pretrained)
    before: dict[str, float] = {}
    if checkpoint is not None:
        load_segmenter(model, checkpoint, num_classes=recipe.num_classes)
    elif recipe.pretraining is not None and recipe.pretraining_scene is not None:
        first = replace(recipe, fit=recipe.pretraining, scene=recipe.pretraining_scene)
        trained = _fit_segmenter(model, first, data, Path(run_dir) / "pretraining", {}, {})
        load_strict(model, read_state(trained.weights).state, source=trained.weights)
        before["miou_before"] = _segmenter_metrics(model, _scenes(recipe, data, "validation"), recipe)["miou"]
    prepare(model, recipe.filter, torch.zeros(1, 3, recipe.scene.crop, recipe.scene.crop))
    result = _fit_segmenter(model, recipe, data, run_dir, _details(recipe, checkpoint), before)
    store_plain(result, model)
    return result


def load_segmenter(model: nn.Module, path: str | Path, *, num_classes: int) -> None:
    """Load weights of a whole segmentation model, or of its encoder alone, in place; errors are `load_official`'s."""
    own = {name for name, _ in model.named_children()} - {"encoder"}
    is_whole = any(not own.isdisjoint(key.split(".")) for key in read_state(path).state)
    if is_whole:
        load_official(model, path, num_classes=num_classes)
    else:
        load_official(model.get_submodule("encoder"), path, without=("fc.", "classifier."))


def store_plain(result: FitResult, model: nn.Module) -> None:
    """Fold the weights files of a compact run, so that they load like any others."""
    if not any(isinstance(module, CompactConv2d) for module in model.modules()):
        return
    for path in result.weights.parent.glob("*.safetensors"):
        checkpoint = read_state(path)
        twin = copy.deepcopy(model)
        if set(checkpoint.state) == set(twin.state_dict()):
            load_strict(twin, checkpoint.state, source=path)
            restore(twin)
            save_weights(path, twin.state_dict(), metadata=checkpoint.metadata, overwrite=True)


def _fit_segmenter(
    model: nn.Module,
    recipe: SegmentationRecipe,
    data: str | Path,
    run_dir: str | Path,
    details: Mapping[str, Any],
    known: Mapping[str, float],
) -> FitResult:
    scenes = _scenes(recipe, data, "validation")
    network = {"head": recipe.head, "encoder": recipe.encoder, "num_classes": recipe.num_classes}
    return fit(
        SegmentationTask(model), recipe.fit,
        TrainingData(
            train=_scenes(recipe, data, "train"),
            evaluate=lambda model: {**_segmenter_metrics(model, scenes, recipe), **known},
        ),
        run_dir, details={"task": "segmentation", "network": network, "scene": asdict(recipe.scene), **details},
    )  # fmt: skip


def _scenes(recipe: SegmentationRecipe, data: str | Path, split: Split) -> Scenes:
    return open_scenes(data, split, recipe.scene, num_classes=recipe.num_classes)


def _details(recipe: Recipe, checkpoint: str | Path | None) -> dict[str, Any]:
    start = {} if checkpoint is None else {"started_from": str(checkpoint)}
    return {"gradfilter": version("gradfilter"), "settings": settings(recipe), **start}


def _require_extras() -> None:
    for module in ("accelerate", "torchmetrics"):
        require(module, "gradfilter[train]")


def _check_start(name: str, checkpoint: str | Path | None, pretrained: bool) -> None:
    if (checkpoint is None) != pretrained:
        given = "neither" if checkpoint is None else "both"
        raise ValueError(f"{name} fine-tunes a trained network: give --checkpoint FILE or --pretrained, not {given}")


def _classifier_metrics(
    model: nn.Module, pictures: LabelledPictures, recipe: ClassificationRecipe
) -> Mapping[str, float]:
    num_classes, workers = len(pictures.class_names), recipe.fit.num_workers
    return classification.evaluate(model, pictures, num_classes=num_classes, workers=workers).metrics()


def _segmenter_metrics(model: nn.Module, scenes: Scenes, recipe: SegmentationRecipe) -> Mapping[str, float]:
    return segmentation.evaluate(
        model, scenes, recipe.scene, num_classes=recipe.num_classes, workers=recipe.fit.num_workers
    )
