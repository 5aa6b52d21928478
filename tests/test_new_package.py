"""The skeleton of a new package is complete, and refused where it cannot be one."""

import subprocess
import sys
from pathlib import Path

import pytest


def pytest_in(workspace: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True)


def test_from_end_to_end(workspace: Path, installed: dict[str, str]) -> None:
    """It trains, is killed, resumes, evaluates, exports, loads official weights, reproduces and agrees."""
    done = pytest_in(workspace, installed, "packages/demo")
    assert done.returncode == 0, done.stdout
    assert " skipped" not in done.stdout


@pytest.mark.slow
def test_linters(workspace: Path, installed: dict[str, str]) -> None:
    for command in ("ruff check packages", "ruff format --check packages", "mypy packages/demo/src"):
        checked = subprocess.run(
            [sys.executable, "-m", *command.split()], cwd=workspace, env=installed, capture_output=True, text=True
        )
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Demo2",), "name='Demo2' must be"),
        (("class",), "name='class' must be"),
        (("json",), "name='json' must be"),
        (("demo",), "demo exists; present: visionkernels, demo"),
        (("new", "--distribution", "New Paper"), "distribution='New Paper' must be"),
        (("new", "--title", 'A "quoted" title'), "title='A \"quoted\" title' must be"),
    ],
)
def test_refusals(tool, workspace: Path, arguments: tuple[str, ...], message: str) -> None:
    done = tool(workspace, "new_package", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not (workspace / "packages" / "new").exists()
