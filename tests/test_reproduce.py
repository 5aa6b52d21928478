"""The report holds what every package measured, also where another package fails."""

import json
import re
from pathlib import Path

import pytest


@pytest.fixture
def report(workspace: Path) -> Path:
    return workspace / "report"


def test_report(tool, workspace: Path, installed: dict[str, str], report: Path) -> None:
    done = tool(workspace, "reproduce", "--quick", env=installed)
    assert done.returncode == 0, done.stderr
    (demo,) = json.loads((report / "report.json").read_text())["packages"]
    assert demo["counts"] == {"agrees": 2, "misses": 0, "measured": 1, "not run": 1, "failed": 0}
    page = (report / "index.html").read_text()
    assert "Tokens of an image" in page and '<span class="agrees">agrees</span>' in page
    # self-contained: every address is inside the page
    assert re.findall(r'(?:src|href)="(?!#|data:)', page) == []


def test_a_package_that_fails(tool, workspace: Path, installed: dict[str, str], report: Path) -> None:
    assert tool(workspace, "new_package", "absent").returncode == 0
    done = tool(workspace, "reproduce", env=installed)
    assert done.returncode == 1 and "failed: absent" in done.stderr
    page = (report / "index.html").read_text()
    assert "The run failed with exit code 1" in page and "Tokens of an image" in page


def test_bad_flags(tool, workspace: Path) -> None:
    assert tool(workspace, "reproduce", "--only", "nope").stderr == (
        "reproduce: error: unknown package 'nope'; present: demo\n"
    )
    assert tool(workspace, "reproduce", "--full", "--quick").returncode == 2
