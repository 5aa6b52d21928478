"""What the settings of pictures refuse."""

import pytest

from visionkernels.pictures.recipes import AugmentationRecipe, PictureRecipe, SceneRecipe


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PictureRecipe(size=0), "size=0 must be at least 1"),
        (lambda: PictureRecipe(size=224, resize=200), "resize=200 must be at least size=224"),
        (lambda: PictureRecipe(interpolation="nearest"), "interpolation='nearest' must be one of 'bicubic'"),
        (lambda: AugmentationRecipe(erasing=1.5), "erasing=1.5"),
        (lambda: AugmentationRecipe(mixup=-1), "mixup=-1"),
        (lambda: AugmentationRecipe(smoothing=1), "smoothing=1"),
        (lambda: AugmentationRecipe(repeats=0), "repeats=0"),
        (lambda: SceneRecipe(short_side=0), "short_side=0"),
        (lambda: SceneRecipe(stride=600), "at most crop=512, or pixels are left out"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
