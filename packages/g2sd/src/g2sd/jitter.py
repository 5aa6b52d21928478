"""Large-scale jitter, the augmentation of detectors: pictures resized by a random factor, and cropped to fit."""

from typing import Any

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from visionkernels.checks import check
from visionkernels.pictures.objects import boxes_of_masks

__all__ = ["large_scale_jitter"]


def large_scale_jitter(side: int, scale_range: tuple[float, float] = (0.1, 2.0)) -> list[nn.Module]:
    """Return the steps of large-scale jitter (G. Ghiasi and others, 2021) to pictures of at most `side` pixels a side.

    A picture is resized to fit in a square of `side` pixels times a random factor of `scale_range`, and cropped at
    random where it is larger than `side`. Boxes become those of what is visible, and objects of which nothing is are
    left out. Raises ValueError for a range that does not rise.
    """
    low, high = scale_range
    check(0 < low <= high, "scale_range", scale_range, "two rising numbers above 0")
    return [_Jitter((side, side), scale_range), _CropToFit(side), _KeepVisible()]


class _Jitter(v2.ScaleJitter):  # type: ignore[misc]  # torchvision.transforms has no types
    """Leaves thin pictures a pixel."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = super().make_params(flat_inputs)["size"]
        return {"size": (max(height, 1), max(width, 1))}


class _CropToFit(v2.Transform):  # type: ignore[misc]  # torchvision.transforms has no types
    """Crops the sides that are longer than `side`, at a random place."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        size = min(height, self.side), min(width, self.side)
        spare = height - size[0], width - size[1]
        top, left = (int(torch.randint(limit + 1, ())) for limit in spare)
        return {"top": top, "left": left, "height": size[0], "width": size[1]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


class _KeepVisible(nn.Module):
    """Leaves objects out that a crop has left nothing of, and fits boxes to what it has left."""

    def forward(self, image: tv_tensors.Image, target: dict[str, Any]) -> tuple[tv_tensors.Image, dict[str, Any]]:
        boxes, masks = target["boxes"], target.get("masks")
        if masks is None:
            is_seen = (boxes[:, 2:] - boxes[:, :2]).amin(1) >= 1
            fitted = boxes[is_seen]
        else:
            is_seen = masks.bool().flatten(1).any(1)
            fitted = boxes_of_masks(masks[is_seen])
        kept = {key: tv_tensors.wrap(value[is_seen], like=value) for key, value in target.items() if key != "boxes"}
        return image, {"boxes": tv_tensors.wrap(fitted.to(boxes.dtype), like=boxes), **kept}
