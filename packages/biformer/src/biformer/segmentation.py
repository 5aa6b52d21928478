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
from jaxtyping import Float, Int
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision.ops import Conv2dNormActivation
from tqdm import tqdm

from biformer.checkpoint import MODEL_NAMES, load_model
from biformer.dense_data import IGNORED, Scenes, aligned_size, open_scenes
from biformer.dense_recipes import SceneRecipe, SegmentationHead, SegmentationRecipe
from biformer.model import BiFormer, BiFormerBackbone
from biformer.recipes import settings
from visionkernels.checkpoints import Checkpoint, CheckpointError, load_strict, read_state
from visionkernels.extras import require
from visionkernels.training import FitResult, TrainingData, fit

__all__ = [
    "SegmentationModel",
    "SegmentationTask",
    "backbone_model",
    "evaluate",
    "load_segmentation_model",
    "predict",
    "segmentation_model",
    "train",
]

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
    and `options` (`drop_path_rate`, `depth`, ...) go to `timm.create_model`. `scene` is what `predict` goes by.
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
    multiples of 32 by zeros at the right and bottom. `scene` says how `predict` prepares a picture.
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
        logits = [_resize(output, (padded.shape[-2], padded.shape[-1]))[..., :height, :width] for output in outputs]
        return logits if self.training else logits[0]


class SegmentationTask(TrainingTask):
    """Cross-entropy of every pixel, in float32, of the main and the auxiliary logits.

    The sum over labelled pixels is divided by the number of all pixels, as in the paper's framework, so that a batch
    without labels has loss 0.
    """

    def __init__(self, model: nn.Module, *, auxiliary_weight: float = 0.4) -> None:
        super().__init__(verbose=False)
        self.trainable_module, self.auxiliary_weight = model, auxiliary_weight

    def forward(
        self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, "batch height width"]
    ) -> dict[str, Tensor]:
        """Take images and class indices, 255 for pixels that do not count; return the losses and the main logits."""
        logits: list[Tensor] = self.trainable_module(images)
        losses = [
            F.cross_entropy(each.float(), labels, ignore_index=IGNORED, reduction="sum") / labels.numel()
            for each in logits
        ]
        loss = losses[0] + self.auxiliary_weight * sum(losses[1:])
        return {"loss": loss, "main_loss": losses[0], "output": logits[0]}


@torch.inference_mode()
def predict(
    model: SegmentationModel, image: Float[Tensor, "channels height width"]
) -> Float[Tensor, "classes height width"]:
    """Return class probabilities for every pixel of a normalised image, by the settings of `model.scene`.

    The image is resized to `aligned_size`, computed whole or in windows, and the logits are resized back; the mean is
    over `test_scales` and, with `test_flip`, over the mirrored image as well. Raises ValueError for a batch, and for a
    model in training mode.
    """
    if image.ndim != 3:
        raise ValueError(f"image has shape {list(image.shape)}; expected [channels, height, width]")
    if model.training:
        raise ValueError("the model is in training mode, where it returns a list; call model.eval() first")
    scene, (height, width) = model.scene, image.shape[-2:]
    infer = partial(_slide, crop=scene.crop, stride=scene.stride) if scene.inference == "slide" else _whole
    total, count = image.new_zeros(model.num_classes, height, width), 0
    for scale in scene.test_scales:
        resized = F.interpolate(image[None], aligned_size(height, width, scene, scale), mode="bilinear", antialias=True)
        for is_flipped in (False, True) if scene.test_flip else (False,):
            logits = infer(model, resized.flip(-1)).flip(-1) if is_flipped else infer(model, resized)
            total += _resize(logits.float(), (height, width))[0].softmax(0)
            count += 1
    return total / count


def evaluate(
    model: SegmentationModel, scenes: Scenes, *, workers: int = 0, show_progress: bool = True
) -> dict[str, float]:
    """Measure a model on its device, in percent; several processes share the pictures.

    `miou` is the mean over the classes that occur, in labels or predictions of the whole set, of intersection over
    union; `pixel_accuracy` the share of labelled pixels that are right; `majority_miou` the `miou` of always naming
    the most frequent class. Raises ValueError for pictures without a labelled pixel, and ImportError without
    `biformer[dense]`.
    """
    metrics = require("torchmetrics", _EXTRA)
    device = next(model.parameters()).device
    confusion = metrics.ConfusionMatrix(
        task="multiclass", num_classes=max(model.num_classes, 2), ignore_index=IGNORED
    ).to(device)
    model.eval()
    for image, labels in tqdm(
        own_share(scenes, workers), desc="evaluating", disable=None if show_progress else True, leave=False
    ):
        confusion.update(predict(model, image.to(device)).argmax(0), labels.to(device))
    counts = confusion.compute().double()
    if not counts.any():
        raise ValueError(f"none of the {len(scenes)} pictures has a labelled pixel, so there is nothing to measure")
    truth, named, right = counts.sum(1), counts.sum(0), counts.diagonal()
    union = truth + named - right
    return {
        "miou": 100 * float((right / union)[union > 0].mean()),
        "pixel_accuracy": 100 * float(right.sum() / counts.sum()),
        "majority_miou": 100 * float(truth.max() / truth.sum() / (truth > 0).sum()),
    }


def own_share(pictures: Any, workers: int) -> DataLoader:
    """Return a loader of single samples, of those that fall to this process."""
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, processes = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if shared else (0, 1)
    own = Subset(pictures, range(rank, len(pictures), processes))
    return DataLoader(own, batch_size=None, num_workers=workers)


def train(
    recipe: SegmentationRecipe,
    data: str | Path | None,
    run_dir: str | Path,
    *,
    checkpoint: str | Path | None = None,
) -> FitResult:
    """Train a segmentation model; a run that `run_dir` holds goes on where it stopped.

    `data` is as for `biformer.dense_data.open_scenes`, by default the recipe's own; `checkpoint` gives the backbone's
    weights. `run_dir/weights.safetensors` opens with `load_segmentation_model`. The metrics are those of `evaluate`.
    Errors as for `open_scenes`, `segmentation_model` and `visionkernels.training.fit`.
    """
    for module in ("accelerate", "torchmetrics", "segmentation_models_pytorch"):
        require(module, "biformer[train,dense]")
    data = data or recipe.data
    if data is None:
        raise ValueError(f"recipe {recipe.name} has no data of its own; give --data FOLDER")
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
        TrainingData(train=scenes, evaluate=partial(_metrics, scenes=val_scenes, workers=recipe.fit.num_workers)),
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
    options = stored_options(checkpoint, path, "segmentation_model")
    model = segmentation_model(**options, scene=SceneRecipe(**stored_options(checkpoint, path, "scene")))
    load_strict(model, checkpoint.state, source=path)
    return model.eval()


def stored_options(checkpoint: Checkpoint, path: str | Path, key: str) -> dict[str, Any]:
    """Return the keyword arguments that a weights file of ours holds under `key`, JSON's lists as tuples."""
    if key not in checkpoint.metadata:
        what = key.replace("_", " ")
        raise CheckpointError(f"{path} holds no {what} of `biformer train`; give weights.safetensors of such a run")
    stored = json.loads(checkpoint.metadata[key])
    return {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}


def _metrics(model: SegmentationModel, scenes: Scenes, workers: int) -> Mapping[str, float]:
    return evaluate(model, scenes, workers=workers)


def _whole(model: nn.Module, images: Tensor) -> Tensor:
    return cast(Tensor, model(images))


def _slide(model: SegmentationModel, images: Tensor, *, crop: int, stride: int) -> Tensor:
    """The mean logits of windows of `crop` pixels a side every `stride` pixels, the last ones moved back inside."""
    height, width = images.shape[-2:]
    total = images.new_zeros(len(images), model.num_classes, height, width)
    count = images.new_zeros(height, width)
    for top in _starts(height, crop, stride):
        for left in _starts(width, crop, stride):
            window = (..., slice(top, top + crop), slice(left, left + crop))
            total[window] += model(images[window])
            count[window] += 1
    return total / count


def _starts(side: int, crop: int, stride: int) -> list[int]:
    steps = max(-(-(side - crop) // stride), 0) + 1
    return [max(min(step * stride, side - crop), 0) for step in range(steps)]


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)
