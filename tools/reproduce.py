"""Reproduce the tables of every paper and write report/index.html and report/report.json.

Each package measures itself (`<name> reproduce`) in a process of its own, so that one that fails leaves the others'
results in the report; the exit code is then 1.
"""

import base64
import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from tqdm import tqdm

from visionkernels.files import replace_file, write_json
from visionkernels.tables import render
from workspace import ROOT, Names, Project, run_tool, select

_MIME = {".png": "image/png", ".svg": "image/svg+xml"}


def reproduce(
    *,
    full: bool = False,
    quick: bool = False,
    only: Names = (),
    output: Path = ROOT / "report",
) -> int:
    """Reproduce the papers' tables.

    Args:
        full: also the cells that take more than minutes
        quick: the cells that take minutes (the default, named for scripts)
        only: this package alone; may be repeated
        output: the folder of the report; an older report in it is replaced
    """
    if full and quick:
        raise ValueError("--full and --quick exclude each other")
    start = time.perf_counter()
    reports = []
    with tempfile.TemporaryDirectory() as scratch:
        for package in tqdm(select(only), desc="reproduce", unit="package", file=sys.stderr):
            print(f"--- {package.name}", file=sys.stderr)
            reports.append(_run(package, full, Path(scratch, package.name)))
    failed = [report["name"] for report in reports if report["exit_code"]]
    summary = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}",
        "seconds": round(time.perf_counter() - start, 1),
        "packages": reports,
    }
    write_json(output / "report.json", summary, overwrite=True)
    with replace_file(output / "index.html", overwrite=True) as page:
        page.write_text(_page(summary), encoding="utf-8")
    print(f"wrote {output / 'index.html'} and report.json in {summary['seconds']:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(package: Project, full: bool, folder: Path) -> dict[str, Any]:
    """The report of one package, pictures inline; without tables if it could not write any."""
    target = folder / "report.json"
    command = [sys.executable, "-m", package.name, "reproduce", "--json", str(target), "--figures-dir", str(folder)]
    start = time.perf_counter()
    exit_code = subprocess.run(command + ["--full"] * full).returncode
    report: dict[str, Any] = {"version": package.version, "versions": {}, "tables": [], "figures": []}
    if target.exists():
        report |= json.loads(target.read_text())
    for figure in report["figures"]:
        figure["image"] = _inline(Path(figure.pop("file"))) if figure["error"] is None else None
    statuses = [cell["status"] for table in report["tables"] for cell in table["cells"]]
    counts = {status: statuses.count(status) for status in ("agrees", "misses", "measured", "not run", "failed")}
    seconds = round(time.perf_counter() - start, 1)
    return report | {
        "name": package.name,
        "title": package.metadata["description"],
        "exit_code": exit_code,
        "counts": counts,
        "seconds": seconds,
    }


def _inline(picture: Path) -> str:
    return f"data:{_MIME[picture.suffix]};base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _page(summary: dict[str, Any]) -> str:
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters["table"] = lambda table: render(table, "html")
    return environment.get_template("report.html").render(summary)


if __name__ == "__main__":
    sys.exit(run_tool(reproduce))
