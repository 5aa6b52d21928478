"""Probes of an encoder's features without fine-tuning: nearest neighbours, and a linear classifier."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import g2sd.vit  # noqa: F401 - registers the models
from g2sd.layouts import contents_of, encoder_heads
from g2sd.official import load_encoder, options_of, refuse_other_layouts, square_size
from g2sd.recipes import RECIPES, ProbeRecipe
from visionkernels.checks import check
from visionkernels.pictures.labelled import LabelledPictures, open_pictures
from visionkernels.pictures.recipes import PictureRecipe
from visionkernels.pictures.transforms import evaluation_transform
from visionkernels.recipes import settings
from visionkernels.tasks.classification import ClassificationSets, describe_inputs
from visionkernels.training import FitResult
from visionkernels.training.task import Task
from visionkernels.weights import Checkpoint, Trained, load_strict, read_checkpoint

__all__ = [
    "Encoder",
    "LinearProbeTask",
    "NeighbourResult",
    "encoder_of",
    "linear_probe",
    "nearest_neighbours",
    "open_probe",
    "recipe_for",
    "vote",
]


class Encoder(nn.Module):
    """The features of a vision transformer: the normed class token, or the mean of the patches' tokens."""

    def __init__(self, model: nn.Module, *, pool: str = "class") -> None:
        super().__init__()
        check(pool in ("class", "mean"), "pool", pool, "'class' or 'mean'")
        self.model: Any = model
        self.pool, self.width = pool, int(model.embed_dim)  # type: ignore[arg-type]

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """Return features of normalised images."""
        tokens: Tensor = self.model.forward_features(images)
        return tokens[:, 0] if self.pool == "class" else tokens[:, 1:].mean(1)


def encoder_of(
    source: str | Path | Checkpoint,
    *,
    img_size: int,
    num_heads: int | None = None,
    pool: str = "class",
    entry: str | None = None,
) -> Encoder:
    """Return the frozen encoder of any file of the family, for square images of `img_size` pixels.

    Raises CheckpointError for files that hold none, and ValueError for a `pool` other than "class" and "mean".
    """
    checkpoint = read_checkpoint(source, entry=entry)
    contents = contents_of(checkpoint.state, checkpoint.path)
    refuse_other_layouts(contents, checkpoint.path)
    heads = options_of(checkpoint).get("num_heads") if num_heads is None else num_heads
    model: Any = timm.create_model(
        "g2sd_vit_tiny_patch16_224", distilled=False, global_pool="token", num_classes=0, img_size=img_size,
        patch_size=contents.patch_size, in_chans=contents.in_chans, embed_dim=contents.width, depth=contents.depth,
        num_heads=encoder_heads(contents.width, heads),
    )  # fmt: skip
    load_encoder(model, checkpoint)
    return Encoder(model.eval().requires_grad_(False), pool=pool)


def recipe_for(source: str | Path | Checkpoint) -> ProbeRecipe:
    """Return the settings of ImageNet's linear probe for the encoder of a file.

    Images and data are those that a file of `g2sd train` names; other files take ImageNet's images at the size of their
    positions. Raises CheckpointError for other files, and InputError for positions that are no square.
    """
    checkpoint = read_checkpoint(source)
    contents = contents_of(checkpoint.state, checkpoint.path)
    recipe = cast(ProbeRecipe, RECIPES["linear_small_in1k"])
    trained = checkpoint.trained
    if trained is not None and trained.inputs is not None:
        # digits and other signs are not mirrored, nor cropped, unless training did
        random_crop = (trained.settings or {})["augmentation"]["random_crop"]
        augmentation = replace(recipe.augmentation, random_crop=random_crop)
        pictures = PictureRecipe.of_inputs(trained.inputs)
        return replace(recipe, pictures=pictures, data=trained.data, augmentation=augmentation)
    size, _ = square_size(contents, checkpoint.path)
    return replace(recipe, pictures=PictureRecipe(size=size, resize=round(size * 256 / 224)))


@dataclass(frozen=True)
class NeighbourResult:
    """Accuracy of votes of nearest neighbours, in percent."""

    top1: float
    majority_top1: float
    """Accuracy of always naming the most frequent class."""
    count: int
    """Number of images."""


def nearest_neighbours(
    encoder: Encoder,
    data: str | Path,
    pictures: PictureRecipe,
    *,
    num_neighbours: int = 20,
    temperature: float = 0.07,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | None = None,
) -> NeighbourResult:
    """Classify validation images by their nearest training images; see `vote`.

    `data` is as for `visionkernels.pictures.labelled.open_pictures`. Raises ValueError as `vote` does.
    """
    transform = evaluation_transform(pictures)
    train_set = open_pictures(data, "train", transform)
    val_set = open_pictures(data, "validation", transform, class_names=train_set.class_names)
    encoder = encoder.to(device)
    load = partial(_features, encoder, batch_size=batch_size, workers=workers)
    (known, labels), (features, truth) = load(train_set), load(val_set)
    named = vote(
        features, known, labels, num_classes=len(train_set.class_names), num_neighbours=num_neighbours,
        temperature=temperature,
    )  # fmt: skip
    majority = float(torch.bincount(truth).max()) / len(truth)
    return NeighbourResult(100 * float((named == truth).float().mean()), 100 * majority, len(truth))


def vote(
    features: Float[Tensor, "queries width"],
    known: Float[Tensor, "samples width"],
    labels: Int[Tensor, " samples"],
    *,
    num_classes: int,
    num_neighbours: int = 20,
    temperature: float = 0.07,
    queries_at_once: int = 256,
) -> Int[Tensor, " queries"]:
    """Name a class for each query: the votes of its nearest samples, by cosine, weigh exp(cosine / temperature).

    As in DINO's evaluation (Wu et al., 2018). Raises ValueError for more neighbours than samples and for a temperature
    that is not above 0.
    """
    check(1 <= num_neighbours <= len(known), "num_neighbours", num_neighbours, f"1 to the {len(known)} samples")
    check(temperature > 0, "temperature", temperature, "above 0")
    known = F.normalize(known.float(), dim=1)
    named = []
    for part in F.normalize(features.float(), dim=1).split(queries_at_once):
        cosines, places = (part @ known.mT).topk(num_neighbours, 1)
        # relative to the nearest, so that no exponential overflows
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        votes = torch.zeros(len(part), num_classes, device=part.device).scatter_add_(1, labels[places], weights)
        named.append(votes.argmax(1))
    return torch.cat(named)


@torch.inference_mode()
def _features(encoder: Encoder, pictures: LabelledPictures, *, batch_size: int, workers: int) -> tuple[Tensor, Tensor]:
    device = next(encoder.parameters()).device
    loader = DataLoader(pictures, batch_size=batch_size, num_workers=workers)
    batches = [(encoder(images.to(device)), labels.to(device)) for images, labels in loader]
    return torch.cat([features for features, _ in batches]), torch.cat([labels for _, labels in batches])


class LinearProbeTask(Task):
    """Cross-entropy of a linear classifier on frozen features, which a norm without parameters standardises."""

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__(_probe(encoder.width, num_classes))
        self.encoder = encoder

    def forward(
        self, images: Float[Tensor, "batch channels height width"], target: Int[Tensor, " batch"]
    ) -> dict[str, Tensor]:
        """Return the loss and the logits."""
        with torch.no_grad():
            features = self.encoder(images)
        logits = self.trainable_module(features)
        return {"loss": F.cross_entropy(logits.float(), target), "output": logits}

    def final_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return encoder and classifier together, under the official names."""
        encoder = {key: value for key, value in self.encoder.model.state_dict().items() if not key.startswith("head")}
        return encoder | {f"head.{key}": value for key, value in state.items()}


def _probe(width: int, num_classes: int) -> nn.Module:
    linear = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), linear)


def linear_probe(
    recipe: ProbeRecipe, data: str | Path | None, out: str | Path, *, init: str | Path | Checkpoint
) -> FitResult:
    """Train a linear classifier on the frozen encoder of `init`; rerun with the same arguments to resume.

    The metrics are those of `visionkernels.tasks.classification`. Errors as for `encoder_of`, `open_pictures` and
    `visionkernels.training.fit`.
    """
    sets = ClassificationSets.open(recipe, data, install="g2sd-vision[train]")
    torch.manual_seed(recipe.fit.seed)
    checkpoint = read_checkpoint(init)
    encoder = encoder_of(checkpoint, img_size=recipe.pictures.size, pool=recipe.pool)
    task = LinearProbeTask(encoder, sets.num_classes)
    evaluate = partial(_accuracy, encoder=encoder, sets=sets, workers=recipe.fit.num_workers)
    options = {
        "img_size": recipe.pictures.size, "num_heads": encoder.model.blocks[0].attn.num_heads, "pool": recipe.pool,
        "num_classes": sets.num_classes,
    }  # fmt: skip
    trained = Trained(
        kind="probe", package="g2sd", options=options, inputs=recipe.pictures.inputs(), class_names=sets.class_names,
        data=sets.source, settings=settings(recipe), details={"started_from": str(checkpoint.path)},
    )  # fmt: skip
    return sets.fit(task, out, trained, evaluate=evaluate)


def open_probe(checkpoint: Checkpoint) -> nn.Module:
    """Return encoder and classifier of a file of `linear_probe`, in evaluation mode."""
    trained = checkpoint.trained
    assert trained is not None and trained.inputs is not None
    size = PictureRecipe.of_inputs(trained.inputs).size
    encoder = encoder_of(checkpoint, img_size=size, pool=trained.options.get("pool", "class"))
    classifier = _probe(encoder.width, len(checkpoint.state["head.1.weight"]))
    head = {key.removeprefix("head."): value for key, value in checkpoint.state.items() if key.startswith("head.")}
    load_strict(classifier, head, source=checkpoint.path)
    model = nn.Sequential(encoder, classifier)
    describe_inputs(model, trained)
    return model.eval()


def _accuracy(model: nn.Module, *, encoder: Encoder, sets: ClassificationSets, workers: int) -> Mapping[str, float]:
    return sets.measure(nn.Sequential(encoder, model), workers=workers)
