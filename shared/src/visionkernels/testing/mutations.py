"""Seeded mutations of files, and a runner that reads them in a child process under limits of memory and time.

A reader must return data or raise an error that it documents, whatever its file holds. A mutation is a function of the
reader's name, a seed and an index, which a fault names, so that
`read_mutations(reader, range(index, index + 1), seed=seed)` repeats it.
"""

import contextlib
import copy
import ctypes
import faulthandler
import json
import logging
import math
import os
import pickletools
import re
import resource
import select
import shutil
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor

from visionkernels.checks import InputError

__all__ = [
    "MutatedReader", "Outcome", "assert_no_faults", "mutated", "mutated_json", "mutated_pickle", "mutated_state",
    "read_mutations",
]  # fmt: skip

EDGES = (0, 1, -1, 2**31 - 1, 2**63 - 1)
"""Integers at which sizes and counts go wrong."""
_ORDERS: Sequence[Literal["little", "big"]] = ("little", "little", "big")
_ODD_VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 7, 2**31 - 1, 2**40, 2**63 - 1, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    "1", "x", "é" * 3, "../x", [], [[]], [0], [-1, 2], {}, {"x": 1},
)  # fmt: skip


@dataclass(frozen=True)
class MutatedReader:
    """A reader of files, and how a mutated file for it is written."""

    name: str
    write: Callable[[Path, Random], Path]
    """Writes a mutated file or folder into an empty folder, and returns its path."""
    read: Callable[[Path], object]
    """Reads all of it."""
    documented: tuple[tuple[type[Exception], str], ...] = ()
    """Documented errors beside InputError and its subclasses, with a pattern that the message must contain."""


@dataclass(frozen=True)
class Outcome:
    """The result of reading one mutated file."""

    reader: str
    seed: int
    index: int
    kind: Literal["read", "refused", "fault"]
    message: str = ""
    growth: int = 0
    """Bytes of resident memory that reading took at its peak."""


def mutated(content: bytes, random: Random) -> bytes:
    """Return `content` with one to three random changes."""
    for _ in range(random.choice((1, 1, 2, 3))):
        content = random.choice(_CHANGES)(content, random)
    return content


def _place(content: bytes, random: Random) -> int:
    """Return a place in the content; half of them are in its first bytes, where headers are."""
    size = max(len(content), 1)
    return random.randrange(min(size, 64)) if random.random() < 0.5 else random.randrange(size)


def _put(content: bytes, place: int, new: bytes) -> bytes:
    """Return the content with `new` over the bytes from `place` on; the length stays."""
    return (content[:place] + new + content[place + len(new) :])[: len(content)]


def _flip(content: bytes, random: Random) -> bytes:
    place = _place(content, random)
    return _put(content, place, bytes(byte ^ 1 << random.randrange(8) for byte in content[place : place + 1]))


def _replace(content: bytes, random: Random) -> bytes:
    return _put(content, _place(content, random), random.randbytes(1))


def _fill(content: bytes, random: Random) -> bytes:
    return _put(content, _place(content, random), random.choice((b"\0", b"\xff")) * random.choice((2, 4, 8, 40)))


def _truncate(content: bytes, random: Random) -> bytes:
    return content[: _place(content, random)]


def _insert(content: bytes, random: Random) -> bytes:
    place = _place(content, random)
    return content[:place] + random.randbytes(random.choice((1, 2, 4, 9))) + content[place:]


def _repeat(content: bytes, random: Random) -> bytes:
    start, length, place = _place(content, random), random.choice((1, 4, 16, 100)), _place(content, random)
    return content[:place] + content[start : start + length] * random.choice((1, 1, 3)) + content[place:]


def _swap(content: bytes, random: Random) -> bytes:
    length = random.choice((1, 2, 4, 16))
    one, other = _place(content, random), _place(content, random)
    first, second = content[one : one + length], content[other : other + length]
    return _put(_put(content, one, second), other, first)


def _edge(content: bytes, random: Random) -> bytes:
    width, order = random.choice((2, 4, 8)), random.choice(_ORDERS)
    place = _place(content, random) // 2 * 2
    return _put(content, place, (random.choice(EDGES) & (1 << 8 * width) - 1).to_bytes(width, order))


_CHANGES: Sequence[Callable[[bytes, Random], bytes]] = (
    _flip, _flip, _replace, _fill, _truncate, _insert, _repeat, _swap, _edge, _edge,
)  # fmt: skip


def mutated_json(value: Any, random: Random) -> Any:
    """Return a copy of a JSON value in which one to three values are replaced, removed, moved or repeated."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 2, 3))):
        owners = [(owner, key) for owner in _containers(value) for key in _keys(owner)]
        if not owners:
            return random.choice(_ODD_VALUES)
        owner, key = random.choice(owners)
        match random.choice(("odd", "odd", "remove", "other", "repeat", "wrap")):
            case "odd":
                owner[key] = copy.deepcopy(random.choice(_ODD_VALUES))
            case "remove":
                del owner[key]
            case "other":
                other, other_key = random.choice(owners)
                owner[key] = copy.deepcopy(other[other_key])
            case "repeat" if isinstance(owner, list):
                owner.insert(key, copy.deepcopy(owner[key]))
            case _:
                owner[key] = [owner[key]]
    return value


def _keys(owner: Any) -> list[Any]:
    return list(owner) if isinstance(owner, dict) else list(range(len(owner)))


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for item in list(value.values()) if isinstance(value, dict) else value:
            yield from _containers(item)


def mutated_pickle(content: bytes, random: Random) -> bytes:
    """Return a pickle in which instructions are removed, repeated, swapped, replaced or have other arguments."""
    places = [place for _, _, place in pickletools.genops(content)]
    parts = [content[a:b] for a, b in zip(places, [*places[1:], len(content)], strict=True)]
    for _ in range(random.choice((1, 1, 2, 3))):
        place, other = random.randrange(1, len(parts)), random.randrange(1, len(parts))
        match random.randrange(5):
            case 0:
                parts[place] = b""
            case 1:
                parts.insert(place, parts[other])
            case 2:
                parts[place], parts[other] = parts[other], parts[place]
            case 3:
                parts[place] = random.choice(_INSTRUCTIONS)
            case _ if len(parts[place]) > 1:
                parts[place] = parts[place][:1] + mutated(parts[place][1:], random)
    return b"".join(parts)


_INSTRUCTIONS = (
    *(bytes((byte,)) for byte in b"(0.12NRQabdelostu})]\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94"),
    b"K\x00", b"J\xff\xff\xff\xff", b"M\xff\xff", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"h\x00", b"h\x05",
    b"X\x01\x00\x00\x00x", b"G\x7f\xf8\x00\x00\x00\x00\x00\x00", b"ctorch\nFloatStorage\n", b"cbuiltins\nlist\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"cnumpy\ndtype\n",
)  # fmt: skip


def mutated_state(state: Mapping[str, Tensor], random: Random) -> dict[str, Tensor]:
    """Return a state dict in which tensors are removed, renamed, exchanged, or have other shapes and types."""
    state = dict(state)
    for _ in range(random.choice((1, 1, 2, 4))):
        key, other = (random.choice(list(state)) for _ in range(2))
        value = state[key]
        match random.randrange(6):
            case 0 if len(state) > 1:
                del state[key]
            case 1:
                state[random.choice((f"{key}x", f"x.{key}", key.partition(".")[2] or "x", "head.weight"))] = value
            case 2:
                state[key] = state[other]
            case 3:
                state[key] = value.to(random.choice((torch.int64, torch.bool, torch.complex64, torch.float64)))
            case _:
                axes = list(value.shape)
                axes = random.choice((axes[1:], [*axes, 1], [1, *axes], [], axes))
                place = random.randrange(max(len(axes), 1))
                # without an element, a shape of any size takes no bytes of a file
                odd = random.choice(([0], [1], [2], [3, 7], [2**31 - 1, 0], [0, 2**31 - 1], [2**40, 0]))
                axes[place : place + len(odd)] = odd if axes else []
                size = math.prod(axes)
                state[key] = torch.zeros(axes if size <= 1 << 20 else [min(axis, 64) for axis in axes])
    return state


def read_mutations(
    reader: MutatedReader, indices: range, *, seed: int = 0, memory: int = 3 << 27, seconds: float = 20
) -> list[Outcome]:
    """Read the mutated files of `indices`, one after the other, in a child process, and return their outcomes.

    A fault is an error that is not documented, the end of the process, more than `seconds` of CPU time, and more than
    `memory` bytes above what the process had, whether it took them or was refused them.
    """
    outcomes: list[Outcome] = []
    while len(outcomes) < len(indices):
        ended = _in_child(reader, indices[len(outcomes) :], seed, memory, seconds, outcomes)
        if len(outcomes) < len(indices):
            outcomes.append(Outcome(reader.name, seed, indices[len(outcomes)], "fault", ended))
    return outcomes


def assert_no_faults(outcomes: Sequence[Outcome]) -> None:
    """Raise AssertionError with the first faults of each kind."""
    faults = [outcome for outcome in outcomes if outcome.kind == "fault"]
    lines = [f"{fault.reader}, seed {fault.seed}, index {fault.index}: {fault.message}" for fault in faults[:10]]
    counts = Counter(outcome.kind for outcome in outcomes)
    assert not faults, f"{dict(counts)}\n" + "\n".join(lines)


def _in_child(
    reader: MutatedReader, indices: range, seed: int, memory: int, seconds: float, outcomes: list[Outcome]
) -> str:
    """Append the outcomes of a child process, and return how it ended."""
    receiving, sending = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of threads, which the child does not use
        child = os.fork()
    if child == 0:
        try:
            os.close(receiving)
            _read_all(reader, indices, seed, memory, seconds, sending)
        finally:
            os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as lines:
        while is_alive := bool(select.select([lines], [], [], 6 * seconds + 60)[0]):
            line = lines.readline()
            if not line.endswith(b"\n"):
                break
            outcomes.append(Outcome(**json.loads(line)))
        if not is_alive:
            os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    ends = {signal.SIGPROF: f"takes more than {seconds} seconds", signal.SIGKILL: "hangs, or was killed"}
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return ends.get(number, f"ends the process: {signal.Signals(number).name if number else 'by itself'}")  # type: ignore[call-overload]


def _read_all(reader: MutatedReader, indices: range, seed: int, memory: int, seconds: float, sending: int) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    faulthandler.disable()
    silent = os.open(os.devnull, os.O_RDWR)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    # the default action ends the process, also within a function of C
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder = Path(tempfile.mkdtemp(prefix="mutations-"))
    try:
        for index in indices:
            place = folder / str(index)
            place.mkdir()
            try:
                path = reader.write(place, Random(f"{reader.name} {seed} {index}"))
            except Exception:
                outcome = Outcome(reader.name, seed, index, "fault", f"cannot be written: {traceback.format_exc()}")
            else:
                outcome = Outcome(reader.name, seed, index, *_read_one(reader, path, memory, seconds))
            os.write(sending, json.dumps(asdict(outcome)).encode() + b"\n")
            shutil.rmtree(place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read_one(
    reader: MutatedReader, path: Path, memory: int, seconds: float
) -> tuple[Literal["read", "refused", "fault"], str, int]:
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    # memory that was freed before would be taken again without being counted
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # not every kernel sets the peak VmHWM back; it then starts where it is
        Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmHWM")
    resource.setrlimit(resource.RLIMIT_DATA, (_status("VmData") + memory, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    error: BaseException | None = None
    try:
        reader.read(path)
    except BaseException as raised:
        error = raised
    signal.setitimer(signal.ITIMER_PROF, 0)
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    growth = max(_status("VmHWM") - before, 0)
    if growth > memory:
        return "fault", f"takes {growth} bytes of memory", growth
    if error is None:
        return "read", "", growth
    trace = "".join(traceback.format_exception(error))[-3000:]
    if any(isinstance(cause, MemoryError) or "allocate memory" in str(cause) for cause in _chain(error)):
        return "fault", f"asks for more than {memory} bytes of memory: {trace}", growth
    documented = ((InputError, ""), *reader.documented)
    if any(isinstance(error, kind) and re.search(pattern, str(error)) for kind, pattern in documented):
        return "refused", f"{type(error).__name__}: {error}"[:500], growth
    return "fault", trace, growth


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(name: str) -> int:
    """Return a size of this process in bytes."""
    content = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", content)[1]) << 10  # type: ignore[index]
