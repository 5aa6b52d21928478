"""Official checkpoints, which are plain backbones: wrappers and prefixes off, then strictly into the model."""

from pathlib import Path

from torch import nn

from visionkernels.checkpoints import CheckpointError, load_strict, read_state

__all__ = ["load_official"]

_PREFIXES = ("module.", "model.", "encoder.", "backbone.")


def load_official(
    model: nn.Module, path: str | Path, *, num_classes: int | None = None, without: tuple[str, ...] = ()
) -> None:
    """Load a weights file into `model`, converted or not, in place.

    Takes .pth and .safetensors, bare or wrapped, with keys that carry the prefixes of trainers ("model.", "encoder.",
    "backbone.", ...). With `num_classes` a classifier of another size stays as the model has it; keys that begin as
    `without` says are left out, for a model that is a part of what was trained. Raises CheckpointError
    for files that are damaged or do not fit, naming the first keys. timm's MobileNetV2 has other keys than
    torchvision's: such official files go into "torchvision:mobilenet_v2".
    """
    state = dict(read_state(path).state)
    wanted = set(model.state_dict())
    while not set(state) & wanted:
        prefix = next((each for each in _PREFIXES if any(key.startswith(each) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith(without)}
    if num_classes is None:
        load_strict(model, state, source=path)
        return
    own = model.state_dict()
    stems = {key.rpartition(".")[0] for key, value in state.items() if key in own and own[key].shape != value.shape}
    if stems - {_classifier(model)}:
        raise CheckpointError(f"{path} differs from the model in more than its classifier: {', '.join(sorted(stems))}")
    load_strict(model, state, source=path, keep=sorted(stems))


def _classifier(model: nn.Module) -> str:
    """Return the name of the last linear layer, or of the last convolution of a model without one."""
    names = {kind: [name for name, module in model.named_modules() if isinstance(module, kind)]
             for kind in (nn.Linear, nn.Conv2d)}  # fmt: skip
    return (names[nn.Linear] or names[nn.Conv2d] or [""])[-1]
