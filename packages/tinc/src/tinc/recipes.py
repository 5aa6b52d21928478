"""The official configurations by name, official YAML files, and their grids of variations."""

import itertools
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tinc.activations import check_activation
from visionkernels.checks import InputError, check, check_choice, check_known
from visionkernels.extras import require

__all__ = [
    "MAX_LEVELS",
    "RECIPES",
    "Allocation",
    "Compat",
    "Level",
    "LossWeight",
    "OfficialRecipe",
    "Scheduler",
    "expand_grid",
    "find_recipe",
    "from_options",
    "levels_from_options",
    "read_yaml",
    "to_options",
]

_log = logging.getLogger(__name__)

Allocation = Literal["equal", "aoi", "var"]
Compat = Literal["official", "none"]
OptimizerName = Literal["Adamax", "Adam", "SGD"]
SchedulerName = Literal["MultiStepLR", "StepLR", "CyclicLR", "none"]

_ROOT_KEY = "CompressFramwork"  # the spelling of the official files
_MAX_YAML_BYTES = 1 << 20
MAX_LEVELS = 7
"""Largest number of levels of a tree, which then has 262144 leaves."""
_MAX_GRID = 10_000


@dataclass(frozen=True)
class Level:
    """One level of the tree; each of its nodes owns a segment of `layers` linear layers."""

    ratio: float
    """Parameters of a node, relative to those of a node of another level."""
    layers: int
    activation: str = "Sine"
    """"Sine", "ReLU", "LeakyReLU" with its slope (as "LeakyReLU0.1"), "Sigmoid" or "Tanh"."""
    allocation: Allocation = "equal"
    """Distribution of the level's parameters over its nodes: equal, by voxels above zero (area of interest), or by
    variance. The root ignores it."""

    def __post_init__(self) -> None:
        check(_is_real(self.ratio), "ratio", self.ratio, "a finite number")
        check(self.ratio > 0, "ratio", self.ratio, "above 0")
        check(isinstance(self.layers, int), "layers", self.layers, "an integer")
        check(self.layers >= 1, "layers", self.layers, "at least 1")
        check_activation(self.activation)
        check_choice("allocation", self.allocation, Allocation)


@dataclass(frozen=True, kw_only=True)
class LossWeight:
    """Weight of squared errors with targets in [low, high], in units of the normalised range; others have weight 1."""

    low: float = 2001
    high: float = 65535
    scale: float = 0.01

    def __post_init__(self) -> None:
        check(self.scale >= 0, "scale", self.scale, "at least 0")


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """A learning rate scheduler of torch and its arguments; it is stepped after every update."""

    name: SchedulerName = "MultiStepLR"
    arguments: tuple[tuple[str, Any], ...] = (("milestones", (20_000, 50_000)), ("gamma", 0.2))

    def __post_init__(self) -> None:
        check_choice("scheduler", self.name, SchedulerName)
        check(self.name != "none" or not self.arguments, "arguments", self.arguments, "empty for scheduler 'none'")


@dataclass(frozen=True, kw_only=True)
class OfficialRecipe:
    """Settings of a tree and its training on one volume; the defaults are those of the official files."""

    name: str
    levels: tuple[Level, ...]
    ratio: float = 64.0
    """Bytes of the input file / bytes of the weights as float32."""
    w0: float = 30.0
    """Frequency of the first sine of a segment of two or more layers."""
    normal_min: float = 0.0
    normal_max: float = 100.0
    """Range that voxels are scaled to, from `normal_min` on."""
    output: int = 1
    """Number of channels."""
    batch_size: int = 262_144
    """Points of an update, summed over all leaves."""
    epochs: int = 10_000
    """Passes over the voxels of a leaf, counted by the number of points."""
    optimizer: OptimizerName = "Adamax"
    lr: float = 1e-3
    scheduler: Scheduler = field(default_factory=Scheduler)
    weight: LossWeight = field(default_factory=LossWeight)
    eval_batch_size: int = 262_144
    """Points of a leaf that are evaluated at once."""
    eval_epochs: int = 1000
    """Epochs between evaluations."""
    seed: int = 42
    compat: Compat = "official"
    """"official" reproduces the official code; "none" corrects it: variances are relative to the level, an unreachable
    ratio is refused, any batch size works, points are drawn without replacement, and samples are rounded to nearest."""

    def __post_init__(self) -> None:
        check(1 <= len(self.levels) <= MAX_LEVELS, "levels", self.levels, f"1 to {MAX_LEVELS} levels")
        last = self.levels[-1].layers
        check(last >= 2, "levels[-1].layers", last, "at least 2: a leaf of one layer has no width to choose")
        check(self.ratio > 0, "ratio", self.ratio, "above 0")
        check(self.normal_min < self.normal_max, "normal_min, normal_max", (self.normal_min, self.normal_max), "rising")
        for name in ("ratio", "w0", "normal_min", "normal_max", "lr"):
            check(_is_real(getattr(self, name)), name, getattr(self, name), "a finite number")
        for name in ("output", "batch_size", "epochs", "eval_batch_size", "eval_epochs"):
            value = getattr(self, name)
            check(isinstance(value, int), name, value, "an integer")
            check(value >= 1, name, value, "at least 1")
        check_choice("optimizer", self.optimizer, OptimizerName)
        check(self.lr > 0, "lr", self.lr, "above 0")
        check(self.seed >= 0, "seed", self.seed, "at least 0")
        check_choice("compat", self.compat, Compat)


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


RECIPES = {
    recipe.name: recipe
    for recipe in (
        OfficialRecipe(name="default", levels=(Level(1.0, 2), Level(0.8, 2), Level(1.5, 3, allocation="aoi"))),
        OfficialRecipe(name="multi0", levels=(Level(1.0, 5),)),
        OfficialRecipe(name="multi1", levels=(Level(1.0, 2), Level(1.0, 3))),
        OfficialRecipe(name="multi2", levels=(Level(1.0, 2), Level(1.0, 2), Level(1.5, 3))),
    )
}
"""The configurations of the official repository: one tree for a single task, three for the comparison of depths."""


def find_recipe(name: str) -> OfficialRecipe:
    """Return the recipe of this name. Raises ValueError with the nearest name and all names."""
    check_known("recipe", name, RECIPES)
    return RECIPES[name]


def read_yaml(path: str | Path) -> OfficialRecipe:
    """Return the recipe of an official single-task YAML file, under the name of the file.

    Device, logging and the path of the volume are ignored. Raises FileNotFoundError, ImportError without pyyaml, and
    ValueError for any other file.
    """
    options = _load(path)
    if _ROOT_KEY not in options:
        raise InputError(f"{path} has no {_ROOT_KEY!r}; read a grid with Static and Dynamic by expand_grid")
    return from_options(options, name=Path(path).stem)


def expand_grid(path: str | Path) -> list[OfficialRecipe]:
    """Return the recipes of an official multi-task YAML file: `Static` options, varied by the choices of `Dynamic`.

    In `Dynamic`, PRODUCT combines every choice of its entries with every other, and CONCAT takes the choices of its
    entries one after the other; any other list of tables has one choice for each entry. Raises the errors of
    `read_yaml`, and ValueError for a `Dynamic` without choices.
    """
    options = _load(path)
    if not isinstance(options.get("Static"), Mapping):
        raise InputError(f"{path} has no 'Static' options; read a single task by read_yaml")
    static, stem = options["Static"], Path(path).stem
    dynamic = options.get("Dynamic")
    choices = _choices({} if dynamic is None else dynamic)
    if not choices:
        raise InputError(f"{path} has no combinations: Dynamic={dynamic!r}")
    return [from_options(_merge(static, choice), name=f"{stem}_{number}") for number, choice in enumerate(choices)]


def _load(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"configuration {path} is not a file")
    size = path.stat().st_size
    if size > _MAX_YAML_BYTES:
        raise InputError(f"configuration {path} has {size} bytes; at most {_MAX_YAML_BYTES} are read")
    yaml = require("yaml", "tinc-vision[official]")
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"configuration {path} is not valid YAML: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(options, dict):
        raise InputError(f"configuration {path} holds a {type(options).__name__}; it must be a mapping of options")
    return options


def _choices(tree: Any) -> list[dict[str, Any]]:
    """Return the choices of a tree of PRODUCT and CONCAT, as mappings of options."""
    if isinstance(tree, Sequence) and not isinstance(tree, str):
        return [choice for branch in tree for choice in _choices(branch)]
    if not isinstance(tree, Mapping):
        raise InputError(f"Dynamic holds {tree!r}; it must hold mappings of options under PRODUCT and CONCAT")
    factors: list[list[dict[str, Any]]] = []
    for key, branch in tree.items():
        branches = list(branch.values()) if isinstance(branch, Mapping) else branch
        if key in ("CONCAT", "PRODUCT") and not isinstance(branches, list):
            raise InputError(f"Dynamic: {key}={branch!r} must be a mapping or a list of entries")
        match key:
            case "CONCAT":
                factors.append([choice for branch in branches for choice in _choices(branch)])
            case "PRODUCT":
                factors += [_choices(branch) for branch in branches]
            case _:
                factors.append([{key: value} for value in _values(branch)])
    size = 1
    for factor in factors:
        size *= len(factor)
    check(size <= _MAX_GRID, "Dynamic", f"{size} combinations", f"at most {_MAX_GRID}")
    merged = []
    for combination in itertools.product(*factors):
        choice: dict[str, Any] = {}
        for part in combination:
            choice = _merge(choice, part)
        merged.append(choice)
    return merged


def _values(branch: Any) -> list[Any]:
    """Return the values of an option; a mapping that contains a grid has one value for each choice."""
    return list(_choices(branch)) if isinstance(branch, Mapping) else [branch]


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def from_options(options: Mapping[str, Any], *, name: str) -> OfficialRecipe:
    """Return the recipe of official options, which are nested mappings; missing options keep their defaults.

    Unknown allocations count as "equal", as in the official code, with a warning in the log.
    """
    try:
        work = options.get(_ROOT_KEY, options)
        train, evaluation = work.get("Train", {}), work.get("Eval", {})
        network, preprocess = work["Network"], work.get("Preprocess", {})
        values: dict[str, Any] = {
            "levels": levels_from_options(network["level_info"]),
            "ratio": work.get("Ratio"),
            "w0": network.get("w0"),
            "output": network.get("output"),
            "normal_min": preprocess.get("normal_min"),
            "normal_max": preprocess.get("normal_max"),
            "batch_size": train.get("batch_size"),
            "epochs": train.get("epochs"),
            "optimizer": train.get("optimizer", {}).get("type"),
            "lr": train.get("optimizer", {}).get("lr"),
            "scheduler": _scheduler(train.get("lr_scheduler")),
            "weight": _weight(train.get("weight")),
            "eval_batch_size": evaluation.get("batch_size"),
            "eval_epochs": evaluation.get("epochs"),
            "seed": options.get("Reproduc", {}).get("seed"),
        }
        check(network.get("input", 3) == 3, "Network.input", network.get("input"), "3, the axes of an octree")
        return OfficialRecipe(name=name, **{key: value for key, value in values.items() if value is not None})
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"the options of {name} are not official ones: {type(error).__name__} {error}") from error


def levels_from_options(level_info: Sequence[Sequence[Any]]) -> tuple[Level, ...]:
    """Return the levels of the official list of [ratio, layers, activation, allocation]."""
    levels = []
    for number, level in enumerate(level_info):
        if not isinstance(level, list | tuple) or len(level) < 2:
            raise InputError(f"level_info[{number}]={level!r} must be [ratio, layers, activation, allocation]")
        ratio, layers, *words = level
        activation = words[0] if words else "Sine"
        allocation: Any = words[1] if len(words) > 1 else "equal"
        if allocation not in ("equal", "aoi", "var"):
            _log.warning("level %d: allocation %r is unknown and counts as 'equal'", number, allocation)
            allocation = "equal"
        levels.append(Level(ratio, layers, activation, allocation))
    return tuple(levels)


def _scheduler(options: Mapping[str, Any] | None) -> Scheduler | None:
    if options is None:
        return None
    rest = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items() if key != "name"}
    return Scheduler(name=options["name"], arguments=() if options["name"] == "none" else tuple(rest.items()))


def _weight(values: Sequence[float] | None) -> LossWeight | None:
    if values is None:
        return None
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise InputError(f"weight={values!r} must be [low, high, scale]")
    return LossWeight(low=values[0], high=values[1], scale=values[2])


def to_options(recipe: OfficialRecipe) -> dict[str, Any]:
    """Return the official options of a recipe, the content of opt.yaml; `from_options` is the inverse."""
    levels = [[level.ratio, level.layers, level.activation, level.allocation] for level in recipe.levels]
    arguments = {key: list(value) if isinstance(value, tuple) else value for key, value in recipe.scheduler.arguments}
    weight = recipe.weight
    return {
        "Ratio": recipe.ratio,
        "Train": {
            "batch_size": recipe.batch_size,
            "epochs": recipe.epochs,
            "optimizer": {"type": recipe.optimizer, "lr": recipe.lr},
            "lr_scheduler": {"name": recipe.scheduler.name, **arguments},
            "weight": [weight.low, weight.high, weight.scale],
        },
        "Eval": {"batch_size": recipe.eval_batch_size, "epochs": recipe.eval_epochs},
        "Preprocess": {"normal_min": recipe.normal_min, "normal_max": recipe.normal_max},
        "Network": {"input": 3, "output": recipe.output, "level_info": levels, "w0": recipe.w0},
    }


def equal_shares(recipe: OfficialRecipe) -> OfficialRecipe:
    """Return the recipe with equal allocation on every level, whose tree is independent of the volume's values."""
    return replace(recipe, levels=tuple(replace(level, allocation="equal") for level in recipe.levels))
