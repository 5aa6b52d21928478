"""The distributions of this repository, found by their folders, so that no list names a package a second time."""

import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

__all__ = ["ROOT", "SHARED", "Names", "Project", "packages", "pin", "run_tool", "select"]

# a flag that may be repeated
Names = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Project:
    """One distribution: `name` is its folder, import and command, `distribution` its name on PyPI."""

    name: str
    folder: Path

    @property
    def metadata(self) -> dict[str, Any]:
        """The [project] table of its pyproject.toml."""
        project: dict[str, Any] = tomllib.loads((self.folder / "pyproject.toml").read_text())["project"]
        return project

    @property
    def distribution(self) -> str:
        return str(self.metadata["name"])

    @property
    def version(self) -> str:
        return str(self.metadata["version"])


SHARED = Project("visionkernels", ROOT / "shared")


def packages() -> list[Project]:
    """The papers, by name."""
    return [Project(path.parent.name, path.parent) for path in sorted(ROOT.glob("packages/*/pyproject.toml"))]


def select(only: Sequence[str]) -> list[Project]:
    """The papers named in `only`, or all; raises ValueError with the known names for an unknown one."""
    present = {package.name: package for package in packages()}
    for name in only:
        if name not in present:
            raise ValueError(f"unknown package {name!r}; present: {', '.join(present)}")
    return [present[name] for name in only] if only else list(present.values())


def pin(version: str) -> str:
    """What a package asks of visionkernels `version`: this minor release and its fixes."""
    major, minor, _fix = version.split(".")
    return f">={major}.{minor},<{major}.{int(minor) + 1}"


def run_tool(tool: Callable[..., int | None]) -> int:
    """Call `tool` with the process's arguments; a wrong one is a line on stderr and exit code 2."""
    try:
        return tyro.cli(tool, config=(tyro.conf.FlagCreatePairsOff,)) or 0
    except (ValueError, FileExistsError) as error:
        print(f"{tool.__name__.replace('_', '-')}: error: {error}", file=sys.stderr)
        return 2
