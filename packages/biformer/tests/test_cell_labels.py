"""Stored labels of cells follow the crop of their picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from biformer.cell_labels import CellLabelledPictures, crop_label_map, read_label_map
from visionkernels.pictures.labelled import open_pictures
from visionkernels.pictures.recipes import AugmentationRecipe, PictureRecipe
from visionkernels.pictures.transforms import evaluation_transform, training_transform

SMALL = PictureRecipe(size=32, resize=36)
TRANSFORM = evaluation_transform(SMALL)


def gradient(mode="RGB", size=(24, 16)):
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, size[0], dtype=np.uint8), (size[1], 1)))
    return ramp.convert(mode)


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
