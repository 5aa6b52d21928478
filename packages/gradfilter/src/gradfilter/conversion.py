"""One line makes a model train its last convolutions with filtered gradients: `convert(model, last_n=4, radius=4)`."""

import copy
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
    is_plain_convolution,
)
from gradfilter.cost import layer_coverage
from gradfilter.timing import wins_time
from gradfilter.trace import Call, Trace, trace
from visionkernels.checks import InputError
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
"""Below it more than half of the taps read padding, and the gradient is at least twice too large."""


@dataclass(frozen=True)
class LayerReport:
    """What became of one convolution."""

    name: str
    status: Literal["filtered", "exact", "frozen"]
    radius: tuple[int, int] | None
    reason: str = ""
    """Why it is not filtered."""


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did, layer by layer, in the order of execution."""

    layers: tuple[LayerReport, ...]
    lean_activations: tuple[str, ...]
    """Modules that now keep less for backward."""
    frozen_norms: tuple[str, ...]
    """Batch norms that keep to their running statistics in training mode too."""
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
        lines[-1] += f"{len(self.frozen_norms)} norms on their running statistics"
        lines += [f"not lean, since called as a function: {each}" for each in self.functional_activations]
        lines += [f"in an activation checkpoint: {each}" for each in self.checkpointed]
        lines += [f"statistics not frozen, since of another class: {each}" for each in self.moving_norms]
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

    Chosen are the last `last_n` convolutions in the order of execution, or those of `layers` (names or patterns such
    as "layer4.*"), or all. `radius` is one for all, or a dict of names and patterns; None leaves a layer exact. A
    chosen layer also stays exact, and is trained all the same, where its kind has no filter, where `objective="time"`
    measures that filtering it would lose time, and where most taps read padding (unless it is named, or
    `border="covered"`). Parameters, state dict and forward pass stay as they are (with `compact` the state dict holds
    base, scale and offset until `restore`).

    `freeze_rest` leaves trainable the chosen convolutions, the linear layers behind the first of them, and the affine
    parameters of norms by `train_norm`: those behind it, none, or all. With `norm_stats="frozen"` a batch norm without
    trained parameters keeps to its running statistics in training mode too (those of torch for images, synchronised
    ones and timm's; the report lists others). `lean_activations` makes ReLU, ReLU6 and
    dropout behind the first chosen layer keep one bit an element; "all" also hard-swish and SiLU, a byte each and so
    approximately; None is True unless `exportable`. `compact` trains scale * weight + offset instead of the weight (see
    `CompactConv2d`). `exportable` builds the gradients so that exported training graphs hold them (see
    `straight_through` of `filtered_conv2d`, on second derivatives too), which excludes the last two. `example_input` is
    what the model takes (a tensor, a tuple or a dict), needed where one image of the model's own size would not do, and
    by "time" for its batch. A layer that was a `FilteredConv2d` before stays filtered if it is chosen, with its own
    radius for None.

    A second call starts from the unconverted model. Warns where layers stay exact for their borders, if nothing is
    filtered, and where filtered layers run in an activation checkpoint, which leaves filtering little memory to save;
    seen are those of `torch.utils.checkpoint`, and timm's `grad_checkpointing` that calls it, unless the model enters
    them in training mode only. `warns=False` leaves all of that to the report. Raises ValueError for wrong arguments,
    with the count or the nearest names, and then leaves the model as it was.
    """
    _check_choices(objective, lean_activations, train_norm, norm_stats, border)
    if compact and border == "covered":
        raise InputError("compact=True with border='covered' is not exact; choose one of the two")
    if exportable and (compact or lean_activations):
        other = "compact=True" if compact else f"lean_activations={lean_activations!r}"
        raise InputError(f"exportable=True with {other}: a graph would lose its gradients; choose one of the two")
    lean_activations = not exportable if lean_activations is None else lean_activations
    found = trace(model, example_input)
    chosen = choose(found, last_n, layers)
    radii = _radii(radius, chosen)
    first_name, is_named = chosen[0].name, layers is not None
    plan = {
        call.name: decide(
            _unconverted(call), radii[call.name], is_named, objective, border, is_first=call.name == first_name
        )
        for call in chosen
    }
    # nothing below fails, so that a wrong call leaves the model as it was
    restore(model)
    _remember(model)
    first = found.order.index(chosen[0].name)
    if freeze_rest:
        _freeze_rest(model, found, chosen, first, train_norm)
    for call in chosen:
        if plan[call.name].status == "filtered":
            as_filtered(call.module, plan[call.name].radius or 1, border=border, exportable=exportable)
            if compact and call.module.kernel_size != (1, 1) and not isinstance(call.module, CompactConv2d):
                CompactConv2d.from_filtered(call.module)
    lean_names = _make_lean(model, found.order[first:], lean_activations)
    frozen = _freeze_norms(model) if norm_stats == "frozen" else ()
    report = ConversionReport(
        (*_report_layers(found, plan), *_other_convolutions(model)), lean_names, frozen,
        tuple(found.functions) if lean_activations else (),
        tuple(name for name in found.checkpointed if name in plan and plan[name].status == "filtered"),
        _moving_norms(model) if norm_stats == "frozen" else (),
    )  # fmt: skip
    if warns:
        _warn(report)
    return report


def restore(model: nn.Module) -> None:
    """Undo `convert` in all of `model`: the classes, settings and Parameters of before, and what was trainable.

    `model` may be the one that was converted, a part of it, or what it is a part of. Modules and parameters that were
    put in since stay as they are.
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
    """What `convert` changes of one module."""

    kind: type[nn.Module]
    settings: dict[str, Any]
    is_trainable: dict[str, bool]


def _remember(model: nn.Module) -> None:
    for module in model.modules():
        settings = {name: value for name, value in vars(module).items() if name in _SETTINGS}
        is_trainable = {name: each.requires_grad for name, each in module.named_parameters(recurse=False)}
        is_convolution = isinstance(module, nn.Conv2d)
        module.__dict__[BEFORE_CONVERSION] = _Before(type(module), settings if is_convolution else {}, is_trainable)


def _unconverted(call: Call) -> Call:
    """Return the call of a layer as it was before `convert`; one that was converted is copied."""
    if BEFORE_CONVERSION not in call.module.__dict__:
        return call
    twin = copy.deepcopy(call.module)
    restore(twin)
    return replace(call, module=twin)


def exact_twin(model: nn.Module) -> nn.Module:
    """Return a copy of `model` without filters, be they of `convert` or its own."""
    twin = copy.deepcopy(model)
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
        if value not in allowed:
            raise InputError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")


def choose(found: Trace, last_n: int | None, layers: Sequence[str] | None) -> list[Call]:
    """Return the chosen convolutions in the order of execution; arguments and errors are those of `convert`."""
    calls = found.convolutions
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
    """Return the names that match; a pattern without a match is an error that names the nearest."""
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise InputError(f"{pattern!r} is no name or pattern of a convolution")
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
    """Return whether `convert` filters a layer that was chosen, and if not why."""
    if isinstance(call.module, FilteredConv2d):  # whoever built it wants it filtered
        if border == "covered" and isinstance(call.module, CompactConv2d):
            raise InputError(f"border={border!r} is not exact for {call.name}, a compact layer; it takes 'plain'")
        return LayerReport(call.name, "filtered", radius or call.module.radius)
    if radius is None:
        return LayerReport(call.name, "exact", None, "radius None")
    if not is_plain_convolution(call.module):
        return LayerReport(call.name, "exact", None, f"{type(call.module).__name__} computes its weight anew")
    share = layer_coverage(call)
    if share < MIN_COVERAGE and border == "plain" and not is_named:
        return LayerReport(call.name, "exact", None, f"gradient overestimated: coverage {share:.2f}")
    if objective == "time" and not wins_time(call, radius, needs_input_gradient=not is_first):
        return LayerReport(call.name, "exact", None, "filtering would be slower")
    return LayerReport(call.name, "filtered", radius)


def _freeze_rest(model: nn.Module, found: Trace, chosen: Sequence[Call], first: int, train_norm: TrainNorm) -> None:
    modules = dict(model.named_modules())
    trained: list[nn.Module] = [call.module for call in chosen]
    behind = set(found.order[first:])
    trained += [modules[name] for name in behind if isinstance(modules[name], nn.Linear)]
    for name, module in modules.items():
        is_norm = isinstance(module, _BatchNorm | nn.GroupNorm | nn.LayerNorm)
        # a norm with an activation in it has children, so it is placed by those that run after it
        runs_behind = name in behind or any(each.startswith(f"{name}.") for each in behind)
        if is_norm and (train_norm == "all" or (train_norm == "after" and runs_behind)):
            trained.append(module)
    model.requires_grad_(False)
    for module in trained:
        for name, parameter in module.named_parameters(recurse=False):
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


def _report_layers(found: Trace, plan: Mapping[str, LayerReport]) -> list[LayerReport]:
    return [plan.get(call.name, LayerReport(call.name, "frozen", None)) for call in found.convolutions]


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
            f"{report.checkpointed[0]}); it drops their inputs already, so both together save little memory",
            stacklevel=3,
        )
