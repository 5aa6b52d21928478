"""Commands that lose no source, and take axes and types as they are told."""

from pathlib import Path

import numpy as np
import pytest

import tinc
from tinc.cli import main


@pytest.fixture
def volume(tmp_path):
    array = (np.indices((4, 24, 20)).sum(0) * 3).astype(np.uint8)
    np.save(tmp_path / "x.npy", array)
    return tmp_path / "x.npy"


def run(*words) -> int:
    return main([str(word) for word in words])


def test_source_is_not_replaced(volume, tmp_path, capsys):
    """By no name of it: compress and decompress refuse the source as their output, also with --overwrite."""
    before = volume.read_bytes()
    (tmp_path / "link.npy").symlink_to(volume)
    for out in (volume, tmp_path / "link.npy", tmp_path / "." / "x.npy"):
        assert run("compress", volume, out, "--lossless", "--overwrite") == 2
        assert "is the source itself, which would be lost" in capsys.readouterr().err
    assert run("chunk", volume, volume, "--size", 4, 8, 8, "--overwrite") == 2
    assert "is the source itself, which would be lost" in capsys.readouterr().err
    assert volume.read_bytes() == before
    assert run("compress", volume, tmp_path / "x.tinc", "--lossless") == 0
    stored = (tmp_path / "x.tinc").read_bytes()
    assert run("decompress", tmp_path / "x.tinc", tmp_path / "x.tinc", "--overwrite") == 2
    assert (tmp_path / "x.tinc").read_bytes() == stored


@pytest.mark.parametrize(("words", "axis"), [((), 0), (("--channel-axis", "none"), None), (("--channel-axis", 2), 2)])
def test_channel_axis(tmp_path, words, axis):
    """An axis that a TIFF wrongly calls C is overruled."""
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed")
    array = (np.indices((4, 24, 20)).sum(0) * 3).astype(np.uint8)
    tifffile.imwrite(tmp_path / "x.tif", array, imagej=True, metadata={"axes": "CYX"})
    assert run("compress", tmp_path / "x.tif", tmp_path / "x.tinc", "--lossless", *words) == 0
    file = tinc.open(tmp_path / "x.tinc")
    assert file.info()["channel_axis"] == axis and (file.decode() == array).all()


def test_as_type(tmp_path):
    """chunk and batch convert as compress does."""
    array = np.indices((4, 16, 16)).sum(0).astype(np.float64) + 0.25
    np.save(tmp_path / "x.npy", array)
    assert run("chunk", tmp_path / "x.npy", tmp_path / "x.zarr", "--size", 4, 8, 8, "--as", "uint8") == 0
    assert run("batch", tmp_path / "x.npy", "--out", tmp_path / "all", "--as", "uint8") == 0
    assert (tinc.open(tmp_path / "all/x.tinc").decode() == np.rint(array)).all()


def test_damage_that_libraries_do_not_report(tmp_path, capsys, monkeypatch):
    """Assertions of tifffile and sizes beyond the memory: one line, exit code 2, and no output."""
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed")
    damaged = Path(__file__).parent / "files/damaged/assertion.tif"
    assert run("compress", damaged, tmp_path / "x.tinc", "--lossless") == 2
    assert capsys.readouterr().err == f"tinc: error: volume {damaged} is damaged or of another format: AssertionError\n"

    def allocate(*_, **__):
        raise MemoryError

    whole = tmp_path / "whole.tif"
    tifffile.imwrite(whole, np.zeros((4, 8, 8), np.uint8), compression="zlib", photometric="minisblack")
    monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", allocate)
    assert run("compress", whole, tmp_path / "x.tinc", "--lossless") == 2
    assert capsys.readouterr().err == f"tinc: error: volume {whole} is damaged, or larger than the memory\n"
    assert not (tmp_path / "x.tinc").exists()
