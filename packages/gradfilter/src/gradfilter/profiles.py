"""Memory, operations and time of training the last convolutions of a model, before it is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from gradfilter.conversion import Radii, TrainNorm, choose, convert, decide, exact_twin
from gradfilter.cost import LayerCost, layer_cost, layer_coverage
from gradfilter.timing import step_seconds
from gradfilter.trace import Call, call_model, trace
from visionkernels.checks import InputError, check_choice, check_size
from visionkernels.modules import copy_module
from visionkernels.ops.filtered_conv import Radius, check_radius
from visionkernels.profiling import compare, saved_activation_bytes

__all__ = ["LayerProfile", "Plan", "Profile", "example_images", "profile"]

EXACT = "exact"


@dataclass(frozen=True)
class LayerProfile:
    """Costs of one convolution for the batch of the profile, by "exact" and radii such as "2x2".

    Where it runs several times in a forward pass, sizes and coverage are those of its first call; costs are summed.
    """

    name: str
    input_size: tuple[int, ...]
    output_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    coverage: float
    """Share of (output, tap) pairs that read the map, not padding; below 0.5 filtering overestimates the gradient."""
    saved_bytes: dict[str, int]
    """Size of the input that the convolution keeps, as the paper counts."""
    flops: dict[str, int]
    """Operations of the gradients of input and weight; a multiply-add counts as 2."""
    predicted_seconds: dict[str, float]
    """Time of backward: operations at this machine's speed of products plus bytes at its speed of copies."""
    measured_seconds: dict[str, float] = field(default_factory=dict)
    """Time of forward and backward, if requested."""
    stays_exact: str = ""
    """Why `convert` would leave the layer exact; its figures are then those of "exact" for every radius."""
    num_calls: int = 1
    """How often it runs in a forward pass."""


@dataclass(frozen=True)
class Plan:
    """Arguments of `convert` that fit a budget, and their costs."""

    layers: tuple[str, ...]
    radius: dict[str, tuple[int, int] | None]
    saved_bytes: int
    flops: int


@dataclass(frozen=True)
class Profile:
    """Costs of the chosen convolutions in the order of execution, and what autograd keeps for the whole model."""

    layers: tuple[LayerProfile, ...]
    radii: tuple[str, ...]
    autograd_bytes: dict[str, int]
    """Memory really kept for backward by the whole model: "exact" is the stock model with these layers trained and
    norms in training mode; "2x2" differs from it by the filters alone. "exact lean" and "2x2 lean" add lean activations
    and frozen statistics of norms that are not trained. Empty if not measured."""
    not_measured: str = ""
    """The reason, if the model does not run in training mode on the example."""

    def total(self, name: str, cost: str) -> float:
        """Return the sum of a field of the layers ("saved_bytes", "flops", ...), for a radius or "exact"."""
        return sum(getattr(layer, cost)[name] for layer in self.layers)

    def fit(self, *, memory_kib: float | None = None, flops: float | None = None) -> Plan:
        """Return as many layers, counted from the end, as fit both budgets, with radii as small as possible.

        `memory_kib` limits the kept inputs, `flops` the operations of backward. Raises ValueError if not even the last
        layer fits at the largest radius.
        """
        budget = {"saved_bytes": None if memory_kib is None else 1024 * memory_kib, "flops": flops}
        coarsest = self.radii[-1]
        for first in range(len(self.layers)):
            chosen = dict.fromkeys(range(first, len(self.layers)), coarsest)
            if self._fits(chosen, budget):
                break
        else:
            needed = {cost: self.layers[-1].__dict__[cost][coarsest] for cost in budget}
            raise InputError(
                f"memory_kib={memory_kib}, flops={flops} fit no layer; {self.layers[-1].name} at radius {coarsest} "
                f"needs {needed['saved_bytes'] / 1024:.1f} KiB and {needed['flops']} operations"
            )
        for index in reversed(chosen):
            # the last layers get the finest filters: their errors reach all layers before them
            chosen[index] = next(name for name in self.radii if self._fits(chosen | {index: name}, budget))
        names = {
            self.layers[index].name: None if self.layers[index].stays_exact else _as_pair(name)
            for index, name in chosen.items()
        }
        return Plan(
            tuple(names), names, *(sum(self._costs(chosen, cost)) for cost in ("saved_bytes", "flops"))
        )  # fmt: skip

    def _costs(self, chosen: dict[int, str], cost: str) -> list[int]:
        return [getattr(self.layers[index], cost)[name] for index, name in chosen.items()]

    def _fits(self, chosen: dict[int, str], budget: dict[str, float | None]) -> bool:
        return all(limit is None or sum(self._costs(chosen, cost)) <= limit for cost, limit in budget.items())

    def __str__(self) -> str:
        names = (EXACT, *self.radii)
        figures = {"KiB": ("saved_bytes", 1 / 1024), "MFLOPs": ("flops", 1e-6)}
        if self.layers[0].measured_seconds:
            figures["ms"] = ("measured_seconds", 1e3)
        headers = ["convolution", *(f"{unit} {name}" for unit in figures for name in names)]
        rows = [
            [layer.name, *(unit * getattr(layer, cost)[name] for cost, unit in figures.values() for name in names)]
            for layer in self.layers
        ]
        sums = ["total", *(unit * self.total(name, cost) for cost, unit in figures.values() for name in names)]
        grid = tabulate([*rows, sums], headers, tablefmt="simple", floatfmt=".2f")
        kept = ", ".join(f"{name} {count / 1024:.1f}" for name, count in self.autograd_bytes.items())
        notes = [f"{layer.name} stays exact: {layer.stays_exact}" for layer in self.layers if layer.stays_exact]
        notes += [
            f"{layer.name} runs {layer.num_calls} times; its figures are sums"
            for layer in self.layers
            if layer.num_calls > 1
        ]
        notes.append(f"kept for backward by the whole model, KiB: {kept or self.not_measured or 'not measured'}")
        return f"{grid}\n\n" + "\n".join(notes)


def profile(
    model: nn.Module,
    example_input: Any = None,
    *,
    last_n: int | None = None,
    layers: Sequence[str] | None = None,
    radii: Sequence[Radius] = (2, 4, 7),
    measures_time: bool = False,
    measures_memory: bool = True,
    train_norm: TrainNorm = "none",
) -> Profile:
    """Return the cost of the backward pass of the chosen convolutions, exact and for every radius.

    The model does not change.

    Args:
        model: any module that `gradfilter.convert` takes
        example_input: as for `convert`; costs are those of its batch
        last_n: as for `convert`
        layers: as for `convert`
        radii: sides of patches, in outputs
        measures_time: run every call of a layer for some milliseconds
        measures_memory: run the whole model once for each figure of `autograd_bytes`
        train_norm: norms that are trained in `autograd_bytes`, as for `convert`

    Raises ValueError as `convert` does.
    """
    check_choice("train_norm", train_norm, TrainNorm)
    if not isinstance(radii, Sequence) or not radii:
        raise InputError(f"radii={radii!r} must be one or more radii, e.g. (2, 4, 7)")
    pairs = sorted({check_radius(radius) for radius in radii}, key=lambda pair: pair[0] * pair[1])
    model = exact_twin(model)
    traced = trace(model, example_input)
    chosen = choose(traced, last_n, layers)
    profiles = tuple(
        _profile_layer(
            [other for other in traced.calls if other.name == call.name],
            pairs, measures_time, is_named=layers is not None, is_first=call.name == chosen[0].name,
        )
        for call in chosen
    )  # fmt: skip
    kept, reason = {}, ""
    if measures_memory:
        filtered = [layer.name for layer in profiles if not layer.stays_exact]
        try:
            kept = _autograd_bytes(model, example_input, [call.name for call in chosen], filtered, pairs, train_norm)
        except (ValueError, RuntimeError) as error:  # a norm of one value a channel, a head that needs larger images
            reason = f"not measured, since training mode fails on this example: {str(error).partition(chr(10))[0]}"
    return Profile(profiles, tuple(map(_as_name, pairs)), kept, reason)


def _profile_layer(
    calls: Sequence[Call], radii: Sequence[tuple[int, int]], measures_time: bool, *, is_named: bool, is_first: bool
) -> LayerProfile:
    call = calls[0]
    names = (EXACT, *map(_as_name, radii))
    reason = decide(call, radii[0], is_named, "memory", "plain", is_first=is_first).reason
    tried = [None, *(None if reason else radius for radius in radii)]
    size = call.module.weight.element_size()
    costs = {
        name: [(call, layer_cost(call, radius)) for call in calls] for name, radius in zip(names, tried, strict=True)
    }
    return LayerProfile(
        name=call.name,
        input_size=call.input_size,
        output_size=call.output_size,
        kernel_size=call.module.kernel_size,
        coverage=layer_coverage(call),
        saved_bytes={name: sum(cost.saved_elements * size for _, cost in pairs) for name, pairs in costs.items()},
        flops={name: sum(cost.flops for _, cost in pairs) for name, pairs in costs.items()},
        predicted_seconds={name: sum(_predict(*pair, size) for pair in pairs) for name, pairs in costs.items()},
        measured_seconds=_measure(calls, dict(zip(names, tried, strict=True)), is_first) if measures_time else {},
        stays_exact=reason,
        num_calls=len(calls),
    )


def _measure(calls: Sequence[Call], radii: dict[str, Radius | None], is_first: bool) -> dict[str, float]:
    # layers before the first call are frozen, but a later call of that layer comes after a trained one
    steps = [
        step_seconds(call, list(radii.values()), needs_input_gradient=index > 0 or not is_first)
        for index, call in enumerate(calls)
    ]
    return dict(zip(radii, map(sum, zip(*steps, strict=True)), strict=True))


def _predict(call: Call, cost: LayerCost, element_size: int) -> float:
    inputs, outputs = torch.Size(call.input_size).numel(), torch.Size(call.output_size).numel()
    # the kept input, the gradient of the output and the weight are read, two gradients are written
    elements = cost.saved_elements + inputs + outputs + 2 * call.module.weight.numel()
    flops_per_second, bytes_per_second = _machine_speed()
    return cost.flops / flops_per_second + elements * element_size / bytes_per_second


@cache
def _machine_speed() -> tuple[float, float]:
    """Return floating-point operations a second of products, and bytes a second of a copy (read and written)."""
    square, long = torch.randn(1024, 1024), torch.randn(1 << 22)
    timings = compare({"product": lambda: square @ square, "copy": lambda: long.clone()}, repeats=3,
                      threads=torch.get_num_threads())  # fmt: skip
    return 2 * 1024**3 / timings["product"].median, 8 * long.numel() / timings["copy"].median


def _autograd_bytes(
    model: nn.Module,
    example_input: Any,
    layers: Sequence[str],
    filtered: Sequence[str],
    radii: Sequence[tuple[int, int]],
    train_norm: TrainNorm,
) -> dict[str, int]:
    if example_input is None:
        size = trace(model).convolutions[0].input_size
        example_input = torch.randn(size, dtype=next(model.parameters()).dtype)
    kept = {}
    for name, radius in ((EXACT, None), *((_as_name(radius), radius) for radius in radii)):
        by_layer = {layer: radius if layer in filtered else None for layer in layers}
        options = {"layers": layers, "train_norm": train_norm}
        kept[name] = _kept(model, example_input, by_layer, norm_stats="update", lean_activations=False, **options)
        kept[f"{name} lean"] = _kept(
            model, example_input, by_layer, norm_stats="frozen", lean_activations=True, **options
        )
    return kept


def _kept(model: nn.Module, example_input: Any, radius: Radii, **options: Any) -> int:
    twin = copy_module(model).train()
    convert(twin, radius, example_input=example_input, **options, warns=False)
    return saved_activation_bytes(lambda: call_model(twin, example_input))


def _as_name(radius: tuple[int, int]) -> str:
    return f"{radius[0]}x{radius[1]}"


def _as_pair(name: str) -> tuple[int, int]:
    rows, columns = name.split("x")
    return int(rows), int(columns)


def example_images(model: nn.Module, batch: int, size: tuple[int, int] | None = None) -> Tensor:
    """Return a random batch of images of `size` (rows, columns), by default the model's own."""
    if batch < 1:
        raise InputError(f"batch={batch} must be at least 1")
    check_size(size)
    (_, channels, *own), *_ = [call.input_size for call in choose(trace(model), None, None)]
    return torch.randn(batch, channels, *(own if size is None else size))
