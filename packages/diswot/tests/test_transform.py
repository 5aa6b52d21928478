"""Transforms of training images, and images with their indices."""

from dataclasses import replace

import torch
from PIL import Image

from diswot.recipes import RECIPES
from diswot.training import IndexedPictures, training_transform
from visionkernels.pictures.labelled import open_pictures
from visionkernels.pictures.recipes import PictureRecipe
from visionkernels.testing.pictures import write_colours

_DIGITS = RECIPES["mnist5k_kd"]
RECIPE = replace(_DIGITS, pictures=replace(_DIGITS.pictures, size=16, resize=16))


class TestTransform:
    def test_crops_and_flips(self):
        """One white pixel moves by up to `padding`, to either side, and over the middle where it is mirrored."""
        recipe = replace(RECIPE, pictures=PictureRecipe(size=16, resize=16, mean=(0,) * 3, std=(1,) * 3), padding=2)
        pixels = torch.zeros(16, 16, 3, dtype=torch.uint8)
        pixels[5, 6] = 255
        picture = Image.fromarray(pixels.numpy())

        def places(recipe):
            transform = training_transform(recipe)
            found = [transform(picture)[0].nonzero() for _ in range(400)]
            assert all(len(each) == 1 for each in found)
            rows, columns = torch.cat(found).unbind(1)
            return set(rows.tolist()), set(columns.tolist())

        assert places(recipe) == (set(range(3, 8)), set(range(4, 9)))
        flipped = replace(recipe, is_flipped=True)
        assert places(flipped) == (set(range(3, 8)), set(range(4, 12)))
        assert places(replace(recipe, padding=0)) == ({5}, {6})

    def test_normalises(self):
        recipe = replace(RECIPE, padding=0)
        image = training_transform(recipe)(Image.new("RGB", (20, 10), (255, 0, 128)))
        wanted = (torch.tensor([1, 0, 128 / 255]) - torch.tensor(recipe.pictures.mean)) / torch.tensor(
            recipe.pictures.std
        )
        assert image.shape == (3, 16, 16)
        torch.testing.assert_close(image.mean((1, 2)), wanted)

    def test_indices(self, tmp_path):
        pictures = IndexedPictures(open_pictures(write_colours(tmp_path), "train", training_transform(RECIPE)))
        assert len(pictures) == 48
        assert [pictures[index][1:] for index in (0, 20, 47)] == [(0, 0), (1, 20), (2, 47)]
