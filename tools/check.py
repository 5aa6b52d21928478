"""Everything that CI runs, on this machine: one line a step, its output where it fails, and a closing count."""

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workspace import ROOT, SHARED, Names, Project, run_tool, select

# as the script `test` of pyproject.toml
_FAST = ["-n", "auto", "--maxprocesses", "8", "--dist", "loadfile", "-m", "not slow and not browser"]


@dataclass(frozen=True)
class Step:
    """A step passes if all its commands exit with 0, each run in its folder."""

    name: str
    commands: Sequence[tuple[list[str], Path]]


def steps(projects: Sequence[Project], only: Sequence[str]) -> list[Step]:
    """The steps for `projects`, or for the whole workspace where `only` names none."""
    python = [sys.executable, "-m"]
    files = [str(project.folder) for project in projects] if only else ["."]
    sources = [str(project.folder / "src") for project in projects] + ([] if only else ["tools"])
    # of the tests of the whole repository, those that speak of these packages by name
    about = ["tests/test_layout.py", "tests/test_readmes.py", "-k", " or ".join(each.folder.name for each in projects)]
    suites: list[list[str]] = [files, about] if only else [[]]
    papers = [project for project in projects if project != SHARED]
    chosen = [argument for project in papers for argument in ("--only", project.name)] if only else []
    return [
        Step(
            "lint", [([*python, "ruff", "check", *files], ROOT), ([*python, "ruff", "format", "--check", *files], ROOT)]
        ),
        Step("types", [([*python, "mypy", *sources], ROOT)]),
        Step("imports", [([sys.executable, "tools/imports.py"], ROOT)]),
        Step("dependencies", [(_deptry(project), project.folder) for project in projects]),
        Step("tests", [([*python, "pytest", *_FAST, *tests], ROOT) for tests in suites]),
        Step("shapes", [(_shapes(project), ROOT) for project in papers]),
        # every package is built and tried with the base's wheel
        Step("wheels", [([sys.executable, "tools/wheels.py", *chosen], ROOT)] if papers else []),
    ]


def _deptry(project: Project) -> list[str]:
    # extras are imported by name where they are used, which deptry cannot see; tools/imports.py watches over Triton
    groups = project.metadata.get("optional-dependencies", {}).values()
    extras = {re.split(r"[^\w.-]", requirement)[0] for group in groups for requirement in group} - {SHARED.name}
    ignored = ["DEP003=triton"] + ["DEP002=" + "|".join(sorted(extras))] * bool(extras)
    return [sys.executable, "-m", "deptry", "src", "--no-ansi", "--per-rule-ignores", ",".join(ignored)]


def _shapes(project: Project) -> list[str]:
    # the golden cases run the public functions; their annotated shapes are checked on the way
    checked = f"{project.name},{SHARED.name},{SHARED.name}.testing.typechecking.check"
    cases = [f"packages/{project.name}/tests/test_parity.py", "-k", "golden"]
    return [sys.executable, "-m", "pytest", *cases, f"--jaxtyping-packages={checked}"]


def check(*, only: Names = (), skip: Names = (), keep_going: bool = False) -> int:
    """Run all checks.

    Args:
        only: this package alone, or visionkernels; may be repeated
        skip: leave this step out; may be repeated
        keep_going: run the remaining steps after a failure
    """
    named = select([name for name in only if name != SHARED.name]) if set(only) != {SHARED.name} else []
    projects = [SHARED, *named] if not only or SHARED.name in only else named
    listed = steps(projects, only)
    unknown = set(skip) - {step.name for step in listed}
    if unknown:
        raise ValueError(f"skip={sorted(unknown)} must be of: {', '.join(step.name for step in listed)}")
    passed = failed = 0
    for step in listed:
        if step.name in skip:
            continue
        if _passes(step):
            passed += 1
            continue
        failed += 1
        if not keep_going:
            break
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


def _passes(step: Step) -> bool:
    start = time.perf_counter()
    print(f"{step.name:14}", end="", flush=True)
    output = ""
    for command, folder in step.commands:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output = done.stdout
        if done.returncode:
            print(f"FAILED {time.perf_counter() - start:6.1f} s\n{output}")
            return False
    last = output.strip().rpartition("\n")[2].strip("= ")
    print(f"passed {time.perf_counter() - start:6.1f} s  {last}")
    return True


if __name__ == "__main__":
    sys.exit(run_tool(check))
