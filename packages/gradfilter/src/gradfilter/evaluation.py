"""Measuring a weights file of `gradfilter train`, or the plain weights of a recipe's network."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gradfilter.checkpoint import load_official
from gradfilter.digits import digits, load_tinyconv
from gradfilter.digits import evaluate as evaluate_digits
from gradfilter.models import create_classifier, create_segmenter
from gradfilter.picture_recipes import ClassificationRecipe, SegmentationRecipe
from gradfilter.recipes import Recipe
from gradfilter.training import load_segmenter
from visionkernels import classification, segmentation
from visionkernels.checkpoints import CheckpointError, load_strict, read_state, stored_options
from visionkernels.evaluation import check_loading
from visionkernels.pictures.labelled import open_pictures
from visionkernels.pictures.recipes import PictureRecipe, SceneRecipe
from visionkernels.pictures.scenes import open_scenes
from visionkernels.pictures.transforms import evaluation_transform

__all__ = ["evaluate_checkpoint", "load_network"]


class Network(NamedTuple):
    """A trained network and how it takes its pictures."""

    model: nn.Module
    num_classes: int
    pictures: PictureRecipe | SceneRecipe
    class_names: tuple[str, ...] | None = None


def load_network(path: str | Path) -> Network:
    """Return the network of a weights file of `gradfilter train` on pictures, in evaluation mode.

    Raises CheckpointError for any other file.
    """
    checkpoint = read_state(path)

    def stored(key: str) -> Any:
        return stored_options(checkpoint, path, key, package="gradfilter")

    options = stored("network")
    if "head" in options:
        network = Network(create_segmenter(**options), options["num_classes"], SceneRecipe(**stored("scene")))
    else:
        network = Network(
            create_classifier(**options), options["num_classes"], PictureRecipe(**stored("pictures")),
            stored("class_names"),
        )  # fmt: skip
    load_strict(network.model, checkpoint.state, source=path)
    network.model.eval()
    return network


def evaluate_checkpoint(
    path: str | Path,
    data: str | None,
    *,
    recipe: Recipe | None = None,
    device: torch.device,
    workers: int = 0,
    batch_size: int = 64,
) -> Mapping[str, float]:
    """Return the metrics of a weights file on the validation data.

    A file of `gradfilter train` says what it holds; for plain weights, official ones too, `recipe` does. `data` is as
    for the training, and not needed for digits. Raises ValueError for missing data, a `batch_size` below 1 or
    `workers` below 0, CheckpointError for other files.
    """
    check_loading(workers, batch_size)
    metadata = read_state(path).metadata
    if recipe is None and metadata.get("model_name") == "tinyconv":
        if data not in (None, "mnist5k"):
            raise ValueError(f"--data {data} cannot be given: {path} was trained on digits, which come with it")
        return evaluate_digits(load_tinyconv(path).to(device), digits("test"))
    if recipe is None and "task" not in metadata:
        raise CheckpointError(f"{path} does not say what it holds; give --recipe NAME, whose network it is of")
    if data is None:
        raise ValueError("--data is missing; give the folder that holds the validation pictures, or shapes")
    network = load_network(path) if recipe is None else _load_plain(path, recipe, data)
    model = network.model.to(device)
    if isinstance(network.pictures, SceneRecipe):
        scenes = open_scenes(data, "validation", network.pictures, num_classes=network.num_classes)
        return segmentation.evaluate(model, scenes, network.pictures, num_classes=network.num_classes, workers=workers)
    pictures = open_pictures(
        data, "validation", evaluation_transform(network.pictures), class_names=network.class_names
    )
    return asdict(
        classification.evaluate(
            model, pictures, num_classes=network.num_classes, batch_size=batch_size, workers=workers
        )
    )


def _load_plain(path: str | Path, recipe: Recipe, data: str) -> Network:
    match recipe:
        case SegmentationRecipe():
            model = create_segmenter(recipe.head, recipe.encoder, num_classes=recipe.num_classes)
            load_segmenter(model, path, num_classes=recipe.num_classes)
            return Network(model.eval(), recipe.num_classes, recipe.scene)
        case ClassificationRecipe():
            pictures = open_pictures(data, "validation", evaluation_transform(recipe.pictures))
            num_classes = len(pictures.class_names)
            model = create_classifier(recipe.model, num_classes=num_classes)
            load_official(model, path)
            return Network(model.eval(), num_classes, recipe.pictures)
        case _:
            raise ValueError(f"--recipe {recipe.name} is of digits, whose weights tell themselves; leave it out")
