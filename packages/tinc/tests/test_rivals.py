"""Other codecs at the same bytes."""

import math

import numpy as np
import pytest

from tinc import rivals
from tinc.metrics import psnr
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


def test_search_keeps_the_best() -> None:
    """Also of a codec whose quality falls where its size grows; not the last result that fits."""
    original = np.full((2, 8, 8), 100, np.uint8)

    def codec(volume: np.ndarray, knob: float) -> tuple[int, np.ndarray]:
        # all fit; the first one tried is exact
        return 10, volume if knob == 0.5 else volume + 9

    coded = rivals._search(codec, original, 20)
    assert coded is not None
    assert math.isinf(psnr(original, coded[1]))


class TestHevc:
    @pytest.mark.parametrize("shape", [(4, 40, 48), (6, 80, 64), (3, 33, 70), (2, 97, 31), (3, 5, 9)], ids=str)
    def test_reproducible(self, shape: tuple[int, ...]) -> None:
        """The stream of a crop is the same each time, and is what its MD5 say; also of frames one block wide."""
        volume = np.random.default_rng(0).integers(90, 160, shape).astype(np.uint8)
        (size, decoded), second = (rivals._hevc(volume, 0.4) for _ in range(2))
        assert decoded is not None and second[1] is not None
        assert size == second[0] and np.array_equal(decoded, second[1])
        assert psnr(volume, decoded) > 25

    def test_verified(self, volume: np.ndarray) -> None:
        """No damage passes for a worse codec: a stream that decodes to something else is none."""
        frames = (volume[:, :, :32] >> 4).astype(np.uint16)
        stream = rivals._x265(frames, 20, 16)
        sound = rivals._verified(stream)
        assert sound is not None and sound.shape == frames.shape
        assert rivals._bytes_without_digests(stream) < len(stream)
        caught = 0
        for place in range(len(stream) // 2, len(stream), len(stream) // 40):
            damaged = bytearray(stream)
            damaged[place] ^= 4
            decoded = rivals._verified(bytes(damaged))
            caught += decoded is None
            assert decoded is None or decoded.shape != sound.shape or np.array_equal(decoded, sound)
        assert caught > 10

    def test_corrupt(self, volume: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
        """A stream that decodes to something else is no result, whatever it looks like."""
        monkeypatch.setattr(rivals, "_verified", lambda stream: None)
        assert rivals._hevc(volume, 0.4)[1] is None
        assert match("hevc", volume, 12) is None


def test_out_of_reach(volume: np.ndarray) -> None:
    assert match("zfp", volume, 1000) is None


def test_best_order_of_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec that prefers an axis gets it in front, and the volume comes back as it was."""
    volume = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)

    def codec(turned: np.ndarray, knob: float) -> tuple[int, np.ndarray]:
        decoded = turned.copy()
        decoded[0, 0, 0] += 1 + (turned.shape[0] != 5)
        return 10, decoded

    monkeypatch.setitem(rivals.RIVALS, "turned", codec)
    size, decoded = match("turned", volume, 2)
    assert size == 10 and decoded.shape == volume.shape
    assert np.abs(decoded.astype(int) - volume).sum() == 1


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
