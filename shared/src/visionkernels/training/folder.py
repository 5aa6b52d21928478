"""The folder of a run: what defines it (run.json), its log, and checkpoints that a kill cannot damage."""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from visionkernels.files import replace_file, sync, write_json

__all__ = ["RunFolder", "describe_run"]

# fields of a recipe that may differ when a run goes on: they do not change its numbers
FREE_FIELDS = ("num_workers", "save_every_updates", "keep_checkpoints", "trackers", "device")


def describe_run(recipe: Mapping[str, Any], details: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Return what run.json holds: the recipe and details, which define the run, and where and how it runs."""
    names = ("visionkernels", "torch", "timm", "accelerate", "numpy")
    described = {
        "recipe": recipe,
        "details": details,
        **facts,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "git": _git_state(),
        "command": sys.argv,
    }
    plain: dict[str, Any] = json.loads(json.dumps(described))  # tuples become lists, as they will be when read back
    return plain


def _git_state() -> str | None:
    """Return the commit of the working directory, with "-dirty" if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository here
        return None


class RunFolder:
    """Reads and writes the files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.log = path / "log.jsonl"

    def claim(self, run: Mapping[str, Any]) -> None:
        """Write run.json, or check that the folder's run has the same recipe, details and data.

        Raises ValueError that names the fields that differ.
        """
        path = self.path / "run.json"
        if path.exists():
            old, new = (_defining_fields(each) for each in (json.loads(path.read_text(encoding="utf-8")), run))
            fields = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
            if fields:
                changes = ", ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in fields)
                raise ValueError(f"{self.path} holds another run: {changes}; use another folder or the old values")
        for leftover in self.checkpoints.glob(".*"):  # a kill in the middle of saving
            shutil.rmtree(leftover)
        write_json(path, run, overwrite=True)

    def latest(self) -> Path | None:
        """Return the newest whole checkpoint."""
        return max(self.checkpoints.glob("[!.]*"), default=None)

    def begin(self, name: str) -> Path:
        """Return a new folder for a checkpoint, which does not count before `publish`."""
        partial = self.checkpoints / f".{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def publish(self, partial: Path, *, keep: int) -> None:
        """Make the checkpoint count, in one step, and remove all but the newest `keep`."""
        for file in partial.rglob("*"):
            sync(file)
        sync(partial)
        partial.rename(partial.with_name(partial.name.removeprefix(".")))
        sync(self.checkpoints)
        for old in sorted(self.checkpoints.glob("[!.]*"))[:-keep]:
            # renamed first: a kill within the removal must not leave half a checkpoint that counts
            shutil.rmtree(old.rename(old.with_name(f".{old.name}")))

    def history(self) -> list[dict[str, float]]:
        """Return the lines of the log."""
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]

    def write_history(self, entries: list[dict[str, float]]) -> None:
        """Write the log whole, so that a kill cannot leave half a line."""
        with replace_file(self.log, overwrite=True) as temporary:
            temporary.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")


def _defining_fields(run: Mapping[str, Any]) -> dict[str, Any]:
    recipe = {name: value for name, value in run["recipe"].items() if name not in FREE_FIELDS}
    return _flatten({**recipe, "details": run["details"], "samples_per_epoch": run["samples_per_epoch"]})


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
