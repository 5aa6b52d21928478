"""Files of torch.save, and pickles of arrays, read without running code."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from visionkernels.weights._array_pickles import read_arrays
from visionkernels.weights._stand_ins import SAFE_GLOBALS, CheckpointError

__all__ = ["CheckpointError", "read_torch"]


def read_torch(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the content of a file of `torch.save`, a dictionary, and its plain entries as text.

    A plain pickle of numpy's arrays, as detectron2's model zoo has them, is read too; they become tensors. No code of
    the file runs: objects beside tensors, numbers, text and containers are stand-ins. Raises CheckpointError for a
    damaged file, one that needs code to load, and one that is no dictionary.
    """
    try:
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
