"""Features for distillation losses, read by hooks in an ordinary forward pass: maps, pooled vectors, logits.

A plan names modules, so that it fits every copy of a network; hooks exist only during one pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm.layers
from jaxtyping import Float
from torch import Tensor, nn

from diswot.losses import Features, Source
from diswot.networks import StagedClassifier
from diswot.networks.staged import BlockReLU
from visionkernels.checks import InputError, check_choice

__all__ = ["FeaturePlan", "find_classifier", "find_stages", "plan_features", "read_features"]

_ACTIVATIONS = (
    BlockReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    timm.layers.GELU,
    timm.layers.Swish,
    timm.layers.HardSwish,
)


@dataclass(frozen=True)
class FeaturePlan:
    """The modules of a network whose outputs are the features of a source."""

    source: Source
    modules: tuple[str, ...] = ()
    """Modules of the maps, in order; for "pooled", the classifier."""


def plan_features(model: nn.Module, source: Source, layers: Sequence[str] = ()) -> FeaturePlan:
    """Return where `model` has the features that `Distiller.source` names.

    The stages are `layers`, names of modules whose outputs are maps, or else those of `find_stages`. "last_map" is that
    of the last one, "middle_map" of number (n + 1) // 2 of n. "all_maps" has the stem in front, where one is found;
    given `layers` are all maps. Raises ValueError for a source that is none, for names that `model` lacks, and as
    `find_stages` and `find_classifier` do.
    """
    check_choice("source", source, Source)
    if source == "logits":
        return FeaturePlan(source)
    if source == "pooled":
        return FeaturePlan(source, (find_classifier(model)[0],))
    stem: str | None = None
    if layers:
        stages = tuple(layers)
        known = {name for name, _ in model.named_modules() if name}
        if strange := [name for name in stages if name not in known]:
            raise InputError(f"layers has {strange[0]!r}, no module of {type(model).__name__}; {_children(model)}")
    else:
        stem, stages = find_stages(model)
    match source:
        case "last_map":
            return FeaturePlan(source, stages[-1:])
        case "middle_map":
            return FeaturePlan(source, (stages[(len(stages) - 1) // 2],))
        case "all_maps":
            return FeaturePlan(source, stages if stem is None else (stem, *stages))
    return FeaturePlan(source, stages)


def find_stages(model: nn.Module) -> tuple[str | None, tuple[str, ...]]:
    """Return the names of the stem, if there is one, and of the stages.

    Networks of this package and of timm list them in `feature_info`: the first entry is the stem for ours, and for
    others where its module has no parts. Networks like torchvision's ResNet have them in layer1, layer2, ... after
    `relu`. Raises ValueError for other networks, with their children.
    """
    info = getattr(model, "feature_info", None)
    if info is not None:
        names = tuple(entry["module"] for entry in info)
        has_stem = isinstance(model, StagedClassifier) or not list(model.get_submodule(names[0]).children())
        return (names[0], names[1:]) if has_stem and len(names) > 1 else (None, names)
    children = dict(model.named_children())
    numbered = sorted(name for name in children if name.startswith("layer") and name[5:].isdigit())
    if not numbered:
        raise InputError(f"the stages of {type(model).__name__} are not known; name them by layers: {_children(model)}")
    return ("relu" if isinstance(children.get("relu"), nn.ReLU) else None), tuple(numbered)


def find_classifier(model: nn.Module) -> tuple[str, nn.Linear]:
    """Return the name and the module of the linear classifier: that of timm's `get_classifier`, else the last one.

    Raises ValueError for a network without.
    """
    modules = dict(model.named_modules())
    if callable(get_classifier := getattr(model, "get_classifier", None)):
        classifier = get_classifier()
        if isinstance(classifier, nn.Linear):
            return next(name for name, module in modules.items() if module is classifier), classifier
    linear = [(name, module) for name, module in modules.items() if isinstance(module, nn.Linear)]
    if not linear:
        raise InputError(f"{type(model).__name__} has no linear classifier; {_children(model)}")
    return linear[-1]


def read_features(
    model: nn.Module, images: Float[Tensor, "batch channels height width"], plan: FeaturePlan
) -> tuple[Float[Tensor, "batch classes"], Features]:
    """Run `model` and return its logits and the features of `plan`, as a `Distiller` takes them.

    Maps are [B, C, H, W]; those of networks that say `output_fmt` "NHWC" are turned. Preactivations are the inputs of
    the last activation that runs within each stage; where that has another shape than the stage's output, the stage
    ends without one, and its output is taken. Raises ValueError for modules that did not run or give no maps.
    """
    seen: dict[str, Tensor] = {}
    with _watching(model, plan, seen):
        logits: Tensor = model(images)
    missing = [name for name in plan.modules if name not in seen]
    if missing:
        raise InputError(f"module {missing[0]!r} of {type(model).__name__} took no part in its forward pass")
    if plan.source == "logits":
        return logits, logits
    if plan.source == "pooled":
        return logits, seen[plan.modules[0]]
    is_turned = getattr(model, "output_fmt", "NCHW") == "NHWC"
    maps = [_as_map(model, name, seen[name], is_turned=is_turned) for name in plan.modules]
    return logits, maps[0] if plan.source in ("last_map", "middle_map") else maps


@contextmanager
def _watching(model: nn.Module, plan: FeaturePlan, seen: dict[str, Tensor]) -> Iterator[None]:
    handles = []
    for name in plan.modules:
        module = model.get_submodule(name)
        if plan.source == "pooled":
            handles.append(module.register_forward_pre_hook(_note_input(name, seen)))
            continue
        before: dict[str, Tensor] = {}
        if plan.source == "preactivations":
            activations = (part for part in module.modules() if isinstance(part, _ACTIVATIONS))
            # prepended: where the stage is an activation, its input must be there before its output
            handles += [part.register_forward_pre_hook(_note_input(name, before)) for part in activations]
        handles.append(module.register_forward_hook(_note_output(name, seen, before)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note_input(name: str, seen: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # an activation in place overwrites what it takes
        seen[name] = inputs[0].clone() if getattr(module, "inplace", False) else inputs[0]

    return note


def _note_output(
    name: str, seen: dict[str, Tensor], before: dict[str, Tensor]
) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def note(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        earlier = before.get(name)
        is_last = earlier is not None and isinstance(output, Tensor) and earlier.shape == output.shape
        seen[name] = earlier if is_last and earlier is not None else output

    return note


def _as_map(model: nn.Module, name: str, features: Any, *, is_turned: bool) -> Tensor:
    if not isinstance(features, Tensor) or features.ndim != 4:
        what = f"gives {list(features.shape)}" if isinstance(features, Tensor) else f"gives a {type(features).__name__}"
        raise InputError(
            f"module {name!r} of {type(model).__name__} {what}, no map [batch, channels, height, width]; name others "
            "by layers, or take a loss of logits or pooled vectors (rkd, pkt, cc, crd)"
        )
    return features.movedim(-1, 1) if is_turned else features


def _children(model: nn.Module) -> str:
    return f"its children are {', '.join(name for name, _ in model.named_children()) or 'none'}"
