"""Classification of images: recipe, data, loss, training, evaluation, export, and names for what is in a picture."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.nn import functional as F

from visionkernels import models
from visionkernels.checks import InputError, check, check_size
from visionkernels.export import export_program, first_channels
from visionkernels.extras import require
from visionkernels.package import installed_packages
from visionkernels.pictures.labelled import LabelledPictures, open_pictures
from visionkernels.pictures.reading import read_picture
from visionkernels.pictures.recipes import AugmentationRecipe, PictureRecipe
from visionkernels.pictures.transforms import evaluation_transform, training_transform
from visionkernels.recipes import Recipe, data_of
from visionkernels.tasks.sets import LabelledSets
from visionkernels.tasks.sharing import shard_loader
from visionkernels.training.task import Task
from visionkernels.weights import Checkpoint, CheckpointError, Trained, TrainedModel, load_strict, without_prefixes

__all__ = [
    "ClassificationRecipe",
    "ClassificationSets",
    "ClassificationTask",
    "Evaluation",
    "LabelledRecipe",
    "Prediction",
    "build_classifier",
    "class_names",
    "classify",
    "describe_inputs",
    "evaluate",
    "evaluate_trained",
    "export",
    "open_classifier",
    "open_plain",
    "readable_names",
    "untrained",
]


@dataclass(frozen=True, kw_only=True)
class LabelledRecipe(Recipe):
    """A training on images that have a class each."""

    pictures: PictureRecipe = field(default_factory=PictureRecipe)


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(LabelledRecipe):
    """A training whose images vary as timm's do."""

    augmentation: AugmentationRecipe = field(default_factory=AugmentationRecipe)


@dataclass(frozen=True)
class ClassificationSets(LabelledSets):
    """Images with a class each; `source` is as `visionkernels.pictures.labelled.open_pictures` takes it."""

    recipe: LabelledRecipe
    train: LabelledPictures
    validation: LabelledPictures

    @classmethod
    def open(
        cls,
        recipe: LabelledRecipe,
        data: str | Path | None,
        *,
        install: str,
        transform: Callable[[Any], Any] | None = None,
    ) -> "ClassificationSets":
        """Open `data`, by default the recipe's own; `transform` is that of training, by default timm's by the recipe.

        Raises ImportError with the pip line for `install`, and as `open_pictures`.
        """
        for module in ("accelerate", "torchmetrics"):
            require(module, install)
        source = data_of(recipe, data)
        if transform is None:
            assert isinstance(recipe, ClassificationRecipe)
            transform = training_transform(recipe.pictures, recipe.augmentation)
        train = open_pictures(source, "train", transform)
        if len(train.class_names) < 2:
            raise InputError(f"--data {source} has one class, {train.class_names[0]!r}; a classifier needs two or more")
        evaluated = evaluation_transform(recipe.pictures)
        validation = open_pictures(source, "validation", evaluated, class_names=train.class_names)
        return cls(recipe, source, len(train.class_names), train, validation)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names

    def record(self, **details: Any) -> Trained:
        trained = self.recipe.record(self.num_classes)
        return replace(trained, class_names=self.class_names, data=self.source).with_details(**details)

    def measure(self, model: nn.Module, *, workers: int = 0) -> Mapping[str, float]:
        return evaluate(model, self.validation, num_classes=self.num_classes, workers=workers).metrics()


class ClassificationTask(Task):
    """Cross-entropy in float32."""

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        target: Int[Tensor, " batch"] | Float[Tensor, "batch classes"],
    ) -> dict[str, Tensor]:
        """Take images and classes, indices or probabilities; return the loss and the logits."""
        logits = self.trainable_module(images)
        return {"loss": F.cross_entropy(logits.float(), target), "output": logits}


def build_classifier(trained: Trained) -> nn.Module:
    """Return the model of a record with random weights, whose `pretrained_cfg` says how images are prepared."""
    model = _create(trained.package, cast(str, trained.model), **trained.options)
    describe_inputs(model, trained)
    return model


def describe_inputs(model: nn.Module, trained: Trained | None) -> None:
    """Say in a model's `pretrained_cfg`, where timm looks for it, how a record has images prepared."""
    if trained is not None and trained.inputs is not None:
        pictures = PictureRecipe.of_inputs(trained.inputs)
        prepared = {
            "input_size": (first_channels(model), pictures.size, pictures.size),
            "crop_pct": pictures.size / pictures.resize,
            "crop_mode": "center",
            "interpolation": pictures.interpolation,
            "mean": pictures.mean,
            "std": pictures.std,
            "label_names": trained.class_names,
        }
        own = cast(dict[str, Any], getattr(model, "pretrained_cfg", None) or {})
        model.pretrained_cfg = model.default_cfg = {**own, **prepared}  # type: ignore[assignment]


def _create(package: str, name: str, **options: Any) -> nn.Module:
    owner = installed_packages().get(package)
    build = models.create if owner is None else owner.resolve(owner.create)
    model: nn.Module = build(name, **options)
    return model


def open_classifier(checkpoint: Checkpoint) -> nn.Module:
    """Return the classifier of a weights file that says what it is, in evaluation mode."""
    assert checkpoint.trained is not None
    model = build_classifier(checkpoint.trained)
    load_strict(model, checkpoint.state, source=checkpoint.path)
    return model.eval()


def open_plain(checkpoint: Checkpoint, trained: Trained) -> TrainedModel:
    """Open weights that do not say what they are, such as a bare state dict, as the classifier of a record.

    The number of classes is by default that of the outputs in the file. Raises CheckpointError where they do not fit,
    and as `visionkernels.models.create`.
    """
    model = build_classifier(trained)
    state = without_prefixes(checkpoint.state, model)
    classifier = models.classifier_name(model)
    weight = state.get(f"{classifier}.weight")
    if weight is None or weight.ndim < 2:
        raise CheckpointError(f"{checkpoint.path} does not fit {trained.model}: it has no classifier {classifier!r}")
    if "num_classes" not in trained.options:
        trained = replace(trained, options={**trained.options, "num_classes": len(weight)})
        model = build_classifier(trained)
    load_strict(model, state, source=checkpoint.path)
    return TrainedModel(model.eval(), trained, str(checkpoint.path))


def untrained(name: str, num_classes: int | None = None, *, package: str = "") -> TrainedModel:
    """Return the model `name`, as `package` creates it, with random weights."""
    check(num_classes is None or num_classes >= 1, "num_classes", num_classes, "at least 1")
    model = _create(package, name, **({} if num_classes is None else {"num_classes": num_classes}))
    if num_classes is None:
        num_classes = len(cast(Tensor, model.get_submodule(models.classifier_name(model)).weight))
    return as_classifier(model.eval(), name, num_classes, source=name)


def as_classifier(model: nn.Module, name: str, num_classes: int, *, package: str = "", source: str) -> TrainedModel:
    """Return a classifier that no run of ours trained, with a record."""
    trained = Trained(kind="classifier", package=package, model=name, options={"num_classes": num_classes})
    return TrainedModel(model, trained, source)


def evaluate_trained(
    opened: TrainedModel, data: str | Path, *, workers: int = 0, batch_size: int = 64
) -> Mapping[str, float]:
    """Return the metrics of a classifier on the validation images of `data`, prepared as it was trained."""
    model, trained = opened.model, opened.trained
    transform = cast(Any, create_transform(**resolve_model_data_config(model)))
    pictures = open_pictures(data, "validation", transform, class_names=trained.class_names)
    num_classes = trained.options.get("num_classes")
    return asdict(evaluate(model, pictures, num_classes=num_classes, batch_size=batch_size, workers=workers))


def export(opened: TrainedModel, path: Path, *, size: tuple[int, int] | None = None, **options: Any) -> str:
    """Write a classifier as `visionkernels.export.export_program` does; see `visionkernels.tasks.export`."""
    check_size(size)
    model = opened.model
    config = resolve_model_data_config(model)
    channels = first_channels(model)
    height, width = config["input_size"][1:] if size is None else size
    num_classes = opened.trained.options.get("num_classes", getattr(model, "num_classes", None))
    description = {
        "model": opened.trained.model, "num_classes": num_classes, "size": [height, width],
        "label_names": opened.trained.class_names, **{name: config[name] for name in ("mean", "std", "interpolation")},
    }  # fmt: skip
    example = torch.zeros(2, channels, height, width, device=next(model.parameters()).device)
    export_program(model, example, path, description=description, **options)
    return f"images [batch, {channels}, {height}, {width}] to logits [batch, {num_classes}]"


@dataclass(frozen=True)
class Evaluation:
    """How good a classifier is on a data set; accuracies are in percent."""

    top1: float
    top5: float
    """Share of images whose class is among the five best, or among all where there are fewer."""
    loss: float
    """Mean cross-entropy."""
    majority_top1: float
    """Top-1 of always naming the most frequent class."""
    num_pictures: int

    def metrics(self) -> Mapping[str, float]:
        """Return what a training run reports."""
        return {"top1": self.top1, "top5": self.top5, "val_loss": self.loss, "majority_top1": self.majority_top1}


class Prediction(NamedTuple):
    """One of the classes that a picture may be of."""

    name: str
    number: int
    probability: float


def evaluate(
    model: nn.Module,
    pictures: LabelledPictures,
    *,
    num_classes: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    show_progress: bool = True,
) -> Evaluation:
    """Measure a model in evaluation mode, on its device; several processes share the pictures.

    `num_classes` is by default what the model says. Raises ValueError for labels that the model does not have, and
    ImportError without torchmetrics.
    """
    metrics = require("torchmetrics", "torchmetrics")
    device = next(model.parameters()).device
    num_classes = cast(int, model.num_classes) if num_classes is None else num_classes
    check(num_classes >= 2, "num_classes", num_classes, "at least 2: one class cannot be told from others")
    if max(pictures.labels) >= num_classes:
        raise InputError(f"the data has class {max(pictures.labels)}, the model {num_classes} classes")
    accuracy = partial(metrics.classification.MulticlassAccuracy, num_classes, average="micro")
    top1, top5 = accuracy(top_k=1).to(device), accuracy(top_k=min(5, num_classes)).to(device)
    loss = metrics.MeanMetric().to(device)
    model.eval()
    with torch.inference_mode():
        for images, labels in shard_loader(pictures, workers, batch_size, show_progress=show_progress):
            images, labels = images.to(device), labels.to(device)
            logits = model(images).float()
            for metric in (top1, top5):
                metric.update(logits, labels)
            losses = F.cross_entropy(logits, labels, reduction="none")
            loss.update(losses)
    majority = max(Counter(pictures.labels).values()) / len(pictures)
    best, best5 = (round(100 * float(metric.compute()), 4) for metric in (top1, top5))
    return Evaluation(best, best5, float(loss.compute()), 100 * majority, len(pictures))


def classify(
    images: Sequence[str | Path | BinaryIO | Image.Image], model: nn.Module, *, top: int = 5, batch_size: int = 16
) -> list[list[Prediction]]:
    """Return the `top` most probable classes of each picture, the best first, fewer if the model has fewer.

    Pictures are prepared as the model's `pretrained_cfg` says, on its device; it is put in evaluation mode. Raises
    FileNotFoundError, and ValueError that names a file which is no picture.
    """
    if top < 1:
        raise InputError(f"top={top} must be at least 1")
    config = resolve_model_data_config(model)
    transform = create_transform(**config)
    names = class_names(model)
    device = next(model.parameters()).device
    model.eval()
    predictions = []
    for start in range(0, len(images), batch_size):
        pictures = [transform(read_picture(image)) for image in images[start : start + batch_size]]
        with torch.inference_mode():
            probabilities = model(torch.stack(pictures).to(device)).float().softmax(-1)
        values, indices = (found.tolist() for found in probabilities.topk(min(top, len(names))))
        for row, chosen in zip(values, indices, strict=True):
            predictions.append([Prediction(names[i], i, value) for i, value in zip(chosen, row, strict=True)])
    return predictions


def class_names(model: nn.Module) -> list[str]:
    """Return the names of the model's classes, as `readable_names` does from its `pretrained_cfg`."""
    config = cast(dict[str, Any], model.pretrained_cfg)
    return readable_names(cast(int, model.num_classes), config.get("label_names"))


def readable_names(num_classes: int, names: Sequence[str] | None = None) -> list[str]:
    """Return the names of classes: those given, ImageNet's for 1,000 classes, else numbers.

    WordNet's numbers ("n01440764"), which ImageNet's folders have for names, become words.
    """
    imagenet = ImageNetInfo()
    if not names and num_classes == imagenet.num_classes():
        names = imagenet.label_names()
    if names is None or len(names) != num_classes:
        return [f"class {number}" for number in range(num_classes)]
    synsets = set(imagenet.label_names())
    return [imagenet.label_name_to_description(name) if name in synsets else name for name in names]
