"""Measure the speed of every package beside its baselines, print the tables and write report/bench.json.

Each package times itself (`<name> bench`) in a process of its own, one after the other.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from visionkernels.files import write_json
from visionkernels.profiling import BenchRow, bench_table
from workspace import ROOT, Names, run_tool, select


def bench(*, only: Names = (), output: Path = ROOT / "report" / "bench.json") -> int:
    """Run the benches and print their ratios as Markdown.

    Args:
        only: this package alone; may be repeated
        output: the merged rows; an older file is replaced
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    failed = []
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}")
    for package in select(only):
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "bench.json")
            command = [sys.executable, "-m", package.name, "bench", "--json", str(target)]
            # its own table goes to stderr: stdout holds the merged one
            done = subprocess.run(command, stdout=sys.stderr)
            if done.returncode or not target.exists():
                failed.append(package.name)
                continue
            rows[package.name] = json.loads(target.read_text())
        print(f"\n## {package.name} {package.version}\n\n{bench_table(BenchRow(**row) for row in rows[package.name])}")
    write_json(output, rows, overwrite=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_tool(bench))
