"""The command line of every package: shared verbs from a Package record, exit codes, errors in one line."""

from visionkernels.cli.options import FitOptions, RecipeDefault, ReportOptions
from visionkernels.cli.printing import find_device, print_metrics, report_bench, report_fit, write_result
from visionkernels.cli.running import run
from visionkernels.cli.verbs import run_package

__all__ = [
    "FitOptions",
    "RecipeDefault",
    "ReportOptions",
    "find_device",
    "print_metrics",
    "report_bench",
    "report_fit",
    "run",
    "run_package",
    "write_result",
]
