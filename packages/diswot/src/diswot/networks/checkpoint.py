"""Official checkpoints into the networks of this package, whose state dicts have the official keys (section 4)."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from diswot.networks.nb101 import GraphCell
from diswot.networks.staged import StagedClassifier
from visionkernels.weights import Checkpoint, load_strict, read_checkpoint

__all__ = ["load_into", "variant_names", "variant_of"]

# the modules that register networks, by the names that timm gives them
_MODULES = (
    "cifar_resnet",
    "cifar_wrn",
    "cifar_vgg",
    "cifar_mobilenet",
    "cifar_shufflenet",
    "cifar_resnet50",
    "nb201",
    "nb101",
    "structure_net",
)


def load_into(model: StagedClassifier, source: str | Path | Checkpoint, *, entry: str | None = None) -> Checkpoint:
    """Load the weights of a .pth or .safetensors file into `model`: all keys, all shapes.

    A training checkpoint, {"opt", "model", ...}, is read without running code that it holds; `entry` names the weights
    where "model" is not meant. A model without classifier leaves the file's out. Returns what was read, with the entry
    that it was taken from. Raises FileNotFoundError, and CheckpointError that names the first five keys that differ
    and the network of this package that the file fits.
    """
    checkpoint = read_checkpoint(source, entry=entry)
    state = _with_aliases(model, checkpoint.state)
    head = state.get(f"{model.classifier_name}.weight")
    keep = [] if model.num_classes else [model.classifier_name]
    load_strict(model, state, source=checkpoint.path, candidates=_candidates(state, head), keep=keep)
    return checkpoint


def variant_names() -> list[str]:
    """Return the names of all networks of this package, as timm has them."""
    return [name for module in _MODULES for name in timm.list_models(module=module)]


def variant_of(checkpoint: Checkpoint) -> str | None:
    """Return the name of the network of this package that a file fits; None for none."""
    state = checkpoint.state
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    for name in _plausible(state):
        head = state[f"{_classifier_of(name)}.weight"]
        if head.ndim == 2 and head.numel() and _shapes(name, len(head)) == shapes:
            return name
    return None


def _with_aliases(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add what a file of NAS-Bench-101 has under one of its two names; where it has both, `last_inop` counts."""
    state = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, GraphCell):
            names = f"{name}.input_op.{len(module.input_op) - 1}.", f"{name}.last_inop."
            for one, other in (names, names[::-1]):
                for key in [key for key in state if key.startswith(one)]:
                    state.setdefault(other + key.removeprefix(one), state[key])
    return state


def _candidates(
    state: Mapping[str, Tensor], head: Tensor | None
) -> Mapping[str, Callable[[], dict[str, tuple[int, ...]]]]:
    classes = 0 if head is None or head.ndim != 2 or not head.numel() else len(head)
    return {name: partial(_shapes, name, classes) for name in _plausible(state)}


def _plausible(state: Mapping[str, Tensor]) -> Iterator[str]:
    """The names whose first convolution and classifier, which their configurations name, the file has."""
    for name in variant_names():
        cfg = timm.get_pretrained_cfg(name)
        assert cfg is not None
        if all(f"{layer}.weight" in state for layer in (cfg.first_conv, cfg.classifier)):
            yield name


def _classifier_of(name: str) -> str:
    cfg = timm.get_pretrained_cfg(name)
    assert cfg is not None
    return str(cfg.classifier)


@cache
def _shapes(name: str, classes: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=classes)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}
