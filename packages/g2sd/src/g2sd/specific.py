"""Specific distillation for classification: losses of labels and of a teacher's logits (G2SD, sec. 3.3)."""

from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from visionkernels.checks import InputError, check, check_choice
from visionkernels.ops.nkd_loss import nkd_loss

__all__ = ["Mode", "SpecificDistiller", "hard_distillation_loss", "relation_loss", "soft_distillation_loss"]

Mode: TypeAlias = Literal["hard", "soft", "nkd"]
Target: TypeAlias = Int[Tensor, " batch"] | Float[Tensor, "batch classes"]


def hard_distillation_loss(
    class_logits: Float[Tensor, "batch classes"],
    distillation_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    target: Target,
) -> Float[Tensor, ""]:
    """Return (CE(class logits, target) + CE(distillation logits, teacher's best class)) / 2 (as in DeiT).

    `target` are class indices, or probabilities of classes as mixing gives them. In float32 (float64 for float64). The
    teacher gets no gradient. Raises ValueError for logits of different shapes, and for a target that does not fit.
    """
    class_logits, distillation_logits, teacher_logits = _checked(
        target, class_logits=class_logits, distillation_logits=distillation_logits, teacher_logits=teacher_logits
    )
    teacher_loss = F.cross_entropy(distillation_logits, teacher_logits.argmax(1))
    return (F.cross_entropy(class_logits, _probabilities(target, class_logits)) + teacher_loss) / 2


def soft_distillation_loss(
    class_logits: Float[Tensor, "batch classes"],
    distillation_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    target: Target,
    *,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Return (CE(class logits, target) + T^2 KL(teacher / T || distillation / T)) / 2, means over the batch.

    Arguments, precision and errors as for `hard_distillation_loss`; ValueError for a temperature that is not above 0.
    """
    check(temperature > 0, "temperature", temperature, "above 0")
    class_logits, distillation_logits, teacher_logits = _checked(
        target, class_logits=class_logits, distillation_logits=distillation_logits, teacher_logits=teacher_logits
    )
    ours, theirs = (F.log_softmax(logits / temperature, 1) for logits in (distillation_logits, teacher_logits))
    teacher_loss = temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return (F.cross_entropy(class_logits, _probabilities(target, class_logits)) + teacher_loss) / 2


def relation_loss(
    student: list[tuple[Tensor, Tensor, Tensor]], teacher: list[tuple[Tensor, Tensor, Tensor]], *, num_heads: int
) -> Float[Tensor, ""]:
    """Compare how tokens relate: KL of softmax(t_i t_j^T / sqrt(d)) and softmax(s_i s_j^T / sqrt(d)).

    A layer is (query, key, value), each [batch, tokens, channels]; all nine pairs i, j count. Channels divide into
    `num_heads` relation heads of d channels. Sum over keys, mean over everything else (as in TinyMIM). In float32.
    Raises ValueError for numbers of layers or tokens that differ, and for channels that heads do not divide.
    """
    if len(student) != len(teacher) or not student:
        raise InputError(f"student has {len(student)} layers and teacher {len(teacher)}; give as many, one or more")
    total = torch.zeros((), device=student[0][0].device)
    for ours, theirs in zip(student, teacher, strict=True):
        ours_heads, theirs_heads = ([_split(tokens, num_heads) for tokens in layer] for layer in (ours, theirs))
        if ours_heads[0].shape[2] != theirs_heads[0].shape[2]:
            raise InputError(
                f"student has {ours_heads[0].shape[2]} tokens, the teacher {theirs_heads[0].shape[2]}; use one grid"
            )
        for i in range(3):
            for j in range(3):
                target = _relations(theirs_heads[i].detach(), theirs_heads[j].detach())
                relations = _relations(ours_heads[i], ours_heads[j])
                total = total + F.kl_div(relations, target, reduction="none", log_target=True).sum(3).mean()
    return total / (9 * len(student))


def _split(tokens: Tensor, num_heads: int) -> Tensor:
    batch, count, channels = tokens.shape
    check(num_heads >= 1 and channels % num_heads == 0, "num_heads", num_heads, f"a divisor of {channels} channels")
    return tokens.float().view(batch, count, num_heads, -1).transpose(1, 2)


def _relations(left: Tensor, right: Tensor) -> Tensor:
    with torch.autocast(left.device.type, enabled=False):
        return F.log_softmax(left @ right.mT / left.shape[3] ** 0.5, 3)


class SpecificDistiller(nn.Module):
    """A student in training with labels and a frozen teacher that sees the same, mixed images.

    `mode` is "hard" or "soft" for students with a distillation head, or "nkd", which teaches the class logits alone and
    needs none; `alpha` is NKD's weight of the other classes. Raises ValueError for a student that does not fit, and for
    other settings.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        mode: Mode = "hard",
        temperature: float = 1.0,
        alpha: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, Mode)
        check(temperature > 0, "temperature", temperature, "above 0")
        check(alpha >= 0, "alpha", alpha, "at least 0")
        classes = [int(getattr(model, "num_classes", 0)) for model in (student, teacher)]
        if classes[0] != classes[1]:
            raise InputError(f"the student has {classes[0]} classes, the teacher {classes[1]}; they must have the same")
        has_heads = hasattr(student, "set_distilled_training")
        if mode != "nkd" and not has_heads:
            raise InputError(
                f"mode={mode!r} needs a student with a distillation head; use distilled=True, or mode='nkd'"
            )
        self.student, self.mode, self.temperature, self.alpha = student, mode, temperature, alpha
        self.teacher = teacher.eval().requires_grad_(False)
        if has_heads:
            distilled: Any = student
            distilled.set_distilled_training(True)
            distilled.eval_head = "class" if mode == "nkd" else "mean"
            # in NKD no loss reaches this head, whose gradient several processes would wait for
            distilled.head_dist.requires_grad_(mode != "nkd")

    def train(self, mode: bool = True) -> "SpecificDistiller":
        """Set the student's mode; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self, images: Float[Tensor, "batch channels height width"], target: Target
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch classes"]]:
        """Return the loss and the class logits."""
        return self.loss(images, self.student(images), target)

    def loss(
        self,
        images: Float[Tensor, "batch channels height width"],
        outputs: Tensor | tuple[Tensor, Tensor],
        target: Target,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch classes"]]:
        """Return the loss of the student's training outputs for images, and the class logits."""
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        class_logits, distillation_logits = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        if self.mode == "nkd":
            labels = target.argmax(1) if target.ndim == 2 else target
            loss = nkd_loss(class_logits, teacher_logits, labels, alpha=self.alpha, temperature=self.temperature)
            return loss, class_logits
        if self.mode == "hard":
            return hard_distillation_loss(class_logits, distillation_logits, teacher_logits, target), class_logits
        loss = soft_distillation_loss(
            class_logits, distillation_logits, teacher_logits, target, temperature=self.temperature
        )
        return loss, class_logits


def _checked(target: Tensor, **logits: Tensor) -> list[Tensor]:
    """Return logits in float32 or float64."""
    shapes = {name: list(value.shape) for name, value in logits.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1 or next(iter(logits.values())).ndim != 2:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise InputError(f"{listed} must all be [batch, classes]")
    batch, classes = next(iter(shapes.values()))
    fits = list(target.shape) in ([batch], [batch, classes]) and target.is_floating_point() == (target.ndim == 2)
    if not fits:
        raise InputError(
            f"target is {target.dtype} {list(target.shape)}; it must be class indices [{batch}], or probabilities "
            f"[{batch}, {classes}]"
        )
    if not batch:
        raise InputError("the batch is empty")
    if target.ndim == 1 and not (int(target.min()) >= 0 and int(target.max()) < classes):
        raise InputError(f"target reaches from {int(target.min())} to {int(target.max())}; there are {classes} classes")
    widened = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in logits.values()]
    widened[-1] = widened[-1].detach()
    return widened


def _probabilities(target: Tensor, logits: Tensor) -> Tensor:
    return target.to(logits.dtype) if target.ndim == 2 else target
