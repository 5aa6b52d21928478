"""BiFormer with a segmentation head: model, loss, inference, and training by a recipe (BiFormer, sec. 4.3).

Decoders are those of segmentation-models-pytorch. They differ from the paper's heads:

| | the paper's | here |
|---|---|---|
| UperNet | 512 channels, pool scales 1, 2, 3, 6, dropout 0.1 | the same layers |
| auxiliary head | 3x3 convolution of 256 channels on stage 3, weight 0.4 | the same layers |
| Semantic FPN | 3x3 convolution on each of the 4 pyramid maps of 256 channels | none |
| | BatchNorm in the head of 128 channels, corners not aligned in up-sampling | GroupNorm of 32 groups, aligned |
"""

from pathlib import Path
from typing import Any, cast, get_args

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from biformer.model import BiFormer, BiFormerBackbone
from biformer.official import MODEL_NAMES, load_official
from biformer.recipes import SegmentationHead, SegmentationRecipe
from visionkernels.checks import InputError, check_known
from visionkernels.extras import require
from visionkernels.pictures.recipes import SceneRecipe
from visionkernels.pictures.scenes import IGNORED
from visionkernels.tasks.segmentation import SegmentationSets, SegmentationTask, shares_norms
from visionkernels.training import FitResult
from visionkernels.weights import Checkpoint, load_strict, read_checkpoint

__all__ = ["SegmentationModel", "backbone_model", "open_segmenter", "segmentation_model", "train"]

_EXTRA = "biformer[dense]"
STRIDE = 32
"""Stride of the last stage; images are padded to multiples of it."""


def segmentation_model(
    name: str,
    head: SegmentationHead = "upernet",
    *,
    num_classes: int = 150,
    has_auxiliary: bool | None = None,
    decoder_channels: int | None = None,
    dropout: float = 0.1,
    scene: SceneRecipe | None = None,
    init: str | Path | None = None,
    n_win: int = 8,
    **options: Any,
) -> "SegmentationModel":
    """Return a BiFormer with a segmentation head.

    Args:
        name: one of the BiFormer models
        head: the decoder
        num_classes: classes of a pixel
        has_auxiliary: add a second head on stage 3; by default for UperNet
        decoder_channels: by default the paper's, 512 for UperNet (even) and 128 for FPN (a multiple of 32; its
            pyramid has twice as many)
        dropout: rate before the classifier
        scene: how images are prepared
        init: weights of the backbone, official or ours; its classifier and last norm are ignored
        n_win: regions per side
        options: `drop_path_rate`, `depth`, ... for `timm.create_model`

    Raises ValueError for unknown names, CheckpointError, and ImportError without `biformer[dense]`.
    """
    check_known("head", head, get_args(SegmentationHead))
    if num_classes < 1 or num_classes > IGNORED:
        raise InputError(f"num_classes={num_classes} must be 1 to {IGNORED}, the label of ignored pixels")
    channels = (512 if head == "upernet" else 128) if decoder_channels is None else decoder_channels
    multiple = 2 if head == "upernet" else 32
    if channels < 1 or channels % multiple:
        raise InputError(f"decoder_channels={channels} must be a multiple of {multiple} for {head}")
    backbone = BiFormerBackbone(backbone_model(name, init, n_win=n_win, **options))
    dims = [info["num_chs"] for info in backbone.feature_info]
    auxiliary = None
    if has_auxiliary or (has_auxiliary is None and head == "upernet"):
        auxiliary = nn.Sequential(
            Conv2dNormActivation(dims[2], channels // 2, 3), *_classifier(channels // 2, num_classes, dropout)
        )
    return SegmentationModel(
        backbone,
        _decoder(head, dims, channels, dropout),
        # the FPN decoder ends with its dropout
        _classifier(channels, num_classes, dropout if head == "upernet" else 0.0),
        auxiliary,
        scene=SceneRecipe() if scene is None else scene,
    )


def backbone_model(name: str, init: str | Path | None = None, **options: Any) -> BiFormer:
    """Return the model `name`, with the weights of a classifier in the file `init` if given.

    Raises InputError for other models, and CheckpointError.
    """
    check_known("model", name, MODEL_NAMES)
    if init is None:
        return cast(BiFormer, timm.create_model(name, num_classes=0, **options))
    checkpoint = read_checkpoint(init)
    if checkpoint.trained is None:
        return load_official(checkpoint, name, **options)
    options = {**checkpoint.trained.options, **options}
    model = cast(BiFormer, timm.create_model(name, **options))
    load_strict(model, checkpoint.state, source=init)
    return model


def _decoder(head: SegmentationHead, dims: list[int], channels: int, dropout: float) -> nn.Module:
    decoders = require("segmentation_models_pytorch.decoders", _EXTRA)
    # by its convention maps at strides 1 and 2 come first
    encoder_channels = [3, 0, *dims]
    if head == "fpn":
        fpn = decoders.fpn.decoder.FPNDecoder(
            encoder_channels, pyramid_channels=2 * channels, segmentation_channels=channels, dropout=dropout
        )
        return cast(nn.Module, fpn)
    upernet: Any = decoders.upernet.decoder.UPerNetDecoder(encoder_channels, decoder_channels=channels)
    # the backbone already has the same norms
    upernet.feature_norms = nn.ModuleList(nn.Identity() for _ in dims)
    return cast(nn.Module, upernet)


def _classifier(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    linear = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(cast(Tensor, linear.bias))
    return nn.Sequential(nn.Dropout2d(dropout), linear)


class SegmentationModel(nn.Module):
    """Segmentation model, from normalised images [B, 3, H, W] of any size to logits [B, classes, H, W].

    In training it returns a list of these and, if there is an auxiliary head, its logits. Images are zero-padded at the
    right and bottom to multiples of 32. `scene` is for `visionkernels.tasks.segmentation.predict`.
    """

    def __init__(
        self,
        backbone: BiFormerBackbone,
        decoder: nn.Module,
        classifier: nn.Sequential,
        auxiliary: nn.Sequential | None,
        *,
        scene: SceneRecipe,
    ) -> None:
        super().__init__()
        self.backbone, self.decoder, self.classifier, self.auxiliary = backbone, decoder, classifier, auxiliary
        self.scene = scene
        self.num_classes = cast(nn.Conv2d, classifier[-1]).out_channels

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Any:
        """Return logits at the size of the images."""
        if images.ndim != 4:
            raise InputError(f"images have shape {list(images.shape)}; expected [batch, channels, height, width]")
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE))
        maps = self.backbone(padded)
        outputs = [self.classifier(self.decoder([images, images[:, :0], *maps]))]
        if self.training and self.auxiliary is not None:
            outputs.append(self.auxiliary(maps[2]))
        enlarged = [F.interpolate(output, padded.shape[-2:], mode="bilinear") for output in outputs]
        logits = [output[..., :height, :width] for output in enlarged]
        return logits if self.training else logits[0]


def train(
    recipe: SegmentationRecipe, data: str | Path | None, out: str | Path, *, init: str | Path | None = None
) -> FitResult:
    """Train a segmentation model; rerun with the same arguments to resume the run in `out`.

    `data` is as for `visionkernels.pictures.scenes.open_scenes`, by default the recipe's own; `init` holds weights
    of the backbone. `out`/weights.safetensors opens with `visionkernels.weights.open_trained`. The metrics are those
    of `visionkernels.tasks.segmentation.evaluate`. Raises as `open_scenes`, `segmentation_model` and
    `visionkernels.training.fit`.
    """
    require("segmentation_models_pytorch", "biformer[train,dense]")
    needs = "UperNet" if recipe.head == "upernet" else None
    is_synced = shares_norms(recipe.fit, recipe.sync_norm, needs=needs)
    sets = SegmentationSets.open(recipe, data, num_classes=recipe.model.num_classes, install="biformer[train,dense]")
    torch.manual_seed(recipe.fit.seed)
    trained = sets.record(started_from=init)
    model: nn.Module = segmentation_model(recipe.model.name, **trained.options, scene=recipe.scene, init=init)
    if is_synced:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return sets.fit(SegmentationTask(model, auxiliary_weight=recipe.auxiliary_weight), out, trained)


def open_segmenter(checkpoint: Checkpoint) -> SegmentationModel:
    """Return the model of a weights file of `train`, in evaluation mode."""
    trained = checkpoint.trained
    assert trained is not None and trained.inputs is not None
    model = segmentation_model(cast(str, trained.model), **trained.options, scene=SceneRecipe.of_inputs(trained.inputs))
    load_strict(model, checkpoint.state, source=checkpoint.path)
    return model.eval()
