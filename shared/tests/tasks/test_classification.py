"""Measuring a classifier: accuracy, loss and the trivial answer."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from visionkernels.pictures.labelled import LabelledPictures
from visionkernels.pictures.recipes import PictureRecipe
from visionkernels.tasks.classification import ClassificationSets, Evaluation, evaluate
from visionkernels.testing.pictures import write_colours


class Constant(nn.Module):
    num_classes = 3

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images):
        return self.logits.expand(len(images), -1)


class TestEvaluate:
    def pictures(self, labels):
        files = [Image.new("RGB", (4, 4))] * len(labels)
        return LabelledPictures(files.__getitem__, labels, ("a", "b", "c"), pil_to_tensor)

    def test_numbers(self):
        labels = [0, 1, 1, 2, 1]
        measured = evaluate(Constant([0.0, 2.0, 1.0]), self.pictures(labels), batch_size=2)
        loss = nn.functional.cross_entropy(torch.tensor([[0.0, 2.0, 1.0]] * 5), torch.tensor(labels)).item()
        assert measured == Evaluation(
            top1=60, top5=100, loss=pytest.approx(loss, rel=1e-6), majority_top1=60, num_pictures=5
        )

    @pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"workers": -1}])
    def test_bad_loading(self, wrong):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name}={value} must be at least"):
            evaluate(Constant([0.0, 1.0, 2.0]), self.pictures([0, 1]), **wrong)

    def test_one_class(self):
        with pytest.raises(ValueError, match="num_classes=1 must be at least 2"):
            evaluate(Constant([0.0]), self.pictures([0, 0]), num_classes=1)

    def test_unknown_class(self):
        with pytest.raises(ValueError, match="the data has class 3, the model 3 classes"):
            evaluate(Constant([0.0, 1.0, 2.0]), self.pictures([0, 3]))


def test_data_of_one_class(tmp_path):
    """Noticed before anything is trained, not at the end of the first epoch."""
    write_colours(tmp_path, train=2, val=1)
    for folder in ("train/red", "train/blue"):
        shutil.rmtree(tmp_path / folder)
    recipe = SimpleNamespace(pictures=PictureRecipe(size=8, resize=8), data=None)
    with pytest.raises(ValueError, match="has one class, 'green'; a classifier needs two or more"):
        ClassificationSets.open(recipe, tmp_path, install="demo", transform=pil_to_tensor)
