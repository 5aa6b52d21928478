"""Generic distillation: a student's decoder learns the hidden state of a masked autoencoder's decoder for every patch.

Teacher and student see the same image and the same visible patches. The target is the teacher's hidden state after a
block in the middle of its decoder, layer-normalised (G2SD, sec. 3.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from g2sd.mae import MaskedAutoencoder
from g2sd.masking import PatchMask, draw_noise, mask_patches
from g2sd.teachers import TokenTeacher
from visionkernels.checks import InputError, check, check_choice
from visionkernels.ops.feature_smooth_l1 import feature_smooth_l1

__all__ = ["DistillOutput", "GenericDistiller", "Supervision"]

Supervision: TypeAlias = Literal["all", "masked"]


@dataclass(frozen=True)
class DistillOutput:
    """One step for one or several students."""

    loss: Float[Tensor, ""]
    """Sum over students."""
    losses: tuple[Float[Tensor, ""], ...]
    predictions: tuple[Float[Tensor, "batch tokens channels"], ...]
    """For each student: class token (if supervised), visible and removed patches, in the order of `mask`."""
    hidden: Float[Tensor, "batch tokens channels"]
    """The teacher's hidden state, in the same order; the target is its layer norm."""
    mask: PatchMask


class Students(nn.Module):
    """The students and their losses against a teacher's hidden state: the trainable module, without the teacher."""

    def __init__(self, students: Sequence[MaskedAutoencoder], *, supervise: Supervision, beta: float) -> None:
        super().__init__()
        self.members = nn.ModuleList(students)
        self.supervise, self.beta = supervise, beta

    def forward(
        self, images: Float[Tensor, "batch channels height width"], mask: PatchMask, hidden: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return losses and predictions against `hidden`, whose tokens are the supervised ones."""
        predictions = []
        for student in cast(list[Any], self.members):
            decoded = student.decode(student.encode(images, mask), mask)
            predictions.append(student.decoderfeature_pred(supervised(decoded, mask, self.supervise)))
        return tuple(feature_smooth_l1(output, hidden, beta=self.beta) for output in predictions), tuple(predictions)


def supervised(tokens: Tensor, mask: PatchMask, supervise: Supervision) -> Tensor:
    """Return the supervised ones of the tokens [class, visible, removed]."""
    return tokens if supervise == "all" else tokens[:, 1 + mask.num_visible :]


class GenericDistiller(nn.Module):
    """Frozen teacher and students in training; several students share the teacher's pass.

    `supervise` all tokens, or the removed patches ("masked"). `num_masks` masks of each image are used at a time. The
    teacher stays in evaluation mode. `teacher_layer` counts the blocks of the teacher's decoder from 1; it is not for a
    `TokenTeacher`. Raises ValueError for a teacher and students that do not fit each other, and for invalid
    settings.
    """

    def __init__(
        self,
        teacher: "MaskedAutoencoder | TokenTeacher",
        students: MaskedAutoencoder | Sequence[MaskedAutoencoder],
        *,
        teacher_layer: int = 4,
        supervise: Supervision = "all",
        mask_ratio: float = 0.75,
        beta: float = 2.0,
        num_masks: int = 1,
    ) -> None:
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        chosen = (students,) if isinstance(students, MaskedAutoencoder) else tuple(students)
        self.teacher_layer, self.supervise, self.mask_ratio = teacher_layer, supervise, mask_ratio
        self.beta, self.num_masks = beta, num_masks
        check_choice("supervise", supervise, Supervision)
        check(num_masks >= 1, "num_masks", num_masks, "at least 1")
        check(beta > 0, "beta", beta, "above 0")
        check(0 <= mask_ratio < 1, "mask_ratio", mask_ratio, "in [0, 1)")
        check(supervise == "all" or mask_ratio > 0, "mask_ratio", mask_ratio, "above 0 for supervise='masked'")
        check(bool(chosen), "students", chosen, "one or more")
        self.students = Students(chosen, supervise=supervise, beta=beta)
        if isinstance(teacher, MaskedAutoencoder):
            blocks = len(teacher.decoder_blocks)
            check(1 <= teacher_layer <= blocks, "teacher_layer", teacher_layer, f"1 to {blocks}, blocks of its decoder")
            width = teacher.decoder_width
        else:
            width = teacher.width
        self.teacher_width = width
        for student in chosen:
            self._check_fit(teacher, student, width)
            # official files have this head, and official training leaves it to weight decay
            if student.encoderfeature_pred is not None:
                student.encoderfeature_pred.requires_grad_(False)
            for unused in (student.decoder_norm, student.decoder_pred):
                unused.requires_grad_(False)

    @staticmethod
    def _check_fit(teacher: "MaskedAutoencoder | TokenTeacher", student: MaskedAutoencoder, width: int) -> None:
        if student.grid != teacher.grid:
            grids = [f"{rows}x{columns}" for rows, columns in (teacher.grid, student.grid)]
            raise InputError(
                f"the teacher has {grids[0]} patches and the student {grids[1]}; they must see the same grid: "
                "img_size / patch_size must agree"
            )
        head = student.decoderfeature_pred
        if head is None or head.fc2.out_features != width:
            have = "no feature head" if head is None else f"a feature head of {head.fc2.out_features} channels"
            raise InputError(f"the student has {have}; create it with teacher_decoder_width={width}")

    def train(self, mode: bool = True) -> "GenericDistiller":
        """Set the students' mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def draw_noise(
        self, images: Float[Tensor, "batch channels height width"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "masks patches"]:
        """Return noise for `num_masks` masks of each image."""
        patches = self.teacher.grid[0] * self.teacher.grid[1]
        return draw_noise(self.num_masks * len(images), patches, generator=generator, device=images.device)

    @torch.no_grad()
    def target(self, images: Float[Tensor, "batch channels height width"], mask: PatchMask) -> Tensor:
        """Return the teacher's hidden state of all tokens, [masks, 1 + patches, width], in the order of the mask."""
        if isinstance(self.teacher, MaskedAutoencoder):
            return self.teacher.decode(self.teacher.encode(images, mask), mask, num_blocks=self.teacher_layer)
        return cast(Tensor, self.teacher(images, mask))

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        noise: Float[Tensor, "masks patches"] | None = None,
        *,
        hidden: Float[Tensor, "masks tokens features"] | None = None,
        generator: torch.Generator | None = None,
    ) -> DistillOutput:
        """Return losses of images, normalised as the teacher's; `noise` decides the masks, by default drawn.

        `hidden` is a known result of `target` for these images and this noise. The loss is smooth L1 of `beta`, the
        mean over tokens and channels, in float32 (float64 for float64). Raises ValueError for shapes that do not fit.
        """
        noise = self.draw_noise(images, generator) if noise is None else noise
        expected = [self.num_masks * len(images), self.teacher.grid[0] * self.teacher.grid[1]]
        if list(noise.shape) != expected:
            raise InputError(f"noise has shape {list(noise.shape)}; expected {expected}: masks of images, patches")
        mask = mask_patches(noise, self.mask_ratio)
        hidden = self.target(images, mask) if hidden is None else hidden
        hidden = supervised(hidden, mask, self.supervise)
        losses, predictions = self.students(images, mask, hidden)
        return DistillOutput(torch.stack(losses).sum(), losses, predictions, hidden, mask)
