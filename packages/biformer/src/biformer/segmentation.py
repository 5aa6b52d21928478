"""BiFormer under a segmentation head: the model, its loss, inference, and training by a recipe (BiFormer, sec. 4.3).

Decoders are those of segmentation-models-pytorch. Against the paper's heads:

| | the paper's | here |
|---|---|---|
| UperNet | 512 channels, pool scales 1, 2, 3, 6, dropout 0.1 | the same layers |
| auxiliary head | 3x3 convolution of 256 channels on stage 3, weight 0.4 | the same layers |
| Semantic FPN | 3x3 convolution on each of the 4 pyramid maps of 256 channels | none |
| | BatchNorm in the head of 128 channels, corners not aligned in up-sampling | GroupNorm of 32 groups, aligned |
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast, get_args

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from biformer.checkpoint import MODEL_NAMES, load_model
from biformer.dense_recipes import SegmentationHead, SegmentationRecipe
from biformer.model import BiFormer, BiFormerBackbone
from visionkernels.checkpoints import load_strict, read_state, stored_options
from visionkernels.extras import require
from visionkernels.pictures.recipes import SceneRecipe
from visionkernels.pictures.scenes import IGNORED, Scenes, open_scenes
from visionkernels.recipes import data_of, settings
from visionkernels.segmentation import SegmentationTask, evaluate
from visionkernels.training import FitResult, TrainingData, fit

__all__ = ["SegmentationModel", "backbone_model", "load_segmentation_model", "segmentation_model", "train"]

_EXTRA = "biformer[dense]"
STRIDE = 32
"""Of the last stage; images are padded to multiples of it."""


def segmentation_model(
    name: str,
    head: SegmentationHead = "upernet",
    *,
    num_classes: int = 150,
    has_auxiliary: bool | None = None,
    decoder_channels: int | None = None,
    dropout: float = 0.1,
    scene: SceneRecipe | None = None,
    checkpoint: str | Path | None = None,
    n_win: int = 8,
    **options: Any,
) -> "SegmentationModel":
    """Return a BiFormer with a segmentation head.

    `has_auxiliary` adds the second head on stage 3, by default for UperNet. `decoder_channels` is by default the
    paper's, 512 of UperNet (even) and 128 of FPN (a multiple of 32, its own maps have twice as many).
    `checkpoint` gives the backbone's weights, official or ours; its classifier and last norm are left out. `n_win`
    and `options` (`drop_path_rate`, `depth`, ...) go to `timm.create_model`. `scene` says how pictures are prepared.
    Raises ValueError for unknown names, CheckpointError, and ImportError without `biformer[dense]`.
    """
    if head not in get_args(SegmentationHead):
        raise ValueError(f"unknown head {head!r}; known: {', '.join(get_args(SegmentationHead))}")
    if num_classes < 1 or num_classes > IGNORED:
        raise ValueError(f"num_classes={num_classes} must be 1 to {IGNORED}, the label of ignored pixels")
    channels = (512 if head == "upernet" else 128) if decoder_channels is None else decoder_channels
    multiple = 2 if head == "upernet" else 32
    if channels < 1 or channels % multiple:
        raise ValueError(f"decoder_channels={channels} must be a multiple of {multiple} for {head}")
    backbone = BiFormerBackbone(backbone_model(name, checkpoint, n_win=n_win, **options))
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
        scene=scene or SceneRecipe(),
    )


def backbone_model(name: str, checkpoint: str | Path | None = None, **options: Any) -> BiFormer:
    """Return the model `name`, with the weights of a classification `checkpoint` if given.

    Raises ValueError for a name that is no BiFormer, and CheckpointError.
    """
    if name not in MODEL_NAMES:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODEL_NAMES)}")
    if checkpoint is not None:
        return load_model(checkpoint, name, **options)
    return cast(BiFormer, timm.create_model(name, num_classes=0, **options))


def _decoder(head: SegmentationHead, dims: list[int], channels: int, dropout: float) -> nn.Module:
    decoders = require("segmentation_models_pytorch.decoders", _EXTRA)
    # by its convention the maps at strides 1 and 2 come first
    encoder_channels = [3, 0, *dims]
    if head == "fpn":
        fpn = decoders.fpn.decoder.FPNDecoder(
            encoder_channels, pyramid_channels=2 * channels, segmentation_channels=channels, dropout=dropout
        )
        return cast(nn.Module, fpn)
    upernet: Any = decoders.upernet.decoder.UPerNetDecoder(encoder_channels, decoder_channels=channels)
    # the backbone norms its maps already, in just this way
    upernet.feature_norms = nn.ModuleList(nn.Identity() for _ in dims)
    return cast(nn.Module, upernet)


def _classifier(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    linear = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(cast(Tensor, linear.bias))
    return nn.Sequential(nn.Dropout2d(dropout), linear)


class SegmentationModel(nn.Module):
    """Takes normalised images [B, 3, H, W] of any size, returns logits [B, classes, H, W].

    In training it returns a list: these, and where there is an auxiliary head its logits too. Sides are padded to
    multiples of 32 by zeros at the right and bottom. `scene` is what `visionkernels.segmentation.predict` goes by.
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
        """Return logits at the images' size."""
        if images.ndim != 4:
            raise ValueError(f"images have shape {list(images.shape)}; expected [batch, channels, height, width]")
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE))
        maps = self.backbone(padded)
        outputs = [self.classifier(self.decoder([images, images[:, :0], *maps]))]
        if self.training and self.auxiliary is not None:
            outputs.append(self.auxiliary(maps[2]))
        enlarged = [F.interpolate(output, padded.shape[-2:], mode="bilinear") for output in outputs]
        logits = [each[..., :height, :width] for each in enlarged]
        return logits if self.training else logits[0]


def train(
    recipe: SegmentationRecipe,
    data: str | Path | None,
    run_dir: str | Path,
    *,
    checkpoint: str | Path | None = None,
) -> FitResult:
    """Train a segmentation model; a run that `run_dir` holds goes on where it stopped.

    `data` is as for `visionkernels.pictures.scenes.open_scenes`, by default the recipe's own; `checkpoint` gives the
    backbone's weights. `run_dir/weights.safetensors` opens with `load_segmentation_model`. The metrics are those of
    `visionkernels.segmentation.evaluate`.
    Errors as for `open_scenes`, `segmentation_model` and `visionkernels.training.fit`.
    """
    for module in ("accelerate", "torchmetrics", "segmentation_models_pytorch"):
        require(module, "biformer[train,dense]")
    data = data_of(recipe, data)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    is_synced = recipe.sync_norm and processes > 1 and recipe.fit.device != "cpu" and torch.cuda.is_available()
    together = recipe.fit.batch_size // (recipe.fit.accumulation_steps * (1 if is_synced else processes))
    if recipe.head == "upernet" and together < 2:
        raise ValueError(f"batch_size={recipe.fit.batch_size} norms {together} pictures at a time; UperNet needs 2")
    opened = partial(open_scenes, data, scene=recipe.scene, num_classes=recipe.model.num_classes)
    scenes, val_scenes = opened("train"), opened("validation")
    torch.manual_seed(recipe.fit.seed)
    options: dict[str, Any] = {
        "name": recipe.model.name,
        "head": recipe.head,
        "has_auxiliary": recipe.auxiliary_weight > 0,
        "decoder_channels": recipe.decoder_channels,
        "dropout": recipe.dropout,
        **recipe.model.options(),
    }
    model: nn.Module = segmentation_model(**options, scene=recipe.scene, checkpoint=checkpoint)
    if is_synced:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return fit(
        SegmentationTask(model, auxiliary_weight=recipe.auxiliary_weight),
        recipe.fit,
        TrainingData(train=scenes, evaluate=partial(_metrics, scenes=val_scenes, recipe=recipe)),
        run_dir,
        details={
            "task": "segmentation",
            "segmentation_model": json.dumps(options),
            "scene": json.dumps(asdict(recipe.scene)),
            "biformer": version("biformer"),
            "settings": settings(recipe),
            **({} if checkpoint is None else {"started_from": str(checkpoint)}),
        },
    )


def load_segmentation_model(path: str | Path) -> SegmentationModel:
    """Return the model of a weights file of `train`, in evaluation mode. Raises CheckpointError for any other file."""
    checkpoint = read_state(path)
    options = stored_options(checkpoint, path, "segmentation_model", package="biformer")
    model = segmentation_model(
        **options, scene=SceneRecipe(**stored_options(checkpoint, path, "scene", package="biformer"))
    )
    load_strict(model, checkpoint.state, source=path)
    return model.eval()


def _metrics(model: nn.Module, scenes: Scenes, recipe: SegmentationRecipe) -> Mapping[str, float]:
    return evaluate(model, scenes, recipe.scene, num_classes=recipe.model.num_classes, workers=recipe.fit.num_workers)
