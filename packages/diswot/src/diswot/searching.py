"""Search in a space of students, within a budget, by the score or a proxy: random, evolution, aging evolution (sec. 4).

A search is a function of its settings: candidates come in rounds from one generator, and a folder keeps every score
that was computed. A second run repeats the same steps, reads these scores, and ends with the same result.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from diswot.budget import NO_LIMIT, Budget, Cost, cost_of, latency_of
from diswot.ranking import ORDERS, How, best_first, combine, measure_candidate
from diswot.scoring import Project, TeacherCache
from diswot.spaces import Space
from diswot.spaces.structures import StructureSpace
from visionkernels import sweeps
from visionkernels.checks import InputError, check, check_choice, check_known
from visionkernels.files import finite_or_none, write_json

__all__ = ["Algorithm", "Candidate", "SearchResult", "search"]

Algorithm: TypeAlias = Literal["aging", "evolution", "random"]
_TERMS = tuple(name for name in ORDERS if name not in ("rank", "zscore"))
_MAX_TRIES = 2000
"""Candidates in a row that the budget may refuse."""
_FIRST_MEMBERS = 10


@dataclass(frozen=True)
class Candidate:
    """A student that was scored."""

    key: str
    score: float
    """Combined score of all terms; NaN for a student that lacks one of them."""
    terms: Mapping[str, float]
    stderr: float
    """Standard error of the sum of the terms, over seeds."""
    seeds: int
    """Number of draws that the score averages over."""
    params: int
    macs: int
    latency_ms: float | None = None
    """Milliseconds for one image; None without a limit in the budget."""


@dataclass(frozen=True)
class SearchResult:
    """All students that were scored, and the order of evaluation."""

    candidates: tuple[Candidate, ...]
    """Each once, from best to worst; finalists, whose scores are of more draws, before the others."""
    history: tuple[str, ...]
    """Keys in the order of evaluation, repeats too."""

    @property
    def best(self) -> Candidate:
        """The best one."""
        return self.candidates[0]


def search(
    space: Space,
    teacher: TeacherCache,
    *,
    budget: Budget = NO_LIMIT,
    algorithm: Algorithm = "aging",
    evaluations: int = 1000,
    terms: Sequence[str] = ("correlation",),
    combined: How = "sum",
    project: Project = "none",
    population: int | None = None,
    tournament: int = 8,
    num_classes: int = 100,
    seed: int = 0,
    round_size: int = 8,
    final: TeacherCache | None = None,
    finalists: int = 10,
    jobs: int = 1,
    out: str | Path | None = None,
) -> SearchResult:
    """Return the students of a space by score, best first, all within the budget.

    "random" draws; "aging" (regularised evolution) changes the best of `tournament` members that are drawn from the
    population, and drops the oldest; "evolution" changes any member twice, and drops the worst; in spaces with an
    initial structure its first members are changes of that one. `population` is 36 for "aging" and 512 for
    "evolution". `terms` are terms of the score or proxies, put together by `combined`: "sum", or over the population as
    ranks or standard scores. `evaluations` counts repeats, which cost nothing. Candidates of a round of
    `round_size` do not depend on each other, so the result does not depend on `jobs`. Where all changes exceed the
    budget, candidates are drawn anew.

    Few seeds are fast and noisy: with `final`, the same teacher with more of them, the best `finalists` are scored
    again and ordered among themselves by that.

    `out` is a folder that keeps settings and scores; call again with the same arguments to resume. Raises RuntimeError
    if 2,000 candidates in a row exceed the budget, and ValueError for invalid settings or a folder of other settings.
    """
    check_choice("algorithm", algorithm, Algorithm)
    check_choice("combined", combined, How)
    check_choice("project", project, Project)
    for term in terms:
        check_known("term", term, _TERMS)
    if population is None:
        population = 512 if algorithm == "evolution" else 36
    counts = {
        "evaluations": evaluations, "round_size": round_size, "tournament": tournament, "finalists": finalists
    }  # fmt: skip
    for name, value in counts.items():
        check(value >= 1, name, value, "at least 1")
    check(population >= 2, "population", population, "at least 2")
    check(bool(terms), "terms", terms, "one or more")
    settings = {
        "space": _described(space), "budget": str(budget), "algorithm": algorithm, "terms": list(terms),
        "combined": combined, "project": project, "population": population, "tournament": tournament,
        "num_classes": num_classes, "seed": seed, "round_size": round_size, "teacher": teacher.digest(),
        "final": final and final.digest(),
    }  # fmt: skip
    folder = None if out is None else _claimed(Path(out), settings)
    students = _Students(space, tuple(terms), combined, project, budget, num_classes, jobs, folder)
    first_round = students.scored_by(teacher, "scores")
    rng = np.random.default_rng(seed)
    history: list[str] = []
    members: list[str] = []
    with tqdm(total=evaluations, desc="searching", disable=None) as bar:
        while len(history) < evaluations:
            count = min(round_size, evaluations - len(history))
            draws: list[Callable[[], str]] = [partial(space.sample, rng)]
            if algorithm == "aging" and len(members) >= population:
                draws.insert(0, partial(_child, space, members, first_round.combined(members), tournament, rng))
            elif algorithm == "evolution" and len(members) > _FIRST_MEMBERS:
                draws.insert(0, partial(_grandchild, space, members, rng))
            elif algorithm == "evolution" and isinstance(space, StructureSpace):
                draws.insert(0, partial(space.mutate, space.initial, rng, replacements=1))
            keys = [students.within_budget(draws) for _ in range(count)]
            first_round.evaluate(keys)
            history += keys
            members += keys
            if algorithm == "aging":
                members = members[-population:]
            elif len(members) > population:
                order = np.argsort(_lowest(first_round.combined(members)), kind="stable")[-population:]
                members = [members[i] for i in sorted(order)]
            bar.update(count)
    candidates = first_round.candidates(list(dict.fromkeys(history)))
    if final is not None:
        last_round = students.scored_by(final, "finals")
        last_round.evaluate([candidate.key for candidate in candidates[:finalists]])
        candidates = [
            *last_round.candidates([candidate.key for candidate in candidates[:finalists]]),
            *candidates[finalists:],
        ]
    result = SearchResult(tuple(candidates), tuple(history))
    if folder is not None:
        write_json(folder / "result.json", finite_or_none({"settings": settings, **asdict(result)}), overwrite=True)
    return result


def _child(space: Space, members: Sequence[str], scores: np.ndarray, tournament: int, rng: np.random.Generator) -> str:
    """Return a neighbour of the best of some members that are drawn with replacement."""
    drawn = rng.integers(0, len(members), tournament)
    return space.mutate(members[int(drawn[_lowest(scores[drawn]).argmax()])], rng)


def _lowest(scores: np.ndarray) -> np.ndarray:
    """Return scores with -infinity for those that are missing."""
    return np.where(np.isnan(scores), -math.inf, scores)


def _grandchild(space: Space, members: Sequence[str], rng: np.random.Generator) -> str:
    return space.mutate(space.mutate(members[int(rng.integers(len(members)))], rng), rng)


class _Students:
    """Costs by key, computed once; a folder keeps latencies beyond the process."""

    def __init__(
        self, space: Space, terms: tuple[str, ...], combined: How, project: Project, budget: Budget, num_classes: int,
        jobs: int, folder: Path | None,
    ) -> None:  # fmt: skip
        self.space, self.terms, self.how, self.project, self.budget = space, terms, combined, project, budget
        self.jobs, self.folder = jobs, folder
        self.costs: dict[str, Cost] = {}
        self.latencies: dict[str, float] = {}
        self.build = partial(_built, space=space, num_classes=num_classes)

    def within_budget(self, draws: Sequence[Callable[[], str]]) -> str:
        """Return the first key drawn that the budget allows; later functions are used where earlier ones find none."""
        for draw in draws:
            for _ in range(_MAX_TRIES):
                key = draw()
                if key not in self.costs:
                    self.costs[key] = cost_of(partial(self.build, key), self.space.input_size)
                if self.budget.allows(self.costs[key]) and self._is_fast(key):
                    return key
        smallest = min(self.costs.values(), key=lambda cost: (cost.params, cost.macs))
        fastest = f"; the fastest takes {min(self.latencies.values()):.3g} ms" if self.latencies else ""
        raise RuntimeError(
            f"budget {self.budget}: none of {_MAX_TRIES} candidates of {self.space.name} in a row is within it; the "
            f"smallest seen has {smallest.params:,} parameters and {smallest.macs:,} multiply-accumulates{fastest}"
        )

    def _is_fast(self, key: str) -> bool:
        if self.budget.latency_ms is None:
            return True
        if key not in self.latencies:
            measure = partial(_latency, build=self.build, input_size=self.space.input_size)
            self.latencies |= self.kept("latencies", measure, [key], jobs=1)
        return self.latencies[key] <= self.budget.latency_ms

    def kept(self, name: str, measure: Callable[[str], Any], keys: Sequence[str], *, jobs: int) -> dict[str, Any]:
        """Return the result of `measure` for each key; results in the folder are not measured again."""
        done = None if self.folder is None else self.folder / f"{name}.jsonl"
        if done is None and jobs == 1:
            return {key: measure(key) for key in keys}
        threads = torch.get_num_threads() if jobs == 1 else 1
        results = sweeps.map(
            measure, keys, jobs=jobs, threads=threads, done=done, key=str, show_progress=False, install="diswot[sweeps]"
        )
        return dict(zip(keys, results, strict=True))

    def scored_by(self, teacher: TeacherCache, name: str) -> "_Round":
        """Return the scores of these students for a teacher; the folder keeps them under `name`."""
        return _Round(self, teacher, name)


class _Round:
    """Scores of all requested keys, computed once."""

    def __init__(self, students: _Students, teacher: TeacherCache, name: str) -> None:
        self.students, self.name, self.seeds = students, name, teacher.seeds
        self.results: dict[str, dict[str, Any]] = {}
        self._measure = partial(
            _measured, build=students.build, teacher=teacher, terms=students.terms, project=students.project
        )

    def evaluate(self, keys: Sequence[str]) -> None:
        """Score those keys that were not scored yet."""
        new = [key for key in dict.fromkeys(keys) if key not in self.results]
        results = self.students.kept(self.name, self._measure, new, jobs=self.students.jobs)
        for key, result in results.items():
            try:
                self.results[key] = {
                    name: {term: float(result[name][term]) for term in self.students.terms}
                    for name in ("scores", "stderr")
                }
            except (KeyError, TypeError, ValueError) as error:
                where = f"{self.students.folder}/{self.name}.jsonl"
                raise InputError(f"{where} has {result!r} for {key}; remove that line") from error

    def combined(self, keys: Sequence[str]) -> np.ndarray:
        """Return the combined scores of keys among each other; NaN for those that lack one."""
        table = [[self.results[key]["scores"][term] for key in keys] for term in self.students.terms]
        return combine(table, how=self.students.how)

    def candidates(self, keys: Sequence[str]) -> list[Candidate]:
        """Return students, best first; NaN last, -infinity before it."""
        scores = self.combined(keys)
        return [self._candidate(keys[i], float(scores[i])) for i in best_first(scores)]

    def _candidate(self, key: str, score: float) -> Candidate:
        result, cost = self.results[key], self.students.costs[key]
        stderr = math.sqrt(sum(error**2 for error in result["stderr"].values()))
        latency = self.students.latencies.get(key)
        return Candidate(key, score, result["scores"], stderr, self.seeds, cost.params, cost.macs, latency)


def _built(key: str, *, space: Space, num_classes: int) -> nn.Module:
    return space.build(key, num_classes=num_classes)


def _latency(key: str, *, build: Callable[[str], nn.Module], input_size: tuple[int, int, int]) -> float:
    return latency_of(build(key), input_size)


def _measured(
    key: str, *, build: Callable[[str], nn.Module], teacher: TeacherCache, terms: tuple[str, ...], project: Project
) -> dict[str, Any]:
    """Return scores and standard errors for JSON, in which numbers that are not finite are strings."""
    measured = measure_candidate((key, partial(build, key)), teacher=teacher, orders=terms, project=project)
    return {
        name: {
            term: value if math.isfinite(value) else str(value)
            for term, value in measured[name].items()
            if term in terms
        }
        for name in ("scores", "stderr")
    }


def _described(space: Space) -> str:
    """Return the name of a space with its options, which decide what its keys mean."""
    options = {name: value for name, value in vars(space).items() if not name.startswith("_")}
    return f"{space.name} {json.dumps(options, sort_keys=True, default=str)}"


def _claimed(out: Path, settings: Mapping[str, Any]) -> Path:
    """Return the folder, which from now on is of these settings. Raises ValueError if it is of others."""
    path = out / "settings.json"
    plain = json.loads(json.dumps(settings))
    if path.exists():
        try:
            kept = dict(json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise InputError(f"{path} is damaged: {error}; give another folder") from error
        other = [name for name in {**kept, **plain} if kept.get(name) != plain.get(name)]
        if other:
            raise InputError(f"out={str(out)!r} holds a search with other {', '.join(other)}; give another folder")
    elif out.is_dir() and any(out.iterdir()):
        raise InputError(f"out={str(out)!r} is a folder of other files; give a new one")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, plain)
    return out
