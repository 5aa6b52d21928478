"""Reading a picture, whatever its file holds."""

import numpy as np
import pytest
from PIL import Image

from visionkernels.pictures.reading import CorruptPictureError, read_picture


def gradient(mode="RGB", size=(24, 16)):
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, size[0], dtype=np.uint8), (size[1], 1)))
    return ramp.convert(mode)


class TestReadPicture:
    @pytest.mark.parametrize(
        ("mode", "suffix"), [("RGB", "png"), ("L", "png"), ("P", "gif"), ("CMYK", "jpg"), ("1", "png")]
    )
    def test_modes(self, tmp_path, mode, suffix):
        path = tmp_path / f"picture.{suffix}"
        gradient(mode).save(path)
        assert read_picture(path).mode == "RGB"
        assert read_picture(path).size == (24, 16)

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_transparency_is_white(self, tmp_path, mode):
        path = tmp_path / "picture.png"
        Image.new(mode, (4, 4), (0,) * len(mode)).save(path)
        assert read_picture(path).getpixel((0, 0)) == (255, 255, 255)

    def test_transparent_palette(self, tmp_path):
        path = tmp_path / "picture.png"
        Image.new("P", (4, 4), 0).save(path, transparency=0)
        assert read_picture(path).getpixel((0, 0)) == (255, 255, 255)

    def test_16_bits(self, tmp_path):
        path = tmp_path / "picture.png"
        Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(path)
        assert [read_picture(path).getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]

    def test_rotated_by_exif(self, tmp_path):
        path = tmp_path / "picture.jpg"
        exif = Image.Exif()
        exif[0x0112] = 6  # a quarter turn
        gradient().save(path, exif=exif)
        assert read_picture(path).size == (16, 24)

    def test_given_picture_stays(self):
        given = gradient("L")
        assert read_picture(given).mode == "RGB"
        assert given.mode == "L"

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.png is not a file"):
            read_picture(tmp_path / "none.png")

    @pytest.mark.parametrize("share", [0, 0.05, 0.5, 0.95])
    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
    def test_truncated(self, tmp_path, suffix, share):
        path = tmp_path / f"picture.{suffix}"
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(CorruptPictureError, match=rf"^picture .*picture\.{suffix} cannot be read: .+"):
            read_picture(path)

    def test_floating_point(self, tmp_path):
        path = tmp_path / "picture.tiff"
        Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(path)
        with pytest.raises(CorruptPictureError, match="no stated range"):
            read_picture(path)
