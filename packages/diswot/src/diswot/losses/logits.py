"""Losses between logits [B, K]."""

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from diswot.losses.distiller import Agreement, Distiller, Source, unit_vectors
from visionkernels.checks import InputError

__all__ = ["KD", "PearsonInterclass"]


class KD(Distiller):
    """Softened cross-entropy between the classes (Hinton et al., 2015).

    T^2 / B * sum KL(softmax(z_t / T) || softmax(z_s / T)). Trained with .9 of it and .1 of the labels' cross-entropy.
    Raises ValueError for T <= 0 or different numbers of classes.
    """

    source: ClassVar[Source] = "logits"
    beta: ClassVar[float | None] = 0.9
    needs: Agreement = "shape"

    def __init__(self, *, temperature: float = 4.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise InputError(f"temperature={temperature} must be above 0")
        self.temperature = temperature

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of logits [B, K]."""
        student, teacher = (F.log_softmax(logits / self.temperature, dim=1) for logits in (student, teacher))
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * self.temperature**2


class PearsonInterclass(Distiller):
    """1 - the mean over samples of the Pearson correlation of the two rows of logits (DIST, Huang et al., 2022).

    In 0 to 2. A row of equal logits correlates with nothing. Raises ValueError for different numbers of classes.
    """

    source: ClassVar[Source] = "logits"
    needs: Agreement = "shape"

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of logits [B, K]."""
        student, teacher = (unit_vectors(logits - logits.mean(1, keepdim=True)) for logits in (student, teacher))
        return 1 - (student * teacher).sum(1).mean()
