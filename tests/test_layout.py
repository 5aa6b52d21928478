"""Every distribution has the files, the metadata and the pins that the design asks for."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from visionkernels.package import Package, installed_packages

ROOT = Path(__file__).parents[1]
SHARED = ROOT / "shared"
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
EVERY = [SHARED, *PACKAGES]


def project(folder: Path) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return table


def ids(folder: Path) -> str:
    return folder.name


@pytest.mark.parametrize("folder", EVERY, ids=ids)
class TestDistribution:
    def test_files(self, folder: Path) -> None:
        name = "visionkernels" if folder == SHARED else folder.name
        wanted = ["README.md", "CHANGELOG.md", "LICENSE", "changes/README.md", f"src/{name}/py.typed", "tests"]
        if folder != SHARED:
            modules = ("__init__", "__main__", "cli", "tables", "bench")
            wanted += [f"src/{name}/{module}.py" for module in modules] + ["tests/parity.py", "tests/golden"]
        assert [path for path in wanted if not (folder / path).exists()] == []

    def test_licence(self, folder: Path) -> None:
        assert (folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()

    def test_metadata(self, folder: Path) -> None:
        table = project(folder)
        assert re.fullmatch(r"\d+\.\d+\.\d+", table["version"])
        assert table["requires-python"] == ">=3.11"
        assert (table["readme"], table["license"], table["license-files"]) == ("README.md", "Apache-2.0", ["LICENSE"])

    def test_extras_are_in_the_workspace(self, folder: Path) -> None:
        workspace = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["envs"]["default"][
            "workspace"
        ]
        where = "shared" if folder == SHARED else "packages/*"
        (features,) = [member["features"] for member in workspace["members"] if member["path"] == where]
        assert set(project(folder).get("optional-dependencies", {})) - set(features) == set()

    def test_changelog_names_the_version(self, folder: Path) -> None:
        released = re.findall(r"^## (\d+\.\d+\.\d+) ", (folder / "CHANGELOG.md").read_text(), re.MULTILINE)
        # before the first release there is none
        assert not released or released[0] == project(folder)["version"]


@pytest.mark.parametrize("folder", PACKAGES, ids=ids)
class TestPackage:
    def test_command(self, folder: Path) -> None:
        assert project(folder)["scripts"] == {folder.name: f"{folder.name}.cli:main"}

    def test_record(self, folder: Path) -> None:
        announced = project(folder)["entry-points"]["visionkernels.packages"]
        assert announced == {folder.name: f"{folder.name}.cli:PACKAGE"}
        record: Package = resolve_name(announced[folder.name])
        assert (record.name, record.distribution) == (folder.name, project(folder)["name"])

    def test_references(self, folder: Path) -> None:
        """What the record names exists."""
        record = installed_packages()[folder.name]
        named = ["recipes", "official", "create", "upgrade", "evaluate", "export", "tables", "figures", "bench"]
        for reference in (*(getattr(record, name) for name in (*named, "facts", "verdict")), *record.openers.values()):
            assert reference is None or record.resolve(reference) is not None
        record.register_models()

    def test_help_does_not_wait_for_torch(self, folder: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", folder.name, "--help"],
            env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0
        assert re.findall(r"\| +(torch|timm|numpy)$", done.stderr, re.MULTILINE) == []

    def test_pin(self, folder: Path) -> None:
        major, minor, _ = project(SHARED)["version"].split(".")
        (pin,) = [line for line in project(folder)["dependencies"] if line.startswith("visionkernels")]
        assert pin == f"visionkernels>={major}.{minor},<{major}.{int(minor) + 1}"
