"""The record that a weights file keeps of itself: what it is, which model, and how inputs are prepared.

It is the only such record: the training loop writes it into every file, and whoever opens a file reads it here. It
knows nothing of images or of any paper; `inputs`, `options` and `details` belong to the kind of model.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from visionkernels.files import replace_file
from visionkernels.package import installed_packages, resolve
from visionkernels.weights.torch_files import CheckpointError

__all__ = ["Trained", "save_weights", "trained_of"]

RECORD_VERSION = 1
_KEY = "trained"
# what a run ends with, beside what defines it
_OUTCOME = ("fit", "versions", "update")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The record of a weights file, as plain data; lists come back as tuples."""

    kind: str
    """"classifier", "segmenter", "detector", "autoencoder", ...: what `package` opens by this name."""
    package: str
    """Import name of the package that builds the model."""
    model: str | None = None
    """Model name, as `visionkernels.models.create` or the package takes it."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function that builds the model."""
    inputs: Mapping[str, Any] | None = None
    """How an input is prepared. For images: size, resize, interpolation, mean, std, channel_order and range."""
    class_names: tuple[str, ...] | None = None
    data: str | None = None
    """Training data, as `--data` takes it."""
    settings: Mapping[str, Any] | None = None
    """The recipe, without its `fit`."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further facts that the package keeps: initial weights, a teacher, category ids."""
    fit: Mapping[str, Any] | None = None
    """The settings of the run."""
    versions: Mapping[str, str] = field(default_factory=dict)
    update: int | None = None
    """Number of optimiser updates that the weights have seen."""

    def definition(self) -> dict[str, Any]:
        """Return what is known before training and defines a run."""
        return {name: value for name, value in asdict(self).items() if name not in _OUTCOME}

    def metadata(self) -> dict[str, str]:
        """Return the record as it stands in a file."""
        return {_KEY: json.dumps({"version": RECORD_VERSION, **asdict(self)})}

    def save(self, path: str | Path, state: Mapping[str, Tensor], *, overwrite: bool = False) -> None:
        """Write `state` with this record as safetensors, whole or not at all. Raises as `save_weights`."""
        save_weights(path, state, metadata=self.metadata(), overwrite=overwrite)

    def with_details(self, **details: Any) -> "Trained":
        """Return the record with these details added, paths as text; None leaves one out."""
        given = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in details.items()
            if value is not None
        }
        return replace(self, details={**self.details, **given})


def trained_of(metadata: Mapping[str, str], state: Mapping[str, Tensor], path: Path) -> Trained | None:
    """Return the record in a file's metadata; None for a file of another project.

    Files of releases before this record are read by the package that wrote them (`Package.upgrade`). Raises
    CheckpointError for a damaged record and for one of a newer release.
    """
    if not set(metadata) - {"format"}:
        return None
    if _KEY not in metadata:
        upgrades = [package.upgrade for package in installed_packages().values() if package.upgrade is not None]
        upgraded: Trained | None = next(filter(None, (resolve(upgrade)(metadata, state) for upgrade in upgrades)), None)
        return None if upgraded is None else Trained(**_tuples(vars(upgraded)))
    try:
        record = dict(_tuples(json.loads(metadata[_KEY])))
        version = record.pop("version")
        if version > RECORD_VERSION:
            raise CheckpointError(
                f"{path} has a record of version {version}; this release reads up to {RECORD_VERSION}: run "
                "pip install -U visionkernels"
            )
        return _checked(Trained(**record))
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a damaged record of its model: {type(error).__name__} {error}") from error


_TYPES: dict[str, Any] = {
    "kind": str, "package": str, "model": str | None, "options": dict, "inputs": dict | None,
    "class_names": tuple | None, "data": str | None, "settings": dict | None, "details": dict, "fit": dict | None,
    "versions": dict, "update": int | None,
}  # fmt: skip


def _checked(trained: Trained) -> Trained:
    for item in fields(trained):
        if not isinstance(value := getattr(trained, item.name), _TYPES[item.name]):
            raise TypeError(f"{item.name} is a {type(value).__name__}")
    return trained


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def save_weights(
    path: str | Path, state: Mapping[str, Tensor], *, metadata: Mapping[str, str], overwrite: bool = False
) -> None:
    """Write `state` and `metadata` as safetensors, whole or not at all.

    For weights under foreign names; ours are written by `Trained.save`. Tensors that share memory are stored one by
    one. Raises FileExistsError unless `overwrite`.
    """
    tensors = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}
    with replace_file(path, overwrite=overwrite) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt", **metadata})
