"""Recipes: complete settings as frozen dataclasses, checked, found by name, and read back from a run.json.

A recipe has a `name`, a one-line `summary`, `data` that needs no path (or None), and a `fit` of
`visionkernels.training`; its other fields are the package's.
"""

import difflib
import json
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["check", "check_choice", "check_known", "data_of", "find", "read", "settings"]

Recipe = TypeVar("Recipe")


def check(holds: bool, argument: str, value: object, allowed: str) -> None:
    """Raise ValueError, "argument=value must be allowed", unless `holds`."""
    if not holds:
        raise ValueError(f"{argument}={value!r} must be {allowed}")


def check_choice(argument: str, value: object, choices: object) -> None:
    """Raise ValueError unless `value` is one of the `typing.Literal` `choices`."""
    allowed = typing.get_args(choices)
    check(value in allowed, argument, value, f"one of {', '.join(map(repr, allowed))}")


def check_known(what: str, name: str, known: Collection[str], *, listing: str = "") -> None:
    """Raise ValueError for a `name` that is not `known`, with the nearest, and with all where they are few.

    `listing` says where many are listed.
    """
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1 if len(known) <= 50 else 3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    listed = f"known: {', '.join(known)}" if len(known) <= 50 else f"there are {len(known)}{listing and '; '}{listing}"
    raise ValueError(f"unknown {what} {name!r}; {hint}{listed}")


def find(name: str, recipes: Mapping[str, Recipe], *, listing: str = "") -> Recipe:
    """Return the recipe of this name; ValueError names the nearest one and, where they are few, all."""
    check_known("recipe", name, recipes, listing=listing)
    return recipes[name]


def settings(recipe: Any) -> dict[str, Any]:
    """Return a recipe without its `fit`, as plain data for a run.json, where `fit` stands by itself."""
    return {key: value for key, value in asdict(recipe).items() if key != "fit"}


def data_of(recipe: Any, given: str | Path | None) -> str | Path:
    """Return the data `given`, or else the recipe's own; ValueError where there is neither."""
    data: str | Path | None = given or recipe.data
    if data is None:
        raise ValueError(f"recipe {recipe.name} has no data of its own; give --data FOLDER")
    return data


def read(path: str | Path, find: Callable[[str], Recipe], *, package: str) -> Recipe:
    """Return the recipe that a run.json holds, of the kind that `find` has under its name.

    Raises FileNotFoundError, and ValueError for a file that no `train` of `package` wrote.
    """
    try:
        run = json.loads(Path(path).read_text(encoding="utf-8"))
        values = {**run["details"]["settings"], "fit": run["recipe"]}
        recipe: Recipe = _build(type(find(values["name"])), values)
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no run.json of {package} train: {type(error).__name__} {error}") from error
    return recipe


def _build(kind: Any, values: Mapping[str, Any]) -> Any:
    """Build a dataclass from what `asdict` and JSON made of it."""
    hints = typing.get_type_hints(kind)
    unknown = set(values) - {each.name for each in fields(kind)}
    if unknown:
        raise KeyError(f"unknown settings {sorted(unknown)}")
    return kind(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    """Return a field's value: a list was a tuple, and a dict the first dataclass that its type names."""
    if isinstance(value, list):
        return tuple(_value(hint, each) for each in value)
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
