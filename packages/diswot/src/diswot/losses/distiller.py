"""The base of all distillation losses: source of features, checks, precision, and matching of channels."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from visionkernels.checks import InputError

__all__ = ["Distiller", "Features", "Source", "common_size", "require_equal", "unit_vectors"]

Source = Literal["logits", "pooled", "last_map", "middle_map", "stage_maps", "all_maps", "preactivations"]
"""Which features: of one tensor, the logits [B, K], the pooled vector [B, C], the map before pooling or that of the
middle stage [B, C, H, W]; of one map a stage, those without or with the stem, or before their last ReLU."""

Features = Tensor | Sequence[Tensor]
Agreement = Literal["batch", "channels", "shape"]

NUM_AXES = {"logits": 2, "pooled": 2}
LISTS = ("stage_maps", "all_maps", "preactivations")


class Distiller(nn.Module):
    """A loss between features of a student and of a teacher, for the same samples.

    `forward` takes one tensor of either network, or one list, as `source` says, and returns a scalar. It is computed in
    float32, in float64 for float64 input, also under autocast. The teacher gets no gradient. `beta` is the weight that
    the loss is trained with, where one was published. Raises TypeError for a tensor in place of a list and the other
    way round; ValueError for different batch sizes or numbers of maps, and where `needs` says so, other shapes.
    """

    source: ClassVar[Source]
    beta: ClassVar[float | None] = None
    is_indexed: ClassVar[bool] = False
    """Whether `forward` takes the samples' places in the training set too."""
    needs: Agreement = "batch"
    """Which parts of the two shapes must agree, besides the number of samples."""

    def __init__(self) -> None:
        super().__init__()
        # one a map of the student where channels differ, else none
        self.adapters = nn.ModuleList()

    @classmethod
    def build(
        cls, student: Features | None, teacher: Features | None, num_samples: int | None, **options: Any
    ) -> "Distiller":
        """Return the loss with the trained parts that features of these shapes need; see `create`."""
        distiller = cls(**options)
        if student is not None and teacher is not None:
            distiller.adapt(*distiller.pairs(student, teacher))
        return distiller

    def adapt(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        """Add what makes these features of the student comparable with the teacher's: 1x1 convolutions."""
        channels = [(a.shape[1], b.shape[1]) for a, b in zip(student, teacher, strict=True)]
        if self.needs != "batch" and student[0].ndim == 4 and any(ours != theirs for ours, theirs in channels):
            self.adapters.extend(self.adapter(*pair) for pair in channels)

    def adapter(self, student_channels: int, teacher_channels: int) -> nn.Module:
        """Return the trained map from the student's channels to the teacher's."""
        return nn.Conv2d(student_channels, teacher_channels, 1, bias=False)

    def forward(self, student: Features, teacher: Features) -> Float[Tensor, ""]:
        """Return the loss."""
        students, teachers = self.pairs(student, teacher)
        with torch.autocast(students[0].device.type, enabled=False):
            if self.adapters:
                students = [adapter(features) for adapter, features in zip(self.adapters, students, strict=True)]
            for ours, theirs in zip(students, teachers, strict=True):
                require_equal(type(self).__name__, ours, theirs, self.needs)
            return self.compare_all(students, teachers)

    def compare_all(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """Return the loss of checked float32 or float64 features: by default the sum over its tensors."""
        losses = [self.compare(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]
        return torch.stack(losses).sum()

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of one tensor of each."""
        raise NotImplementedError

    @classmethod
    def pairs(cls, student: Features, teacher: Features) -> tuple[list[Tensor], list[Tensor]]:
        """Return both as lists, in at least float32, the teacher's without gradient; raise for what does not pair."""
        name, is_list = cls.__name__, cls.source in LISTS
        for whose, features in (("student", student), ("teacher", teacher)):
            if isinstance(features, Tensor) == is_list:
                wanted = "a list of tensors" if is_list else "a tensor"
                raise TypeError(f"{name}: {whose} must be {wanted} ({cls.source}), not {type(features).__name__}")
        ours = [student] if isinstance(student, Tensor) else list(student)
        theirs = [teacher] if isinstance(teacher, Tensor) else list(teacher)
        if len(ours) != len(theirs) or not ours:
            raise InputError(f"{name}: student has {len(ours)} maps and teacher {len(theirs)}; give as many of each")
        num_axes = NUM_AXES.get(cls.source, 4)
        for one, other in zip(ours, theirs, strict=True):
            if one.ndim != num_axes or other.ndim != num_axes:
                axes = "[batch, channels, height, width]" if num_axes == 4 else "[batch, features]"
                raise InputError(f"{name}: student {list(one.shape)} and teacher {list(other.shape)} must be {axes}")
            require_equal(name, one, other, "batch")
        return [_wide(value) for value in ours], [_wide(value.detach()) for value in theirs]


def require_equal(name: str, student: Tensor, teacher: Tensor, needs: Agreement) -> None:
    """Raise ValueError naming both shapes unless as much of them agrees as `needs` says."""
    shapes = f"{name}: student {list(student.shape)} and teacher {list(teacher.shape)}"
    if len(student) != len(teacher):
        raise InputError(f"{shapes} have {len(student)} and {len(teacher)} samples; give the same samples to both")
    if needs == "batch" or student.shape == teacher.shape:
        return
    if student.shape[1] != teacher.shape[1]:
        what = "channels" if student.ndim > 2 else "features or classes"
        hint = "; with create(..., student=, teacher=) a trained layer matches them" if student.ndim > 2 else ""
        raise InputError(f"{shapes} have {student.shape[1]} and {teacher.shape[1]} {what}{hint}")
    if needs == "shape":
        sizes = " and ".join(str(list(maps.shape[2:])) for maps in (student, teacher))
        raise InputError(f"{shapes} differ in size, {sizes}; pool the larger or take maps of the same stage")


def common_size(
    student: Float[Tensor, "batch student_channels _ _"], teacher: Float[Tensor, "batch teacher_channels _ _"]
) -> tuple[Float[Tensor, "batch student_channels height width"], Float[Tensor, "batch teacher_channels height width"]]:
    """Average both maps down to the smaller height and the smaller width."""
    height, width = (min(student.shape[axis], teacher.shape[axis]) for axis in (2, 3))
    student, teacher = (
        maps if maps.shape[2:] == (height, width) else F.adaptive_avg_pool2d(maps, (height, width))
        for maps in (student, teacher)
    )
    return student, teacher


def unit_vectors(vectors: Float[Tensor, "*batch features"], *, eps: float = 1e-12) -> Float[Tensor, "*batch features"]:
    """Return x / |x| along the last axis; x no longer than `eps` has no direction: it gives 0, without a gradient."""
    lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    is_short = lengths <= eps
    return torch.where(is_short, 0.0, vectors) / torch.where(is_short, 1.0, lengths)


def _wide(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))
