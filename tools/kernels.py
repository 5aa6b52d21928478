"""Compile every Triton kernel ahead of time, without a GPU, and print what it takes; 1 if one exceeds its target.

Below stands each op's roofline: the least operations and bytes of a call, and the time that they take on an H100.
"""

import dataclasses
import sys

from tabulate import tabulate

from visionkernels.testing.kernels import compile_report, roofline_report


def main() -> int:
    rows = compile_report()
    print(tabulate([dataclasses.asdict(row) for row in rows], headers="keys", tablefmt="github"), end="\n\n")
    lines = [
        (line.op, line.config, line.operations / 1e9, line.bytes_moved / 1e6, line.bound, line.microseconds)
        for line in roofline_report()
    ]
    headers = ("op", "config", "GFLOP", "MB", "bound", "microseconds")
    print(tabulate(lines, headers=headers, tablefmt="github", floatfmt=".1f"))
    violations = [row for row in rows if not row.is_within_limits]
    for row in violations:
        print(f"{row.op} {row.kernel} on {row.target}: spills or takes too much shared memory", file=sys.stderr)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
