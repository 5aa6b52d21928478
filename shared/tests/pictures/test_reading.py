"""Reading a picture, whatever its file holds."""

import contextlib
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

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

    @pytest.mark.parametrize("orientation", [1, 6])
    def test_16_bits_with_a_transparent_grey(self, tmp_path, orientation):
        path, exif = tmp_path / "picture.png", Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(path, transparency=25700, exif=exif)
        assert np.asarray(read_picture(path))[..., 0].flatten().tolist() == [0, 255, 255]

    @pytest.mark.parametrize("values", [[-1, 100], [0, 65536], [0, 2_000_000_000]], ids=str)
    def test_more_than_16_bits(self, tmp_path, values):
        """They are not clipped, since nobody knows what is white."""
        path = tmp_path / "picture.tiff"
        Image.fromarray(np.array([values], dtype=np.int32)).save(path)
        with pytest.raises(CorruptPictureError, match=f"pixels go from {values[0]} to {values[1]}; save it with 8 or"):
            read_picture(path)

    @pytest.mark.parametrize(
        ("pixels", "tag", "value", "message"),
        [
            (np.zeros((4, 4), np.uint16), 262, 0, "its 0 is white"),
            (np.zeros((4, 4), np.uint8), 339, 2, "its pixels are signed numbers"),
        ],
        ids=["white is zero", "signed"],
    )
    def test_unusual_tiff(self, tmp_path, pixels, tag, value, message):
        """Pillow reads these as if the tag were not there."""
        path = tmp_path / "picture.tiff"
        Image.fromarray(pixels).save(path, tiffinfo={339: 1})
        content, entry = path.read_bytes(), struct.pack("<HHI", tag, 3, 1)
        at = content.index(entry) + len(entry)
        path.write_bytes(content[:at] + struct.pack("<H", value) + content[at + 2 :])
        with pytest.raises(CorruptPictureError, match=message):
            read_picture(path)

    @pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
    def test_animation_is_its_first_frame(self, tmp_path, suffix):
        path = tmp_path / f"picture.{suffix}"
        first, second = (Image.new("RGB", (8, 8), colour) for colour in ("white", "black"))
        first.save(path, save_all=True, append_images=[second])
        assert read_picture(path).getpixel((3, 3)) == (255, 255, 255)

    @pytest.mark.parametrize(("size", "reason"), [((60_000, 60_000), "exceeds limit"), ((9, 9_001), "it is 9 x 9001")])
    def test_sizes(self, tmp_path, size, reason):
        """One too large to read, and one whose shorter side no transform can enlarge."""
        path = tmp_path / "picture.png"
        Image.new("L", (9, 9_001)).save(path)
        content = bytearray(path.read_bytes())
        content[16:24] = struct.pack(">II", *size)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        path.write_bytes(content)
        with pytest.raises(CorruptPictureError, match=reason):
            read_picture(path)

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

    @pytest.mark.parametrize(("content", "reason"), [("", "it is empty"), ("a text", "it is in no format that Pillow")])
    def test_no_picture(self, tmp_path, content, reason):
        path = tmp_path / "picture.png"
        path.write_text(content)
        with pytest.raises(CorruptPictureError, match=f"picture.png cannot be read: {reason}"):
            read_picture(path)

    def test_name_with_a_line_break(self, tmp_path):
        path = tmp_path / "two\nlines.png"
        path.write_text("a text")
        with pytest.raises(CorruptPictureError, match=r"^picture /.*two\\nlines\.png cannot be read"):
            read_picture(path)

    @pytest.mark.parametrize("suffix", ["avif", "tiff"])
    def test_damaged(self, tmp_path, suffix):
        """Whatever Pillow's decoders raise, the file is named."""
        if suffix == "avif" and not features.check("avif"):
            pytest.skip("Pillow was built without AVIF")
        path, random = tmp_path / f"picture.{suffix}", np.random.default_rng(0)
        gradient().save(path)
        content = path.read_bytes()
        for _ in range(300):
            damaged = bytearray(content)
            for place in random.integers(len(damaged), size=3):
                damaged[place] = random.integers(256)
            path.write_bytes(damaged)
            with contextlib.suppress(CorruptPictureError):
                read_picture(path)

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
