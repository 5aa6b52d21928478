"""CI runs the packages that a change touches, and all of them where it cannot know."""

import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("path", "packages"),
    [
        ("packages/demo/README.md", ["demo"]),
        ("docs/design.md", []),
        ("shared/README.md", ["visionkernels", "demo", "other"]),
        ("pyproject.toml", ["visionkernels", "demo", "other"]),
    ],
)
def test_path(tool, workspace: Path, path: str, packages: list[str]) -> None:
    git = ["git", "-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    tool(workspace, "new_package", "other")
    for change in ("other", "change"):
        if change == "change":
            file = workspace / path
            file.parent.mkdir(exist_ok=True)
            file.write_text(file.read_text() + "\n" if file.exists() else "new\n")
        subprocess.run([*git, "add", "-A"], cwd=workspace, check=True)
        subprocess.run([*git, "commit", "-qm", change], cwd=workspace, check=True)
    listed = ", ".join(f'"{name}"' for name in packages)
    assert tool(workspace, "changed", "HEAD~1").stdout == f"packages=[{listed}]\n"


def test_unknown_base(tool, workspace: Path) -> None:
    assert tool(workspace, "changed", "0" * 40).stdout == 'packages=["visionkernels", "demo"]\n'


def test_move(tool, workspace: Path) -> None:
    """A file that leaves shared/ may be missed by any package."""
    git = ["git", "-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    subprocess.run([*git, "mv", "shared/README.md", "packages/demo/OTHER.md"], cwd=workspace, check=True)
    subprocess.run([*git, "commit", "-qm", "move"], cwd=workspace, check=True)
    assert tool(workspace, "changed", "HEAD~1").stdout == 'packages=["visionkernels", "demo"]\n'
