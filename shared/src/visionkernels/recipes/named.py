"""The base of all recipes; looking one up by its name, and reading one back from a run.json."""

import json
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from visionkernels.checks import InputError, check_known
from visionkernels.recipes.fit import FitRecipe

if TYPE_CHECKING:
    from visionkernels.weights import Trained

__all__ = ["ModelRecipe", "Recipe", "by_name", "choose", "data_of", "settings"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete training: a name, the run, and in subclasses the model and the settings of a paper."""

    trainer: ClassVar[str]
    """The function that trains by this kind of recipe, as "module:function".

    It takes `(recipe, data, out, *, ...)`; its further arguments say what a recipe needs (`teacher`), and what it may
    be given (`init=None`).
    """

    name: str
    summary: str
    """One line for listings."""
    fit: FitRecipe
    data: str | None = None
    """Built-in data set; None requires `--data`."""

    def record(self, num_classes: int | None = None) -> "Trained":
        """Return what a weights file says of the recipe's model, for as many classes or the recipe's own.

        Raises InputError for a recipe whose model depends on more.
        """
        raise InputError(f"recipe {self.name} does not name a model; give the name of one")


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """A model by name, and its options; None keeps the model's default."""

    name: str

    def options(self) -> dict[str, Any]:
        """Return the options that are given, as keyword arguments of the function that builds the model."""
        return {key: value for key, value in asdict(self).items() if value is not None and key != "name"}


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def by_name(*recipes: Iterable[AnyRecipe]) -> dict[str, AnyRecipe]:
    """Return recipes by their names."""
    return {recipe.name: recipe for group in recipes for recipe in group}


def choose(name: str, recipes: Mapping[str, AnyRecipe], *, listing: str = "") -> AnyRecipe:
    """Return the recipe of this name, or the one that a run.json holds, of the class of its namesake in `recipes`.

    Raises FileNotFoundError, and InputError for a file that no `train` wrote and for an unknown name, with the nearest;
    `listing` says where all names stand.
    """
    if not name.endswith(".json"):
        check_known("recipe", name, recipes, listing=listing)
        return recipes[name]
    try:
        run = json.loads(Path(name).read_text(encoding="utf-8"))
        record = run["trained"] if "trained" in run else run["details"]
        values = {**record["settings"], "fit": run["recipe"]}
        namesake = values["name"]
        check_known("recipe", namesake, recipes, listing=listing)
        recipe: AnyRecipe = _build(type(recipes[namesake]), values)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{name} is not the run.json of a training: {type(error).__name__} {error}") from error
    return recipe


def settings(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe without its `fit`, as plain data for a run.json, where `fit` stands by itself."""
    return {key: value for key, value in asdict(recipe).items() if key != "fit"}


def data_of(recipe: Recipe, given: str | Path | None) -> str:
    """Return the data `given`, or else the recipe's own. Raises InputError where there is neither, and for ""."""
    data = recipe.data if given is None else str(given)
    if data is None:
        raise InputError(f"recipe {recipe.name} has no built-in data; give --data FOLDER")
    if not data.strip():
        raise InputError("data='' is empty; give --data FOLDER, or leave it out")
    return data


def _build(kind: Any, values: Mapping[str, Any]) -> Any:
    """Build a dataclass from what `asdict` and JSON made of it."""
    hints = typing.get_type_hints(kind)
    unknown = set(values) - {field.name for field in fields(kind)}
    if unknown:
        raise KeyError(f"unknown settings {sorted(unknown)}")
    return kind(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    """Return a field's value: a list was a tuple, and a dict the first dataclass that its type names."""
    if isinstance(value, list):
        return tuple(_value(hint, item) for item in value)
    if isinstance(value, dict):
        kind = next(_dataclasses(hint), None)
        if kind is None:
            raise TypeError(f"{value} is no {hint}")
        return _build(kind, value)
    return value


def _dataclasses(hint: Any) -> Iterator[Any]:
    if is_dataclass(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from _dataclasses(part)
