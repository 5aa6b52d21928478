"""Training steps of the stages: MAE's pixels, generic distillation, and classification.

Losses are float32 in any precision.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from g2sd.generic import GenericDistiller, supervised
from g2sd.mae import MaskedAutoencoder, pixel_loss, pixel_patches
from g2sd.masking import draw_noise, mask_patches
from g2sd.specific import SpecificDistiller
from visionkernels.checks import InputError
from visionkernels.training.task import Task

__all__ = ["AutoencoderTask", "ClassifierTask", "GenericTask"]


class AutoencoderTask(Task):
    """Pre-training: pixels of removed patches. `flat_loss` is that of patches of one colour, their mean."""

    def __init__(self, model: MaskedAutoencoder, *, mask_ratio: float = 0.75, is_normalised: bool = True) -> None:
        super().__init__(model)
        if model.decoderfeature_pred is not None or model.encoderfeature_pred is not None:
            raise InputError("model has feature heads, which pixels do not train; create it without teacher widths")
        self.num_patches, self.patch_size = model.num_patches, tuple(model.patch_embed.patch_size)
        self.mask_ratio, self.is_normalised = mask_ratio, is_normalised

    def forward(
        self, images: Float[Tensor, "batch channels height width"], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the loss; labels are not used."""
        noise = draw_noise(len(images), self.num_patches, device=images.device)
        prediction, mask = self.trainable_module(images, noise, mask_ratio=self.mask_ratio)
        patches, removed = pixel_patches(images, self.patch_size), mask.removed
        loss = pixel_loss(prediction, patches, removed, is_normalised=self.is_normalised)
        with torch.no_grad():
            flat = torch.zeros_like(patches) if self.is_normalised else patches.mean(2, keepdim=True).expand_as(patches)
            flat_loss = pixel_loss(flat, patches, removed, is_normalised=self.is_normalised)
        return {"loss": loss, "flat_loss": flat_loss}


class GenericTask(Task):
    """Generic distillation. The teacher is neither trained nor saved.

    Two baselines need no student, and the loss must fall below them: `zero_loss` of always predicting 0, and
    `position_loss` of predicting, for each position, the mean of all targets so far.
    """

    def __init__(self, distiller: GenericDistiller) -> None:
        super().__init__(distiller.students, teacher=distiller.teacher)
        # not a submodule: its students are trained above
        self._distiller = (distiller,)
        rows, columns = distiller.teacher.grid
        self.mean_target: Tensor
        self.num_targets: Tensor
        self.register_buffer("mean_target", torch.zeros(1 + rows * columns, distiller.teacher_width))
        self.register_buffer("num_targets", torch.zeros(()))

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        noise: Tensor | None = None,
        hidden: Float[Tensor, "batch tokens features"] | None = None,
    ) -> dict[str, Tensor]:
        """Return the sum of the students' losses, the losses themselves, and the baselines.

        `hidden` are stored targets of the masks that `noise` gives; without them, the second argument is not used, so
        that it may be the labels of a batch.
        """
        (distiller,) = self._distiller
        if noise is None or hidden is None:
            noise = distiller.draw_noise(images)
        mask = mask_patches(noise, distiller.mask_ratio)
        hidden = distiller.target(images, mask) if hidden is None else hidden
        losses, _ = self.trainable_module(images, mask, supervised(hidden, mask, distiller.supervise))
        outputs = {"loss": torch.stack(losses).sum()}
        if len(losses) > 1:
            outputs |= {f"loss_{i}": loss for i, loss in enumerate(losses)}
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            target = F.layer_norm(hidden.float(), hidden.shape[-1:], eps=1e-6)
            ids = mask.ids_shuffle[:, :, None].expand(-1, -1, target.shape[2])
            mean = self.mean_target.expand(len(target), -1, -1)
            mean = torch.cat([mean[:, :1], mean[:, 1:].gather(1, ids)], 1)
            for name, guess in (("zero_loss", torch.zeros_like(target)), ("position_loss", mean)):
                ours, theirs = (supervised(tokens, mask, distiller.supervise) for tokens in (guess, target))
                outputs[name] = len(losses) * F.smooth_l1_loss(ours, theirs, beta=distiller.beta)
            self.num_targets += len(target)
            update = mask.unshuffle(target).mean(0) - self.mean_target
            self.mean_target += update * (len(target) / self.num_targets)
        return outputs

    def final_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a single student's weights under its own names; names of several students begin with their place."""
        (distiller,) = self._distiller
        prefix = "members.0." if len(distiller.students.members) == 1 else "members."
        return {key.removeprefix(prefix): value for key, value in state.items()}


class ClassifierTask(Task):
    """Fine-tuning with labels, or specific distillation where there is a distiller."""

    def __init__(self, model: nn.Module, distiller: SpecificDistiller | None = None) -> None:
        super().__init__(model, teacher=None if distiller is None else distiller.teacher)
        # not a submodule: its student is trained above
        self._distiller = () if distiller is None else (distiller,)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        target: Int[Tensor, " batch"] | Float[Tensor, "batch classes"],
    ) -> dict[str, Tensor]:
        """Return the loss and the class logits."""
        outputs = self.trainable_module(images)
        if not self._distiller:
            return {"loss": F.cross_entropy(outputs.float(), target), "output": outputs}
        loss, logits = self._distiller[0].loss(images, outputs, target)
        return {"loss": loss, "output": logits}
