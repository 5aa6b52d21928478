"""From a weights file of any package to its model."""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from visionkernels.checks import InputError
from visionkernels.models import is_callable
from visionkernels.package import Package, installed_packages, resolve
from visionkernels.weights.reading import Checkpoint, CheckpointError, read_checkpoint
from visionkernels.weights.trained import Trained

__all__ = ["TrainedModel", "open_trained"]

# builds a model by name and loads weights that do not say what they are
_PLAIN = "visionkernels.tasks.classification:open_plain"


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode with its weights, and what they say of themselves."""

    model: nn.Module
    trained: Trained
    source: str
    """For messages: the file."""


def open_trained(
    source: str | Path | Checkpoint,
    *,
    package: Package | str | None = None,
    model: str | None = None,
    num_classes: int | None = None,
) -> TrainedModel:
    """Open a weights file that any package wrote, an official one of `package`, or a bare state dict.

    A file of this project says which model it holds. For every other one, `model` names it (see
    `visionkernels.models.create`; or a recipe of `package`, whose model it is) and `num_classes`, by default the number
    of outputs in the file; without `model` it must be an official file of `package`, a record or the name of an
    installed one. Raises FileNotFoundError, CheckpointError for a file that is damaged or does not fit, and InputError
    for a `model` that contradicts the file.
    """
    if isinstance(package, str):
        package = installed_packages()[package]
    checkpoint = read_checkpoint(source)
    trained = checkpoint.trained
    if trained is None:
        if model is not None:
            return _open_plain(checkpoint, package, model, num_classes)
        if package is None or package.official is None:
            raise CheckpointError(f"{checkpoint.path} does not name its model; give --model NAME [--num-classes N]")
        package.register_models()
        official: TrainedModel = package.resolve(package.official)(checkpoint, None)
        return official
    if model not in (None, trained.model):
        raise InputError(f"{checkpoint.path} holds the weights of {trained.model}, not of --model {model}")
    stored = trained.options.get("num_classes")
    if num_classes not in (None, stored):
        raise InputError(f"{checkpoint.path} holds a model of {stored} classes, not of --num-classes {num_classes}")
    owner = installed_packages().get(trained.package)
    if owner is None:
        raise CheckpointError(
            f"{checkpoint.path} was written by the package {trained.package!r}, which is not installed here"
        )
    if trained.kind not in owner.openers:
        raise CheckpointError(
            f"{checkpoint.path} holds the kind {trained.kind!r}, which this release of {owner.name} does not know"
        )
    if is_callable(trained.model, owner.sources) and model is None:
        raise CheckpointError(
            f"{checkpoint.path} names {trained.model}, code that a file may not run; name it yourself: "
            f"--model {trained.model}"
        )
    owner.register_models()
    return TrainedModel(resolve(owner.openers[trained.kind])(checkpoint), trained, str(checkpoint.path))


def _open_plain(checkpoint: Checkpoint, package: Package | None, model: str, num_classes: int | None) -> TrainedModel:
    """Open weights as the model `model`: the classifier of this name, or the model of a recipe of `package`."""
    options = {} if num_classes is None else {"num_classes": num_classes}
    trained = Trained(kind="classifier", package="" if package is None else package.name, model=model, options=options)
    if package is not None:
        package.register_models()
        recipes = {} if package.recipes is None else package.resolve(package.recipes)
        if model in recipes:
            trained = recipes[model].record(num_classes)
        elif package.official is not None:
            official: TrainedModel | None = package.resolve(package.official)(checkpoint, model)
            if official is not None:
                return official
        if trained.kind != "classifier":
            opened = resolve(package.openers[trained.kind])(replace(checkpoint, trained=trained))
            return TrainedModel(opened, trained, str(checkpoint.path))
    by_name: TrainedModel = resolve(_PLAIN)(checkpoint, trained)
    return by_name
