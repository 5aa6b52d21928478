"""Transfer between digits: a network learns upright ones, then rotated ones in its last layers."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from gradfilter.diagnosis import diagnose
from gradfilter.models import TinyConv
from gradfilter.recipes import TransferRecipe
from gradfilter.training import prepare, store_plain
from visionkernels.checks import check
from visionkernels.extras import require
from visionkernels.profiling import saved_activation_bytes
from visionkernels.samples import mnist5k
from visionkernels.tasks.classification import ClassificationTask
from visionkernels.training import FitRecipe, FitResult, TrainingData, fit
from visionkernels.weights import Checkpoint, load_strict, read_checkpoint

__all__ = [
    "compare_gradients",
    "digits",
    "evaluate",
    "open_digits",
    "train",
    "transfer",
]

Digits = Literal["upright", "turned", "test"]


def digits(part: Digits) -> TensorDataset:
    """Return normalised images [N, 1, 28, 28] and labels: 2,500 upright digits, 1,500 turned ones, 1,000 to test on.

    "turned" and "test" are inverted in brightness and rotated by 90 degrees; no digit is in two parts.
    """
    images, labels = mnist5k()
    place = torch.arange(len(labels)) % 500
    first, last = {"upright": (0, 250), "turned": (250, 400), "test": (400, 500)}[part]
    chosen = (place >= first) & (place < last)
    pixels = torch.from_numpy(images)[chosen].float()[:, None] / 255
    if part != "upright":
        pixels = 1 - pixels.rot90(1, (2, 3))
    return TensorDataset((pixels - 0.1307) / 0.3081, torch.from_numpy(labels)[chosen])


def train(recipe: TransferRecipe, data: str | Path | None, out: str | Path) -> FitResult:
    """Pre-train on upright digits in `out`/pretraining, then fine-tune on turned ones in `out`.

    Rerun with the same arguments to resume. weights.safetensors holds plain weights of a `TinyConv`, for compact
    training too. Metrics are those of `evaluate` on the turned test digits. Raises InputError for `data` other than the
    recipe's own.
    """
    require("accelerate", "gradfilter[train]")
    check(data in (None, recipe.data), "data", data, f"left out: {recipe.name} has its own digits")
    torch.manual_seed(recipe.fit.seed)
    model = TinyConv(widths=recipe.widths, reduction=recipe.reduction)
    trained = recipe.record()
    before = fit(
        ClassificationTask(model), recipe.pretraining, TrainingData(train=digits("upright")),
        Path(out) / "pretraining", trained=replace(trained, settings=None),  # one pre-training serves all recipes
    )  # fmt: skip
    load_strict(model, read_checkpoint(before.weights).state, source=before.weights)
    test = digits("test")
    prepare(model, recipe.filter, test[:1][0])
    training_data = TrainingData(train=digits("turned"), evaluate=partial(evaluate, data=test))
    result = fit(ClassificationTask(model), recipe.fit, training_data, out, trained=trained)
    store_plain(result, model)
    return result


@torch.no_grad()
def evaluate(model: nn.Module, data: TensorDataset) -> Mapping[str, float]:
    """Measure a model in evaluation mode: `top1` in percent, `val_loss`, and `majority_top1` of a constant answer."""
    device = next(model.parameters()).device
    images, labels = (tensor.to(device) for tensor in data.tensors)
    was_training = model.training
    logits = torch.cat([model.eval()(part) for part in images.split(250)]).float()
    model.train(was_training)
    return {
        "top1": 100 * float((logits.argmax(1) == labels).float().mean()),
        "val_loss": float(F.cross_entropy(logits, labels)),
        "majority_top1": 100 * float(labels.bincount().max() / len(labels)),
    }


def open_digits(checkpoint: Checkpoint) -> TinyConv:
    """Return the network of a weights file of `train`, in evaluation mode."""
    assert checkpoint.trained is not None
    model = TinyConv(**checkpoint.trained.options)
    load_strict(model, checkpoint.state, source=checkpoint.path)
    return model.eval()


def transfer(recipe: TransferRecipe, seed: int) -> dict[str, float]:
    """Run one seed without a run folder and return accuracy, milliseconds per step, and KiB kept for backward.

    It uses the data, lengths and schedule of `train` in one plain loop, for tables of many seeds.
    """
    model = _pretrained(recipe, seed)
    before = evaluate(model, digits("test"))["top1"]
    turned = digits("turned")
    prepare(model, recipe.filter, turned[:1][0])
    seconds = _learn(model, turned, recipe.fit, seed)
    model.train()
    kept = saved_activation_bytes(lambda: model(turned[:64][0]))
    after = evaluate(model, digits("test"))["top1"]
    return {"top1": after, "before": before, "step_ms": 1e3 * seconds, "kept_kib": kept / 1024}


def compare_gradients(recipe: TransferRecipe, seed: int) -> dict[str, float]:
    """Compare filtered with exact gradients before the network of `seed` is fine-tuned, on 60 turned digits.

    Returns `weight_cosine`, `weight_norm_ratio`, `input_cosine` and `input_norm_ratio` of `diagnose`, averaged over the
    filtered layers.
    """
    model = _pretrained(recipe, seed)
    images, labels = digits("turned")[::25]
    prepare(model, recipe.filter, images[:1])
    layers = diagnose(model, (images, labels)).layers
    names = ("weight_cosine", "weight_norm_ratio", "input_cosine", "input_norm_ratio")
    return {name: statistics.mean(getattr(layer, name) for layer in layers) for name in names}


def _pretrained(recipe: TransferRecipe, seed: int) -> TinyConv:
    model = TinyConv(widths=recipe.widths, reduction=recipe.reduction)
    model.load_state_dict(_upright(recipe.pretraining, recipe.widths, recipe.reduction, seed))
    return model


@cache
def _upright(settings: FitRecipe, widths: tuple[int, int, int], reduction: int, seed: int) -> Mapping[str, Tensor]:
    torch.manual_seed(seed)
    model = TinyConv(widths=widths, reduction=reduction)
    _learn(model, digits("upright"), settings, seed)
    return model.state_dict()


def _learn(model: nn.Module, data: TensorDataset, settings: FitRecipe, seed: int) -> float:
    """Train by SGD with momentum on a one-cycle schedule, and return the median seconds of a step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=settings.optimizer.lr, momentum=settings.optimizer.momentum)
    epochs, in_epoch = settings.epochs, len(data) // settings.batch_size
    updates = cast(int, settings.updates) if epochs is None else epochs * in_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.optimizer.lr, total_steps=updates, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    images, labels = data.tensors
    seconds = []
    model.train()
    for update in range(updates):
        place = update % in_epoch
        if place == 0:
            order = torch.randperm(len(data), generator=generator)
        batch = order[place * settings.batch_size : (place + 1) * settings.batch_size]
        start = time.perf_counter()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]
