"""Files of a few bytes that decode to gigabytes: refused before memory is taken, unless the caller allows it."""

import pickle
import tracemalloc

import numpy as np
import pytest

from tinc import compress, decompress, file
from tinc import open as open_tinc
from tinc.chunks import TincChunks
from tinc.cli import main
from tinc.errors import MemoryLimitError

# a constant image of 32,768 pixels a side
BOMB = bytes.fromhex("54494e43010000001f000000000000003dc914bd0a00028080028080020000")
GIGABYTE = 1 << 30


def test_whole():
    for read in (decompress, lambda content: np.asarray(open_tinc(content)), TincChunks(lossless=True).decode):
        with pytest.raises(MemoryLimitError, match=r"the file of 31 bytes decodes to 1073741824 bytes here, above the"):
            read(BOMB)
    with pytest.raises(MemoryLimitError, match=r"give max_nbytes=1073741824 \(--max-bytes 1073741824\)"):
        decompress(BOMB, max_nbytes=GIGABYTE - 1)


def test_regions():
    assert open_tinc(BOMB)[:3, -5:].shape == (3, 5)
    assert open_tinc(BOMB, max_nbytes=15)[:3, -5:].shape == (3, 5)


def test_working_memory():
    """That of a slab, and not eight bytes for every sample."""
    opened = open_tinc(BOMB)
    tracemalloc.start()
    part = opened[:4096]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert part.nbytes == 1 << 27 and peak < part.nbytes + 32 * file._SLAB_SAMPLES


@pytest.mark.parametrize("options", [{"lossless": True}, {"ratio": 8}, {"max_error": 3}], ids=str)
@pytest.mark.parametrize("shape", [(37, 61, 45), (1, 300, 190), (9, 500), (3, 90, 41)], ids=str)
def test_slabs(monkeypatch, options, shape):
    """The values are those of the whole at once, in regions and at coarser levels too."""
    random = np.random.default_rng(0)
    axes = np.meshgrid(*(np.linspace(0, 3, size) for size in shape), indexing="ij")
    array = (120 + 90 * np.sin(sum(axes)) + random.normal(0, 4, shape)).astype(np.uint8)
    channel_axis = 0 if shape[0] == 3 else None
    opened = compress(array, preset="fast", channel_axis=channel_axis, **options)
    regions = [None, tuple(slice(size // 5, size - size // 7) for size in shape)]
    cases = [(region, 0) for region in regions] + [(None, level) for level in range(1, opened.levels + 1)]
    whole = [opened.decode(region, level=level) for region, level in cases]
    for samples in (1, 700, 20_000):
        monkeypatch.setattr(file, "_SLAB_SAMPLES", samples)
        for (region, level), expected in zip(cases, whole, strict=True):
            assert np.array_equal(opened.decode(region, level=level), expected)


def test_limit(tmp_path):
    array = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    compress(array, lossless=True).save(tmp_path / "x.tinc")
    with pytest.raises(MemoryLimitError, match="above the limit of 8191"):
        decompress(tmp_path / "x.tinc", max_nbytes=8191)
    assert (decompress(tmp_path / "x.tinc", max_nbytes=8192) == array).all()


def test_command(tmp_path, capsys):
    (tmp_path / "bomb.tinc").write_bytes(BOMB)
    command = ["decompress", str(tmp_path / "bomb.tinc"), str(tmp_path / "out.npy")]
    assert main(command) == 2
    assert "--max-bytes 1073741824" in capsys.readouterr().err
    assert not (tmp_path / "out.npy").exists()
    assert main([*command, "--region", "0:2,0:2", "--max-bytes", "4"]) == 0


@pytest.mark.parametrize("is_mapped", [True, False])
def test_pickled(tmp_path, monkeypatch, is_mapped):
    """As Dask sends it to its workers, which may run in another folder."""
    array = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    content = compress(array, lossless=True)
    content.save(tmp_path / "x.tinc")
    monkeypatch.chdir(tmp_path)
    opened = open_tinc("x.tinc", max_nbytes=9000) if is_mapped else content
    message = pickle.dumps(opened)
    monkeypatch.chdir("/")
    copied = pickle.loads(message)
    assert (copied.decode() == array).all() and copied.max_nbytes == opened.max_nbytes
    assert len(message) < (500 if is_mapped else 2 * content.nbytes_stored)
