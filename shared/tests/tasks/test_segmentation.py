"""Segmentation of any model: its loss, inference and metrics."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from visionkernels.pictures.recipes import SceneRecipe
from visionkernels.pictures.scenes import IGNORED, Scenes
from visionkernels.tasks.segmentation import SegmentationTask, evaluate, predict


class Pointwise(nn.Module):
    """Logits that are the image's channels: the same in any window."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return images


class Twice(nn.Module):
    """As a model with an auxiliary head in training."""

    def forward(self, images):
        return [images, images]


class TestSegmentationTask:
    def test_one_output_and_a_list(self):
        """A model may give its logits alone; auxiliary ones behind them count less."""
        logits, labels = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
        labels[0, :2] = IGNORED
        main = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").mean()
        assert_close(SegmentationTask(Pointwise())(logits, labels)["loss"], main)
        twice = SegmentationTask(Twice(), auxiliary_weight=0.5)(logits, labels)
        assert_close((twice["main_loss"], twice["loss"]), (main, 1.5 * main))

    def test_no_labels(self):
        loss = SegmentationTask(Pointwise())(torch.randn(1, 3, 4, 5), torch.full((1, 4, 5), IGNORED))["loss"]
        assert loss.item() == 0


class TestPredict:
    IMAGE = torch.linspace(-1, 1, 3 * 50 * 130).reshape(3, 50, 130).sin()

    @pytest.mark.parametrize(
        "changes", [{}, {"test_flip": True}, {"inference": "slide"}], ids=["whole", "flip", "slide"]
    )
    def test_pointwise_model(self, changes):
        """Windows and mirroring change nothing for a model that sees single pixels."""
        scene = SceneRecipe(short_side=50, long_side=130, multiple=1, crop=32, stride=20)
        found = predict(Pointwise().eval(), self.IMAGE, replace(scene, **changes))
        assert_close(found, self.IMAGE.softmax(0), rtol=0, atol=1e-6)

    def test_errors(self):
        model = Pointwise()
        with pytest.raises(ValueError, match="the model is in training mode"):
            predict(model, self.IMAGE, SceneRecipe())
        with pytest.raises(ValueError, match=r"image has shape \[1, 3, 50, 130\]"):
            predict(model.eval(), self.IMAGE[None], SceneRecipe())


class TestEvaluate:
    LABELS = torch.tensor([[0, 0, 0, 1], [0, 0, IGNORED, 2]])

    def measure(self, answer: torch.Tensor, labels: torch.Tensor = LABELS) -> dict[str, float]:
        image = 9.0 * F.one_hot(answer, 3).permute(2, 0, 1).float()
        scenes = Scenes(lambda index: (image, labels), 2, lambda image, labels: (image, labels))
        recipe = SceneRecipe(short_side=2, long_side=4, multiple=1)
        return evaluate(Pointwise(), scenes, recipe, num_classes=3, show_progress=False)

    def test_perfect(self):
        found = self.measure(torch.where(self.LABELS == IGNORED, 1, self.LABELS))
        assert found == pytest.approx({"miou": 100, "pixel_accuracy": 100, "majority_miou": 100 * 5 / 7 / 3})

    def test_majority(self):
        found = self.measure(torch.zeros(2, 4, dtype=torch.long))
        assert found["miou"] == pytest.approx(found["majority_miou"])
        assert found["pixel_accuracy"] == pytest.approx(100 * 5 / 7)

    def test_mean_over_classes(self):
        answer = torch.where(self.LABELS == 2, 1, self.LABELS) % IGNORED
        # class 0: 5 of 5, class 1: 1 of 2, class 2: 0 of 1
        assert self.measure(answer)["miou"] == pytest.approx(100 * (1 + 0.5 + 0) / 3)

    def test_classes_that_do_not_occur(self):
        labels = torch.where(self.LABELS == 2, 0, self.LABELS)
        answer = torch.zeros(2, 4, dtype=torch.long)
        expected = {"miou": 100 * 6 / 7 / 2, "pixel_accuracy": 100 * 6 / 7, "majority_miou": 100 * 6 / 7 / 2}
        assert self.measure(answer, labels) == pytest.approx(expected)

    def test_nothing_labelled(self):
        with pytest.raises(ValueError, match="none of the 2 pictures has a labelled pixel"):
            self.measure(torch.zeros(2, 4, dtype=torch.long), torch.full((2, 4), IGNORED))
