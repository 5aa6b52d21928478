"""Prepare a release of one distribution: its version, its changelog and, for visionkernels, the pins of the packages.

The tree must be clean, the changes written down and the tests of the distribution green. Nothing is committed: the
commands that commit, tag and push are printed, and the pushed tag starts the release workflow.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import tyro

from workspace import ROOT, SHARED, Project, packages, pin, run_tool, select

Bump = Literal["major", "minor", "patch"]


def release(name: tyro.conf.Positional[str], bump: tyro.conf.Positional[Bump], *, dry_run: bool = False) -> int:
    """Prepare the release of a package or of visionkernels.

    Args:
        name: the folder's name, or visionkernels
        bump: which part of the version rises
        dry_run: check the tree and the fragments, show the changelog and the commands, change nothing, run no tests
    """
    project = SHARED if name == SHARED.name else select([name])[0]
    version = bumped(project.version, bump)
    _check_tree(project)
    changelog = [sys.executable, "-m", "towncrier", "build"]
    changelog += ["--config", str(ROOT / "pyproject.toml"), "--dir", str(project.folder)]
    changelog += ["--version", version, "--name", project.distribution, "--draft" if dry_run else "--yes"]
    if not dry_run:
        tests = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not browser", str(project.folder)]
        if subprocess.run(tests, cwd=ROOT).returncode:
            print(f"the tests of {name} fail: not released", file=sys.stderr)
            return 1
        _substitute(project, r'^version = ".*"', f'version = "{version}"')
    subprocess.run(changelog, cwd=ROOT, check=True)
    dependents = packages() if project == SHARED and bump != "patch" else []
    for dependent in dependents:
        if not dry_run:
            _substitute(dependent, rf'"{SHARED.name}[^"\[]+"', f'"{SHARED.name}{pin(version)}"')
            fragment = dependent.folder / "changes" / f"+{SHARED.name}-{version}.changed.md"
            fragment.write_text(f"Asks for `{SHARED.name}{pin(version)}`.\n", encoding="utf-8")
    tag = f"{name}-v{version}"
    print(f'git add --all && git commit --message "Release {project.distribution} {version}"')
    print(f"git tag {tag}")
    print(f"git push origin HEAD {tag}")
    if dependents:
        names = ", ".join(dependent.name for dependent in dependents)
        print(f"then release what now asks for {SHARED.name}{pin(version)}: {names}")
    return 0


def bumped(version: str, bump: Bump) -> str:
    """The version after `version` = major.minor.patch."""
    major, minor, patch = map(int, version.split("."))
    if bump == "major":
        return f"{major + 1}.0.0"
    return f"{major}.{minor + 1}.0" if bump == "minor" else f"{major}.{minor}.{patch + 1}"


def _check_tree(project: Project) -> None:
    status = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    if status.stdout:
        first = status.stdout.splitlines()[0].strip()
        raise ValueError(f"the tree is not clean (first: {first}); commit or stash")
    if not [path for path in project.folder.glob("changes/*.md") if path.name != "README.md"]:
        raise ValueError(f"{project.folder / 'changes'} holds no fragment; a release needs a changelog")


def _substitute(project: Project, pattern: str, replacement: str) -> None:
    file = Path(project.folder, "pyproject.toml")
    text, count = re.subn(pattern, replacement, file.read_text(), count=1, flags=re.MULTILINE)
    if not count:
        raise ValueError(f"{file} has no {pattern}")
    file.write_text(text)


if __name__ == "__main__":
    sys.exit(run_tool(release))
