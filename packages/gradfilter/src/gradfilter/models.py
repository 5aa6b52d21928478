"""Networks by name: timm's, torchvision's, segmentation models on timm encoders, and anything that imports."""

import importlib
from collections.abc import Callable
from typing import Any, cast
from urllib.error import URLError

import timm
import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.fcn import FCNHead

from visionkernels.extras import require
from visionkernels.recipes import check_known

__all__ = ["FCN", "SEGMENTATION_HEADS", "TinyConv", "create_classifier", "create_segmenter"]

SEGMENTATION_HEADS = ("pspnet", "deeplabv3", "upernet", "fcn")
_DENSE = "gradfilter[dense]"


def create_classifier(name: str, *, num_classes: int | None = None, pretrained: bool = False) -> nn.Module:
    """Return the network `name`: of timm, "torchvision:NAME", "tinyconv", or "module:callable", which is called.

    `num_classes` None leaves the network's own; a callable gets it as a keyword. `pretrained` takes the published
    weights of timm or torchvision. Raises ValueError for unknown names, with the nearest.
    """
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    family, _, rest = name.rpartition(":")
    if name == "tinyconv":
        return TinyConv(**options)
    if family == "torchvision":
        known = torchvision.models.list_models(module=torchvision.models)
        check_known("torchvision model", rest, known)
        try:
            model = torchvision.models.get_model(rest, weights="DEFAULT" if pretrained else None)
        except URLError as error:
            raise ValueError(f"the published weights of {name} cannot be fetched: {error.reason}") from error
        if num_classes is not None:
            _replace_classifier(model, num_classes)
        return model
    if family:
        if pretrained:
            raise ValueError(f"pretrained=True is for timm and torchvision; {name} brings its own weights")
        return _call(family, rest, options)
    check_known("model", name.partition(".")[0], timm.list_models())  # "resnet18.a1_in1k": which weights, timm knows
    return timm.create_model(name, pretrained=pretrained, **options)


def create_segmenter(head: str, encoder: str, *, num_classes: int, pretrained: bool = False) -> nn.Module:
    """Return a segmentation model, [B, 3, H, W] to logits [B, num_classes, H, W], on an encoder of timm.

    PSPNet, DeepLabV3 and UPerNet are those of segmentation-models-pytorch; FCN is torchvision's head on the last map of
    the encoder. None has an auxiliary head. `pretrained` is the encoder's. Raises ValueError for unknown heads, and
    ImportError without `gradfilter[dense]`.
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
    """Six convolutions for digits: two of 3x3 with norm and ReLU on maps of 28, 14 and 7 pixels, mean, linear.

    The image is averaged over `reduction` x `reduction` pixels first: 2 makes maps of 14, 7 and 3 pixels, 3 of 9, 4, 2.
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


def _replace_classifier(model: nn.Module, num_classes: int) -> None:
    """Give a torchvision model as many outputs: in its last linear layer, or SqueezeNet in its last 1x1 convolution."""
    kinds = (nn.Linear, nn.Conv2d)
    layers = {kind: [(name, each) for name, each in model.named_modules() if isinstance(each, kind)] for kind in kinds}
    name, last = (layers[nn.Linear] or layers[nn.Conv2d])[-1]
    if isinstance(last, nn.Linear):
        if last.out_features != num_classes:
            model.set_submodule(name, nn.Linear(last.in_features, num_classes))
    elif last.out_channels != num_classes:
        model.set_submodule(name, nn.Conv2d(last.in_channels, num_classes, 1))


def _call(module: str, name: str, options: dict[str, Any]) -> nn.Module:
    try:
        create: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model {module}:{name} cannot be imported: {error}") from error
    model = create(**options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {module}:{name} gave a {type(model).__name__}; expected a torch.nn.Module")
    return model
