"""Conversion of a model for training with filtered gradients, and back: `convert(model, last_n=4, radius=4)`."""

import difflib
import fnmatch
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from tabulate import tabulate
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from gradfilter import lean
from gradfilter.conv import (
    BEFORE_CONVERSION,
    CompactConv2d,
    FilteredConv2d,
    as_exact,
    as_filtered,
    why_unfilterable,
)
from gradfilter.cost import layer_coverage
from gradfilter.timing import wins_time
from gradfilter.trace import Call, Trace, trace
from visionkernels.checks import InputError, check_choice
from visionkernels.modules import copy_module
from visionkernels.ops.filtered_conv import Border, Radius, check_radius

__all__ = [
    "ConversionReport",
    "LayerReport",
    "Objective",
    "Radii",
    "TrainNorm",
    "choose",
    "convert",
    "decide",
    "exact_twin",
    "restore",
]

Radii = Radius | None | Mapping[str, Radius | None]
Objective = Literal["memory", "time"]
LeanActivations = Literal["all"] | bool | None
TrainNorm = Literal["after", "none", "all"]

MIN_COVERAGE = 0.5
"""Below this share more than half of the taps read padding, and the gradient is at least twice too large."""


@dataclass(frozen=True)
class LayerReport:
    """What `convert` did to one convolution."""

    name: str
    status: Literal["filtered", "exact", "frozen"]
    radius: tuple[int, int] | None
    reason: str = ""
    """Why it is not filtered."""


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did to each layer, in the order of execution."""

    layers: tuple[LayerReport, ...]
    lean_activations: tuple[str, ...]
    """Modules that now keep less for backward."""
    frozen_norms: tuple[str, ...]
    """Batch norms that use their running statistics in training mode too."""
    functional_activations: tuple[str, ...]
    """Activations called as functions, which stay as they are."""
    checkpointed: tuple[str, ...] = ()
    """Filtered convolutions in an activation checkpoint, which keeps little for backward anyway."""
    moving_norms: tuple[str, ...] = ()
    """Batch norms without trained parameters that `norm_stats="frozen"` could not freeze, as "module: class"."""

    @property
    def filtered(self) -> tuple[str, ...]:
        """Names of the filtered convolutions."""
        return tuple(layer.name for layer in self.layers if layer.status == "filtered")

    def __str__(self) -> str:
        rows = [
            (layer.name, layer.status, "x".join(map(str, layer.radius or ())), layer.reason)
            for layer in self.layers
            if layer.status != "frozen" or layer.reason
        ]
        frozen = sum(layer.status == "frozen" for layer in self.layers)
        lines = [tabulate(rows, ("convolution", "", "radius", "why"), tablefmt="simple")]
        lines.append(f"{frozen} convolutions frozen, {len(self.lean_activations)} activations lean, ")
        lines[-1] += f"{len(self.frozen_norms)} norms use their running statistics"
        lines += [f"not lean, called as a function: {name}" for name in self.functional_activations]
        lines += [f"in an activation checkpoint: {name}" for name in self.checkpointed]
        lines += [f"statistics not frozen, unknown class: {name}" for name in self.moving_norms]
        return "\n".join(lines)


def convert(
    model: nn.Module,
    radius: Radii = 2,
    *,
    last_n: int | None = None,
    layers: Sequence[str] | None = None,
    example_input: Any = None,
    objective: Objective = "memory",
    lean_activations: LeanActivations = None,
    freeze_rest: bool = True,
    train_norm: TrainNorm = "after",
    norm_stats: Literal["frozen", "update"] = "frozen",
    border: Border = "plain",
    compact: bool = False,
    exportable: bool = False,
    warns: bool = True,
) -> ConversionReport:
    """Prepare `model`, in place, for training its chosen convolutions with filtered gradients.

    Parameters, state dict and forward pass stay as they are. A chosen layer stays exact, but is trained, if its class
    computes its weight, if `objective="time"` finds that filtering would be slower, or if most of its taps read padding
    (unless `layers` names it or `border="covered"`). A layer that already was a `FilteredConv2d` stays filtered if it
    is chosen. A second call starts from the unconverted model.

    Args:
        model: any module that runs `nn.Conv2d`
        radius: side of a patch in outputs, or a dict from names and patterns to it; None leaves a layer exact, or keeps
            the radius of a `FilteredConv2d`
        last_n: number of convolutions to choose, counted from the end of the order of execution
        layers: names or patterns such as "layer4.*" of the convolutions to choose, instead of `last_n`; default: all
        example_input: tensor, tuple or dict that the model takes, if one image of the model's own size would not do;
            `objective="time"` measures its batch
        objective: "time" filters the layers that win two measurements on this machine
        lean_activations: ReLU, ReLU6 and dropout after the first chosen layer keep one bit per element; "all": also
            hard-swish and SiLU, approximate at one byte per element; None: True unless `exportable`
        freeze_rest: train only the chosen convolutions, the linear layers after the first of them, and norms
        train_norm: which norms to train: those after the first chosen layer, none, or all
        norm_stats: "frozen": batch norms without trained parameters use their running statistics in training mode too
            (torch's for images, synchronised ones and timm's; the report lists others)
        border: how taps that read padding count, as for `filtered_conv2d`
        compact: train scale * weight + offset (see `CompactConv2d`); the state dict holds these until `restore`
        exportable: build gradients that exported training graphs hold (see `straight_through` of `filtered_conv2d`);
            excludes `lean_activations` and `compact`
        warns: warn where layers stay exact because of their borders, if no layer is filtered, and where filtered layers
            run in an activation checkpoint of `torch.utils.checkpoint`, which already saves most of that memory

    Raises ValueError for wrong arguments, with the count or the nearest names; the model is then unchanged.
    """
    _check_choices(objective, lean_activations, train_norm, norm_stats, border)
    if compact and border == "covered":
        raise InputError("compact=True with border='covered' is not exact; choose one of the two")
    if exportable and (compact or lean_activations):
        other = "compact=True" if compact else f"lean_activations={lean_activations!r}"
        raise InputError(f"exportable=True with {other}: a graph would lose its gradients; choose one of the two")
    lean_activations = not exportable if lean_activations is None else lean_activations
    traced = trace(model, example_input)
    chosen = choose(traced, last_n, layers)
    radii = _radii(radius, chosen)
    first_name, is_named = chosen[0].name, layers is not None

    def look(calls: Sequence[Call]) -> dict[str, LayerReport]:
        return {
            call.name: decide(
                _unconverted(call), radii[call.name], is_named, objective, border, is_first=call.name == first_name
            )
            for call in calls
        }

    plan = look(chosen)
    if objective == "time":  # among many measurements, some are lucky: what was chosen has to win again, later
        plan |= look([call for call in chosen if plan[call.name].status == "filtered"])
    if compact:
        _check_untied(model, [call.module for call in chosen if _becomes_compact(call, plan)])
    # nothing below fails, so that a wrong call leaves the model as it was
    restore(model)
    _remember(model)
    first = traced.order.index(chosen[0].name)
    if freeze_rest:
        _freeze_rest(model, traced, chosen, first, train_norm)
    for call in chosen:
        if plan[call.name].status == "filtered":
            as_filtered(call.module, plan[call.name].radius or 1, border=border, exportable=exportable)
            if compact and _becomes_compact(call, plan) and not isinstance(call.module, CompactConv2d):
                CompactConv2d.from_filtered(call.module)
    lean_names = _make_lean(model, traced.order[first:], lean_activations)
    frozen = _freeze_norms(model) if norm_stats == "frozen" else ()
    report = ConversionReport(
        (*_report_layers(traced, plan), *_other_convolutions(model)), lean_names, frozen,
        tuple(traced.functions) if lean_activations else (),
        tuple(name for name in traced.checkpointed if name in plan and plan[name].status == "filtered"),
        _moving_norms(model) if norm_stats == "frozen" else (),
    )  # fmt: skip
    if warns:
        _warn(report)
    return report


def _becomes_compact(call: Call, plan: Mapping[str, LayerReport]) -> bool:
    return plan[call.name].status == "filtered" and call.module.kernel_size != (1, 1)


def _check_untied(model: nn.Module, convolutions: Sequence[nn.Conv2d]) -> None:
    """Raise InputError for a weight that another module holds as well: a compact layer would train one of its own."""
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for module in convolutions:
        weight = module._parameters.get("base", module._parameters.get("weight"))
        if len(names := owners[id(weight)]) > 1:
            raise InputError(f"compact=True would untie {' and '.join(names)}, which are one weight; leave compact out")


def restore(model: nn.Module) -> None:
    """Undo `convert` in all of `model`: restore classes, settings, Parameters and what was trainable.

    `model` may be the converted model, a part of it, or a larger one. Modules and parameters that were added since
    `convert` stay as they are.
    """
    for module in model.modules():
        before: _Before | None = module.__dict__.pop(BEFORE_CONVERSION, None)
        if before is None:
            continue
        if isinstance(module, CompactConv2d) and not issubclass(before.kind, CompactConv2d):
            module.fold()
        # another class is not convert's: FSDP and parametrizations change it as well
        if isinstance(module, _TWINS):
            module.__class__ = before.kind
        for name in _SETTINGS if isinstance(module, nn.Conv2d) else ():
            module.__dict__.pop(name, None)
        module.__dict__.update(before.settings)
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(before.is_trainable.get(name, parameter.requires_grad))


_SETTINGS = ("radius", "border", "exportable", "pads_to_same")
_TWINS: tuple[type[nn.Module], ...] = (
    FilteredConv2d,
    *lean.EXACT.values(),
    *lean.APPROXIMATE.values(),
    lean.FrozenBatchNorm2d,
)


@dataclass(frozen=True)
class _Before:
    """State of one module that `convert` may change."""

    kind: type[nn.Module]
    settings: dict[str, Any]
    is_trainable: dict[str, bool]


def _remember(model: nn.Module) -> None:
    for module in model.modules():
        settings = {name: value for name, value in vars(module).items() if name in _SETTINGS}
        is_trainable = {name: parameter.requires_grad for name, parameter in module.named_parameters(recurse=False)}
        is_convolution = isinstance(module, nn.Conv2d)
        module.__dict__[BEFORE_CONVERSION] = _Before(type(module), settings if is_convolution else {}, is_trainable)


def _unconverted(call: Call) -> Call:
    """Return the call of a layer as it was before `convert`, by means of a copy if it was converted."""
    if BEFORE_CONVERSION not in call.module.__dict__:
        return call
    twin = copy_module(call.module)
    restore(twin)
    return replace(call, module=twin)


def exact_twin(model: nn.Module) -> nn.Module:
    """Return a copy of `model` without filtered layers, whether `convert` made them or not."""
    twin = copy_module(model)
    restore(twin)
    for module in twin.modules():
        if isinstance(module, FilteredConv2d):
            as_exact(module)
    return twin


def _check_choices(
    objective: object, lean_activations: object, train_norm: object, norm_stats: object, border: object
) -> None:
    for name, value, allowed in (
        ("objective", objective, get_args(Objective)),
        ("lean_activations", True if lean_activations is None else lean_activations, (True, False, "all")),
        ("train_norm", train_norm, get_args(TrainNorm)),
        ("norm_stats", norm_stats, ("frozen", "update")),
        ("border", border, get_args(Border)),
    ):
        check_choice(name, value, allowed)


def choose(traced: Trace, last_n: int | None, layers: Sequence[str] | None) -> list[Call]:
    """Return the chosen convolutions in the order of execution; arguments and errors are those of `convert`."""
    calls = traced.convolutions
    if not calls:
        raise InputError("the model runs no nn.Conv2d; there is nothing to filter")
    if last_n is not None and layers is not None:
        raise InputError(f"last_n={last_n} and layers={layers} exclude each other")
    if last_n is not None:
        if not isinstance(last_n, int) or isinstance(last_n, bool):
            raise InputError(f"last_n={last_n!r} must be an integer in [1, {len(calls)}]")
        if not 1 <= last_n <= len(calls):
            raise InputError(f"last_n={last_n} must be in [1, {len(calls)}], the convolutions that the model runs")
        return calls[-last_n:]
    if layers is None:
        return calls
    if not isinstance(layers, Collection) or not layers:
        raise InputError(f"layers={layers!r} names no convolution; give names or patterns, or None for all")
    names = _matches([call.name for call in calls], layers)
    return [call for call in calls if call.name in names]


def _matches(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Return the names that match; raise InputError for a pattern without a match, with the nearest names."""
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise InputError(f"{pattern!r} must be a string: the name or pattern of a convolution")
        hits = fnmatch.filter(names, pattern)
        if not hits:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0) or list(names[:3])
            raise InputError(f"{pattern!r} names no convolution that the model runs; the nearest are {', '.join(near)}")
        matched.update(hits)
    return matched


def _radii(radius: Radii, chosen: Sequence[Call]) -> dict[str, tuple[int, int] | None]:
    names = [call.name for call in chosen]
    if not isinstance(radius, Mapping):
        return dict.fromkeys(names, None if radius is None else check_radius(radius))
    radii: dict[str, tuple[int, int] | None] = {}
    for pattern, value in radius.items():
        side = None if value is None else check_radius(value)
        radii |= dict.fromkeys(_matches(names, [pattern]), side)
    if missing := [name for name in names if name not in radii]:
        raise InputError(f"radius names no value for {', '.join(missing[:5])}; add a pattern, e.g. '*'")
    return radii


def decide(
    call: Call, radius: tuple[int, int] | None, is_named: bool, objective: Objective, border: Border, *, is_first: bool
) -> LayerReport:
    """Return whether `convert` filters a chosen layer, and the reason if not."""
    if isinstance(call.module, FilteredConv2d):  # whoever built it wants it filtered
        if border == "covered" and isinstance(call.module, CompactConv2d):
            raise InputError(f"border={border!r} is not exact for {call.name}, a compact layer; it takes 'plain'")
        return LayerReport(call.name, "filtered", radius or call.module.radius)
    if radius is None:
        return LayerReport(call.name, "exact", None, "radius None")
    if (reason := why_unfilterable(call.module)) is not None:
        return LayerReport(call.name, "exact", None, reason)
    share = layer_coverage(call)
    if share < MIN_COVERAGE and border == "plain" and not is_named:
        return LayerReport(call.name, "exact", None, f"gradient overestimated: coverage {share:.2f}")
    if objective == "time" and not wins_time(call, radius, needs_input_gradient=not is_first):
        return LayerReport(call.name, "exact", None, "filtering would be slower")
    return LayerReport(call.name, "filtered", radius)


def _freeze_rest(model: nn.Module, traced: Trace, chosen: Sequence[Call], first: int, train_norm: TrainNorm) -> None:
    modules = dict(model.named_modules())
    trained: list[nn.Module] = [call.module for call in chosen]
    behind = set(traced.order[first:])
    trained += [modules[name] for name in behind if isinstance(modules[name], nn.Linear)]
    for name, module in modules.items():
        is_norm = isinstance(module, _BatchNorm | nn.GroupNorm | nn.LayerNorm)
        # a norm with an activation in it has children, so its place is that of the children
        runs_behind = name in behind or any(other.startswith(f"{name}.") for other in behind)
        if is_norm and (train_norm == "all" or (train_norm == "after" and runs_behind)):
            trained.append(module)
    model.requires_grad_(False)
    for module in trained:
        # what computes a convolution's weight belongs to it
        for name, parameter in module.named_parameters(recurse=isinstance(module, nn.Conv2d)):
            parameter.requires_grad_(not (isinstance(module, CompactConv2d) and name == "base"))


def _make_lean(model: nn.Module, behind: Sequence[str], lean_activations: LeanActivations) -> tuple[str, ...]:
    if not lean_activations:
        return ()
    twins = lean.EXACT | (lean.APPROXIMATE if lean_activations == "all" else {})
    modules = dict(model.named_modules())
    return tuple(name for name in dict.fromkeys(behind) if _swap_class(modules[name], twins))


def _freeze_norms(model: nn.Module) -> tuple[str, ...]:
    twins = lean.frozen_norms()
    return tuple(name for name, module in _untrained_norms(model) if _swap_class(module, twins))


def _moving_norms(model: nn.Module) -> tuple[str, ...]:
    return tuple(
        f"{name}: {type(module).__name__}"
        for name, module in _untrained_norms(model)
        if not isinstance(module, lean.FrozenBatchNorm2d)
    )


def _untrained_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        is_trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and module.track_running_stats and not is_trained:
            yield name, module


def _swap_class(module: nn.Module, twins: Mapping[type[nn.Module], type[nn.Module]]) -> bool:
    twin = twins.get(type(module))
    if twin is not None:
        module.__class__ = twin
    return twin is not None


def _report_layers(traced: Trace, plan: Mapping[str, LayerReport]) -> list[LayerReport]:
    return [plan.get(call.name, LayerReport(call.name, "frozen", None)) for call in traced.convolutions]


def _other_convolutions(model: nn.Module) -> list[LayerReport]:
    return [
        LayerReport(name, "frozen", None, f"{type(module).__name__} has no filter")
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd) and not isinstance(module, nn.Conv2d)
    ]


def _warn(report: ConversionReport) -> None:
    overestimated = [layer for layer in report.layers if "coverage" in layer.reason]
    if overestimated:
        names = ", ".join(f"{layer.name} ({layer.reason})" for layer in overestimated[:5])
        warnings.warn(f"left exact: {names}; name them in layers, or pass border='covered'", stacklevel=3)
    if not report.filtered:
        reasons = "; ".join(f"{layer.name}: {layer.reason}" for layer in report.layers if layer.reason)
        warnings.warn(f"no convolution is filtered: {reasons}", stacklevel=3)
    if report.checkpointed:
        warnings.warn(
            f"{len(report.checkpointed)} filtered convolutions run in an activation checkpoint (first: "
            f"{report.checkpointed[0]}); it already drops their inputs, so both together save little memory",
            stacklevel=3,
        )
