"""Readers of weights return data or raise errors that they document, whatever a file holds; and the runner itself."""

import contextlib
import io
import json
import os
import pickle
import pickletools
import signal
import struct
import tarfile
import time
import warnings
import zipfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from visionkernels.checks import InputError
from visionkernels.testing.mutations import (
    MutatedReader,
    assert_no_faults,
    mutated,
    mutated_json,
    mutated_pickle,
    read_mutations,
)
from visionkernels.weights import Trained, read_checkpoint

STATE = {
    "conv.weight": torch.arange(24, dtype=torch.float32).reshape(2, 3, 2, 2), "conv.bias": torch.zeros(2),
    "norm.num_batches_tracked": torch.tensor(3), "half": torch.ones(3, dtype=torch.float16),
}  # fmt: skip
TRAINED = Trained(
    kind="classifier", package="x", model="resnet18", options={"num_classes": 2}, class_names=("a", "b"),
    inputs={"size": 8, "mean": (0.5,)}, settings={"name": "x"}, update=3,
)  # fmt: skip
CONTENT = {
    "model": STATE, "model_ema": {f"module.{key}": value for key, value in STATE.items()}, "epoch": 3, "lr": 0.1,
    "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
    "args": "x", "size": torch.Size([1, 2]), "sparse": torch.eye(2).to_sparse(),
    "parameter": torch.nn.Parameter(torch.ones(2)), "names": ["a", "b"], "shared": STATE["conv.bias"][:1],
}  # fmt: skip


@cache
def saved(kind: str) -> bytes:
    buffer = io.BytesIO()
    match kind:
        case "zip" | "legacy":
            torch.save(CONTENT, buffer, _use_new_zipfile_serialization=kind == "zip")
        case "bare":
            torch.save(STATE, buffer)
        case "arrays":
            arrays = {key: value.numpy() for key, value in STATE.items()}
            pickle.dump({"model": arrays, "__author__": "x", "matching_heuristics": True}, buffer, protocol=2)
        case "safetensors":
            buffer.write(save(STATE, metadata={"format": "pt", **TRAINED.metadata()}))
        case "tar":
            with tarfile.open(fileobj=buffer, mode="w") as archive:
                for member in ("sys_info", "pickle", "tensors", "storages"):
                    archive.addfile(tarfile.TarInfo(member), io.BytesIO(b""))
    return buffer.getvalue()


def of_bytes(*kinds: str) -> Any:
    def write(folder: Path, random: Random) -> Path:
        (folder / "x.pth").write_bytes(mutated(saved(random.choice(kinds)), random))
        return folder / "x.pth"

    return write


def zipped(folder: Path, random: Random) -> Path:
    """Instructions of the pickle and other members within a well-formed archive."""
    with zipfile.ZipFile(io.BytesIO(saved(random.choice(("zip", "bare"))))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    match random.randrange(8):
        case 0:
            name = random.choice(list(members))
            members[name] = mutated(members[name], random)
        case 1:
            name = random.choice(list(members))
            members[random.choice((f"{name}x", "other/data.pkl", name.upper()))] = members.pop(name)
        case _:
            members[pickled] = mutated_pickle(members[pickled], random)
    with zipfile.ZipFile(folder / "x.pth", "w", random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return folder / "x.pth"


def pickles(folder: Path, random: Random) -> Path:
    """Instructions of torch's older form and of a plain pickle of arrays."""
    content = saved(random.choice(("legacy", "arrays", "arrays")))
    parts, stream = [], io.BytesIO(content)
    with contextlib.suppress(ValueError):  # the storages behind the pickles of the older form
        while stream.tell() < len(content):
            start = stream.tell()
            list(pickletools.genops(stream))
            parts.append(content[start : stream.tell()])
    rest = content[sum(map(len, parts)) :]
    place = random.randrange(len(parts))
    parts[place] = mutated_pickle(parts[place], random)
    (folder / "x.pth").write_bytes(b"".join(parts) + rest)
    return folder / "x.pth"


def safetensors_header(folder: Path, random: Random) -> Path:
    """The JSON of the header, with its length right, and the record of the model in it."""
    content = saved("safetensors")
    (length,) = struct.unpack_from("<Q", content)
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    if random.random() < 0.5:
        record = mutated_json(json.loads(header["__metadata__"]["trained"]), random)
        text = json.dumps(record)
        header["__metadata__"]["trained"] = (
            mutated(text.encode(), random).decode("latin-1") if random.random() < 0.2 else text
        )
    else:
        header = mutated_json(header, random)
    text = json.dumps(header).encode()
    (folder / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + rest)
    return folder / "x.safetensors"


def read_all(path: Path) -> None:
    """Read each set of weights of a file."""
    checkpoint = read_checkpoint(path)
    for entry in checkpoint.entries:
        read_checkpoint(path, entry=entry)
    for value in checkpoint.state.values():
        if value.device.type != "meta" and not value.is_quantized:
            value.detach().to_dense().float().sum() if value.layout == torch.sparse_coo else value.clone()


READERS = [
    MutatedReader("torch bytes", of_bytes("zip", "bare"), read_all),
    MutatedReader("torch legacy bytes", of_bytes("legacy", "arrays", "tar"), read_all),
    MutatedReader("torch zipped", zipped, read_all),
    MutatedReader("torch pickles", pickles, read_all),
    MutatedReader("safetensors bytes", of_bytes("safetensors"), read_all),
    MutatedReader("safetensors header", safetensors_header, read_all),
]


@pytest.fixture(scope="module", autouse=True)
def _imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import here what reading imports, and not in each child process."""
    for kind in ("zip", "legacy", "arrays", "safetensors"):
        path = tmp_path_factory.mktemp("whole") / "x.pth"
        path.write_bytes(saved(kind))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that it checks sparse tensors
            read_all(path)


by_reader = pytest.mark.parametrize("reader", READERS, ids=[reader.name.replace(" ", "_") for reader in READERS])


@by_reader
def test_some(reader: MutatedReader) -> None:
    assert_no_faults(read_mutations(reader, range(25)))


@pytest.mark.slow
@by_reader
def test_many(reader: MutatedReader) -> None:
    assert_no_faults(read_mutations(reader, range(1000), seed=1))


class TestRunner:
    """Each kind of outcome, and that the runner goes on after it."""

    def outcomes(self, read: Any, count: int = 3) -> list[Any]:
        reader = MutatedReader("x", self.write, lambda path: read(int(path.read_text())), ((KeyError, "^'known"),))
        return read_mutations(reader, range(count), memory=1 << 26, seconds=1)

    def write(self, folder: Path, random: Random) -> Path:
        (folder / "x").write_text(folder.name)
        return folder / "x"

    def test_memory_is_counted_again(self) -> None:
        """Each time, also where an earlier file, or the parent, has freed as much."""
        freed = [bytearray(1 << 20) for _ in range(200)]
        del freed[::2], freed
        found = self.outcomes(lambda index: [bytearray(b"x" * (1 << 20)) for _ in range(100)])
        assert [outcome.kind for outcome in found] == ["fault"] * 3

    def test_kinds(self) -> None:
        def read(index: int) -> None:
            if index == 1:
                raise InputError("wrong")
            if index == 2:
                raise KeyError("known")

        found = self.outcomes(read)
        assert [outcome.kind for outcome in found] == ["read", "refused", "refused"]
        assert [outcome.index for outcome in found] == [0, 1, 2] and found[1].message == "InputError: wrong"
        assert_no_faults(found)

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            (lambda: {}["unknown"], "KeyError: 'unknown'"),
            (lambda: os.kill(os.getpid(), signal.SIGSEGV), "ends the process: SIGSEGV"),
            (lambda: os._exit(3), "ends the process: by itself"),
            (lambda: _spin(), "takes more than 1 seconds"),
            (lambda: bytearray(1 << 40), "asks for more than 67108864 bytes"),
            (lambda: _swallowed(1 << 36), "asks for more than 67108864 bytes"),
        ],
        ids=["error", "signal", "exit", "time", "memory", "swallowed"],
    )
    def test_faults(self, fault: Any, message: str) -> None:
        found = self.outcomes(lambda index: fault() if index == 1 else None)
        assert [outcome.kind for outcome in found] == ["read", "fault", "read"]
        assert message in found[1].message
        with pytest.raises(AssertionError, match="x, seed 0, index 1"):
            assert_no_faults(found)

    def test_repeats(self) -> None:
        """A mutation depends on the name, the seed and the index alone."""
        for change in (mutated, mutated_pickle):
            whole, seen = saved("arrays"), set()
            for index in range(30):
                one, other = (change(whole, Random(f"x 0 {index}")) for _ in range(2))
                assert one == other
                seen.add(one)
            assert len(seen) > 20
        assert mutated_json([1, {"a": [2]}], Random(0)) == mutated_json([1, {"a": [2]}], Random(0))


def _spin() -> None:
    until = time.process_time() + 30
    while time.process_time() < until:
        np.zeros(1000).sum()


def _swallowed(size: int) -> None:
    try:
        bytearray(size)
    except MemoryError as error:
        raise InputError("large") from error
