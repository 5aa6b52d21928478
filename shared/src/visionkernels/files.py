"""Output files that appear whole or not at all: written under a temporary name in the same folder, then renamed."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["replace_file", "sync", "write_json"]


@contextmanager
def replace_file(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, it becomes `path` in one step.

    Missing folders are made. If the block raises, the temporary file is removed and `path` is as it was. Raises
    FileExistsError if `path` exists and `overwrite` is False, before the block runs.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass --overwrite to replace it")
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
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
    """Write `value` as indented JSON to `path`, whole or not at all; NaN and infinities raise ValueError."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with replace_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
