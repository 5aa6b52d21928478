"""Average precision of detectors that are told their answers, and the task."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from visionkernels.pictures.objects import ObjectPictures, collate_detection, open_objects
from visionkernels.tasks.detection import DetectionTask, evaluate


@pytest.fixture(scope="module")
def shapes() -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Four pictures and their objects."""
    pictures = open_objects("shapes", "validation", num_classes=4)
    return collate_detection([pictures[index] for index in range(4)])


class Oracle(nn.Module):
    """Finds what it was told, in order."""

    def __init__(self, answers: list[dict[str, torch.Tensor]]) -> None:
        nn.Module.__init__(self)
        self.answers, self.weight = iter(answers), nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return [next(self.answers)]


class MaskOracle(Oracle):
    """The same, of a detector that outlines what it finds."""

    @property
    def roi_heads(self):
        return SimpleNamespace(has_mask=lambda: True)


def answer(target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a detector would say that found just this."""
    scores, masks = torch.linspace(0.9, 0.3, len(target["labels"])), 0.9 * target["masks"][:, None].float()
    return {"boxes": target["boxes"], "labels": target["labels"], "scores": scores, "masks": masks}


class TestEvaluate:
    def measure(self, shapes, answers, oracle=Oracle) -> dict[str, float]:
        images, targets = shapes
        pictures = ObjectPictures(lambda index: (images[index], targets[index]), len(images), lambda *sample: sample)
        return evaluate(oracle(answers), pictures, show_progress=False)

    def test_perfect(self, shapes):
        found = self.measure(shapes, map(answer, shapes[1]))
        assert found == pytest.approx({"box_ap": 100, "box_ap50": 100, "box_ap75": 100})

    def test_masks(self, shapes):
        """Right boxes around empty masks, and the opposite."""
        empty = [answer(target) | {"masks": torch.zeros(len(target["masks"]), 1, 128, 160)} for target in shapes[1]]
        found = self.measure(shapes, empty, MaskOracle)
        assert (found["box_ap"], found["mask_ap"]) == (pytest.approx(100), 0)
        moved = [answer(target) | {"boxes": target["boxes"] + 200} for target in shapes[1]]
        found = self.measure(shapes, moved, MaskOracle)
        assert (found["box_ap"], found["mask_ap"]) == (0, pytest.approx(100))

    def test_half_overlap(self, shapes):
        """Boxes cut to 0.62 of their width count at the thresholds 0.5, 0.55 and 0.6 of ten."""
        images, targets = shapes
        single = [{key: value[-1:] for key, value in target.items()} for target in targets]
        cut = [
            answer(target) | {"boxes": torch.stack([left, top, left + 0.62 * (right - left), bottom], 1)}
            for target in single
            for left, top, right, bottom in [target["boxes"].unbind(1)]
        ]
        found = self.measure((images, single), cut)
        assert found == pytest.approx({"box_ap": 30, "box_ap50": 100, "box_ap75": 0})

    def test_wrong_classes(self, shapes):
        answers = [answer(target) | {"labels": target["labels"] % 3 + 1} for target in shapes[1]]
        assert self.measure(shapes, answers)["box_ap"] == 0

    def test_crowds_do_not_count(self, shapes):
        images, targets = shapes
        targets = [target | {"iscrowd": torch.zeros_like(target["labels"])} for target in targets]
        targets[0]["iscrowd"][:] = 1
        answers = [answer(targets[0]) | {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}]
        answers[0] |= {"scores": torch.zeros(0)}
        assert self.measure((images, targets), [*answers, *map(answer, targets[1:])])["box_ap"] == pytest.approx(100)

    def test_nothing_found(self, shapes):
        """No detection in any picture."""
        nothing = [{key: value[:0] for key, value in answer(target).items()} for target in shapes[1]]
        found = self.measure(shapes, nothing, MaskOracle)
        assert set(found.values()) == {0.0} and len(found) == 6

    def test_no_objects(self, shapes):
        images, targets = shapes
        empty = [{key: value[:0] for key, value in target.items()} for target in targets]
        with pytest.raises(ValueError, match="none of the 4 pictures has an object"):
            self.measure((images, empty), map(answer, targets))

    def test_missing_extra(self, shapes, monkeypatch):
        monkeypatch.setitem(sys.modules, "pycocotools", None)
        with pytest.raises(ImportError, match="pip install 'pycocotools'"):
            self.measure(shapes, [])


class Halves(nn.Module):
    """A detector with two losses."""

    def forward(self, images, targets):
        return {"boxes": images[0].sum(), "classes": targets[0]["weight"].to(torch.bfloat16)}


class TestDetectionTask:
    def test_sum(self):
        found = DetectionTask(Halves())([torch.ones(2)], [{"weight": torch.tensor(0.5)}])
        assert (found["loss"].item(), found["loss"].dtype) == (2.5, torch.float32)
        assert (found["boxes"].item(), found["classes"].item()) == (2.0, 0.5)
