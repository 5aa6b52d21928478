"""Files of measured accuracies, written here in the layouts of the benchmarks: none of the real ones is at hand."""

import base64
import json
import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch

from diswot.networks.nb201 import NB201_WINNERS
from diswot.spaces import S0, NasBench101, NasBench201, read_truth
from diswot.spaces.tfrecord import crc32c, masked_crc32c, read_records
from visionkernels.files import CorruptFileError
from visionkernels.weights import CheckpointError

ONE, TWO = NB201_WINNERS["ea"], NB201_WINNERS["zen"]


class TestText:
    def test_columns(self, tmp_path):
        path = tmp_path / "truth.txt"
        path.write_text("# S0, CIFAR-100\n713 71.01\n\n  333\t70.76\n")
        assert read_truth(path, S0()) == {"713": 71.01, "333": 70.76}
        path.write_text(f"{ONE} 73.2\n")
        assert read_truth(path, NasBench201()) == {ONE: 73.2}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", 'has no line; expected lines of "key accuracy"'),
            ("713\n", "line 1 has 1 columns; expected a key and an accuracy"),
            ("713 71.0\n719 70.0\n", "line 2: S0 key '719' has '9' at position 2"),
            ("713 best\n", "line 1: could not convert"),
            ("713 nan\n", "line 1: accuracy nan is not finite"),
            ("713 71.0\n713 71.0\n", "line 2: an earlier line has this key"),
        ],
    )
    def test_errors(self, text, message, tmp_path):
        path = tmp_path / "truth.txt"
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"truth\.txt.*{message}"):
            read_truth(path, S0())

    def test_other_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.txt"):
            read_truth(tmp_path / "none.txt", S0())
        (tmp_path / "truth.txt").write_bytes(b"713 71.0\n\xff\xfe\n")
        with pytest.raises(ValueError, match=r"truth\.txt is no text in UTF-8"):
            read_truth(tmp_path / "truth.txt", S0())
        with pytest.raises(ValueError, match="split='train' must be one of"):
            read_truth(tmp_path / "truth.txt", S0(), split="train")


def nb201_run(epochs, **accuracies):
    names = {name.replace("_", "-"): value for name, value in accuracies.items()}
    return {
        "epochs": epochs,
        "seed": 777,
        "flop": np.float64(1.5),
        "eval_names": list(names),
        "eval_acc1es": {f"{name}@{epochs - 1}": value for name, value in names.items()},
        "latency": None,
    }


def nb201_results(epochs, offset):
    runs = {
        ("cifar10-valid", 777): nb201_run(epochs, x_valid=90.0 + offset, ori_test=91.0 + offset),
        ("cifar100", 777): nb201_run(epochs, x_valid=70.0 + offset, x_test=71.0 + offset, ori_test=72.0),
        ("cifar100", 888): nb201_run(epochs, x_valid=72.0 + offset, x_test=np.float64(73.0 + offset), ori_test=72.0),
        ("cifar10", 777): nb201_run(epochs, ori_test=94.0 + offset),
    }
    return {"arch_index": 0, "all_results": OrderedDict(runs), "clear_net_done": True}


@pytest.fixture
def nb201_file(tmp_path):
    path = tmp_path / "NAS-Bench-201-v1_1.pth"
    infos = {i: {"full": nb201_results(200, i), "less": nb201_results(12, i - 20)} for i in (0, 1)}
    torch.save({"meta_archs": [ONE, TWO], "arch2infos": infos, "evaluated_indexes": {0, 1}}, path)
    return path


class TestNasBench201:
    def test_values(self, nb201_file):
        """Runs of several seeds are averaged."""
        space = NasBench201()
        assert read_truth(nb201_file, space) == {ONE: 72.0, TWO: 73.0}
        assert read_truth(nb201_file, space, split="validation") == {ONE: 71.0, TWO: 72.0}
        assert read_truth(nb201_file, space, dataset="cifar10") == {ONE: 94.0, TWO: 95.0}
        assert read_truth(nb201_file, space, dataset="cifar10-valid", epochs=12) == {ONE: 71.0, TWO: 72.0}

    def test_errors(self, nb201_file, tmp_path):
        space = NasBench201()
        with pytest.raises(ValueError, match="unknown dataset 'cifar1000'; did you mean"):
            read_truth(nb201_file, space, dataset="cifar1000")
        with pytest.raises(
            ValueError, match=r"split='validation' is not measured on 'cifar10'; use dataset='cifar10-valid'"
        ):
            read_truth(nb201_file, space, dataset="cifar10", split="validation")
        with pytest.raises(ValueError, match="epochs=100 must be 12 or 200"):
            read_truth(nb201_file, space, epochs=100)
        with pytest.raises(CheckpointError, match="has no training of 200 epochs on ImageNet16-120"):
            read_truth(nb201_file, space, dataset="ImageNet16-120")
        with pytest.raises(ValueError, match=r"a \.pth file is of space nasbench201, not of s0"):
            read_truth(nb201_file, S0())

    def test_damaged(self, nb201_file, tmp_path):
        data = nb201_file.read_bytes()
        nb201_file.write_bytes(data[: len(data) // 2])
        with pytest.raises(CheckpointError, match=r"NAS-Bench-201-v1_1\.pth is damaged"):
            read_truth(nb201_file, NasBench201())
        torch.save({"model": {}}, nb201_file)
        with pytest.raises(CheckpointError, match="lacks meta_archs or arch2infos"):
            read_truth(nb201_file, NasBench201())
        torch.save(
            {"meta_archs": [ONE], "arch2infos": {0: {"full": {"all_results": {("cifar100", 1): {}}}}}}, nb201_file
        )
        with pytest.raises(CheckpointError, match="architecture 0 has no x-test of cifar100"):
            read_truth(nb201_file, NasBench201())


def varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def metrics(*evaluations):
    """A ModelMetrics message: evaluations of (epoch, time, train, validation, test), then its other fields."""
    message = b""
    for evaluation in evaluations:
        inner = b"".join(
            varint(number << 3 | 1) + struct.pack("<d", value) for number, value in enumerate(evaluation, 1)
        )
        message += varint(1 << 3 | 2) + varint(len(inner)) + inner
    return message + varint(2 << 3) + varint(8_555_530) + varint(3 << 3 | 1) + struct.pack("<d", 1000.0)


def record(adjacency, ops, epochs, validation, test):
    ends = ((0, 1.0, 0.1, 0.1, 0.1), (epochs / 2, 5.0, 0.5, 0.5, 0.5), (epochs, 9.0, 1.0, validation, test))
    fields = ["f" * 32, epochs, adjacency, ops, base64.b64encode(metrics(*ends)).decode()]
    return json.dumps(fields).encode()


def framed(data):
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


CELL = ("0110000100010000", "input,conv3x3-bn-relu,maxpool3x3,output")


@pytest.fixture
def nb101_file(tmp_path):
    path = tmp_path / "nasbench_full.tfrecord"
    records = [
        record(*CELL, 108, 0.93, 0.92),
        record(*CELL, 108, 0.95, 0.94),
        record(*CELL, 36, 0.83, 0.82),
        record("0100", "input,output", 108, 0.5, 0.5),
    ]
    path.write_bytes(b"".join(map(framed, records)))
    return path


class TestNasBench101:
    def test_values(self, nb101_file):
        space = NasBench101()
        truth = read_truth(nb101_file, space)
        assert truth == {"3m/110.01.1": pytest.approx(93.0), "/1": pytest.approx(50.0)}
        assert set(map(space.parse, truth)) == set(truth)
        assert read_truth(nb101_file, space, split="validation", epochs=36) == {"3m/110.01.1": pytest.approx(83.0)}

    def test_errors(self, nb101_file):
        space = NasBench101()
        with pytest.raises(ValueError, match="epochs=200 must be 4, 12, 36 or 108"):
            read_truth(nb101_file, space, epochs=200)
        with pytest.raises(CorruptFileError, match="has no training of 4 epochs"):
            read_truth(nb101_file, space, epochs=4)
        with pytest.raises(ValueError, match=r"a \.tfrecord file is of space nasbench101, not of nasbench201"):
            read_truth(nb101_file, NasBench201())

    @pytest.mark.parametrize(
        ("data", "detail"),
        [
            (b"[]", "not enough values"),
            (b"{", "JSONDecodeError"),
            (record("01", "input,output", 108, 0.1, 0.1), "no matrix of 0 and 1 for 2 vertices"),
            (record("0100", "input,exit", 108, 0.1, 0.1), "from 'input' to 'output'"),
            (json.dumps(["f", 108, "0100", "input,output", ""]).encode(), "IndexError"),
            (json.dumps(["f", 108, "0100", "input,output", "CoE="]).encode(), "IndexError"),
            (json.dumps(["f", 108, "0100", "input,output", "Cn8="]).encode(), "overruns its message"),
        ],
    )
    def test_strange_records(self, data, detail, tmp_path):
        path = tmp_path / "strange.tfrecord"
        path.write_bytes(framed(data))
        with pytest.raises(CorruptFileError, match=rf"strange\.tfrecord: record 0 is none of NAS-Bench-101 .*{detail}"):
            read_truth(path, NasBench101())

    def test_truncated(self, nb101_file):
        """At every byte: the records that are whole, or the error."""
        data = nb101_file.read_bytes()
        ends, records = [0], []
        for each in read_records(nb101_file):
            records.append(each)
            ends.append(ends[-1] + len(each) + 16)
        for length in range(0, len(data), 7):
            nb101_file.write_bytes(data[:length])
            if length in ends:
                continue
            with pytest.raises(
                CorruptFileError, match=r"nasbench_full\.tfrecord is damaged: the record at byte \d+ ends"
            ):
                list(read_records(nb101_file))
        assert len(records) == 4

    def test_flipped_bits(self, nb101_file):
        data = bytearray(nb101_file.read_bytes())
        for bit in range(0, 8 * len(data), 61):
            data[bit // 8] ^= 1 << bit % 8
            nb101_file.write_bytes(data)
            with pytest.raises(CorruptFileError, match="is damaged: the record at byte"):
                list(read_records(nb101_file))
            data[bit // 8] ^= 1 << bit % 8

    def test_large_claims(self, tmp_path):
        length = struct.pack("<Q", 1 << 40)
        path = tmp_path / "large.tfrecord"
        path.write_bytes(length + struct.pack("<I", masked_crc32c(length)))
        with pytest.raises(CorruptFileError, match="has 1099511627776 bytes; at most 16384"):
            list(read_records(path))


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 31, 32, 100])
def test_crc32c(length):
    """Against the definition, a bit at a time."""
    data = np.random.default_rng(length).bytes(length)
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = (remainder >> 1) ^ (0x82F63B78 if remainder & 1 else 0)
    assert crc32c(data) == remainder ^ 0xFFFFFFFF


def test_crc32c_published():
    """The check value of CRC-32C, and 32 zero bytes of RFC 3720."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
