"""Large-scale jitter: sizes, boxes and masks after it."""

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from g2sd.jitter import large_scale_jitter
from visionkernels.pictures.objects import open_objects


@pytest.mark.parametrize("has_masks", [True, False])
def test_large_scale_jitter(has_masks):
    """Pictures of 128 x 160 pixels, resized to 48 to 192 at the longer side and cut to 96."""
    steps = large_scale_jitter(96, (0.5, 2.0))
    pictures = open_objects("shapes", "train", num_classes=4, has_masks=has_masks, steps=steps)
    plain = open_objects("shapes", "train", num_classes=4)
    sizes, num_lost = set(), 0
    for index in range(40):
        image, target = pictures[index]
        height, width = image.shape[1:]
        sizes.add((height, width))
        boxes, count = target["boxes"], len(target["labels"])
        assert boxes.shape == (count, 4) and len(target["iscrowd"]) == count
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] - boxes[:, :2] >= 1).all()
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
        num_lost += len(plain[index][1]["labels"]) - count
        if has_masks:
            for (left, top, right, bottom), mask in zip(boxes.int().tolist(), target["masks"], strict=True):
                assert mask[top:bottom, left:right].sum() == mask.sum() > 0
                assert mask[top].any() and mask[bottom - 1].any() and mask[:, left].any() and mask[:, right - 1].any()
    assert all(height <= 96 and width <= 96 and max(height, width) >= 47 for height, width in sizes)
    assert (96, 96) in sizes and len(sizes) > 10 and num_lost > 0


def test_jitter_of_one_size():
    """A factor of 1 resizes the longer side to the square's, and cuts nothing."""
    image, target = open_objects("shapes", "train", num_classes=4, steps=large_scale_jitter(80, (1.0, 1.0)))[0]
    assert (image.shape, target["masks"].shape[1:]) == ((3, 64, 80), (64, 80))
    with pytest.raises(ValueError, match=r"scale_range=\(2, 1\) must be two rising numbers above 0"):
        large_scale_jitter(80, (2, 1))


@pytest.mark.parametrize("size", [(8, 300), (300, 2), (1, 1)], ids=str)
def test_jitter_of_thin_pictures(size):
    """A side never vanishes."""
    image = tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes(torch.tensor([[0, 0, *size[::-1]]]), format="XYXY", canvas_size=size)
    target = {"boxes": boxes, "labels": torch.tensor([1]), "iscrowd": torch.tensor([0])}
    target["masks"] = tv_tensors.Mask(torch.ones(1, *size, dtype=torch.uint8))
    change = v2.Compose(large_scale_jitter(64, (0.1, 2.0)))
    for _ in range(50):
        changed, fitted = change(image, target)
        assert min(changed.shape) >= 1 and fitted["masks"].shape[1:] == changed.shape[1:]
        assert fitted["boxes"].tolist() == [[0, 0, *changed.shape[:0:-1]]]
