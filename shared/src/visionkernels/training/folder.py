"""The folder of a run: what defines it (run.json), its log, and checkpoints that a kill cannot damage."""

import hashlib
import json
import math
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

from filelock import FileLock, Timeout

from visionkernels.checks import InputError
from visionkernels.files import remove_leftovers, replace_file, sync, write_json
from visionkernels.package import installed_packages
from visionkernels.weights.trained import Trained

__all__ = ["RunFolder", "describe_run"]

# fields of a recipe that may differ when a run goes on: they do not change its numbers
FREE_FIELDS = (
    "num_workers",
    "save_every_updates",
    "save_every_epochs",
    "keep_checkpoints",
    "trackers",
    "device",
)
# what may differ between the invocations of a run
INVOCATION_FIELDS = ("versions", "git", "command", "device", "processes")
# Data workers that outlive a killed run can hold its lock: they look for their parent every 5 seconds.
LOCK_SECONDS = 10.0
# names of checkpoints, hidden while one is written; whatever else is in their folder is the user's
_CHECKPOINT = re.compile(r"(?:epoch-(\d{5,})-update-)?(\d{9,})")
_CHECKSUMS = "checksums.json"


def describe_run(recipe: Mapping[str, Any], trained: Trained, **facts: Any) -> dict[str, Any]:
    """Return what run.json holds: the recipe and the record, which define the run, and where and how it runs."""
    names = {name: name for name in ("visionkernels", "torch", "timm", "accelerate", "numpy")}
    if (package := installed_packages().get(trained.package)) is not None:
        names[package.name] = package.distribution
    versions = {name: version(distribution) for name, distribution in names.items()}
    described = {
        "recipe": recipe,
        "trained": trained.definition(),
        **facts,
        "versions": {"python": platform.python_version(), **versions},
        "git": _git_state(),
        "command": sys.argv,
    }
    plain: dict[str, Any] = json.loads(json.dumps(described, default=_plain))  # tuples become lists, as when read back
    return plain


def _plain(value: object) -> str:
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"the record holds {value!r}, a {type(value).__name__}; JSON has text, numbers, lists and dicts")


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

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out; ValueError if one is in for longer than LOCK_SECONDS."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(self.path / ".lock").acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise InputError(
                f"{self.path} is in use by another process; wait for its end or use another folder"
            ) from None
        with lock:
            yield

    def claim(self, run: Mapping[str, Any]) -> bool:
        """Write run.json, or check that the folder's run has the same recipe, details and data; return if it is new.

        Raises ValueError that names the fields that differ.
        """
        path = self.path / "run.json"
        is_new = not path.exists()
        if is_new:
            write_json(path, run)
        else:
            old, new = map(_defining_fields, (self._described(), run))
            fields = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
            if fields:
                changes = ", ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in fields)
                raise InputError(f"{self.path} holds another run: {changes}; use another folder or the old values")
        self._remove_leftovers()
        return is_new

    def _described(self) -> dict[str, Any]:
        path = self.path / "run.json"
        try:
            described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            _defining_fields(described)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is damaged or no description of a run ({type(error).__name__}: {error}); restore it, or use "
                "another folder"
            ) from error
        return described

    def _remove_leftovers(self) -> None:
        """Remove what a kill in the middle of writing has left."""
        for leftover in self._named(hidden=True):
            shutil.rmtree(leftover)
        for name in ("run.json", "log.jsonl", "best.safetensors", "weights.safetensors", "ema.safetensors"):
            remove_leftovers(self.path / name)

    def _named(self, *, hidden: bool = False) -> list[Path]:
        """Return the folders with a checkpoint's name, the oldest first."""
        mark = "." if hidden else ""
        found: dict[tuple[int, int], Path] = {}
        for path in self.checkpoints.iterdir() if self.checkpoints.is_dir() else ():
            match = _CHECKPOINT.fullmatch(path.name.removeprefix(mark)) if path.name.startswith(mark) else None
            if match is not None and path.is_dir():
                found[int(match[2]), int(match[1] or 0)] = path
        return [found[key] for key in sorted(found)]

    def note_resumption(self, run: Mapping[str, Any]) -> None:
        """Add to run.json, beside the first invocation, the one that takes the run up again."""
        path = self.path / "run.json"
        described = self._described()
        invocation = {name: run[name] for name in INVOCATION_FIELDS}
        described["resumed"] = [*described.get("resumed", []), invocation]
        write_json(path, described, overwrite=True)

    def latest(self) -> Path | None:
        """Return the newest whole checkpoint."""
        return next(reversed(self._named()), None)

    def verify(self, checkpoint: Path) -> None:
        """Raise InputError if a file of `checkpoint` is not as it was written; older ones have no checksums to tell."""
        if not (checkpoint / _CHECKSUMS).exists():
            return
        try:
            expected = json.loads((checkpoint / _CHECKSUMS).read_text(encoding="utf-8"))
            damaged = [name for name, digest in expected.items() if _digest(checkpoint / name) != digest]
        except (OSError, ValueError, AttributeError) as error:
            damaged = [f"{_CHECKSUMS} ({type(error).__name__}: {error})"]
        if not damaged:
            return
        own = self._named()
        earlier = own[: own.index(checkpoint)]
        way = f"from {earlier[-1].name}" if earlier else "from the beginning"
        raise InputError(
            f"{checkpoint} is damaged: {', '.join(damaged[:5])}; remove this folder, and the same command resumes {way}"
        )

    def begin(self, name: str) -> Path:
        """Return a new folder for a checkpoint, which does not count before `publish`."""
        self._check_exists()
        partial = self.checkpoints / f".{name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def publish(self, partial: Path, *, keep: int) -> None:
        """Make the checkpoint count, in one step, and remove all but the newest `keep`, of each update the last."""
        files = [file for file in sorted(partial.rglob("*")) if file.is_file()]
        checksums = {file.relative_to(partial).as_posix(): _digest(file) for file in files}
        (partial / _CHECKSUMS).write_text(json.dumps(checksums, indent=2), encoding="utf-8")
        if self.log.exists():  # the run will not go back to before this checkpoint
            sync(self.log)
        for file in partial.rglob("*"):
            sync(file)
        sync(partial)
        partial.rename(partial.with_name(partial.name.removeprefix(".")))
        sync(self.checkpoints)
        own = self._named()
        of_update = {path.name.rpartition("-")[2]: path for path in own}
        kept = list(of_update.values())[-keep:]
        for old in own:
            if old in kept:
                continue
            # renamed first: a kill within the removal must not leave half a checkpoint that counts
            shutil.rmtree(old.rename(old.with_name(f".{old.name}")))

    def history(self, *, least: int = 0) -> list[dict[str, float]]:
        """Return the lines of the log, one an epoch; what is null there is NaN.

        Raises InputError for a line that is none of a log, and for less than `least` lines.
        """
        entries: list[dict[str, float]] = []
        for number, line in enumerate(self.log.read_bytes().splitlines() if self.log.exists() else (), 1):
            try:
                entries.append({name: _figure(value) for name, value in json.loads(line).items()})
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                fault = f"{type(error).__name__}: {error}"
                raise InputError(
                    f"{self.log} is damaged in line {number} ({fault}); restore it, or use another folder"
                ) from error
        if len(entries) < least:
            raise InputError(
                f"{self.log} has {len(entries)} of {least} epochs of this run; restore it, or use another folder"
            )
        return entries

    def append(self, entry: Mapping[str, float]) -> None:
        """Add the line of an epoch; JSON has no NaN and no infinity, which become null."""
        self._check_exists()
        plain = {name: value if math.isfinite(value) else None for name, value in entry.items()}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(plain)}\n")

    def _check_exists(self) -> None:
        if not (self.path / "run.json").exists():
            raise FileNotFoundError(f"{self.path} was removed while this run wrote to it; nothing more is saved there")

    def cut_history(self, epochs: int) -> None:
        """Drop the log's lines after this many epochs, and one that a kill left unfinished."""
        lines = self.log.read_bytes().splitlines(keepends=True) if self.log.exists() else []
        kept = [line for line in lines[:epochs] if line.endswith(b"\n")]
        if kept != lines:
            with replace_file(self.log, overwrite=True) as temporary:
                temporary.write_bytes(b"".join(kept))


def _figure(value: Any) -> float:
    if value is not None and not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return math.nan if value is None else value


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def _defining_fields(run: Mapping[str, Any]) -> dict[str, Any]:
    recipe = {name: value for name, value in run["recipe"].items() if name not in FREE_FIELDS}
    return _flatten({**recipe, "trained": _without_data(run["trained"]), "samples_per_epoch": run["samples_per_epoch"]})


def _without_data(trained: Mapping[str, Any]) -> dict[str, Any]:
    # a folder may have been moved, or be named another way
    return {name: value for name, value in trained.items() if name != "data"}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
