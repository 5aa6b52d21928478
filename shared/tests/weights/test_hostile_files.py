"""Files of weights that would end the interpreter or fill the memory; small ones, refused before they are unpickled."""

import io
import pickle
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from visionkernels.weights import CheckpointError, read_checkpoint

PROTO, STOP, MARK, TUPLE1, REDUCE, SETITEMS, APPENDS = b"\x80\x02", b".", b"(", b"\x85", b"R", b"u", b"e"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def as_zip(path: Path, program: bytes, **options) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", PROTO + program + STOP)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return path


def as_legacy(path: Path, program: bytes, keys: bytes = b"]") -> Path:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(value, 2) for value in (torch.serialization.MAGIC_NUMBER, 1001, system)]
    path.write_bytes(b"".join(parts) + PROTO + program + STOP + PROTO + keys + STOP)
    return path


def as_plain(path: Path, program: bytes) -> Path:
    path.write_bytes(PROTO + program + STOP)
    return path


WRITERS = {"zip": as_zip, "legacy": as_legacy, "plain": as_plain}


def repeated(call: bytes, count: int) -> bytes:
    """A dictionary of `count` results of a call on what memo 0 holds."""
    items = b"".join(text(str(index)) + call for index in range(count))
    return b"}" + MARK + items + SETITEMS


DEEP_KEY = b"}" + MARK + b")" + TUPLE1 * 150_000 + text("value") + SETITEMS
LONG_TEXT = text("x" * 700_000) + b"q\x000"
PAIRS = b"]" + MARK + b"".join(text(str(index)) + text("v") + b"\x86" for index in range(30_000)) + APPENDS + b"q\x000"
PROGRAMS = {
    "deep key": DEEP_KEY,
    "deep value": b"}" + MARK + text("key") + b"]" * 5_000 + b"a" * 4_999 + SETITEMS,
    "encoded texts": LONG_TEXT
    + repeated(name("_codecs", "encode") + b"h\x00" + text("latin1") + b"\x86" + REDUCE, 3_000),
    "copied pairs": PAIRS + repeated(name("collections", "OrderedDict") + b"h\x00" + TUPLE1 + REDUCE, 3_000),
    "idle calls": MARK + b"N" * 30_000 + b"tq\x000"
    + repeated(name("collections", "Counter") + b"h\x00" + REDUCE, 30_000),
    "long text": b"}" + MARK + b"X\xff\xff\xff\x7f" + SETITEMS,
    "longer text": b"}" + MARK + b"\x8d" + struct.pack("<Q", 2**40) + SETITEMS,
    "buffer": repeated(name("builtins", "bytearray") + number(2**31) + TUPLE1 + REDUCE, 1),
    "new tensor": repeated(name("torch", "FloatTensor") + number(2**29) + TUPLE1 + REDUCE, 1),
    "new storage": repeated(name("torch", "FloatStorage") + number(2**29) + TUPLE1 + b"\x81", 1),
    "large storage": b"}" + MARK + text("w") + MARK + text("storage") + name("torch", "FloatStorage") + text("0")
    + text("cpu") + number(2**29) + b"N" + b"tQ" + SETITEMS,
    "shared array": LONG_TEXT
    + repeated(
        name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray") + number(0) + TUPLE1 + text("b")
        + b"\x87" + REDUCE + MARK + number(1) + number(700_000) + TUPLE1 + name("numpy", "dtype") + text("u1")
        + number(0) + number(1) + b"\x87" + REDUCE + b"\x89" + b"h\x00" + b"tb",
        3_000,
    ),
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_program(tmp_path, writer, program):
    """Whoever reads it: torch's archive, its older form, or a plain pickle of arrays."""
    path = WRITERS[writer](tmp_path / "x.pth", PROGRAMS[program])
    assert path.stat().st_size < 2 * 2**20
    with pytest.raises(CheckpointError, match=r"x\.pth (is damaged|needs the Python object)"):
        read_checkpoint(path)


def test_compressed_archive(tmp_path):
    """A text of 100 MB in 100 kB."""
    path = as_zip(
        tmp_path / "x.pth", b"}" + MARK + text("k") + text("x" * 10**8) + SETITEMS, compression=zipfile.ZIP_DEFLATED
    )
    with pytest.raises(CheckpointError, match="asks for far more memory than it has bytes"):
        read_checkpoint(path)


def test_two_pickles_of_one_name(tmp_path):
    path = as_zip(tmp_path / "x.pth", b"}")
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data.pkl", PROTO + DEEP_KEY + STOP)
    with pytest.raises(CheckpointError, match="nests objects more than 200 deep"):
        read_checkpoint(path)


def test_overlapping_tensors(tmp_path):
    """Four bytes of which a tensor makes a terabyte, and a storage that thousands of tensors share."""
    torch.save({"w": torch.zeros(1).expand(2**38)}, tmp_path / "wide.pth")
    shared = torch.zeros(2**18)
    torch.save({str(index): shared for index in range(3_000)}, tmp_path / "shared.pth")
    for file in ("wide.pth", "shared.pth"):
        with pytest.raises(CheckpointError, match=r"its tensors have \d+ bytes, in a file of"):
            read_checkpoint(tmp_path / file)
    torch.save({str(index): shared for index in range(24)}, tmp_path / "tied.pth")
    assert len(read_checkpoint(tmp_path / "tied.pth").state) == 24


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("protocol", [0, 1, 4, 5])
def test_other_protocols(tmp_path, protocol, is_zip):
    """They are not damaged, and are not called so."""
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": is_zip}
    torch.save({"w": torch.ones(3)}, tmp_path / "x.pth", **options)
    with pytest.raises(CheckpointError, match=f"pickle protocol {protocol if protocol > 1 else '0 or 1'}, which torch"):
        read_checkpoint(tmp_path / "x.pth")


def test_tar(tmp_path):
    with tarfile.open(tmp_path / "x.pth", "w") as archive:
        for member in ("sys_info", "pickle", "tensors", "storages"):
            archive.addfile(tarfile.TarInfo(member), io.BytesIO(b""))
    with pytest.raises(CheckpointError, match=r"is a tar file, as torch\.save wrote before 2017"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged: it is empty"),
        (b"\n <!DOCTYPE html><html>", "is a page of HTML and not the file that it tells of"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "is a pointer of Git LFS"),
        (
            b"hello world",
            "is damaged or no checkpoint of torch.save: an instruction of its pickle has nothing to act on",
        ),
        (b"eeee", "is damaged or no checkpoint of torch.save: an instruction of its pickle has nothing to act on"),
        (b"PK\3\4junk", "is damaged or no checkpoint of torch.save: File is not a zip file"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, content, message):
    (tmp_path / "junk.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"junk\.pth {re.escape(message)}"):
        read_checkpoint(tmp_path / "junk.pth")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_whole_training(tmp_path, is_zip):
    """What training scripts save beside the weights stays readable."""
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(30)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "text": "x" * 10**6,
        "random": torch.get_rng_state(), "parameter": torch.nn.Parameter(torch.ones(2)), "size": torch.Size([1, 2]),
        "half": torch.ones(2, dtype=torch.bfloat16), "sparse": torch.eye(3).to_sparse(), "names": {"a", "b"},
    }  # fmt: skip
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    state = read_checkpoint(tmp_path / "x.pth").state
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
