"""Build every wheel and sdist into dist/, look inside them, and show that each package stands alone.

A package stands alone if its wheel and that of visionkernels, installed into a fresh environment without extras,
import and answer `--help` and `info`. The environments are removed afterwards; uv links their files from its cache.
"""

import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import Parser
from pathlib import Path

from workspace import ROOT, SHARED, Names, Project, pin, run_tool, select

DIST = ROOT / "dist"
UV = [sys.executable, "-m", "uv"]


def build(*, only: Names = (), no_install: bool = False, then: str | None = None) -> int:
    """Build and check the distributions.

    Args:
        only: this package (and visionkernels) alone; may be repeated
        no_install: stop after the build and the look inside
        then: a command to run in each environment as well, to see what it says without extras, such as "biformer train"
    """
    chosen = select(only)
    wheels = {project.name: _build(project) for project in (SHARED, *chosen)}
    problems = [f"{name}: {problem}" for name, wheel in wheels.items() for problem in _inspect(wheel)]
    for package in [] if no_install else chosen:
        problems += _stand_alone(package, [wheels[SHARED.name], wheels[package.name]], then)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(wheels)} distributions, {len(problems)} problems")
    return 1 if problems else 0


def _build(project: Project) -> Path:
    # without flags uv builds the sdist and then the wheel from it, which shows that the sdist is complete
    subprocess.run([*UV, "build", "--quiet", "--out-dir", str(DIST), str(project.folder)], check=True)
    stem = f"{project.distribution.replace('-', '_')}-{project.version}"
    with tarfile.open(DIST / f"{stem}.tar.gz") as sdist:
        missing = {"LICENSE", "README.md", "pyproject.toml"} - {Path(name).name for name in sdist.getnames()}
    if missing:
        raise SystemExit(f"{stem}.tar.gz lacks {', '.join(sorted(missing))}")
    return DIST / f"{stem}-py3-none-any.whl"


def _inspect(wheel: Path) -> list[str]:
    """What is wrong with the contents of a wheel."""
    distribution, version = wheel.name.split("-")[:2]
    information = f"{distribution}-{version}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = Parser().parsestr(archive.read(f"{information}/METADATA").decode())
    tops = {name.split("/")[0] for name in names} - {information}
    problems = [f"installs {len(tops)} top-level names: {sorted(tops)}"] if len(tops) != 1 else []
    wanted = [f"{top}/py.typed" for top in tops] + [f"{information}/licenses/LICENSE"]
    problems += [f"lacks {name}" for name in wanted if name not in names]
    problems += [f"carries {name}" for name in names if "tests" in Path(name).parts]
    base = [line for line in metadata.get_all("Requires-Dist", []) if line.startswith(SHARED.name) and ";" not in line]
    expected = set(pin(SHARED.version).split(","))
    if distribution != SHARED.name and [set(line.removeprefix(SHARED.name).split(",")) for line in base] != [expected]:
        problems.append(f"asks for {base}, not {SHARED.name}{pin(SHARED.version)}")
    return problems


def _stand_alone(package: Project, wheels: list[Path], then: str | None) -> list[str]:
    print(f"{package.name}: installing from its wheels alone")
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder, "venv")
        python = environment / "bin" / "python"
        subprocess.run([*UV, "venv", "--quiet", "--python", sys.executable, str(environment)], check=True)
        install = [*UV, "pip", "install", "--quiet", "--python", str(python), *map(str, wheels)]
        subprocess.run(install, check=True)
        command = str(environment / "bin" / package.name)
        calls = [[str(python), "-c", f"import {package.name}"], [command, "--help"], [command, "info"]]
        # nothing of the checkout or of this environment may help
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
        problems = []
        for call in calls:
            done = subprocess.run(call, cwd=folder, env=clean, capture_output=True, text=True)
            if done.returncode:
                shown = " ".join([Path(call[0]).name, *call[1:]])
                problems.append(f"{package.name}: `{shown}` exits {done.returncode} when alone: {done.stderr.strip()}")
        if then:
            clean["PATH"] = f"{environment / 'bin'}{os.pathsep}{clean.get('PATH', '')}"
            print(f"$ {then}")
            print("exit code", subprocess.run(shlex.split(then), cwd=folder, env=clean).returncode)
        return problems


if __name__ == "__main__":
    sys.exit(run_tool(build))
