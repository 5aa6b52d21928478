"""Official checkpoints: weights of plain networks in wrappers and under prefixes, loaded strictly."""

from pathlib import Path

from torch import nn

from visionkernels import models
from visionkernels.weights import Checkpoint, CheckpointError, load_strict, read_checkpoint, without_prefixes

__all__ = ["load_into", "load_official"]


def load_official(source: str | Path | Checkpoint, name: str, *, num_classes: int | None = None) -> nn.Module:
    """Return the network `name` with the weights of a file, in evaluation mode.

    `name` is as for `visionkernels.models.create`, since official files do not name their network. Official MobileNetV2
    files have the keys of "torchvision:mobilenet_v2", not of timm's. Raises as `load_into` and `create`.
    """
    model = models.create(name, num_classes=num_classes)
    load_into(model, source, num_classes=num_classes)
    return model.eval()


def load_into(
    model: nn.Module,
    source: str | Path | Checkpoint,
    *,
    num_classes: int | None = None,
    without: tuple[str, ...] = (),
) -> None:
    """Load a weights file into `model`, converted or not, in place.

    Takes .pth and .safetensors, bare or wrapped, with or without the prefixes of trainers ("model.", "encoder.",
    "backbone.", ...). With `num_classes`, a classifier of another size in the file is ignored. Keys that begin with one
    of `without` are ignored, for a model that is a part of the trained one. Raises CheckpointError for files that are
    damaged or do not fit, naming the first keys.
    """
    checkpoint = read_checkpoint(source)
    state = without_prefixes(checkpoint.state, model)
    state = {key: value for key, value in state.items() if not key.startswith(without)}
    if num_classes is None:
        load_strict(model, state, source=checkpoint.path)
        return
    own = model.state_dict()
    stems = {key.rpartition(".")[0] for key, value in state.items() if key in own and own[key].shape != value.shape}
    if stems - {models.classifier_name(model)}:
        listed = ", ".join(sorted(stems))
        raise CheckpointError(f"{checkpoint.path} differs from the model in more than its classifier: {listed}")
    load_strict(model, state, source=checkpoint.path, keep=sorted(stems))
