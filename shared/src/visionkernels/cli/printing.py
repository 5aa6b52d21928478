"""Output of commands: metrics in words, a training's outcome, rows of a bench."""

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionkernels.checks import InputError
from visionkernels.files import finite_or_none, refuse_existing, write_json

if TYPE_CHECKING:
    from visionkernels.profiling import BenchRow

__all__ = ["find_device", "print_metrics", "report_bench", "report_fit", "write_result"]

# how a metric is printed
_METRICS = {
    "top1": "top-1 {:.2f} %",
    "top5": "top-5 {:.2f} %",
    "loss": "loss {:.4f}",
    "main_loss": "loss of the main output {:.4f}",
    "val_loss": "loss in evaluation {:.4f}",
    "majority_top1": "always the most frequent class: top-1 {:.2f} %",
    "num_pictures": "{} images",
    "miou": "mIoU {:.2f} %",
    "pixel_accuracy": "pixels right {:.2f} %",
    "miou_before": "before fine-tuning: mIoU {:.2f} %",
    "majority_miou": "always the most frequent class: mIoU {:.2f} %",
}


def print_metrics(metrics: Mapping[str, float]) -> None:
    """Print metrics, a line each, in words where there are some; epoch, update and learning rate are left out."""
    for name, value in metrics.items():
        if name not in ("epoch", "update", "lr"):
            print(_METRICS.get(name, name.replace("_", " ") + " {:.4g}").format(value))


def report_fit(metrics: Mapping[str, Any], weights: Path, note: str | None = None) -> None:
    """Print the metrics of a training, a note, and where its weights are; of several processes only the first does."""
    if os.environ.get("RANK", "0") == "0":
        print_metrics(metrics)
        if note is not None:
            print(note)
        print(f"weights: {weights}")


def write_result(json: Path | None, result: Any, *, overwrite: bool) -> None:
    """Write a result as JSON where a command was asked to; numbers that are not finite become null.

    Commands do so before they print, since stdout may be closed by then.
    """
    if json is not None:
        write_json(json, finite_or_none(result), overwrite=overwrite)


def find_device(name: str) -> Any:
    """Return the torch.device of a `--device` flag; "auto" is a GPU if there is one. Raises InputError for others."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name!r} cannot be used: {str(error).partition(chr(10))[0]}") from error


def report_bench(rows: "Iterable[BenchRow]", *, json: str | Path | None = None, overwrite: bool = False) -> None:
    """Print the rows as they are measured (on stderr), then as a table; write them as a JSON list as well.

    Raises FileExistsError before anything is measured.
    """
    from visionkernels.profiling import bench_table

    refuse_existing(json, overwrite)
    measured = []
    for row in rows:
        print(f"{row.id}: {row.ratio:.2f}", file=sys.stderr)
        measured.append(row)
    if json is not None:
        write_json(json, [asdict(row) for row in measured], overwrite=overwrite)
    print(bench_table(measured))
