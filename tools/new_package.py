"""Write the skeleton of one more paper: a package that passes `hatch run check --only NAME` as it is.

The skeleton measures one small real function from end to end (code, recipe, table, command, golden cases, tests), so
that each part is replaced in place rather than invented. The files lie in tools/templates/package; NAME in a path
stands for the package, and *.jinja are Jinja2 templates.
"""

import keyword
import re
import shutil
import subprocess
import sys
from pathlib import Path

import tyro
from jinja2 import Environment, StrictUndefined

from workspace import ROOT, SHARED, packages, pin, run_tool

TEMPLATES = Path(__file__).parent / "templates" / "package"


def new_package(name: tyro.conf.Positional[str], *, distribution: str | None = None, title: str | None = None) -> None:
    """Write packages/NAME.

    Args:
        name: folder, import and command: lower case, letters and digits
        distribution: name on PyPI, by default NAME
        title: what the paper does, in one line
    """
    taken = [SHARED.name, *(package.name for package in packages())]
    if not re.fullmatch("[a-z][a-z0-9]{1,30}", name) or keyword.iskeyword(name) or name in sys.stdlib_module_names:
        raise ValueError(f"name={name!r} must be 2 to 31 lower-case letters and digits, no keyword or standard module")
    distribution = distribution or name
    if not re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", distribution):
        raise ValueError(f"distribution={distribution!r} must be lower-case words joined by single hyphens")
    title = title or f"{name.capitalize()}, a vision paper"
    if len(title) > 80 or not title.isprintable() or set(title) & set('"\\{}'):
        raise ValueError(f"title={title!r} must be one line of at most 80 characters, no quote, brace or backslash")
    folder = ROOT / "packages" / name
    if name in taken or folder.exists():
        raise FileExistsError(f"{folder} exists; present: {', '.join(taken)}")
    values = {
        "name": name,
        "distribution": distribution,
        "title": title,
        "pin": pin(SHARED.version),
    }
    write(folder, values)
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    # the order of imports and the length of lines depend on the name
    for command in (["check", "--quiet", "--fix"], ["format", "--quiet"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, str(folder)], cwd=ROOT, check=True)
    print(f"wrote {folder}; now: hatch run check --only {name}")


def write(folder: Path, values: dict[str, str]) -> None:
    """Render the templates into `folder`."""
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    for source in sorted(path for path in TEMPLATES.rglob("*") if path.is_file()):
        target = folder / str(source.relative_to(TEMPLATES)).replace("NAME", values["name"]).removesuffix(".jinja")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".jinja":
            target.write_text(environment.from_string(source.read_text()).render(values))
        else:
            shutil.copy(source, target)


if __name__ == "__main__":
    sys.exit(run_tool(new_package))
