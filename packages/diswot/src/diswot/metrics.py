"""Agreement of two orders: rank correlations, their intervals, partial correlations, and precision of the best few."""

# n candidates; `predicted` and `true` are their scores, higher is better

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from scipy import stats

from visionkernels.checks import InputError, check

__all__ = [
    "BestInTop",
    "Interval",
    "TopShare",
    "best_in_top",
    "kendall",
    "kendall_interval",
    "partial_kendall",
    "pearson",
    "rank_difference",
    "ranks",
    "same_sign_ratio",
    "spearman",
    "top_precision",
]

Values: TypeAlias = Sequence[float] | np.ndarray


def kendall(predicted: Values, true: Values) -> float:
    """Kendall's tau-b, in [-1, 1]; NaN where one side is constant or has NaN. Raises ValueError for other lengths."""
    predicted, true = _checked(predicted, true)
    if len(predicted) < 2 or _is_constant(predicted) or _is_constant(true):
        return math.nan
    return float(stats.kendalltau(predicted, true).statistic)


def spearman(predicted: Values, true: Values) -> float:
    """Spearman's rho, in [-1, 1]; NaN where one side is constant or has NaN. Raises ValueError for other lengths."""
    predicted, true = _checked(predicted, true)
    return pearson(stats.rankdata(predicted), stats.rankdata(true))


def pearson(predicted: Values, true: Values) -> float:
    """Pearson's r, in [-1, 1]; NaN where one side is constant or not finite. Raises ValueError for other lengths."""
    predicted, true = _checked(predicted, true)
    if len(predicted) < 2 or _is_constant(predicted) or _is_constant(true):
        return math.nan
    if not np.isfinite(predicted).all() or not np.isfinite(true).all():
        return math.nan
    # the largest number becomes one, so that no square overflows
    centred = [values / max(np.abs(values).max(), 1e-300) for values in (predicted, true)]
    centred = [values - values.mean() for values in centred]
    lengths = [np.sqrt(np.square(values).sum()) for values in centred]
    return float(np.clip(centred[0] @ centred[1] / max(lengths[0] * lengths[1], 1e-300), -1, 1))


def partial_kendall(predicted: Values, true: Values, given: Values) -> float:
    """Kendall's tau of two orders once a third one, such as size, is known.

    (t_pt - t_pg t_tg) / sqrt((1 - t_pg^2) (1 - t_tg^2)); NaN where the third one says all, or one side is constant.
    """
    both, ours, theirs = kendall(predicted, true), kendall(predicted, given), kendall(true, given)
    rest = (1 - ours**2) * (1 - theirs**2)
    return (both - ours * theirs) / math.sqrt(rest) if rest > 1e-12 else math.nan


class Interval(NamedTuple):
    """Percentiles of a bootstrap."""

    low: float
    high: float


def kendall_interval(
    predicted: Values, true: Values, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> Interval:
    """Return the percentiles of tau-b over candidates drawn with replacement; NaN where tau does not exist.

    Time and memory grow with n squared: at most 5,000 candidates are drawn from, the first ones of a shuffled list.
    """
    predicted, true = _checked(predicted, true)
    if not 0 < level < 1 or draws < 1:
        raise InputError(f"level={level} must be in (0, 1) and draws={draws} at least 1")
    if math.isnan(kendall(predicted, true)):
        return Interval(math.nan, math.nan)
    random = np.random.default_rng(seed)
    if (size := len(predicted)) > 5000:
        chosen = random.permutation(size)[:5000]
        predicted, true, size = predicted[chosen], true[chosen], 5000
    signs = [np.sign(ranks[:, None] - ranks).astype(np.float32) for ranks in map(stats.rankdata, (predicted, true))]
    # how often each candidate is drawn, as multinomial counts
    counts = random.multinomial(size, np.full(size, 1 / size), draws).astype(np.float32)
    agreeing, ours, theirs = (
        ((counts @ pairs) * counts).sum(1) for pairs in (signs[0] * signs[1], np.abs(signs[0]), np.abs(signs[1]))
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        taus = agreeing / np.sqrt(ours * theirs)
    taus = taus[np.isfinite(taus)]
    low, high = np.quantile(taus, [(1 - level) / 2, (1 + level) / 2]) if taus.size else (math.nan, math.nan)
    return Interval(float(low), float(high))


def ranks(values: Values) -> np.ndarray:
    """Return places from 1, the largest value; equal values in the order in which they come."""
    places = np.empty(len(values), dtype=np.int64)
    places[np.argsort(-np.asarray(values, dtype=np.float64), kind="stable")] = np.arange(1, len(values) + 1)
    return places


@dataclass(frozen=True)
class TopShare:
    """Agreement on the best and the worst k of n."""

    ratio: float
    k: int
    top_precision: float
    """Share of the predicted best k that are the true best k."""
    bottom_precision: float
    top_kendall: float
    """Kendall's tau within the predicted best k."""
    bottom_kendall: float


def top_precision(predicted: Values, true: Values, ratios: Sequence[float] = (0.01, 0.05, 0.1, 0.5)) -> list[TopShare]:
    """Return how many of the predicted best (and worst) k = int(ratio * n) are so; k below 1 is left out.

    Raises ValueError for ratios outside 0 to 1.
    """
    predicted, true = _checked(predicted, true)
    _check_ratios(ratios)
    by_prediction, by_truth = np.argsort(ranks(predicted)), np.argsort(ranks(true))
    shares_by_ratio = []
    for ratio in ratios:
        k = int(ratio * len(predicted))
        if k >= 1:
            top, bottom = by_prediction[:k], by_prediction[-k:]
            shares = [
                len(np.intersect1d(ours, theirs)) / k for ours, theirs in ((top, by_truth[:k]), (bottom, by_truth[-k:]))
            ]
            shares_by_ratio.append(
                TopShare(ratio, k, *shares, *(kendall(predicted[chosen], true[chosen]) for chosen in (top, bottom)))
            )
    return shares_by_ratio


class BestInTop(NamedTuple):
    """Where the predicted best k of n truly stand."""

    ratio: float
    k: int
    best: int
    """The best true place among them, from 1."""
    worst: int


def best_in_top(predicted: Values, true: Values, ratios: Sequence[float] = (0.01, 0.05, 0.1, 0.5)) -> list[BestInTop]:
    """Return the best and the worst true place among the predicted best k = int(ratio * n); k below 1 is left out.

    Raises ValueError for ratios outside 0 to 1.
    """
    predicted, true = _checked(predicted, true)
    _check_ratios(ratios)
    true_ranks = ranks(true)[np.argsort(ranks(predicted))]
    sizes = [(ratio, int(ratio * len(true))) for ratio in ratios]
    return [BestInTop(ratio, k, int(true_ranks[:k].min()), int(true_ranks[:k].max())) for ratio, k in sizes if k >= 1]


def rank_difference(predicted: Values, true: Values) -> float:
    """Return half the mean distance of places, as the official code counts it."""
    predicted, true = _checked(predicted, true)
    return float(np.abs(ranks(predicted) - ranks(true)).mean() / 2) if len(true) else math.nan


def same_sign_ratio(predicted: Values, true: Values) -> float:
    """Return the share of candidates whose two values have one sign; the official code calls it a ratio of pairs."""
    predicted, true = _checked(predicted, true)
    return float((predicted * true > 0).sum() / (len(true) + 1e-9))


def _checked(*values: Values) -> list[np.ndarray]:
    arrays = [np.asarray(value, dtype=np.float64) for value in values]
    if any(array.ndim != 1 or len(array) != len(arrays[0]) for array in arrays):
        raise InputError(
            f"values have shapes {', '.join(str(array.shape) for array in arrays)}; they must be lists of one length"
        )
    return arrays


def _check_ratios(ratios: Sequence[float]) -> None:
    check(all(0 <= ratio <= 1 for ratio in ratios), "ratios", tuple(ratios), "from 0 to 1")


def _is_constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all()) or bool(np.isnan(values).any())
