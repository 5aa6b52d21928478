"""Contrastive representation distillation (Tian et al., 2020): a teacher's vector told from those of other samples."""

from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diswot.losses.distiller import Distiller, Features, Source
from diswot.losses.vectors import Embed
from visionkernels.checks import InputError

__all__ = ["CRD", "ContrastMemory", "contrastive_loss"]

# N samples of the training set, B batch, Q negatives, D width of the embedding


class CRD(Distiller):
    """Contrast of a student's embedding with the teacher's embeddings of other samples, and the other way round.

    Both pooled vectors are embedded linearly to unit vectors of length `width` and compared with `num_negatives`
    remembered ones of the other network; see `ContrastMemory` and `contrastive_loss`. Besides the vectors, `forward`
    takes `index` [B], the samples' places in a training set of `num_samples`, and may be given the places to compare
    with: `contrast_index` [B, 1 + Q], whose first column is `index`; by default Q are drawn evenly. Raises ValueError
    for places outside the training set (checked on a CPU only) and for shapes that disagree.
    """

    source: ClassVar[Source] = "pooled"
    beta: ClassVar[float | None] = 0.8
    is_indexed: ClassVar[bool] = True

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        num_samples: int,
        *,
        width: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        super().__init__()
        self.embed_s, self.embed_t = Embed(student_width, width), Embed(teacher_width, width)
        self.contrast = ContrastMemory(
            num_samples, width, num_negatives=num_negatives, temperature=temperature, momentum=momentum
        )

    @classmethod
    def build(
        cls, student: Features | None, teacher: Features | None, num_samples: int | None, **options: Any
    ) -> "CRD":
        """Return the loss for vectors of these widths; see `create`."""
        if student is None or teacher is None or num_samples is None:
            raise InputError(
                "crd: its embeddings and memory need example features and the size of the training set, "
                "create('crd', student=vectors, teacher=vectors, num_samples=50000)"
            )
        [ours], [theirs] = cls.pairs(student, teacher)
        return cls(ours.shape[1], theirs.shape[1], num_samples, **options)

    def forward(  # type: ignore[override]
        self,
        student: Float[Tensor, "batch student_width"],
        teacher: Float[Tensor, "batch teacher_width"],
        index: Int[Tensor, "batch"],
        contrast_index: Int[Tensor, "batch candidates"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss and, in training mode, remember the batch."""
        [ours], [theirs] = self.pairs(student, teacher)
        if index.shape != (len(ours),):
            raise InputError(f"index {list(index.shape)} must have the {len(ours)} samples of the batch")
        with torch.autocast(ours.device.type, enabled=False):
            ours, theirs = F.normalize(self.embed_s(ours)), F.normalize(self.embed_t(theirs))
            out_student, out_teacher = self.contrast(ours, theirs, index, contrast_index)
            num_samples = len(self.contrast.memory_v1)
            return contrastive_loss(out_student, num_samples) + contrastive_loss(out_teacher, num_samples)


def contrastive_loss(scores: Float[Tensor, "batch candidates"], num_samples: int) -> Float[Tensor, ""]:
    """Return -1/B (sum log P / (P + c) + sum log q / (N + c)), with q = Q / num_samples and c = q + 1e-7.

    P is the first column of the positive `scores`, of the sample itself, and N the other Q columns.
    """
    noise = (scores.shape[1] - 1) / num_samples
    positive, negatives = scores[:, 0], scores[:, 1:]
    kept = (positive / (positive + noise + 1e-7)).log().sum()
    rejected = (noise / (negatives + noise + 1e-7)).log().sum()
    return -(kept + rejected) / len(scores)


class ContrastMemory(nn.Module):
    """Remembered unit embeddings of every sample by the student (v1) and the teacher (v2), [N, D] each.

    `forward` gives o_s = exp(v2[candidates] . student / T) / Z_s and o_t = exp(v1[candidates] . teacher / T) / Z_t,
    [B, 1 + Q] each. The first call sets each Z to the mean of its scores times N. In training mode the rows of the
    batch then become unit(momentum * row + (1 - momentum) * embedding). `params` holds Q, T, Z_s, Z_t, momentum, with
    Z < 0 before the first call.
    """

    params: Tensor
    memory_v1: Tensor
    memory_v2: Tensor

    def __init__(
        self, num_samples: int, width: int, *, num_negatives: int, temperature: float, momentum: float
    ) -> None:
        super().__init__()
        if num_samples < 1 or num_negatives < 1:
            raise InputError(f"num_samples={num_samples} and num_negatives={num_negatives} must be at least 1")
        if not temperature > 0 or not 0 <= momentum <= 1:
            raise InputError(f"temperature={temperature} must be above 0 and momentum={momentum} in [0, 1]")
        self.num_negatives, self.temperature, self.momentum = num_negatives, temperature, momentum
        self.register_buffer("params", torch.tensor([num_negatives, temperature, -1.0, -1.0, momentum]))
        # of about unit length
        bound = (width / 3) ** -0.5
        for name in ("memory_v1", "memory_v2"):
            self.register_buffer(name, torch.empty(num_samples, width).uniform_(-bound, bound))

    def forward(
        self, student: Tensor, teacher: Tensor, index: Tensor, contrast_index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take unit embeddings [B, D], return scores of student and teacher [B, 1 + Q]."""
        if contrast_index is None:
            contrast_index = self.draw(index)
        elif contrast_index.ndim != 2 or len(contrast_index) != len(index) or contrast_index.shape[1] < 2:
            raise InputError(f"contrast_index {list(contrast_index.shape)} must be [{len(index)}, 1 + negatives]")
        self._check_places(index, contrast_index)
        scores = []
        for place, memory, embedding in ((2, self.memory_v2, student), (3, self.memory_v1, teacher)):
            score = (_candidates(embedding, memory, contrast_index) / self.temperature).exp()
            scores.append(score / self._normaliser(place, score))
        if self.training:
            self._remember(self.memory_v1, student, index)
            self._remember(self.memory_v2, teacher, index)
        return scores[0], scores[1]

    def draw(self, index: Tensor) -> Tensor:
        """Return [B, 1 + Q] places: `index`, then negatives drawn evenly, which may repeat and may hit it."""
        shape = len(index), self.num_negatives
        negatives = torch.randint(len(self.memory_v1), shape, device=index.device)
        return torch.cat([index[:, None], negatives], 1)

    @torch.no_grad()
    def _normaliser(self, place: int, score: Tensor) -> Tensor:
        first = score.mean() * len(self.memory_v1)
        kept = self.params[place]
        value = torch.where(kept < 0, first.to(kept), kept)
        self.params[place] = value
        return value.to(score)

    @torch.no_grad()
    def _remember(self, memory: Tensor, embedding: Tensor, index: Tensor) -> None:
        rows = self.momentum * memory[index] + (1 - self.momentum) * embedding.to(memory)
        memory[index] = F.normalize(rows)

    def _check_places(self, index: Tensor, contrast_index: Tensor) -> None:
        if index.device.type != "cpu" or torch.compiler.is_compiling():
            return
        for name, places in (("index", index), ("contrast_index", contrast_index)):
            low, high = (cast(int, edge.item()) for edge in places.aminmax())
            if low < 0 or high >= len(self.memory_v1):
                last = len(self.memory_v1) - 1
                raise InputError(f"{name} from {low} to {high} must be in 0 to {last}, num_samples - 1")


def _candidates(embedding: Tensor, memory: Tensor, contrast_index: Tensor) -> Tensor:
    """Return the inner products [B, 1 + Q] of embeddings [B, D] with the rows of `memory` that each compares with."""
    if len(memory) <= 4 * contrast_index.shape[1]:
        # all products and a copy, for the backward, of what will change cost less than gathering [B, 1 + Q, D]
        return (embedding @ memory.clone().mT).gather(1, contrast_index)
    return (memory[contrast_index] @ embedding[:, :, None]).squeeze(2)
