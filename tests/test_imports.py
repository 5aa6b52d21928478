"""Imports point down only, and the check that says so bites."""

from pathlib import Path

import pytest


def test_this_repository(tool, root: Path) -> None:
    done = tool(root, "imports")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("packages/demo/src/demo/patches.py", "import other"),
        ("packages/demo/src/demo/patches.py", "import triton"),
        ("shared/src/visionkernels/files.py", "import demo"),
        ("packages/demo/src/demo/patches.py", "import demo.model"),
    ],
)
def test_an_import_that_does_not_point_down(tool, workspace: Path, module: str, line: str) -> None:
    assert tool(workspace, "new_package", "other").returncode == 0
    assert tool(workspace, "imports").returncode == 0
    path = workspace / module
    path.write_text(path.read_text() + f"\n{line}\n")
    done = tool(workspace, "imports")
    assert done.returncode == 1
    assert "BROKEN" in done.stdout
