"""Official checkpoints, which are plain networks: wrappers and prefixes off, then strictly into the model."""

from pathlib import Path

from torch import nn

from visionkernels import models
from visionkernels.weights import Checkpoint, CheckpointError, load_strict, read_checkpoint, without_prefixes

__all__ = ["load_into", "load_official"]


def load_official(source: str | Path | Checkpoint, name: str, *, num_classes: int | None = None) -> nn.Module:
    """Return the network `name` with the weights of a file, in evaluation mode.

    Networks are named as `visionkernels.models.create` takes them; official weights do not say which they are. timm's
    MobileNetV2 has other keys than torchvision's: such official files go into "torchvision:mobilenet_v2". Raises as
    `load_into` and `create`.
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

    Takes .pth and .safetensors, bare or wrapped, with keys that carry the prefixes of trainers ("model.", "encoder.",
    "backbone.", ...). With `num_classes` a classifier of another size stays as the model has it; keys that begin with
    one of `without` are left out, for a model that is a part of what was trained. Raises CheckpointError for files that
    are damaged or do not fit, naming the first keys.
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
