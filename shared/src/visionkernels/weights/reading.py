"""Weights files read without running code that they hold: safetensors, torch.save's, and pickles of arrays."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
from torch import Tensor

from visionkernels.checks import check_choice
from visionkernels.weights.torch_files import CheckpointError, read_torch
from visionkernels.weights.trained import Trained, trained_of

__all__ = ["Checkpoint", "CheckpointError", "first_names", "read_checkpoint"]

_log = logging.getLogger(__name__)

Weights = Literal["auto", "model", "ema"]

# Where training scripts keep their weights, in order of preference.
MODEL_ENTRIES = ("model", "state_dict", "module", "student", "teacher")
EMA_ENTRIES = ("model_ema", "state_dict_ema", "ema")
# how often a file may name the same numbers: layers that share weights do, a few dozen times
MAX_OVERLAP = 64
WRAPPER_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class Checkpoint:
    """A weights file that has been read."""

    path: Path
    state: dict[str, Tensor]
    taken_from: str
    """The entry that `state` was taken from; "" for the file itself."""
    metadata: dict[str, str]
    """Plain entries (epoch, accuracy) as text."""
    entries: tuple[str, ...]
    """The sets of weights in the file; empty where it is one itself."""
    trained: Trained | None
    """The record of a file of this project; None for other files."""


def read_checkpoint(
    source: str | Path | Checkpoint, *, weights: Weights = "auto", entry: str | None = None
) -> Checkpoint:
    """Read the weights of a .safetensors or PyTorch file, on the CPU, without running code that the file holds.

    A Checkpoint is returned as it is, so that a file is read once by whoever opens it first. `weights="model"` takes
    the raw weights and `"ema"` the averaged ones; `"auto"` takes the raw ones, and averaged ones only where there are
    no others, with a warning. A file with several raw ones gives a warning too; `entry` names one, e.g. "teacher" or
    "generator.state_dict", and `weights` is then unused. The prefixes `module.` and `_orig_mod.` are cut where all keys
    carry them. Raises FileNotFoundError, and CheckpointError for a damaged file, for one that needs code to load, for
    one without the asked weights, and for a record of a newer release.
    """
    if isinstance(source, Checkpoint):
        return source
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} is not a file")
    with path.open("rb") as file:
        # a safetensors file is the length of its JSON header in 8 bytes, then the header
        is_safetensors = file.read(9)[8:] == b"{"
    content, metadata = _read_safetensors(path) if is_safetensors else read_torch(path)
    taken = _choose_entry(content, weights, path) if entry is None else entry
    state = _strip_wrappers(_state_in(content, taken, path))
    _check_memory(state, path)
    return Checkpoint(path, state, taken, metadata, tuple(_entries(content)), trained_of(metadata, state, path))


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            # safe_open is no dict: it has keys() and no iterator
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def _choose_entry(content: Mapping[str, Any], weights: Weights, path: Path) -> str:
    present = [name for name in (*MODEL_ENTRIES, *EMA_ENTRIES) if isinstance(content.get(name), Mapping)]
    check_choice("weights", weights, Weights)
    raw, averaged = ([name for name in present if name in entries] for entries in (MODEL_ENTRIES, EMA_ENTRIES))
    allowed = {"auto": raw or averaged, "model": raw, "ema": averaged}
    if not present and weights != "ema":
        return ""
    if not allowed[weights]:
        raise CheckpointError(f"{path} has no {weights} weights; it holds {', '.join(present) or 'a bare state dict'}")
    taken = allowed[weights][0]
    others = [name for name in _entries(content) if name not in (taken, *EMA_ENTRIES)]
    if taken in EMA_ENTRIES and weights == "auto":
        _log.warning("%s holds only averaged weights; took %s", path, taken)
    elif taken in MODEL_ENTRIES and others:
        _log.warning("%s holds several sets of weights; took %s, left %s", path, taken, first_names(others))
    return taken


def _entries(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The names of the state dicts in a file, at the top or one level down."""
    names = []
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping):
            if value and not _non_tensor_keys(value):
                names.append(prefix + key)
            elif not prefix:
                names += _entries(value, f"{key}.")
    return names


def _non_tensor_keys(state: Mapping[str, Any]) -> list[str]:
    return [
        # Python writes out no number of thousands of digits
        str(key) if not isinstance(key, int) or abs(key) < 2**64 else "a large number"
        for key, value in state.items()
        if key != "_metadata" and not (isinstance(key, str) and isinstance(value, Tensor))
    ]


def _state_in(content: Mapping[str, Any], entry: str, path: Path) -> dict[str, Tensor]:
    state: Any = content
    for name in filter(None, entry.split(".")):
        state = state.get(name) if isinstance(state, Mapping) else None
    entries = _entries(content)
    hint = f"; entries with weights: {', '.join(entries)}" if entries else ""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} has no entry {entry!r}{hint}")
    # torch's own versions of the modules, which some scripts save as one more key
    state = {key: value for key, value in state.items() if key != "_metadata"}
    if not state or _non_tensor_keys(state):
        what = f"non-tensor entries (first: {first_names(_non_tensor_keys(state))})" if state else "nothing"
        raise CheckpointError(f"{path} holds {what} where weights were expected, in {entry or 'the file itself'}{hint}")
    return state


def _check_memory(state: Mapping[str, Tensor], path: Path) -> None:
    """Raise CheckpointError for tensors that overlap so much that a copy of them would fill the memory."""
    total = sum(value.numel() * value.element_size() for value in state.values() if value.device.type != "meta")
    if total > MAX_OVERLAP * path.stat().st_size + 2**24:
        raise CheckpointError(f"{path} is damaged: its tensors have {total} bytes, in a file of {path.stat().st_size}")


def _strip_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in WRAPPER_PREFIXES * 2:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def first_names(names: Sequence[str]) -> str:
    """Return the first five names, for a message."""
    return ", ".join(names[:5])
