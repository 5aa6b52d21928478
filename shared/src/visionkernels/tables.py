"""A paper's tables as data: what it prints, how this repository measures it, and how far the two are apart.

A package lists its cells; `reproduce` measures those that this machine can measure and says of every other one what it
lacks and which command fills it. A figure that misses stays in the table as a miss.
"""

import contextlib
import importlib.metadata
import importlib.util
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from tabulate import tabulate
from tqdm import tqdm

from visionkernels.checks import InputError
from visionkernels.files import refuse_existing, replace_file, write_json

__all__ = [
    "CHECKPOINT",
    "DATASET",
    "GPU",
    "SAMPLES",
    "TIME",
    "Cell",
    "Figure",
    "Measured",
    "Need",
    "Result",
    "Table",
    "as_dict",
    "evaluate",
    "installed",
    "render",
    "reproduce",
]

Status: TypeAlias = Literal["agrees", "misses", "measured", "not run", "failed"]
Style: TypeAlias = Literal["terminal", "markdown", "html"]


@dataclass(frozen=True)
class Need:
    """Something that a cell cannot do without; `phrase` completes "needs ...", `is_met` asks this machine.

    Without `is_met` the measurement is the business of the cell's command, which is given what it needs.
    """

    phrase: str
    is_met: Callable[[], bool] | None = None


def installed(*modules: str, pip: str) -> Need:
    """Return the need of modules that `pip install pip` brings."""
    return Need(f"{' and '.join(modules)} (pip install '{pip}')", lambda: all(map(importlib.util.find_spec, modules)))


DATASET = Need("the data set")
CHECKPOINT = Need("trained weights")
GPU = Need("a GPU", lambda: torch.cuda.is_available())
TIME = Need("more than minutes (--full)")
"""Met by `full`."""
SAMPLES = installed("mlxtend", "skimage", pip="visionkernels[samples]")


@dataclass(frozen=True)
class Measured:
    """A figure of ours; `spread` is the standard deviation over seeds, `note` what a reader must know of it."""

    value: float
    spread: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure of a paper's table.

    `paper` is the printed figure (None where the paper has none), `digits` its decimals, `tolerance` the largest
    difference that still agrees, in the figure's own unit. `source` says whether the figure was read in the paper or
    its repository, or recalled. `measure` computes ours; None where only `command` can, with what `needs` names.
    `better` says which way a figure may pass the paper's and still agree.
    """

    row: str
    column: str
    paper: float | None
    digits: int
    tolerance: float
    command: str
    source: Literal["read", "recalled"] = "read"
    measure: Callable[[], Measured | float] | None = None
    needs: tuple[Need, ...] = ()
    better: Literal["higher", "lower"] | None = None

    def __post_init__(self) -> None:
        if self.measure is None and not self.needs:
            raise InputError(f"{self.row} / {self.column} has no measure and needs nothing; name what it needs")


@dataclass(frozen=True)
class Table:
    """A table of a paper; `convention` says how its figures are counted (FLOPs, resolution, seeds)."""

    name: str
    title: str
    convention: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Figure:
    """A picture that belongs to a report; `draw` writes it to the path that it is given."""

    name: str
    title: str
    caption: str
    draw: Callable[[Path], None]
    format: Literal["png", "svg"] = "png"


@dataclass(frozen=True)
class Result:
    """A cell after its measurement; `detail` holds what it lacks, the error, or the note of the measurement."""

    table: str
    cell: Cell
    status: Status
    measured: Measured | None
    detail: str


def evaluate(tables: Sequence[Table], *, full: bool = False, progress: bool = True) -> list[Result]:
    """Measure every cell that has a `measure` and whose needs this machine meets, in the order of the tables.

    `full` also runs the cells that need time. A measurement that raises, or that is not finite, is a failed cell with
    the error as its detail; the others go on.
    """
    cells = [(table, cell) for table in tables for cell in table.cells]
    bar = tqdm(cells, unit="cell", file=sys.stderr, disable=not progress, leave=False)
    results = []
    for table, cell in bar:
        bar.set_postfix_str(f"{table.name}: {cell.row} {cell.column}")
        results.append(_evaluate_cell(table.name, cell, full))
    return results


def _evaluate_cell(table: str, cell: Cell, full: bool) -> Result:
    lacking = [need for need in cell.needs if not _is_met(need, full)]
    if cell.measure is None or lacking:
        # without a measure all its needs are the command's business, also those that this machine has
        needs = [need.phrase for need in (lacking or cell.needs)]
        return Result(table, cell, "not run", None, f"needs {' and '.join(needs)}")
    try:
        value = cell.measure()
    except Exception as error:
        return Result(table, cell, "failed", None, f"{type(error).__name__}: {error}")
    measured = value if isinstance(value, Measured) else Measured(float(value))
    if not all(map(math.isfinite, (measured.value, measured.spread or 0.0))):
        return Result(table, cell, "failed", None, f"measured {measured.value} (spread {measured.spread})")
    if cell.paper is None:
        return Result(table, cell, "measured", measured, measured.note)
    # the published figure is a rounded one: a difference at the tolerance agrees, whatever its last bit says
    difference = measured.value - cell.paper
    shortfall = {"higher": -difference, "lower": difference, None: abs(difference)}[cell.better]
    agrees = shortfall <= cell.tolerance + 1e-9 * abs(cell.paper)
    return Result(table, cell, "agrees" if agrees else "misses", measured, measured.note)


def _is_met(need: Need, full: bool) -> bool:
    return full if need is TIME else need.is_met is not None and need.is_met()


def as_dict(table: Table, results: Sequence[Result]) -> dict[str, Any]:
    """The table with its results as JSON-able data: numbers as they are, and beside them the text to print."""
    cells = []
    for result in (r for r in results if r.table == table.name):
        cell, ours = result.cell, result.measured
        difference = None if ours is None or cell.paper is None else ours.value - cell.paper
        cells.append(
            {
                "row": cell.row,
                "column": cell.column,
                "paper": cell.paper,
                "paper_text": _number(cell.paper, cell.digits) + (" (recalled)" if cell.source == "recalled" else ""),
                "source": cell.source,
                "measured": ours and ours.value,
                "spread": ours and ours.spread,
                "measured_text": _measured_text(ours, cell.digits),
                "difference": difference,
                "difference_text": _number(difference, cell.digits, sign="+"),
                "tolerance": cell.tolerance,
                "status": result.status,
                "detail": result.detail,
                "command": cell.command,
            }
        )
    return {"name": table.name, "title": table.title, "convention": table.convention, "cells": cells}


def _number(value: float | None, digits: int, sign: Literal["", "+"] = "") -> str:
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def _measured_text(measured: Measured | None, digits: int) -> str:
    if measured is None:
        return _number(None, digits)
    spread = "" if measured.spread is None else f" ± {_number(measured.spread, digits)}"
    return _number(measured.value, digits) + spread


_HEADERS = ("", "figure", "paper", "measured", "difference", "status")
_COLUMNS = ("row", "column", "paper_text", "measured_text", "difference_text", "status")


def render(table: dict[str, Any], style: Style = "terminal") -> str:
    """Render the result of `as_dict`: title, convention, figures, then the needs of the cells that were not run."""
    rows = [[cell[column] for column in _COLUMNS] for cell in table["cells"]]
    notes = _notes(table["cells"])
    align = ("left", "left", "right", "right", "right", "left")
    if style == "html":
        # the class of the status lets a page colour it
        rows = [[*map(escape, row[:-1]), f'<span class="{row[-1].replace(" ", "-")}">{row[-1]}</span>'] for row in rows]
        items = "".join(f"<li>{escape(text)}: <code>{escape(command)}</code></li>" for text, command in notes)
        grid = tabulate(rows, _HEADERS, tablefmt="unsafehtml", colalign=align, disable_numparse=True)
        heading = f"<h3>{escape(table['title'])}</h3>\n<p>{escape(table['convention'])}</p>"
        return f'{heading}\n<div class="wide">{grid}</div>\n' + (f"<ul>{items}</ul>" if items else "")
    if style == "markdown":
        grid = tabulate(rows, _HEADERS, tablefmt="github", colalign=align, disable_numparse=True)
        listing = "\n".join(f"- {text}: `{command}`" for text, command in notes)
        return f"### {table['title']}\n\n{table['convention']}\n\n{grid}\n\n{listing}".strip()
    grid = tabulate(rows, _HEADERS, tablefmt="simple", colalign=align, disable_numparse=True)
    listing = "\n".join(f"  {text}\n    {command}" for text, command in notes)
    return f"{table['title']}\n{table['convention']}\n\n{grid}\n\n{listing}".strip()


def _notes(cells: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The lines under a table, each with the command that redoes a cell; cells that share both share a line."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell["detail"]:
            grouped.setdefault((cell["detail"], cell["command"]), []).append(f"{cell['row']} {cell['column']}")
    return [(f"{', '.join(names)}: {detail}", command) for (detail, command), names in grouped.items()]


def reproduce(
    package: str,
    tables: Sequence[Table],
    figures: Sequence[Figure] = (),
    *,
    full: bool = False,
    json: Path | None = None,
    figures_dir: Path | None = None,
    overwrite: bool = False,
) -> int:
    """The body of every `<name> reproduce`: measure, print the tables on stdout, write JSON and figures where asked.

    `package` is the name of the distribution. Returns 1 if a measurement or a figure failed, else 0: a miss is a
    result. Raises FileExistsError before any work if an output is there and `overwrite` is not given.
    """
    paths = [figures_dir / f"{figure.name}.{figure.format}" for figure in figures] if figures_dir else []
    for path in (*paths, json):
        refuse_existing(path, overwrite)
    start = time.perf_counter()
    results = evaluate(tables, full=full)
    sheets = [as_dict(table, results) for table in tables]
    drawn = [_draw(figure, path) for figure, path in zip(figures if figures_dir else (), paths, strict=True)]
    counts = ", ".join(f"{sum(r.status == status for r in results)} {status}" for status in get_args(Status))
    seconds = time.perf_counter() - start
    if json:
        report = {"package": package, "version": importlib.metadata.version(package), "seconds": round(seconds, 3)}
        write_json(json, report | {"versions": _versions(), "tables": sheets, "figures": drawn}, overwrite=overwrite)
    for sheet in sheets:
        print(render(sheet), end="\n\n")
    print(f"{package}: {counts}; {seconds:.0f} s")
    return int(any(r.status == "failed" for r in results) or any(figure["error"] for figure in drawn))


def _draw(figure: Figure, path: Path) -> dict[str, str | None]:
    error = None
    print(f"drawing {path}", file=sys.stderr)
    try:
        # an older picture was refused above, or may be replaced
        with replace_file(path, overwrite=True) as temporary:
            figure.draw(temporary)
    except Exception as cause:
        error = f"{type(cause).__name__}: {cause}"
        print(f"{figure.name} failed: {error}", file=sys.stderr)
    return {
        "name": figure.name,
        "title": figure.title,
        "caption": figure.caption,
        "file": None if error else str(path),
        "error": error,
    }


def _versions() -> dict[str, str]:
    """Versions and hardware that the figures depend on."""
    versions = {"python": platform.python_version()}
    for name in ("visionkernels", "torch", "timm", "numpy", "triton"):
        # a module may come from a distribution of another name, as triton does for ROCm
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return versions | {"device": device, "threads": str(torch.get_num_threads())}
