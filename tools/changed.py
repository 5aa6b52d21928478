"""Print, for GitHub's output file, the packages that the commits since BASE touch.

A change under shared/ or at the root, where every package may feel it, names them all and visionkernels itself, and so
does an unknown BASE.
Runs on a bare Python, before any environment exists.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def changed(base: str) -> list[str]:
    """The names of the touched packages."""
    papers = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
    every = ["visionkernels", *papers]
    # a moved file touches both of its places
    git = ["git", "diff", "--name-only", "--no-renames", "-z", f"{base}...HEAD"]
    done = subprocess.run(git, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return every
    parts = [Path(name).parts for name in done.stdout.split("\0") if name]
    # documentation alone is checked by the job of the workspace
    parts = [part for part in parts if part[0] != "docs" and part[0] not in ("README.md", "CONTRIBUTING.md")]
    if any(part[0] != "packages" for part in parts):
        return every
    return [name for name in papers if any(part[1] == name for part in parts)]


if __name__ == "__main__":
    print(f"packages={json.dumps(changed(sys.argv[1]))}")
