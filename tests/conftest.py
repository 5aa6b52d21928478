"""What the tests of the whole repository share: its folder, and copies of it to break."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

Tool = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A copy of the tools, of visionkernels and of a package `demo` that they made, as a clean git repository."""
    copy = tmp_path / "workspace"
    shutil.copytree(ROOT / "tools", copy / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "shared", copy / "shared", ignore=shutil.ignore_patterns("__pycache__", "tests"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    made = run_tool(copy, "new_package", "demo", "--distribution", "demo-vision", "--title", "A demonstration")
    assert made.returncode == 0, made.stderr
    (copy / ".gitignore").write_text("__pycache__/\n")
    git = ["git", "-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "copy"]):
        subprocess.run([*git, *arguments], cwd=copy, check=True)
    return copy


def run_tool(
    workspace: Path, name: str, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"tools/{name}.py", *arguments]
    return subprocess.run(command, cwd=workspace, env=env, capture_output=True, text=True)


@pytest.fixture
def tool() -> Tool:
    """Runs tools/NAME.py of a workspace: `tool(workspace, name, *arguments, env=None)`."""
    return run_tool


@pytest.fixture
def installed(workspace: Path, tmp_path: Path) -> dict[str, str]:
    """The environment in which the copy's `demo` is installed."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps"]
    command += ["--python", sys.executable, "--target", str(site)]
    subprocess.run([*command, str(workspace / "packages" / "demo")], check=True)
    return os.environ | {"PYTHONPATH": str(site)}
