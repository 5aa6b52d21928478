"""Scores of many students, orders made of them, and how each order agrees with a table of real accuracies."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from scipy import stats
from torch import nn

from diswot.initialisation import generator_for
from diswot.metrics import kendall, kendall_interval, partial_kendall, pearson, spearman
from diswot.proxies import PROXIES, compute
from diswot.scoring import TERMS, Project, TeacherCache
from visionkernels.checks import InputError, check_choice, check_known

__all__ = [
    "DEFAULT_ORDERS",
    "ORDERS",
    "Agreement",
    "How",
    "Ranking",
    "best_first",
    "combine",
    "measure_candidate",
    "rank",
]

DEFAULT_ORDERS = (
    "diswot", "semantic", "relation", "channel", "rank", "correlation", "correlation+params", "snip", "params",
)  # fmt: skip
_SUMS: Mapping[str, tuple[str, ...]] = {"diswot": ("semantic", "relation")}
_OVER_SETS: Mapping[str, tuple[str, ...]] = {"rank": ("semantic", "channel"), "zscore": ("semantic", "channel")}
ORDERS = (*_SUMS, *TERMS, *_OVER_SETS, *PROXIES)
"""Names of orders: diswot (the sum of semantic and relation), the terms of the score, rank and zscore
(semantic and channel added as ranks or as standard scores), and every proxy. "a+b" adds a and b as ranks."""
# neither weights nor images change them
_COUNTS = ("params", "flops")

How: TypeAlias = Literal["sum", "rank", "zscore"]
Candidates: TypeAlias = Mapping[str, nn.Module | Callable[[], nn.Module]]


@dataclass(frozen=True)
class Agreement:
    """Agreement of one order with the true one; intervals hold 95 % of bootstrap draws."""

    proxy: str
    kendall: float
    spearman: float
    pearson: float
    kendall_low: float
    kendall_high: float
    kendall_given_params: float
    """Partial Kendall given the number of parameters: what the order adds to it."""
    seconds: float
    """To compute it for all candidates."""


@dataclass(frozen=True)
class Ranking:
    """Scores by order and candidate, means over seeds; higher is better, NaN is last."""

    keys: tuple[str, ...]
    scores: Mapping[str, tuple[float, ...]]
    stderr: Mapping[str, tuple[float, ...]]
    seconds: Mapping[str, float]

    def order(self, proxy: str) -> list[str]:
        """Return the candidates from best to worst; NaN last, -infinity before it."""
        return [self.keys[i] for i in best_first(np.array(self.scores[proxy]))]

    def agreements(self, truth: Mapping[str, float]) -> list[Agreement]:
        """Compare each order with true figures of the candidates. Raises KeyError for a candidate without one."""
        true = np.array([truth[key] for key in self.keys])
        params = np.array(self.scores["params"])
        rows = []
        for proxy, values in self.scores.items():
            ours = np.array(values)
            low, high = kendall_interval(ours, true)
            rows.append(
                Agreement(
                    proxy, kendall(ours, true), spearman(ours, true), pearson(ours, true), low, high,
                    partial_kendall(ours, true, params), self.seconds[proxy],
                )
            )  # fmt: skip
        return rows


def best_first(scores: np.ndarray) -> np.ndarray:
    """Return places of scores from best to worst; NaN last, -infinity before it, equal ones as they come."""
    return np.lexsort((-scores, np.isnan(scores)))


def rank(
    candidates: Candidates,
    teacher: TeacherCache,
    orders: Sequence[str] = DEFAULT_ORDERS,
    *,
    project: Project = "none",
    jobs: int = 1,
) -> Ranking:
    """Score all candidates for a teacher; its batches, seeds and `init` serve the proxies too.

    Candidates are networks by key, or functions that build them (of a module, where `jobs` is not 1). The number of
    parameters is always among the scores. Raises ValueError for no candidates, unknown names, and what `score` raises.
    """
    if not candidates:
        raise InputError("candidates are none; give one or more")
    if not orders:
        raise InputError(f"orders are none; give one or more of {', '.join(ORDERS)}")
    for part in (part for name in orders for part in _parts(name)):
        check_known("order", part, ORDERS)
    check_choice("project", project, Project)
    measure = partial(measure_candidate, teacher=teacher, orders=tuple(orders), project=project)
    # neighbours have much in common, which is computed once
    items = sorted(candidates.items())
    if jobs == 1:
        from tqdm import tqdm

        results = [measure(item) for item in tqdm(items, desc="scoring", disable=None, leave=False)]
    else:
        from visionkernels import sweeps

        results = sweeps.map(measure, items, jobs=jobs, description="scoring", install="diswot[sweeps]")
    by_key = dict(zip((key for key, _ in items), results, strict=True))
    results = [by_key[key] for key in candidates]
    names = list(dict.fromkeys(name for result in results for name in result["scores"]))
    scores = {name: tuple(result["scores"][name] for result in results) for name in names}
    stderr = {name: tuple(result["stderr"].get(name, math.nan) for result in results) for name in names}
    seconds = {name: sum(result["seconds"][name] for result in results) for name in names}
    for name in orders:
        if name not in scores:
            scores[name] = _combined(name, scores)
            stderr[name] = (math.nan,) * len(items)
            leaves = _leaves(name)
            # one pass gives all terms
            passes = [seconds[leaf] for leaf in leaves if leaf in (*_SUMS, *TERMS)][:1]
            seconds[name] = sum(passes) + sum(seconds[leaf] for leaf in leaves if leaf in PROXIES)
    wanted = [*dict.fromkeys((*orders, "params"))]
    return Ranking(tuple(candidates), *({name: table[name] for name in wanted} for table in (scores, stderr, seconds)))  # type: ignore[arg-type]


def _combined(name: str, scores: Mapping[str, tuple[float, ...]]) -> tuple[float, ...]:
    if name in scores:
        return scores[name]
    how: Literal["rank", "zscore"] = "zscore" if name == "zscore" else "rank"
    return tuple(combine([_combined(part, scores) for part in _parts(name)], how=how).tolist())


def combine(scores: Sequence[Sequence[float]], *, how: How) -> np.ndarray:
    """Add several scores of the same candidates: as they are, as ranks (1 is worst), or as standard scores.

    A candidate with NaN in one of them is NaN.
    """
    check_choice("how", how, How)
    table = np.array(scores, dtype=np.float64)
    for row in table:
        finite = row[np.isfinite(row)]
        if how == "rank":
            row[~np.isnan(row)] = stats.rankdata(row[~np.isnan(row)])
        elif how == "zscore" and finite.size:
            row[:] = (row - finite.mean()) / (finite.std() or 1)
    return table.sum(0)


def measure_candidate(
    item: tuple[str, Any], *, teacher: TeacherCache, orders: Sequence[str], project: Project = "none"
) -> dict[str, dict[str, float]]:
    """Return scores, standard errors and seconds of one candidate (key, network) by name, without orders over sets."""
    key, candidate = item
    model = candidate if isinstance(candidate, nn.Module) else _built(candidate, key)
    scores: dict[str, float] = {}
    stderr: dict[str, float] = {}
    seconds: dict[str, float] = {}
    parts = {part for name in orders for leaf in _leaves(name) for part in (*_SUMS.get(leaf, ()), leaf)}
    terms = [term for term in TERMS if term in parts]
    if terms:
        score = teacher.score(model, key=key, terms=terms, project=project)
        by_seed = dict(score.by_seed)
        by_seed |= {
            name: tuple(map(sum, zip(*(by_seed[term] for term in sums), strict=True)))
            for name, sums in _SUMS.items()
            if name in parts
        }
        for name, values in by_seed.items():
            scores[name], stderr[name] = _mean(values)
            # one forward pass gives all terms
            seconds[name] = score.seconds
    groups: dict[Any, list[str]] = {}
    for name in PROXIES:
        if name in parts or name == "params":
            groups.setdefault(PROXIES[name], []).append(name)  # one pass gives all proxies of a group
    for names in groups.values():
        start = time.perf_counter()
        values_by_seed = _proxies(names, model, key, teacher)
        for name in names:
            scores[name], stderr[name] = _mean([values[name] for values in values_by_seed])
            seconds[name] = time.perf_counter() - start
    return {"scores": scores, "stderr": stderr, "seconds": seconds}


def _built(build: Callable[[], nn.Module], key: str) -> nn.Module:
    # parameters that `initialise` leaves as they are, such as embeddings, so depend on the key alone as well
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(0, key).initial_seed())
        return build()


def _proxies(names: Sequence[str], model: nn.Module, key: str, teacher: TeacherCache) -> list[dict[str, float]]:
    seeds = 1 if set(names) <= set(_COUNTS) else teacher.seeds
    batches, options = teacher.batches, {"init": teacher.init, "key": key, "draws": teacher.draws}
    return [compute(names, model, *batches[seed % len(batches)], seed=seed, **options) for seed in range(seeds)]  # type: ignore[arg-type]


def _parts(name: str) -> tuple[str, ...]:
    """Return the parts of an order over a set; another order is its own part."""
    return _OVER_SETS.get(name) or tuple(name.split("+"))


def _leaves(name: str) -> list[str]:
    """Return the scores of a single candidate that an order needs."""
    parts = _parts(name)
    return [name] if parts == (name,) else [leaf for part in parts for leaf in _leaves(part)]


def _mean(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2 or not np.isfinite(values).all():
        return float(np.mean(values)), math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
