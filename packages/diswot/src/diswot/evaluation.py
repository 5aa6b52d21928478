"""Networks with trained weights, and how good they are on validation data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from timm.data import resolve_model_data_config
from torch import nn

from diswot.data import CIFAR_MEAN, CIFAR_STD
from diswot.features import find_classifier
from diswot.models import create_network
from diswot.networks import StagedClassifier, load_official
from visionkernels import classification
from visionkernels.checkpoints import Checkpoint, CheckpointError, load_strict, read_state, stored_options
from visionkernels.evaluation import check_loading
from visionkernels.pictures.labelled import open_pictures
from visionkernels.pictures.recipes import PictureRecipe
from visionkernels.pictures.transforms import evaluation_transform

__all__ = ["TrainedNetwork", "build_network", "evaluate_checkpoint", "load_network"]


@dataclass(frozen=True)
class TrainedNetwork:
    """A network in evaluation mode, and what it is for."""

    model: nn.Module
    name: str
    num_classes: int
    pictures: PictureRecipe
    class_names: tuple[str, ...] | None = None
    data: str | None = None
    """Of its training."""


def build_network(
    name: str, num_classes: int, pictures: PictureRecipe, class_names: Sequence[str] | None = None
) -> nn.Module:
    """Return a network of `diswot.models` with random weights, whose `pretrained_cfg` tells how it takes pictures."""
    model = create_network(name, num_classes=num_classes)
    cfg = {
        "input_size": (3, pictures.size, pictures.size),
        "crop_pct": pictures.size / pictures.resize,
        "interpolation": pictures.interpolation,
        "mean": pictures.mean,
        "std": pictures.std,
        "label_names": class_names,
    }
    own = cast(dict[str, Any], getattr(model, "pretrained_cfg", None) or {})
    model.pretrained_cfg = {**own, **cfg}  # type: ignore[assignment]
    return model


def load_network(path: str | Path, name: str | None = None) -> TrainedNetwork:
    """Return the network of a weights file: one of `diswot train`, which tells it, or plain or official weights.

    `name` tells the network of plain weights; the number of classes is that of their classifier. Raises
    FileNotFoundError, CheckpointError for a file that does not fit, ValueError where no name is told, or another one.
    """
    checkpoint = read_state(path)
    told = checkpoint.metadata.get("model_name")
    if told is None:
        if name is None:
            raise ValueError(f"{path} does not tell its network; give --model NAME")
        return _load_plain(checkpoint, path, name)
    if name not in (None, told):
        raise ValueError(f"{path} holds the weights of {told}, not of {name}")

    def stored(key: str) -> Any:
        return stored_options(checkpoint, path, key, package="diswot")

    pictures, class_names = PictureRecipe(**stored("pictures")), stored("class_names")
    num_classes = stored("model_options")["num_classes"]
    model = build_network(told, num_classes, pictures, class_names)
    load_strict(model, checkpoint.state, source=path)
    return TrainedNetwork(model.eval(), told, num_classes, pictures, class_names, checkpoint.metadata.get("data"))


def evaluate_checkpoint(
    checkpoint: str | Path,
    data: str | Path | None,
    *,
    model: str | None = None,
    device: torch.device,
    batch_size: int = 64,
    workers: int = 0,
) -> Mapping[str, float]:
    """Return the metrics of a weights file, those of `visionkernels.classification.Evaluation`, on validation data.

    `data` is as for `visionkernels.pictures.labelled.open_pictures`, by default what the network was trained on;
    `model` is the `name` of `load_network`. Raises ValueError for no data, a `batch_size` below 1 or `workers` below 0,
    and as those functions do.
    """
    check_loading(workers, batch_size)
    network = load_network(checkpoint, model)
    data = data or network.data
    if data is None:
        raise ValueError(f"{checkpoint} does not tell its data; give --data FOLDER")
    transform = evaluation_transform(network.pictures)
    pictures = open_pictures(data, "validation", transform, class_names=network.class_names)
    return asdict(
        classification.evaluate(
            network.model.to(device),
            pictures,
            num_classes=network.num_classes,
            batch_size=batch_size,
            workers=workers,
        )
    )


def _load_plain(checkpoint: Checkpoint, path: str | Path, name: str) -> TrainedNetwork:
    classifier, _ = find_classifier(create_network(name))
    weight = checkpoint.state.get(f"{classifier}.weight")
    if weight is None or weight.ndim != 2:
        raise CheckpointError(f"{path} does not fit {name}: it has no classifier {classifier!r}")
    num_classes = len(weight)
    model = create_network(name, num_classes=num_classes)
    if isinstance(model, StagedClassifier):
        load_official(model, path)
    else:
        load_strict(model, checkpoint.state, source=path)
    return TrainedNetwork(model.eval(), name, num_classes, _pictures_of(model, name))


def _pictures_of(model: nn.Module, name: str) -> PictureRecipe:
    """How a network takes pictures where no training tells: timm's way, ImageNet's for torchvision, else CIFAR's."""
    if not getattr(model, "pretrained_cfg", None) and not name.startswith("torchvision:"):
        return PictureRecipe(size=32, resize=32, interpolation="bilinear", mean=CIFAR_MEAN, std=CIFAR_STD)
    config = resolve_model_data_config(model)
    size = config["input_size"][-1]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    resize = round(size / config["crop_pct"])
    return PictureRecipe(size=size, resize=resize, interpolation=interpolation, mean=config["mean"], std=config["std"])
