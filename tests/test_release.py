"""A release changes the version, the changelog and the pins, and nothing where it is refused."""

import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def tested(workspace: Path) -> Path:
    """The workspace, with tests of `demo` that take no time."""
    tests = workspace / "packages" / "demo" / "tests"
    for path in tests.glob("*.py"):
        path.unlink()
    (tests / "test_demo.py").write_text("def test_demo() -> None:\n    assert True\n")
    commit(workspace)
    return workspace


def commit(workspace: Path) -> None:
    git = ["git", "-c", "user.name=tester", "-c", "user.email=tester@example.org"]
    subprocess.run([*git, "add", "-A"], cwd=workspace, check=True)
    subprocess.run([*git, "commit", "-qm", "change"], cwd=workspace, check=True)


def changed(workspace: Path) -> list[str]:
    done = subprocess.run(["git", "status", "--porcelain"], cwd=workspace, capture_output=True, text=True, check=True)
    return sorted(line[3:] for line in done.stdout.splitlines())


def test_package(tool, tested: Path) -> None:
    done = tool(tested, "release", "demo", "minor")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-3:] == [
        'git add --all && git commit --message "Release demo-vision 0.2.0"',
        "git tag demo-v0.2.0",
        "git push origin HEAD demo-v0.2.0",
    ]
    demo = tested / "packages" / "demo"
    assert 'version = "0.2.0"' in (demo / "pyproject.toml").read_text()
    assert "## 0.2.0 (" in (demo / "CHANGELOG.md").read_text()
    assert "### Added\n\n- `demo.patch_mean`" in (demo / "CHANGELOG.md").read_text()
    fragment = "packages/demo/changes/+first.added.md"
    assert changed(tested) == ["packages/demo/CHANGELOG.md", fragment, "packages/demo/pyproject.toml"]


def test_failing_tests(tool, tested: Path) -> None:
    (tested / "packages/demo/tests/test_demo.py").write_text("def test_demo() -> None:\n    assert False\n")
    commit(tested)
    done = tool(tested, "release", "demo", "patch")
    assert done.returncode == 1 and "the tests of demo fail" in done.stderr
    assert changed(tested) == []


def test_visionkernels_moves_the_pins(tool, tested: Path) -> None:
    (tested / "shared/tests").mkdir()
    (tested / "shared/tests/test_nothing.py").write_text("def test_nothing() -> None:\n    assert True\n")
    (tested / "shared/changes/+words.changed.md").write_text("Words.\n")
    commit(tested)
    done = tool(tested, "release", "visionkernels", "minor")
    assert done.returncode == 0, done.stderr
    assert '"visionkernels>=0.2,<0.3"' in (tested / "packages/demo/pyproject.toml").read_text()
    assert "then release what now asks for visionkernels>=0.2,<0.3: demo" in done.stdout
    # which its own release can say at once
    commit(tested)
    assert tool(tested, "release", "demo", "patch").returncode == 0
    assert "- Asks for `visionkernels>=0.2,<0.3`." in (tested / "packages/demo/CHANGELOG.md").read_text()


def test_dry_run(tool, tested: Path) -> None:
    done = tool(tested, "release", "demo", "major", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "git tag demo-v1.0.0" in done.stdout and "`demo.patch_mean`" in done.stdout
    assert changed(tested) == []


def test_refusals(tool, tested: Path) -> None:
    assert "unknown package 'nope'" in tool(tested, "release", "nope", "minor").stderr
    (tested / "stray.txt").write_text("stray")
    done = tool(tested, "release", "demo", "minor")
    assert done.returncode == 2 and "the tree is not clean (first: ?? stray.txt)" in done.stderr
    (tested / "stray.txt").unlink()
    (tested / "packages/demo/changes/+first.added.md").unlink()
    commit(tested)
    done = tool(tested, "release", "demo", "minor")
    assert done.returncode == 2 and "holds no fragment" in done.stderr
