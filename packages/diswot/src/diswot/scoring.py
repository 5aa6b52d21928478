"""The DisWOT score of a teacher and a student, both with fresh weights, by forward passes alone (paper, sec. 3).

Scores are negated losses, so higher is better. One batch and one teacher for each seed serve all students.
"""

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diswot.initialisation import Draws, Init, draws_of, generator_for, initialise, preserved, undrawn
from diswot.observation import DEFAULT_READING, Observation, Reading, check_batch, observe
from diswot.prefixes import KnownPrefixes
from diswot.similarity import relation_loss, semantic_loss
from visionkernels.checks import InputError, check, check_choice, check_known

__all__ = ["TERMS", "Batch", "Project", "Score", "TeacherCache", "rankable", "score"]

Batch: TypeAlias = tuple[Float[Tensor, "batch channels height width"], Int[Tensor, " batch"]]
Project: TypeAlias = Literal["none", "pad", "class_gram"]


@dataclass(frozen=True)
class Score:
    """Means over seeds of the negated losses; higher is better."""

    terms: Mapping[str, float]
    total: float
    """Their sum."""
    stderr: float
    """Standard error of `total` over the seeds; NaN for one seed."""
    seconds: float
    by_seed: Mapping[str, tuple[float, ...]]

    @property
    def semantic(self) -> float:
        """The semantic term. Raises KeyError if it was not asked for."""
        return self.terms["semantic"]

    @property
    def relation(self) -> float:
        """The relation term. Raises KeyError if it was not asked for."""
        return self.terms["relation"]


def _semantic(student: Observation, teacher: Observation, project: Project) -> Tensor:
    ours, theirs = student.gradient, teacher.gradient
    if project == "class_gram":
        if len(ours) != len(theirs):
            raise InputError(f"the student has {len(ours)} classes, the teacher {len(theirs)}; they must have the same")
        return relation_loss(ours, theirs)
    return semantic_loss(*_padded(ours, theirs, project))


def _relation(student: Observation, teacher: Observation, project: Project) -> Tensor:
    return relation_loss(student.map, teacher.map)


def _channel(student: Observation, teacher: Observation, project: Project) -> Tensor:
    return semantic_loss(*_padded(student.map, teacher.map, project))


def _correlation(student: Observation, teacher: Observation, project: Project) -> Tensor:
    maps = []
    for whose, observation in (("student", student), ("teacher", teacher)):
        flat = observation.map.flatten(2)
        if flat.shape[2] < 2:
            shape = list(observation.map.shape)
            raise InputError(f"correlation: the last map of the {whose} is {shape}; it needs two or more positions")
        maps.append(flat - flat.mean(2, keepdim=True))
    return semantic_loss(*_padded(maps[0], maps[1], project))


def _padded(student: Tensor, teacher: Tensor, project: Project) -> tuple[Tensor, Tensor]:
    """Return both, with channels of zero up to the same number if `project` is "pad"."""
    if project != "pad" or student.shape[1] == teacher.shape[1]:
        return student, teacher
    width = max(student.shape[1], teacher.shape[1])
    pads = [(0, 0) * (values.ndim - 2) + (0, width - values.shape[1]) for values in (student, teacher)]
    return nn.functional.pad(student, pads[0]), nn.functional.pad(teacher, pads[1])


TERMS: Mapping[str, Callable[[Observation, Observation, Project], Tensor]] = {
    "semantic": _semantic, "relation": _relation, "channel": _channel, "correlation": _correlation
}  # fmt: skip
"""semantic: channel similarities of the classifier's gradient (M_s); relation: similarities of the batch (M_r);
channel: channel similarities of the last map (ICKD); correlation: the same of the last map without the means of its
channels, which after a ReLU drown what varies (ours)."""


@dataclass
class TeacherCache:
    """A teacher's side of the score, computed once for each seed.

    `batches` has one batch for each seed, or one for all. Raises as `observe` does.
    """

    model: nn.Module
    batches: Sequence[Batch]
    seeds: int = 3
    init: Init = "gaussian"
    reading: Reading = DEFAULT_READING
    key: str = "teacher"
    """Determines the weights together with the seed."""
    draws: Draws = "own"
    """Students' weights: "own" for every student, or "shared" by layers of the same name."""
    observations: tuple[Observation, ...] = field(init=False)
    known: KnownPrefixes = field(init=False, repr=False, default_factory=KnownPrefixes)
    """Cache of the outputs of first blocks that students with shared draws have in common."""

    def __post_init__(self) -> None:
        check(self.seeds >= 1, "seeds", self.seeds, "at least 1")
        check_choice("init", self.init, Init)
        check_choice("draws", self.draws, Draws)
        if len(self.batches) not in (1, self.seeds):
            raise InputError(f"batches are {len(self.batches)}; give one, or one for each of the {self.seeds} seeds")
        if self.init == "keep" and self.seeds > 1 and len(self.batches) == 1:
            raise InputError(f"seeds={self.seeds} must be 1 with init='keep', which draws nothing")
        for images, labels in self.batches:
            check_batch(images, labels)
        self.observations = tuple(self._observations(self.model, self.key, self.reading, "own"))

    def digest(self) -> str:
        """Return a text that is the same for the same teacher, batches, seeds and settings, to tell runs apart."""
        content = hashlib.sha256(repr((self.seeds, self.init, self.reading, self.key, self.draws)).encode())
        for images, labels in self.batches:
            # pixels may differ in the last digits between machines
            means = images.double().mean((1, 2, 3)).round(decimals=2) + 0.0
            content.update(repr((images.shape, means.tolist(), labels.tolist())).encode())
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            content.update(repr((name, tensor.shape, tensor.dtype)).encode())
        for tensor in undrawn(self.model, self.init):
            content.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return content.hexdigest()[:16]

    def _observations(self, model: nn.Module, key: str, reading: Reading, draws: Draws) -> list[Observation]:
        observations = []
        weight = next(model.parameters(), None)
        if weight is None:
            raise InputError(f"{type(model).__name__} has no parameters, and so no linear classifier (head)")
        # the classifier's gradient is needed even in the caller's inference mode
        with torch.inference_mode(False), preserved(model):
            for seed in range(self.seeds):
                images, labels = self.batches[seed % len(self.batches)]
                initialise(model, self.init, draws_of(seed, key, draws))
                # dropout and the like draw from the global generator
                torch.manual_seed(generator_for(seed, key).initial_seed())
                images, labels = images.to(weight), labels.to(weight.device)
                # cached outputs are valid in one mode
                model.train(reading.mode == "train")
                is_shared = draws == "shared" and reading.feature == "auto"
                with self.known.used(model, images) if is_shared else nullcontext():
                    observations.append(observe(model, images, labels, reading))
        return observations

    def score(
        self,
        student: nn.Module,
        *,
        key: str = "student",
        terms: Sequence[str] = ("semantic", "relation"),
        project: Project = "none",
        reading: Reading | None = None,
    ) -> Score:
        """Return the score of a student; arguments are those of `score`."""
        start = time.perf_counter()
        if not terms:
            raise InputError(f"terms are none; give one or more of {', '.join(TERMS)}")
        for term in terms:
            check_known("term", term, TERMS)
        check_choice("project", project, Project)
        observations = self._observations(student, key, reading or self.reading, self.draws)
        pairs = list(zip(observations, self.observations, strict=True))
        # 0 - x, which is not -0
        by_seed = {
            term: tuple(rankable(term, 0 - float(TERMS[term](ours, theirs, project))) for ours, theirs in pairs)
            for term in terms
        }
        totals = torch.tensor(list(by_seed.values()), dtype=torch.float64).sum(0)
        stderr = float(totals.std() / math.sqrt(self.seeds)) if self.seeds > 1 else math.nan
        means = {term: sum(values) / self.seeds for term, values in by_seed.items()}
        return Score(means, float(totals.mean()), stderr, time.perf_counter() - start, by_seed)


def rankable(name: str, value: float) -> float:
    """Return a score, or NaN with a RuntimeWarning for NaN and +infinity; -infinity is a value."""
    if math.isnan(value) or value == math.inf:
        warnings.warn(f"{name} is {value}; it counts as NaN and ranks last", RuntimeWarning, stacklevel=4)
        return math.nan
    return value


def score(
    teacher: nn.Module | TeacherCache,
    student: nn.Module,
    images: Float[Tensor, "batch channels height width"] | None = None,
    labels: Int[Tensor, " batch"] | None = None,
    *,
    terms: Sequence[str] = ("semantic", "relation"),
    combine: Literal["sum"] = "sum",
    init: Init = "gaussian",
    seeds: int = 3,
    feature: str = "auto",
    head: str = "auto",
    mode: Literal["train", "eval"] = "train",
    project: Project = "none",
    key: str = "student",
) -> Score:
    """Score a student for a teacher: how alike the two are before any training (DisWOT, sec. 3).

    total = -(M_s + M_r), each the mean over `seeds` draws of both networks' weights; `init` as
    `diswot.initialisation.initialise`. `images` are normalised, `labels` int64 in [0, classes). Both networks are left
    unchanged. With a `TeacherCache` instead of a teacher, its batches, seeds, init and mode count, and no images
    are given. `key` and the seed decide the student's weights. `feature` and `head` name modules of both networks, see
    `diswot.observation.Reading`.

    Classifiers of unequal width have no semantic term unless `project` says how: "pad" with channels of zero, or
    "class_gram", the similarities of classes instead of channels.

    A term that is NaN is so in the score, with a RuntimeWarning.

    Raises ValueError for what does not fit: batches, labels, widths, class counts, names; `combine="rank"` and "zscore"
    are defined over several students only, see `diswot.ranking.rank`.
    """
    if combine != "sum":
        raise InputError(f"combine={combine!r} is defined over a set of students; use diswot.rank for it, or 'sum'")
    reading = Reading(feature, head, mode)
    if isinstance(teacher, TeacherCache):
        if images is not None or labels is not None:
            raise InputError("images and labels are those of the teacher's cache; give none")
        return teacher.score(
            student, key=key, terms=terms, project=project, reading=Reading(feature, head, teacher.reading.mode)
        )
    if images is None or labels is None:
        raise InputError("images and labels are missing; give both, or a TeacherCache")
    cache = TeacherCache(teacher, [(images, labels)], seeds, init, reading)
    return cache.score(student, key=key, terms=terms, project=project)
