"""Files of torch.save, and pickles of arrays, read without running code."""

import re
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from visionkernels.weights._array_pickles import read_arrays
from visionkernels.weights._pickle_scan import SPARE_BYTES, scan_pickle
from visionkernels.weights._stand_ins import SAFE_GLOBALS, CheckpointError

__all__ = ["CheckpointError", "read_torch"]


def read_torch(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the content of a file of `torch.save`, a dictionary, and its plain entries as text.

    A plain pickle of numpy's arrays, as detectron2's model zoo has them, is read too; they become tensors. No code of
    the file runs: objects beside tensors, numbers, text and containers are stand-ins. What a file may ask for is
    bounded by its size. Raises CheckpointError for a damaged file, one that needs code to load, one of a form that
    torch reads unsafely alone (pickle protocols other than 2 and 3, the tar files of before 2017), and one that is no
    dictionary.
    """
    try:
        _scan(path)
        content = read_arrays(path)
        if content is None:
            with torch.serialization.safe_globals(SAFE_GLOBALS):
                content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, Mapping):
            # by dict's own method, which a file cannot replace
            items = dict(dict.items(cast(Any, content)))
            return items, {str(key): str(value) for key, value in items.items() if isinstance(value, str | int | float)}
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises almost any type
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked:
            raise CheckpointError(
                f"{path} needs the Python object {blocked[1]} to load, which could run code; "
                "save its state dict alone, or as safetensors"
            ) from error
        # torch's own text advises to load the file unsafely
        reason = "" if "weights_only" in str(error) else f": {str(error).partition(chr(10))[0]}"
        raise CheckpointError(f"{path} is damaged or no checkpoint of torch.save{reason}") from error
    raise CheckpointError(f"{path} holds a {type(content).__name__}; a checkpoint is a dict of tensors")


# what is often saved in the place of weights
_NO_WEIGHTS = {
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself; run git lfs pull, or download the file",
    b"<": "a page of HTML and not the file that it tells of; download the file itself",
}


def _scan(path: Path) -> None:
    """Raise CheckpointError for a file that would take too much to read, before any of it is unpickled."""
    size = path.stat().st_size
    with path.open("rb") as file:
        beginning = file.read(40)
        file.seek(0)
        if what := next((what for mark, what in _NO_WEIGHTS.items() if beginning.lstrip().startswith(mark)), None):
            raise CheckpointError(f"{path} is {what}")
        if not size:
            raise CheckpointError(f"{path} is damaged: it is empty")
        if beginning.startswith(b"PK\3\4"):
            _scan_archive(path, size)
        elif beginning[:1] != b"\x80" and tarfile.is_tarfile(path):
            raise CheckpointError(
                f"{path} is a tar file, as torch.save wrote before 2017; load it with an older torch where you trust "
                "it, and save its state dict again"
            )
        else:
            protocol, value = scan_pickle(file, path, size)
            if value == torch.serialization.MAGIC_NUMBER:
                _check_protocol(path, protocol)
                # the version, the machine, the object, and the keys of its storages
                for _ in range(4):
                    scan_pickle(file, path, size)


def _scan_archive(path: Path, size: int) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > 4 * size + SPARE_BYTES:
            raise CheckpointError(f"{path} is damaged: it asks for far more memory than it has bytes")
        for entry in entries:
            # all of them, whichever of two of one name torch would take
            if entry.filename.endswith(".pkl"):
                with archive.open(entry) as file:
                    protocol, _ = scan_pickle(file, path, size)
                _check_protocol(path, protocol)


def _check_protocol(path: Path, protocol: int) -> None:
    if protocol not in (2, 3):
        raise CheckpointError(
            f"{path} is of pickle protocol {protocol or '0 or 1'}, which torch loads with weights_only=False alone; "
            "load it where you trust it, and save its state dict again"
        )
