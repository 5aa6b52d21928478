"""Output files that appear whole or not at all: written under a temporary name in the same folder, then renamed."""

import errno
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from visionkernels.checks import InputError

__all__ = [
    "CorruptFileError",
    "finite_or_none",
    "refuse_existing",
    "remove_leftovers",
    "replace_file",
    "sync",
    "write_json",
]


class CorruptFileError(InputError):
    """A file is damaged, truncated, or none of the format that is asked for."""


@contextmanager
def replace_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, it becomes `path` in one step.

    Missing folders are made. If the block raises, the temporary file is removed and `path` is as it was. The target of
    a link is replaced, not the link; a pipe or a device is written to as it is. Raises FileExistsError if `path` exists
    and `overwrite` is False: before the block runs, or after it if `path` appeared meanwhile.
    """
    path = Path(path)
    if _is_device(path):
        yield path
        return
    taken = FileExistsError(f"{path} exists; pass --overwrite to replace it")
    if path.exists() and not overwrite:
        raise taken
    path = path.resolve() if path.is_symlink() else path
    _check_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays, since many writers choose their format by it
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; a result is as readable as any new file
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        sync(temporary)
        if overwrite:
            temporary.replace(path)
        else:
            _create(path, temporary, taken)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files that a kill within `replace_file(path)` has left."""
    # mkstemp draws eight characters
    for leftover in path.parent.glob(f".{path.stem}-????????{path.suffix}"):
        leftover.unlink()


def refuse_existing(path: str | Path | None, overwrite: bool) -> None:
    """Raise an OSError if the output `path` may not be replaced or cannot be made: before any work, not after it.

    None and "-", a pipe and a device are written to as they are.
    """
    if path is None or str(path) == "-" or _is_device(Path(path)):
        return
    if Path(path).exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass --overwrite to replace it")
    _check_place(Path(path))


def _is_device(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _check_place(path: Path) -> None:
    """Raise an OSError that names what keeps a file `path` from being made, in a folder that may yet have to be."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    above = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise OSError(error.errno, f"no file can be made there ({error.strerror})", str(above)) from error


def _create(path: Path, temporary: Path, taken: FileExistsError) -> None:
    try:
        # unlike a rename, this fails where another process was faster
        path.hardlink_to(temporary)
    except FileExistsError:
        raise taken from None
    except OSError:  # a file system without hard links, e.g. of a memory stick
        temporary.replace(path)


def sync(path: Path) -> None:
    """Wait until the file or folder at `path` is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle of a folder to flush
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, value: Any, *, overwrite: bool = False) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all, or to stdout if `path` is "-".

    NaN and infinities raise ValueError.
    """
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        return
    with replace_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def finite_or_none(value: Any) -> Any:
    """Return `value` with None for every float that is NaN or infinite, since JSON has no word for these.

    Mappings become dicts, and lists and tuples become lists, at any depth; other values are returned as they are.
    """
    if isinstance(value, Mapping):
        return {name: finite_or_none(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
