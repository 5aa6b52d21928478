"""Official files and files of measured accuracies that are damaged: data, or an error of ours."""

import base64
import json
import struct
from pathlib import Path
from random import Random

import numpy as np
import pytest
import timm
import torch

from diswot.networks.nb201 import NB201_WINNERS
from diswot.official import load_official, open_official
from diswot.spaces import S0, NasBench101, NasBench201, read_truth
from diswot.spaces.tfrecord import masked_crc32c
from visionkernels.testing.mutations import (
    MutatedReader,
    assert_no_faults,
    mutated,
    mutated_json,
    mutated_state,
    read_mutations,
)
from visionkernels.weights import CheckpointError, read_checkpoint

NAMES = ("s0_111", "cifar_resnet8", "nb201")


def write_state(folder: Path, random: Random) -> Path:
    state = timm.create_model(random.choice(NAMES), num_classes=5).state_dict()
    torch.save({"opt": None, "model": mutated_state(state, random)}, folder / "x.pth")
    return folder / "x.pth"


def read_state(path: Path) -> None:
    checkpoint = read_checkpoint(path)
    name = Random(path.stat().st_size).choice((None, None, *NAMES))
    load_official(checkpoint, name)
    open_official(checkpoint, name)


def write_nasbench201(folder: Path, random: Random) -> Path:
    accuracies = {"x-test@199": 71.0, "x-valid@199": np.float64(3).item(), "ori-test@199": 72.0}
    infos = {name: {"all_results": {"cifar100 777": {"epochs": 200, "eval_acc1es": accuracies}}} for name in ("full",)}
    content = {"meta_archs": list(NB201_WINNERS.values())[:2], "arch2infos": {"0": infos, "1": infos}}
    content = mutated_json(json.loads(json.dumps(content)), random)
    # keys of the file are integers and pairs, which JSON has not
    architectures = content.get("arch2infos") if isinstance(content, dict) else None
    if isinstance(architectures, dict):
        content["arch2infos"] = {int(key) if key.isdigit() else key: value for key, value in architectures.items()}
        for info in architectures.values():
            full = info.get("full") if isinstance(info, dict) else None
            results = full.get("all_results") if isinstance(full, dict) else None
            if isinstance(full, dict) and isinstance(results, dict):
                full["all_results"] = {tuple(key.split()): value for key, value in results.items()}
    content = content if isinstance(content, dict) else {"meta_archs": content}
    torch.save(content, folder / "x.pth")
    return folder / "x.pth"


def framed(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def write_nasbench101(folder: Path, random: Random) -> Path:
    """Fields of records, with right checksums, and bytes of the file."""
    doubles = b"".join(bytes([number << 3 | 1]) + struct.pack("<d", 0.5) for number in range(1, 7))
    metrics = b"\x0a" + bytes([len(doubles)]) + doubles
    metrics = mutated(metrics, random) if random.random() < 0.3 else metrics
    fields = ["x", 108, "011000100", "input,conv3x3-bn-relu,output", base64.b64encode(metrics).decode()]
    fields[2] = "011001000"
    data = json.dumps(mutated_json(fields, random) if random.random() < 0.6 else fields).encode()
    data = mutated(data, random) if random.random() < 0.2 else data
    content = framed(data) + framed(json.dumps(fields).encode())
    (folder / "x.tfrecord").write_bytes(mutated(content, random) if random.random() < 0.2 else content)
    return folder / "x.tfrecord"


def write_text(folder: Path, random: Random) -> Path:
    lines = "# S0\n713 71.01\n333 70.76\n" + f"{random.choice(('1e400', 'nan', '-1', '٣', '0x1'))} 1\n"
    (folder / "x.txt").write_bytes(mutated(lines.encode(), random))
    return folder / "x.txt"


def read_benchmark(path: Path) -> None:
    space = {".pth": NasBench201(), ".tfrecord": NasBench101(), ".txt": S0()}[path.suffix]
    for split in ("test", "validation"):
        assert all(isinstance(value, float) for value in read_truth(path, space, split=split).values())


READERS = [
    MutatedReader("diswot states", write_state, read_state),
    MutatedReader("nasbench201", write_nasbench201, read_benchmark),
    MutatedReader("nasbench101", write_nasbench101, read_benchmark),
    MutatedReader("accuracies", write_text, read_benchmark),
]
by_reader = pytest.mark.parametrize("reader", READERS, ids=[reader.name.replace(" ", "_") for reader in READERS])


@pytest.mark.parametrize("shape", [(), (5,), (2**31 - 1, 0), (0, 64), (2, 3, 4)])
@pytest.mark.parametrize("name", [None, "s0_111"])
def test_heads(tmp_path: Path, shape: tuple[int, ...], name: str | None) -> None:
    """No network of billions of classes is made."""
    model = timm.create_model("s0_111", num_classes=5)
    torch.save(model.state_dict() | {f"{model.classifier_name}.weight": torch.zeros(shape)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth (fits none|does not fit s0_111)"):
        load_official(tmp_path / "x.pth", name)


@by_reader
def test_some(reader: MutatedReader) -> None:
    assert_no_faults(read_mutations(reader, range(20)))


@pytest.mark.slow
@by_reader
def test_many(reader: MutatedReader) -> None:
    assert_no_faults(read_mutations(reader, range(500), seed=1))
