"""A paper as a record: its name, its recipes, tables and bench, and how its weights files are opened.

The command line makes its shared verbs of this record, and a weights file that names a package is opened through it.
A distribution announces its record as an entry point of the group `visionkernels.packages`. References are
"module:attribute" and are imported when they are used, so that a record costs nothing.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

__all__ = ["Package", "installed_packages", "is_command", "resolve"]

_GROUP = "visionkernels.packages"
_TASKS = "visionkernels.tasks"


@dataclass(frozen=True, kw_only=True)
class Package:
    """One paper. `NAME` in a default stands for `name`."""

    name: str
    """Folder, import and command."""
    distribution: str
    """Name on PyPI."""
    summary: str
    """One line of the command's help."""
    models: tuple[str, ...] = ()
    """Modules that register models in timm when they are imported."""
    recipes: str | None = "NAME.recipes:RECIPES"
    """Recipes by name; None for a package whose training is its own."""
    openers: Mapping[str, str] = field(default_factory=dict)
    """For each kind of weights file, the function from a Checkpoint to its model."""
    official: str | None = "NAME.official:open_official"
    """From a Checkpoint of the official implementation, and a model name or None, to a TrainedModel.

    With a name it may return None, for weights that are to be loaded as they are.
    """
    create: str = "visionkernels.models:create"
    """From a model name and options to a model with random weights."""
    sources: tuple[str, ...] = ()
    """Prefixes of model names, before the colon, that `create` builds itself."""
    upgrade: str | None = None
    """From metadata and weights of a file of earlier releases to its record, or None."""
    evaluate: str = f"{_TASKS}:evaluate"
    """From a TrainedModel and data to metrics."""
    export: str = f"{_TASKS}:export"
    """From a TrainedModel to a file for another runtime."""
    tables: str = "NAME.tables:tables"
    """Function that returns the paper's tables."""
    figures: str | None = None
    """Function that returns the figures of a report."""
    bench: str = "NAME.bench:measure"
    """From `full` to rows of a bench, one after the other."""
    facts: str | None = None
    """Function that returns further lines of `info`."""
    verdict: str | None = None
    """From the metrics of a training to a line that judges them, or None."""
    train_options: type | None = None
    """Dataclass of further flags of `train`; what is given goes to the trainer."""
    export_options: type | None = None
    """The same for `export`."""
    verbs: Mapping[str, Callable[..., int | None]] = field(default_factory=dict)
    """The paper's own commands; one of the name of a shared verb takes its place."""

    @property
    def version(self) -> str:
        """Version of the installed distribution."""
        return version(self.distribution)

    def resolve(self, reference: str) -> Any:
        """Return what one of the references above stands for."""
        return resolve(reference.replace("NAME", self.name, 1))

    def register_models(self) -> None:
        """Make timm know the models of this package."""
        for module in self.models:
            importlib.import_module(module)


def resolve(reference: str) -> Any:
    """Return the attribute that "module:attribute" stands for."""
    return resolve_name(reference)


@functools.cache
def installed_packages() -> Mapping[str, Package]:
    """Return the records of all installed packages by name; each is loaded when it is looked up."""
    return _Installed({point.name: point for point in entry_points(group=_GROUP)})


class _Installed(Mapping[str, Package]):
    def __init__(self, points: Mapping[str, EntryPoint]) -> None:
        self.points = points

    def __getitem__(self, name: str) -> Package:
        package: Package = self.points[name].load()
        return package

    def __iter__(self) -> Iterator[str]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)


def is_command(name: str) -> bool:
    """Tell whether this process runs the command `name`, by its script or as `python -m name`.

    A package then leaves out the imports of its public names, since `--help` needs none of them.
    """
    return Path(sys.argv[0]).stem == name or sys.orig_argv[1:3] == ["-m", name]
