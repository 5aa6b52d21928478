"""Fine-tuning of trained networks by a recipe, in their last convolutions, with filtered gradients (sec. 4)."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from gradfilter.conv import CompactConv2d
from gradfilter.conversion import ConversionReport, choose, convert, restore
from gradfilter.models import create_segmenter
from gradfilter.official import load_into
from gradfilter.recipes import ClassificationRecipe, FilterRecipe, SegmentationRecipe
from gradfilter.trace import trace
from visionkernels import models
from visionkernels.checks import InputError
from visionkernels.modules import copy_module
from visionkernels.pictures.recipes import SceneRecipe
from visionkernels.tasks.classification import ClassificationSets, ClassificationTask
from visionkernels.tasks.segmentation import SegmentationSets, SegmentationTask
from visionkernels.training import FitResult
from visionkernels.weights import Checkpoint, load_strict, read_checkpoint

__all__ = ["load_segmenter", "open_segmenter", "prepare", "store_plain", "train_classifier", "train_segmenter"]

_EXTRA = "gradfilter[train]"


def prepare(model: nn.Module, recipe: FilterRecipe, example_input: Tensor) -> ConversionReport:
    """Convert `model` by the recipe; "head" trains the linear layers, or the last convolution if there are none."""
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
    out: str | Path,
    *,
    init: str | Path | None = None,
    pretrained: bool = False,
) -> FitResult:
    """Fine-tune a classifier; rerun with the same arguments to resume the run in `out`.

    `out`/weights.safetensors holds plain weights and opens with `visionkernels.weights.open_trained`. Metrics are those
    of `visionkernels.tasks.classification`.

    Args:
        recipe: the settings
        data: as for `visionkernels.pictures.labelled.open_pictures`; None takes the recipe's own
        out: folder of the run
        init: any weights of the network, ours or official; a classifier for other classes is ignored
        pretrained: start from published weights instead

    Raises InputError without weights to start from, and as `open_pictures`, `load_into` and
    `visionkernels.training.fit` do.
    """
    _check_start(recipe.name, init, pretrained)
    sets = ClassificationSets.open(recipe, data, install=_EXTRA)
    torch.manual_seed(recipe.fit.seed)
    model = models.create(recipe.model, num_classes=sets.num_classes, pretrained=pretrained)
    if init is not None:
        load_into(model, init, num_classes=sets.num_classes)
    prepare(model, recipe.filter, sets.validation[0][0][None])
    result = sets.fit(ClassificationTask(model), out, sets.record(started_from=init))
    store_plain(result, model)
    return result


def train_segmenter(
    recipe: SegmentationRecipe,
    data: str | Path | None,
    out: str | Path,
    *,
    init: str | Path | None = None,
    pretrained: bool = False,
) -> FitResult:
    """Fine-tune a segmentation model; rerun with the same arguments to resume the run in `out`.

    Without `init` and `pretrained`, a recipe with pre-training first trains all layers in `out`/pretraining.
    `out`/weights.safetensors holds plain weights and opens with `visionkernels.weights.open_trained`. Metrics are those
    of `visionkernels.tasks.segmentation`, and `miou_before` for the pre-trained model.

    Args:
        recipe: the settings
        data: as for `visionkernels.pictures.scenes.open_scenes`; None takes the recipe's own
        out: folder of the run
        init: weights of the whole model, or of its encoder alone
        pretrained: start from an encoder with published weights

    Raises the errors of `train_classifier`, and ImportError without `gradfilter[dense]`.
    """
    if recipe.pretraining is None or (init is not None and pretrained):
        _check_start(recipe.name, init, pretrained)
    sets = SegmentationSets.open(recipe, data, num_classes=recipe.num_classes, install=_EXTRA)
    torch.manual_seed(recipe.fit.seed)
    model = create_segmenter(recipe.head, recipe.encoder, num_classes=recipe.num_classes, pretrained=pretrained)
    before: dict[str, float] = {}
    if init is not None:
        load_segmenter(model, init, num_classes=recipe.num_classes)
    elif recipe.pretraining is not None and recipe.pretraining_scene is not None:
        first = replace(recipe, fit=recipe.pretraining, scene=recipe.pretraining_scene)
        whole = SegmentationSets.open(first, data, num_classes=recipe.num_classes, install=_EXTRA)
        # without settings, since one pre-training serves all recipes
        record = replace(whole.record(), settings=None)
        trained = whole.fit(SegmentationTask(model), Path(out) / "pretraining", record)
        load_strict(model, read_checkpoint(trained.weights).state, source=trained.weights)
        before["miou_before"] = sets.measure(model, workers=recipe.fit.num_workers)["miou"]
    prepare(model, recipe.filter, torch.zeros(1, 3, recipe.scene.crop, recipe.scene.crop))
    evaluate = partial(sets.measure, workers=recipe.fit.num_workers, known=before)
    result = sets.fit(SegmentationTask(model), out, sets.record(started_from=init), evaluate=evaluate)
    store_plain(result, model)
    return result


def open_segmenter(checkpoint: Checkpoint) -> nn.Module:
    """Return the segmentation model of a weights file, in evaluation mode."""
    trained = checkpoint.trained
    assert trained is not None and trained.inputs is not None
    num_classes = trained.options["num_classes"]
    model = create_segmenter(trained.options["head"], cast(str, trained.model), num_classes=num_classes)
    load_segmenter(model, checkpoint, num_classes=num_classes)
    model.scene = SceneRecipe.of_inputs(trained.inputs)  # type: ignore[assignment]
    return model.eval()


def load_segmenter(model: nn.Module, source: str | Path | Checkpoint, *, num_classes: int) -> None:
    """Load weights of a whole segmentation model, or of its encoder alone, in place; raises as `load_into`."""
    own = {name for name, _ in model.named_children()} - {"encoder"}
    checkpoint = read_checkpoint(source)
    is_whole = any(not own.isdisjoint(key.split(".")) for key in checkpoint.state)
    if is_whole:
        load_into(model, checkpoint, num_classes=num_classes)
    else:
        load_into(model.get_submodule("encoder"), checkpoint, without=("fc.", "classifier."))


def store_plain(result: FitResult, model: nn.Module) -> None:
    """Rewrite the weights files of a compact run as plain weights."""
    if not any(isinstance(module, CompactConv2d) for module in model.modules()):
        return
    for path in result.weights.parent.glob("*.safetensors"):
        checkpoint = read_checkpoint(path)
        twin = copy_module(model)
        if checkpoint.trained is not None and set(checkpoint.state) == set(twin.state_dict()):
            load_strict(twin, checkpoint.state, source=path)
            restore(twin)
            checkpoint.trained.save(path, twin.state_dict(), overwrite=True)


def _check_start(name: str, init: str | Path | None, pretrained: bool) -> None:
    if (init is None) != pretrained:
        given = "neither" if init is None else "both"
        raise InputError(f"{name} fine-tunes a trained network: give --init FILE or --pretrained, not {given}")
