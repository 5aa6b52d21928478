"""What becomes of a picture and its class in training and in evaluation."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from visionkernels.pictures.recipes import AugmentationRecipe, PictureRecipe
from visionkernels.pictures.transforms import (
    LabelMixing,
    evaluation_transform,
    repeated_augmentation_order,
    training_transform,
)

SMALL = PictureRecipe(size=32, resize=36)
TRANSFORM = evaluation_transform(SMALL)


def gradient(mode="RGB", size=(24, 16)):
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, size[0], dtype=np.uint8), (size[1], 1)))
    return ramp.convert(mode)


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


def images(count=4, size=64):
    return torch.randn(count, 3, size, size)


class TestLabelMixing:
    @pytest.mark.parametrize("which", ["mixup", "cutmix"])
    def test_labels_are_probabilities(self, which):
        augmentation = AugmentationRecipe(**{"mixup": 0, "cutmix": 0, which: 0.8})
        mixed, target = LabelMixing(augmentation, 5)((images(), torch.tensor([0, 1, 2, 3])))
        assert mixed.shape == (4, 3, 64, 64)
        torch.testing.assert_close(target.sum(-1), torch.ones(4))
        assert (target > 0.1).sum() == 8

    def test_cutmix_pixels_agree_with_labels(self):
        augmentation = AugmentationRecipe(mixup=0, cutmix=1.0, smoothing=0)
        flat = torch.arange(4.0)[:, None, None, None].expand(4, 3, 32, 32).clone()
        mixed, target = LabelMixing(augmentation, 4)((flat, torch.arange(4)))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), target @ torch.arange(4.0))

    def test_without_mixing(self):
        x = images()
        augmentation = AugmentationRecipe(mixup=0, cutmix=0, smoothing=0.1)
        same, target = LabelMixing(augmentation, 5)((x, torch.tensor([0, 1, 2, 3])))
        assert same is x
        torch.testing.assert_close(target, 0.9 * F.one_hot(torch.arange(4), 5) + 0.02)

    def test_odd_batch(self):
        with pytest.raises(ValueError, match="3 a process and step is odd"):
            LabelMixing(AugmentationRecipe(), 5)((images(3), torch.tensor([0, 1, 2])))


class TestPosterize:
    def test_no_bits_left(self):
        """At the top of timm's scale nothing is left of a picture, and Pillow 13 refuses to do that."""
        augmentation = AugmentationRecipe(rand_augment="rand-m10-inc1", erasing=0)
        transform = training_transform(PictureRecipe(size=8, resize=8), augmentation)
        augment = next(part for part in transform.transforms if hasattr(part, "ops"))
        op = next(op for op in augment.ops if op.name.startswith("Posterize"))
        op.prob = 1.0
        picture = Image.new("RGB", (8, 8), (200, 100, 50))
        assert op(picture).getextrema() == ((0, 0),) * 3
        op.magnitude = 2
        assert op(picture).getextrema() != ((0, 0),) * 3
