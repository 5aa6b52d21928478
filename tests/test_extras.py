"""What a message tells users to install can be installed."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECTS = [ROOT / "shared", *sorted((ROOT / "packages").iterdir())]
INSTALL = re.compile(r"""["' ]([a-z0-9-]+)\[([a-z,]+)\]["' ]""")


def extras_of(project: Path) -> tuple[str, set[str]]:
    metadata = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return metadata["name"], set(metadata.get("optional-dependencies", ()))


EXTRAS = dict(map(extras_of, PROJECTS))


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.name)
def test_named_extras_exist(project):
    """Every `distribution[extra]` in the sources is there, and a package names its own."""
    own, _ = extras_of(project)
    named = [
        (path.name, distribution, extra)
        for path in (project / "src").rglob("*.py")
        for distribution, listed in INSTALL.findall(path.read_text(encoding="utf-8"))
        for extra in listed.split(",")
        if distribution in EXTRAS
    ]
    assert named
    assert [place for place in named if place[2] not in EXTRAS[place[1]]] == []
    if project.name != "shared":
        assert {distribution for _, distribution, _ in named} == {own}
