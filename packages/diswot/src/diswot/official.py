"""Official weights of the paper's networks, and records for weights files of earlier releases."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from diswot.models import create_network
from diswot.networks import StagedClassifier, load_into, variant_names, variant_of
from visionkernels.tasks.classification import as_classifier
from visionkernels.weights import Checkpoint, CheckpointError, Trained, TrainedModel, read_checkpoint

__all__ = ["load_official", "open_official", "upgrade"]


def load_official(
    source: str | Path | Checkpoint,
    name: str | None = None,
    *,
    entry: str | None = None,
    num_classes: int | None = None,
) -> nn.Module:
    """Return the network of an official .pth or .safetensors file, in evaluation mode.

    `name` is one of `diswot.networks.variant_names()` or SPACE:KEY of a search space, by default the one that the file
    fits; `num_classes` is by default that of its classifier, and 0 leaves the classifier out. `entry` names the weights
    where a file has several. Raises FileNotFoundError, and CheckpointError for a file that fits no network, naming the
    first five keys that differ.
    """
    checkpoint = read_checkpoint(source, entry=entry)
    name = variant_of(checkpoint) if name is None else name
    if name is None:
        raise CheckpointError(f"{checkpoint.path} fits none of this package's networks; name its model (--model NAME)")
    model = create_network(name, num_classes=num_classes)
    if not isinstance(model, StagedClassifier):
        raise CheckpointError(f"{name} is no network of this package; open its weights with open_trained")
    if num_classes is None:
        weight = checkpoint.state.get(f"{model.classifier_name}.weight")
        if weight is None or weight.ndim != 2 or not weight.numel():
            raise CheckpointError(
                f"{checkpoint.path} does not fit {name}: it has no classifier {model.classifier_name!r}"
            )
        model = create_network(name, num_classes=len(weight))
        assert isinstance(model, StagedClassifier)
    load_into(model, checkpoint)
    return model.eval()


def open_official(checkpoint: Checkpoint, name: str | None = None) -> TrainedModel | None:
    """Return the network of an official file with its record; None for a `name` that is no network of this package.

    Raises CheckpointError as `load_official`.
    """
    if name is not None and name not in variant_names() and not isinstance(create_network(name), StagedClassifier):
        return None
    name = variant_of(checkpoint) if name is None else name
    model = load_official(checkpoint, name)
    assert name is not None and isinstance(model, StagedClassifier)
    return as_classifier(model, name, model.num_classes, package="diswot", source=str(checkpoint.path))


def upgrade(metadata: Mapping[str, str], state: Mapping[str, Tensor]) -> Trained | None:
    """Return the record of a file of an early diswot 0.1, which has none, or None for another file."""
    if "diswot" not in metadata or "model_name" not in metadata:
        return None
    return Trained(
        kind="classifier",
        package="diswot",
        model=metadata["model_name"],
        options=json.loads(metadata["model_options"]),
        inputs=json.loads(metadata["pictures"]),
        class_names=tuple(json.loads(metadata["class_names"])),
        data=metadata["data"],
        settings=json.loads(metadata["settings"]),
        versions={"diswot": metadata["diswot"]},
    )
