"""Weights files of earlier releases, kept as their metadata and shapes; and how often files are read."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from visionkernels.weights import reading, save_weights

__all__ = ["count_reads", "write_earlier_file"]

_DTYPES = {"F32": torch.float32, "I64": torch.int64}


def write_earlier_file(frozen: Path, kind: str, folder: Path) -> Path:
    """Write the weights file `kind` of the JSON file `frozen` into `folder`, with zeros as weights; return its path."""
    stored = json.loads(frozen.read_text())[kind]
    state = {name: torch.zeros(shape, dtype=_DTYPES[dtype]) for name, dtype, *shape in stored["weights"]}
    path = folder / f"{kind}.safetensors"
    save_weights(path, state, metadata=stored["metadata"])
    return path


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return how often the weights in each file are read from now on, by the file's name."""
    reads: Counter[str] = Counter()

    def counting(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def wrapper(path: Path) -> Any:
            reads[path.name] += 1
            return read(path)

        return wrapper

    for name in ("_read_safetensors", "read_torch"):
        monkeypatch.setattr(reading, name, counting(getattr(reading, name)))
    return reads
