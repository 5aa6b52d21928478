"""Rank metrics against SciPy and against counting pairs."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diswot import metrics

few = settings(max_examples=60, deadline=None)
# whole numbers, so that there are ties
values = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=0, max_size=12)


def counted(predicted, true):
    """Return tau-b by going through all pairs."""
    agreeing = ours = theirs = 0
    for i in range(len(true)):
        for j in range(i):
            a, b = (float(np.sign(each[i] - each[j])) for each in (predicted, true))
            agreeing, ours, theirs = agreeing + a * b, ours + a * a, theirs + b * b
    return agreeing / math.sqrt(ours * theirs) if ours * theirs else math.nan


def close(value, expected):
    assert value == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.fixture
def pair():
    random = np.random.default_rng(0)
    true = random.standard_normal(20).round(1)
    return (true + random.standard_normal(20)).round(1), true


class TestKendall:
    @few
    @given(values)
    def test_reference(self, pairs):
        predicted, true = ([float(pair[i]) for pair in pairs] for i in (0, 1))
        close(metrics.kendall(predicted, true), counted(predicted, true))

    def test_infinities_are_values(self):
        close(metrics.kendall([-math.inf, 0, math.inf], [1, 2, 3]), 1)
        close(metrics.kendall([-math.inf, -math.inf, 3, 4], [1, 2, 3, 4]), counted([0, 0, 3, 4], [1, 2, 3, 4]))


@few
@given(values)
def test_correlations_reference(pairs):
    predicted, true = ([float(pair[i]) for pair in pairs] for i in (0, 1))
    rank = linear = math.nan
    if len(pairs) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rank, linear = stats.spearmanr(predicted, true).statistic, np.corrcoef(predicted, true)[0, 1]
    close(metrics.spearman(predicted, true), rank)
    close(metrics.pearson(predicted, true), linear)


class TestSpearman:
    def test_infinities_are_values(self):
        close(metrics.spearman([-math.inf, 0, 5, math.inf], [1, 2, 3, 5]), 1)


class TestPearson:
    @pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e200, 1e307])
    def test_any_scale(self, scale, pair):
        predicted, true = pair
        assert metrics.pearson(predicted * scale, true) == pytest.approx(np.corrcoef(predicted, true)[0, 1], rel=1e-6)

    def test_infinities(self):
        assert math.isnan(metrics.pearson([1, 2, math.inf], [1, 2, 3]))
        assert math.isnan(metrics.pearson([1, 2, 3], [-math.inf, 2, 3]))


@pytest.mark.parametrize("metric", [metrics.kendall, metrics.spearman, metrics.pearson])
class TestCorrelations:
    @pytest.mark.parametrize("few_values", [([], []), ([1.0], [2.0])], ids=["none", "one"])
    def test_too_few(self, metric, few_values):
        assert math.isnan(metric(*few_values))

    def test_two(self, metric):
        assert metric([1, 2], [5, 9]) == pytest.approx(1)
        assert metric([1, 2], [9, 5]) == pytest.approx(-1)

    def test_constant(self, metric):
        assert math.isnan(metric([2, 2, 2], [1, 2, 3]))
        assert math.isnan(metric([1, 2, 3], [2, 2, 2]))
        assert math.isnan(metric([-math.inf] * 3, [1, 2, 3]))

    def test_nan(self, metric):
        assert math.isnan(metric([1, math.nan, 3], [1, 2, 3]))

    def test_errors(self, metric):
        with pytest.raises(ValueError, match=r"values have shapes \(2,\), \(3,\); they must be lists of one length"):
            metric([1, 2], [1, 2, 3])
        with pytest.raises(ValueError, match=r"shapes \(2, 2\)"):
            metric(np.eye(2), np.eye(2))


class TestPartialKendall:
    def test_reference(self, pair):
        predicted, true = pair
        given_ = np.round(true * 2 + np.random.default_rng(1).standard_normal(20), 1)
        both, ours, theirs = counted(predicted, true), counted(predicted, given_), counted(true, given_)
        expected = (both - ours * theirs) / math.sqrt((1 - ours**2) * (1 - theirs**2))
        close(metrics.partial_kendall(predicted, true, given_), expected)

    def test_the_third_says_all_or_nothing(self, pair):
        predicted, true = pair
        assert math.isnan(metrics.partial_kendall(predicted, true, true))
        assert math.isnan(metrics.partial_kendall(predicted, true, predicted))
        assert math.isnan(metrics.partial_kendall(predicted, true, np.ones(20)))
        assert math.isnan(metrics.partial_kendall([], [], []))


class TestKendallInterval:
    def loop(self, predicted, true, draws, seed, level):
        random = np.random.default_rng(seed)
        size = len(true)
        found = []
        for counts in random.multinomial(size, np.full(size, 1 / size), draws):
            chosen = np.repeat(np.arange(size), counts)
            found.append(metrics.kendall(predicted[chosen], true[chosen]))
        kept = [each for each in found if not math.isnan(each)]
        return np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])

    @pytest.mark.parametrize(("size", "level"), [(20, 0.95), (4, 0.5)])
    def test_reference(self, pair, size, level):
        predicted, true = (each[:size] for each in pair)
        found = metrics.kendall_interval(predicted, true, draws=150, seed=3, level=level)
        np.testing.assert_allclose(found, self.loop(predicted, true, 150, 3, level), atol=1e-6)

    def test_infinities(self, pair):
        predicted, true = pair
        lowest = predicted.argmin()
        predicted[lowest] = predicted.min() - 1
        with_infinity = np.where(np.arange(20) == lowest, -np.inf, predicted)
        assert metrics.kendall_interval(with_infinity, true) == metrics.kendall_interval(predicted, true)

    @pytest.mark.parametrize("predicted", [[], [1.0], [2.0, 2.0, 2.0], [1.0, math.nan, 2.0]])
    def test_nothing_to_tell(self, predicted):
        assert all(map(math.isnan, metrics.kendall_interval(predicted, np.arange(len(predicted)))))

    def test_two_candidates(self):
        assert metrics.kendall_interval([1, 2], [3, 4]) == (1, 1)

    def test_more_candidates_narrow_it(self):
        random = np.random.default_rng(0)
        widths = []
        for size in (20, 600):
            true = random.standard_normal(size)
            low, high = metrics.kendall_interval(true + random.standard_normal(size), true, draws=300)
            assert low < 0.5 < high or size == 20
            widths.append(high - low)
        assert widths[1] < widths[0] / 2

    @pytest.mark.slow
    def test_many_candidates_are_thinned(self):
        true = np.arange(6000.0)
        assert metrics.kendall_interval(true, true, draws=20) == (1, 1)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"level=1 must be in \(0, 1\)"):
            metrics.kendall_interval([1, 2], [1, 2], level=1)
        with pytest.raises(ValueError, match="draws=0"):
            metrics.kendall_interval([1, 2], [1, 2], draws=0)


class TestRanks:
    def test_largest_is_first(self):
        assert metrics.ranks([0.5, 3, -math.inf, 1]).tolist() == [3, 1, 4, 2]

    def test_ties_and_nan(self):
        assert metrics.ranks([2, math.nan, 2, 5]).tolist() == [2, 4, 3, 1]
        assert metrics.ranks([]).tolist() == []


class TestTopPrecision:
    def test_by_hand(self):
        true = np.arange(10.0)
        predicted = true.copy()
        predicted[[9, 0]] = predicted[[0, 9]]
        (half,) = metrics.top_precision(predicted, true, (0.01, 0.5))
        assert (half.ratio, half.k, half.top_precision, half.bottom_precision) == (0.5, 5, 0.8, 0.8)
        # among 8, 7, 6, 5 in order, and 0 at the head
        close(half.top_kendall, counted(predicted[[0, 8, 7, 6, 5]], true[[0, 8, 7, 6, 5]]))
        close(half.bottom_kendall, counted(predicted[[9, 1, 2, 3, 4]], true[[9, 1, 2, 3, 4]]))

    def test_k_is_rounded_down_and_dropped_below_one(self):
        assert [each.k for each in metrics.top_precision(range(19), range(19))] == [1, 9]
        assert metrics.top_precision([], []) == []

    def test_all(self):
        (each,) = metrics.top_precision([1, 2, 3], [3, 1, 2], (1,))
        assert (each.top_precision, each.bottom_precision) == (1, 1)

    @pytest.mark.parametrize("ratio", [1.5, -0.1])
    def test_errors(self, ratio):
        with pytest.raises(ValueError, match=r"ratios=.* must be from 0 to 1"):
            metrics.top_precision([1, 2], [1, 2], (ratio,))
        with pytest.raises(ValueError, match=r"ratios=.* must be from 0 to 1"):
            metrics.best_in_top([1, 2], [1, 2], (ratio,))


class TestBestInTop:
    def test_by_hand(self):
        predicted, true = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [3, 9, 1, 0, 4, 5, 6, 7, 8, 2]
        assert metrics.best_in_top(predicted, true, (0.05, 0.1, 0.3, 1)) == [
 (0.1, 1, 7, 7), (0.3, 3, 1, 9), (1, 10, 1, 10)
]  # fmt: skip


class TestRankDifference:
    def test_by_hand(self):
        assert metrics.rank_difference([1, 2, 3, 4], [4, 2, 3, 1]) == (3 + 3) / 4 / 2
        assert metrics.rank_difference([1, 2], [1, 2]) == 0
        assert math.isnan(metrics.rank_difference([], []))


class TestSameSignRatio:
    def test_by_hand(self):
        assert metrics.same_sign_ratio([1, -1, 0, 2], [3, -2, 5, -1]) == pytest.approx(0.5)
        assert metrics.same_sign_ratio([], []) == 0
