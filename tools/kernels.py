"""Compile every Triton kernel ahead of time, without a GPU, and print what it takes; 1 if one exceeds its target."""

import dataclasses
import sys

from tabulate import tabulate

from visionkernels.testing.kernels import compile_report


def main() -> int:
    rows = compile_report()
    print(tabulate([dataclasses.asdict(row) for row in rows], headers="keys", tablefmt="github"))
    violations = [row for row in rows if not row.is_within_limits]
    for row in violations:
        print(f"{row.op} {row.kernel} on {row.target}: spills or takes too much shared memory", file=sys.stderr)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
