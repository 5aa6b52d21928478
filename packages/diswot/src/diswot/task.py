"""One step of distillation: the labels' loss, the teacher's logits, and a loss between features.

The task needs no run of this package: like every `timm.task.TrainingTask` it goes into any loop.

    task = DistillationTask(student, teacher, distiller="sp")
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.05, momentum=0.9)
    task(images, labels)["loss"].backward()
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from diswot.features import FeaturePlan, plan_features, read_features
from diswot.initialisation import preserved
from diswot.losses import Distiller, Features, create
from diswot.losses.contrastive import ContrastMemory
from diswot.losses.registry import DISTILLERS
from visionkernels.checks import InputError, check, check_known
from visionkernels.tasks.teachers import Teacher
from visionkernels.training.task import Task

__all__ = ["DEFAULT_BETA", "KD_ALONE", "DistillationTask", "DistilledStudent", "FeatureTeacher"]

DEFAULT_BETA = 1.0
"""Weight of a loss for which none was published."""
KD_ALONE = ("none", "kd")
"""Names in place of a distiller that add nothing to KD."""


class DistillationTask(Task):
    """ce_weight * cross-entropy + kd_weight * KD + beta * the distiller's loss; without a teacher, cross-entropy alone.

    `distiller` is a name of `diswot.losses`, or one of KD_ALONE; `options` are those of its class. Its own
    parameters, made for images of `image_size`, are in `trainable_module` with the student, which alone runs in
    evaluation mode; without such parameters `trainable_module` is the student itself. `beta` is by default
    the published one, else DEFAULT_BETA. `student_layers` and `teacher_layers` name the maps (see
    `diswot.features.plan_features`). The teacher stays frozen and in evaluation mode; where `mean` and `std` say how
    images are normalised, it gets them normalised by its own `pretrained_cfg`. Losses are float32 in any precision.
    With several processes, losses between samples see those of their process.

    Raises ValueError for networks of different numbers of classes or input channels, a distiller without a teacher or
    whose features do not pair, a negative weight, and for "crd" without `num_samples`, the size of the training set.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        distiller: str = "none",
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        beta: float | None = None,
        temperature: float = 4.0,
        num_samples: int | None = None,
        image_size: tuple[int, int] = (32, 32),
        student_layers: Sequence[str] = (),
        teacher_layers: Sequence[str] = (),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(student)
        check_known("distiller", distiller, ("none", *DISTILLERS))
        check(teacher is not None or distiller == "none", "distiller", distiller, "'none' without a teacher")
        for name, weight in {"ce_weight": ce_weight, "kd_weight": kd_weight, "beta": beta}.items():
            check(weight is None or weight >= 0, name, weight, "at least 0")
        self.kd = create("kd", temperature=temperature)
        self.ce_weight, self.kd_weight = ce_weight, kd_weight
        self.beta: float | None = None  # of a loss between features, where there is one
        if teacher is None:
            return
        source = "logits" if distiller in KD_ALONE else DISTILLERS[distiller].source
        plans = plan_features(student, source, student_layers), plan_features(teacher, source, teacher_layers)
        examples = _examples(student, teacher, plans, image_size)
        self.teacher = FeatureTeacher(teacher, plans[1], mean=mean, std=std)
        if distiller in KD_ALONE:
            check(not options, "options", options, f"none for distiller={distiller!r}")
            return
        loss = _create(distiller, plans, examples, num_samples=num_samples, **options)
        self.beta = next(weight for weight in (beta, loss.beta, DEFAULT_BETA) if weight is not None)
        self.trainable_module = DistilledStudent(student, plans[0], loss)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        target: Tensor,
        index: Int[Tensor, " batch"] | None = None,
    ) -> dict[str, Tensor]:
        """Take images, classes (indices or probabilities) and, for "crd", the samples' places in the training set.

        Returns "loss", its unweighted parts "ce_loss", "kd_loss" and "feature_loss", and the logits as "output".
        """
        if self.teacher is None:
            logits = self.trainable_module(images)
            return {"loss": F.cross_entropy(logits.float(), target), "output": logits}
        their_logits, their_features = self.teacher(images)
        if self.beta is None:
            logits, parts = self.trainable_module(images), {}
        else:
            logits, feature_loss = self.trainable_module(images, their_features, index)
            parts = {"feature_loss": feature_loss}
        parts |= {"ce_loss": F.cross_entropy(logits.float(), target), "kd_loss": self.kd(logits, their_logits)}
        loss = self.ce_weight * parts["ce_loss"] + self.kd_weight * parts["kd_loss"]
        if self.beta is not None:
            loss = loss + self.beta * parts["feature_loss"]
        return {"loss": loss, **parts, "output": logits}

    def final_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the student's weights under its own names, without what else was trained."""
        if self.beta is None:
            return dict(state)
        student = "student."
        return {key.removeprefix(student): value for key, value in state.items() if key.startswith(student)}


class DistilledStudent(nn.Module):
    """A student and a loss on its features, with what that trains; without a teacher's features just the student."""

    def __init__(self, student: nn.Module, plan: FeaturePlan, distiller: Distiller) -> None:
        super().__init__()
        self.student, self.plan, self.distiller = student, plan, distiller
        # DDP would copy a contrastive memory from the main process before each step; `_share` keeps them equal instead
        self._ddp_params_and_buffers_to_ignore = [
            f"{name}.{buffer}"
            for name, module in self.named_modules()
            if isinstance(module, ContrastMemory)
            for buffer, _ in module.named_buffers()
        ]

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        teacher_features: Features | None = None,
        index: Int[Tensor, " batch"] | None = None,
    ) -> Any:
        """Return the logits, and with the teacher's features the loss too; `index` is for losses that are indexed."""
        if teacher_features is None:
            return self.student(images)
        logits, features = read_features(self.student, images, self.plan)
        if not self.distiller.is_indexed:
            return logits, self.distiller(features, teacher_features)
        if index is None:
            raise InputError(f"{type(self.distiller).__name__} needs index, the samples' places in the training set")
        loss = self.distiller(features, teacher_features, index)
        for module in self.distiller.modules():
            if isinstance(module, ContrastMemory) and self.training:
                _share(module, index)
        return logits, loss


class FeatureTeacher(Teacher):
    """A frozen network that gives logits and features, of images normalised anew where it has other statistics."""

    def __init__(
        self, model: nn.Module, plan: FeaturePlan, *, mean: Sequence[float] | None, std: Sequence[float] | None
    ) -> None:
        super().__init__(model, mean=mean, std=std)
        self.plan = plan

    @torch.no_grad()
    def forward(  # type: ignore[override]  # features beside the logits
        self, images: Float[Tensor, "batch channels height width"]
    ) -> tuple[Tensor, Features]:
        """Return the logits and the features of the plan."""
        return read_features(self.model, self.prepare(images), self.plan)


def _create(
    distiller: str,
    plans: tuple[FeaturePlan, FeaturePlan],
    examples: tuple[Features, Features],
    **options: Any,
) -> Distiller:
    try:
        return create(distiller, student=examples[0], teacher=examples[1], **options)
    except ValueError as error:
        places = [", ".join(plan.modules) or plan.source for plan in plans]
        raise InputError(
            f"{error} (student: {places[0]}; teacher: {places[1]}; student_layers and teacher_layers name others)"
        ) from error


def _examples(
    student: nn.Module, teacher: nn.Module, plans: tuple[FeaturePlan, FeaturePlan], size: tuple[int, int]
) -> tuple[Features, Features]:
    """Return features of two blank images; raise ValueError for networks of different inputs or outputs."""
    kinds = [type(model).__name__ for model in (student, teacher)]
    channels = [_in_channels(model) for model in (student, teacher)]
    if channels[0] != channels[1]:
        raise InputError(f"student {kinds[0]} takes {channels[0]} input channels, teacher {kinds[1]} {channels[1]}")
    outputs = []
    for model, plan in zip((student, teacher), plans, strict=True):
        images = torch.zeros(2, channels[0], *size, device=next(model.parameters()).device)
        with preserved(model), torch.no_grad():
            outputs.append(read_features(model.eval(), images, plan))
    classes = [logits.shape[1] for logits, _ in outputs]
    if classes[0] != classes[1]:
        raise InputError(f"student {kinds[0]} has {classes[0]} classes, teacher {kinds[1]} {classes[1]}")
    return outputs[0][1], outputs[1][1]


def _in_channels(model: nn.Module) -> int:
    # without convolutions, colour images are assumed
    return next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)


@torch.no_grad()
def _share(memory: ContrastMemory, index: Tensor) -> None:
    """Give every process what the others remember of this step, and the mean of their normalisers."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    processes = distributed.get_world_size()
    everyones = _gathered(index, processes)
    for rows in (memory.memory_v1, memory.memory_v2):
        rows[everyones] = _gathered(rows[index], processes)
    normalisers = memory.params[2:4].clone()
    distributed.all_reduce(normalisers)
    memory.params[2:4] = normalisers / processes


def _gathered(tensor: Tensor, processes: int) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(processes)]
    distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
