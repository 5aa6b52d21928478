"""Measured accuracies of architectures: from text, and from the files of NAS-Bench-101 and NAS-Bench-201.

The benchmarks' files are gigabytes that users have or have not. Their layouts are read as their published readers
describe them; our tests write small files of these layouts, and none of the real ones was at hand.
"""

import base64
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from diswot.networks.nb101_cell import NB101Cell
from diswot.spaces.nasbench101 import NasBench101, nb101_key
from diswot.spaces.nasbench201 import NasBench201
from diswot.spaces.protocol import Space
from diswot.spaces.tfrecord import read_records
from visionkernels.checks import InputError, check, check_choice, check_known
from visionkernels.files import CorruptFileError
from visionkernels.weights import CheckpointError, read_torch

__all__ = ["read_truth"]

Split = Literal["validation", "test"]


def read_truth(
    path: str | Path,
    space: Space,
    *,
    dataset: str = "cifar100",
    split: Split = "test",
    epochs: int | None = None,
) -> dict[str, float]:
    """Return accuracies in percent by the keys of `space`; text keeps the unit that it has.

    The file is text with two columns, "key accuracy", blank lines and lines that start with # left out; or the .pth
    of NAS-Bench-201, or the .tfrecord of NAS-Bench-101. Runs of several seeds are averaged. For the last two: `split`
    picks the images that accuracies are of, `epochs` the length of training (200 or 12; 108, 36, 12 or 4; by default
    the longest). `dataset` is for NAS-Bench-201: "cifar10", "cifar10-valid", "cifar100" or "ImageNet16-120".
    Isomorphic cells of NAS-Bench-101 have several keys: compare `space.hash(key)` to find all of them.

    Raises FileNotFoundError, and ValueError with the path for a damaged file, one of another space, and one without
    what was asked.
    """
    path = Path(path)
    check_choice("split", split, Split)
    if not path.is_file():
        raise FileNotFoundError(f"truth {path} is not a file")
    if path.suffix == ".tfrecord":
        _check_space(path, space, NasBench101)
        return _read_nasbench101(path, split, 108 if epochs is None else epochs)
    if path.suffix in (".pth", ".pt"):
        _check_space(path, space, NasBench201)
        return _read_nasbench201(path, space, dataset, split, 200 if epochs is None else epochs)
    return _read_text(path, space)


def _check_space(path: Path, space: Space, expected: type) -> None:
    if not isinstance(space, expected):
        raise InputError(f"{path}: a {path.suffix} file is of space {expected.name}, not of {space.name}")  # type: ignore[attr-defined]


def _read_text(path: Path, space: Space) -> dict[str, float]:
    truth: dict[str, float] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip() or line.lstrip().startswith("#"):
                    continue
                columns = line.split()
                where = f"{path}, line {number}"
                if len(columns) != 2:
                    raise InputError(f"{where} has {len(columns)} columns; expected a key and an accuracy")
                try:
                    key, value = space.parse(columns[0]), float(columns[1])
                except ValueError as error:
                    raise InputError(f"{where}: {error}") from error
                if not math.isfinite(value) or key in truth:
                    what = "an earlier line has this key" if key in truth else f"accuracy {columns[1]} is not finite"
                    raise InputError(f"{where}: {what}")
                truth[key] = value
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from error
    if not truth:
        raise InputError(f'{path} has no line; expected lines of "key accuracy"')
    return truth


# where the API's file has an accuracy: of the data set, (validation, test)
_NB201_SETS = {
    "cifar10-valid": ("x-valid", "ori-test"),
    "cifar10": (None, "ori-test"),
    "cifar100": ("x-valid", "x-test"),
    "ImageNet16-120": ("x-valid", "x-test"),
}


def _read_nasbench201(path: Path, space: Space, dataset: str, split: Split, epochs: int) -> dict[str, float]:
    check_known("dataset", dataset, _NB201_SETS)
    check(epochs in (12, 200), "epochs", epochs, "12 or 200 for NAS-Bench-201")
    metric = _NB201_SETS[dataset][split == "test"]
    if metric is None:
        raise InputError(f"split={split!r} is not measured on {dataset!r}; use dataset='cifar10-valid'")
    content, _ = read_torch(path)
    if not isinstance(content.get("meta_archs"), list) or not isinstance(content.get("arch2infos"), Mapping):
        raise CheckpointError(f"{path} lacks meta_archs or arch2infos; expected the file of NAS-Bench-201's API")
    truth: dict[str, float] = {}
    hyper = "full" if epochs == 200 else "less"
    for index, infos in content["arch2infos"].items():
        try:
            # all_results: (data set, seed) -> what one training measured
            runs = [run for (name, _), run in infos[hyper]["all_results"].items() if name == dataset]
            accuracies = [float(run["eval_acc1es"][f"{metric}@{int(run['epochs']) - 1}"]) for run in runs]
            key = space.parse(content["meta_archs"][index])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            detail = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{path}: architecture {index} has no {metric} of {dataset} ({detail})") from error
        if accuracies:
            truth[key] = sum(accuracies) / len(accuracies)
    if not truth:
        raise CheckpointError(f"{path} has no training of {epochs} epochs on {dataset}")
    return truth


def _read_nasbench101(path: Path, split: Split, epochs: int) -> dict[str, float]:
    check(epochs in (4, 12, 36, 108), "epochs", epochs, "4, 12, 36 or 108 for NAS-Bench-101")
    totals: dict[str, tuple[float, int]] = {}
    for number, record in enumerate(read_records(path)):
        try:
            _, budget, adjacency, operations, metrics = json.loads(record)
            if budget != epochs:
                continue
            key = nb101_key(_recorded_cell(adjacency, operations))
            # measured at the start, half way, and at the end, which counts
            last = list(_evaluations(base64.b64decode(metrics, validate=True)))[-1]
            accuracy = 100 * last[_ACCURACY_FIELDS[split]]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error) as error:
            detail = f"{type(error).__name__}: {error}"
            raise CorruptFileError(f"{path}: record {number} is none of NAS-Bench-101 ({detail})") from error
        total, count = totals.get(key, (0.0, 0))
        totals[key] = total + accuracy, count + 1
    if not totals:
        raise CorruptFileError(f"{path} has no training of {epochs} epochs")
    return {key: total / count for key, (total, count) in totals.items()}


def _recorded_cell(adjacency: str, operations: str) -> NB101Cell:
    ops = operations.split(",")
    size = len(ops)
    if len(adjacency) != size * size or set(adjacency) - set("01"):
        raise InputError(f"adjacency {adjacency!r} is no matrix of 0 and 1 for {size} vertices")
    rows = [[int(digit) for digit in adjacency[size * i : size * (i + 1)]] for i in range(size)]
    return NB101Cell.pruned(rows, ops)


_ACCURACY_FIELDS: dict[Split, int] = {"validation": 4, "test": 5}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def _evaluations(message: bytes) -> Iterator[dict[int, float]]:
    """Go through the evaluations of a ModelMetrics message: the doubles of each by field number."""
    for number, wire, value in _fields(message):
        if number == 1 and wire == _BYTES:
            yield {inner: struct.unpack("<d", bytes_)[0] for inner, kind, bytes_ in _fields(value) if kind == _FIXED64}


def _fields(message: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Go through the fields of a protocol buffer: number, wire type and content (nothing for a varint)."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        wire = tag & 7
        if wire == _VARINT:
            _, end = _varint(message, position)
            yield tag >> 3, wire, b""
        elif wire in (_FIXED64, _FIXED32, _BYTES):
            length = {_FIXED64: 8, _FIXED32: 4}.get(wire)
            if length is None:
                length, position = _varint(message, position)
            end = position + length
            if end > len(message):
                raise InputError(f"a field of {length} bytes overruns its message")
            yield tag >> 3, wire, message[position:end]
        else:
            raise InputError(f"wire type {wire} is unknown")
        position = end


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index in range(10):
        byte = message[position + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise InputError("a number of more than ten bytes")
