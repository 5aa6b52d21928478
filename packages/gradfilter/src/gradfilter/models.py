"""Segmentation models on timm encoders, and a small network for digits, registered in timm as "tinyconv"."""

from typing import Any, cast

import timm
from jaxtyping import Float
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.fcn import FCNHead

from visionkernels.checks import check_known
from visionkernels.extras import require

__all__ = ["FCN", "SEGMENTATION_HEADS", "TinyConv", "create_segmenter", "tinyconv"]

SEGMENTATION_HEADS = ("pspnet", "deeplabv3", "upernet", "fcn")
_DENSE = "gradfilter[dense]"


def create_segmenter(head: str, encoder: str, *, num_classes: int, pretrained: bool = False) -> nn.Module:
    """Return a segmentation model on a timm encoder, from [B, 3, H, W] to logits [B, num_classes, H, W].

    PSPNet, DeepLabV3 and UPerNet are those of segmentation-models-pytorch; FCN is torchvision's head on the last map of
    the encoder. None has an auxiliary head. `pretrained` loads the encoder's weights. Raises ValueError for unknown
    heads, and ImportError without `gradfilter[dense]`.
    """
    check_known("head", head, SEGMENTATION_HEADS)
    if head == "fcn":
        return FCN(encoder, num_classes=num_classes, pretrained=pretrained)
    smp = require("segmentation_models_pytorch", _DENSE)
    kinds = {"pspnet": smp.PSPNet, "deeplabv3": smp.DeepLabV3, "upernet": smp.UPerNet}
    weights = "imagenet" if pretrained else None
    return cast(nn.Module, kinds[head](encoder_name=encoder, encoder_weights=weights, classes=num_classes))


class FCN(nn.Module):
    """Fully convolutional segmentation: two convolutions on the encoder's last map, enlarged to the image."""

    def __init__(self, encoder: str, *, num_classes: int, pretrained: bool = False) -> None:
        super().__init__()
        self.encoder: nn.Module = timm.create_model(encoder, features_only=True, pretrained=pretrained)
        channels = cast(Any, self.encoder).feature_info.channels()[-1]
        self.head = FCNHead(channels, num_classes)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes height width"]:
        """Return logits."""
        logits = self.head(self.encoder(images)[-1])
        return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


class TinyConv(nn.Module):
    """Network for digits: two 3x3 convolutions with norm and ReLU on maps of 28, 14 and 7 pixels each, mean, linear.

    The image is first averaged over `reduction` x `reduction` pixels: 2 makes maps of 14, 7 and 3 pixels, 3 of 9, 4, 2.
    """

    def __init__(self, num_classes: int = 10, widths: tuple[int, int, int] = (16, 32, 64), reduction: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for stage, width in enumerate(widths):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)
        self.num_classes, self.widths, self.reduction = num_classes, widths, reduction

    def forward(self, images: Float[Tensor, "batch 1 height width"]) -> Float[Tensor, "batch classes"]:
        """Return logits."""
        return cast(Tensor, self.head(self.features(F.avg_pool2d(images, self.reduction)).mean((2, 3))))


@register_model
def tinyconv(
    pretrained: bool = False,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
    **options: Any,
) -> TinyConv:
    """Return a `TinyConv`; no weights are published."""
    return TinyConv(**options)
