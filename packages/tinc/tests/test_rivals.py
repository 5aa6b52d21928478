"""Other codecs at the same bytes."""

import math

import numpy as np
import pytest

from tinc.rivals import RIVALS, compare, match, rivalry_table


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    z, y, x = np.mgrid[:4, :40, :48]
    waves = np.sin(x / 7 + z) * np.cos(y / 5)
    noise = np.random.default_rng(0).normal(0, 300, waves.shape)
    return (30000 + 12000 * waves + noise).clip(0, 65535).astype(np.uint16)


@pytest.mark.parametrize("name", RIVALS)
def test_meets_the_target(volume: np.ndarray, name: str) -> None:
    coded = match(name, volume, 4 if name == "zfp" else 12)
    assert coded is not None
    size, decoded = coded
    assert size <= volume.nbytes / (4 if name == "zfp" else 12)
    assert (decoded.shape, decoded.dtype) == (volume.shape, volume.dtype)
    error = decoded.astype(float) - volume
    # far below the error of the volume's mean
    assert np.square(error).mean() < 0.05 * volume.astype(float).var()


def test_out_of_reach(volume: np.ndarray) -> None:
    assert match("zfp", volume, 1000) is None


class TestCompare:
    def test_rows(self, volume: np.ndarray) -> None:
        rows = list(compare(volume, (12,), ("jpeg2k", "zfp"), preset="fast", layers=("residual",)))
        assert [row["codec"] for row in rows] == ["tinc residual", "jpeg2k", "zfp"]
        own, jpeg2k, zfp = rows
        assert own["ratio"] >= 12
        assert own["psnr"] > jpeg2k["psnr"] > zfp["psnr"]
        table = rivalry_table(rows)
        assert "tinc residual" in table
        assert f"{own['psnr']:.2f}" in table

    def test_a_ratio_that_is_not_reached(self, volume: np.ndarray) -> None:
        (row,) = compare(volume, (1000,), ("zfp",), layers=())
        assert math.isnan(row["psnr"])

    def test_errors(self, volume: np.ndarray) -> None:
        with pytest.raises(ValueError, match="float32"):
            list(compare(volume.astype(np.float32), (12,)))
        with pytest.raises(ValueError, match="against=h264 is not known; known: hevc"):
            list(compare(volume, (12,), ("h264",)))
