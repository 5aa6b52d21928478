"""Orders of students, alone and put together, and how they agree with the truth."""

import math
import warnings
from functools import partial

import numpy as np
import pytest
import timm
import torch

from diswot import metrics, proxies
from diswot.ranking import (
    DEFAULT_ORDERS,
    ORDERS,
    Ranking,
    best_first,
    combine,
    measure_candidate,
    rank,
)
from diswot.scoring import TeacherCache

KEYS = ("111", "113", "131", "311")


@pytest.fixture
def cache(s0, batch):
    return TeacherCache(s0("131"), [batch], 2, "kaiming")


@pytest.fixture
def candidates(s0):
    return {key: s0(key) for key in KEYS}


def ranking_of(**scores):
    count = len(next(iter(scores.values())))
    keys = tuple(f"n{i}" for i in range(count))
    scores = {name: tuple(map(float, values)) for name, values in scores.items()}
    return Ranking(keys, scores, dict.fromkeys(scores, (math.nan,) * count), dict.fromkeys(scores, 1.0))


class TestRank:
    def test_scores_are_those_of_the_cache(self, cache, candidates):
        found = rank(candidates, cache)
        assert found.keys == KEYS
        assert list(found.scores) == list(DEFAULT_ORDERS)
        for place, key in enumerate(KEYS):
            score = cache.score(candidates[key], key=key, terms=("semantic", "relation", "channel", "correlation"))
            for term, value in score.terms.items():
                assert found.scores[term][place] == pytest.approx(value)
            total = cache.score(candidates[key], key=key)
            assert found.scores["diswot"][place] == pytest.approx(total.total)
            assert found.stderr["diswot"][place] == pytest.approx(total.stderr)
            assert found.scores["params"][place] == sum(each.numel() for each in candidates[key].parameters())

    def test_proxies_are_means_over_seeds(self, cache, candidates, batch):
        found = rank(candidates, cache, ("snip", "nwot"))
        for name in ("snip", "nwot"):
            values = [
                proxies.compute(name, candidates["113"], *batch, init="kaiming", seed=seed, key="113")[name]
                for seed in range(2)
            ]
            assert found.scores[name][1] == pytest.approx(sum(values) / 2)
            assert found.stderr[name][1] == pytest.approx(abs(values[0] - values[1]) / 2)

    def test_a_batch_for_each_seed(self, s0, candidates):
        batches = [(torch.randn(4, 3, 16, 16), torch.arange(4)) for _ in range(2)]
        found = rank(candidates, TeacherCache(s0(), batches, 2), ("snip",))
        values = [
            proxies.compute("snip", candidates["111"], *batches[i], init="gaussian", seed=i, key="111") for i in (0, 1)
        ]
        assert found.scores["snip"][0] == pytest.approx(sum(each["snip"] for each in values) / 2)

    def test_sums_of_ranks(self, cache, candidates):
        found = rank(candidates, cache, ("rank", "semantic", "channel", "zscore", "snip+params", "rank+params"))
        places = {name: np.argsort(np.argsort(found.scores[name])) + 1.0 for name in ("semantic", "channel", "params")}
        assert found.scores["rank"] == tuple(places["semantic"] + places["channel"])
        standard = [(np.array(found.scores[name]) - np.mean(found.scores[name])) / np.std(found.scores[name])
                    for name in ("semantic", "channel")]  # fmt: skip
        np.testing.assert_allclose(found.scores["zscore"], standard[0] + standard[1])
        expected = combine([found.scores["rank"], found.scores["params"]], how="rank")
        assert found.scores["rank+params"] == tuple(expected)
        snip = rank(candidates, cache, ("snip",)).scores["snip"]
        assert found.scores["snip+params"] == tuple(combine([snip, found.scores["params"]], how="rank"))

    @pytest.mark.parametrize("order", ["diswot+params", "zscore+snip", "rank+zscore", "params+params"])
    def test_orders_of_orders(self, cache, candidates, order):
        found = rank(candidates, cache, (order,))
        assert set(found.scores) == {order, "params"}
        assert all(map(math.isfinite, found.scores[order]))
        assert found.seconds[order] > 0

    def test_time_counts_a_pass_once(self, cache, candidates):
        found = rank(candidates, cache, ("semantic", "channel", "rank"))
        assert found.seconds["rank"] == found.seconds["semantic"] == found.seconds["channel"]

    @pytest.mark.slow  # two processes import torch
    def test_jobs(self, s0, cache):
        builders = {key: partial(_build_s0, key) for key in KEYS}
        orders = ("diswot", "channel", "rank", "snip", "zen", "params")
        one, two = rank(builders, cache, orders), rank(builders, cache, orders, jobs=2)
        assert one.scores == two.scores
        np.testing.assert_equal(one.stderr, two.stderr)
        assert one.scores == rank({key: s0(key) for key in KEYS}, cache, orders).scores

    def test_builders_depend_on_keys_alone(self, batch):
        """Embeddings, which nothing draws anew, are the same whoever was built before."""
        vit = partial(timm.create_model, "test_vit", img_size=16, num_classes=5)
        cache = TeacherCache(vit(), [batch], 1)
        first = rank({"a": vit, "b": vit}, cache, ("diswot",))
        torch.rand(3)
        second = rank({"b": vit, "a": vit}, cache, ("diswot",))
        assert first.scores["diswot"] == second.scores["diswot"][::-1]

    def test_nan_is_last_and_warned_of(self, batch, s0):
        broken = s0()
        broken.conv1.weight.data.fill_(math.nan)
        cache = TeacherCache(s0("131"), [batch], 1, "keep")
        with pytest.warns(RuntimeWarning, match="(semantic|channel) is nan"):
            found = rank({"broken": broken, "whole": s0()}, cache, ("semantic", "rank"))
        assert found.order("semantic") == ["whole", "broken"]
        assert found.order("rank") == ["whole", "broken"]
        assert math.isnan(found.scores["rank"][0])

    def test_singular_kernels(self, s0, candidates):
        """All images are one, so that NWOT's kernel is singular for every seed."""
        images = torch.randn(1, 3, 16, 16).expand(4, -1, -1, -1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = rank(candidates, TeacherCache(s0(), [(images, torch.arange(4))], 2), ("nwot", "nwot+params"))
        assert found.scores["nwot"] == (-math.inf,) * 4
        assert all(map(math.isnan, found.stderr["nwot"]))
        assert all(map(math.isfinite, found.scores["nwot+params"]))

    def test_errors(self, s0, cache, candidates):
        with pytest.raises(ValueError, match="candidates are none"):
            rank({}, cache)
        with pytest.raises(ValueError, match="orders are none; give one or more of diswot, semantic"):
            rank(candidates, cache, ())
        for orders, name in (
            (["snap"], "snap"),
            (["snip+parms"], "parms"),
            (["+snip"], ""),
            (["semantic "], "semantic "),
        ):
            with pytest.raises(ValueError, match=f"unknown order {name!r}"):
                rank(candidates, cache, orders)
        with pytest.raises(ValueError, match="project='crop' must be one of"):
            rank(candidates, cache, project="crop")
        wide = {"wide": timm.create_model("cifar_resnet8x4", num_classes=5)}
        with pytest.raises(ValueError, match="64"):
            rank(wide, cache, ("semantic",))
        assert rank(wide, cache, ("semantic",), project="pad").scores["semantic"][0] < 0


def _build_s0(key):
    import timm

    import diswot.networks  # noqa: F401 - registers the models

    return timm.create_model(f"s0_{key}", num_classes=5)


class TestMeasureCandidate:
    def test_only_what_is_asked_for(self, s0, cache):
        found = measure_candidate(("111", s0()), teacher=cache, orders=("relation",))
        assert set(found["scores"]) == set(found["seconds"]) == {"relation", "params"}

    def test_leaves_the_network(self, s0, cache):
        model = s0()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        measure_candidate(("111", model), teacher=cache, orders=ORDERS)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class TestOrder:
    def test_nan_is_last_and_infinity_before_it(self):
        ranking = ranking_of(x=[math.nan, 1, -math.inf, 3, 1, -5, math.nan])
        assert ranking.order("x") == ["n3", "n1", "n4", "n5", "n2", "n0", "n6"]

    def test_best_first(self):
        assert best_first(np.array([1.0, 1.0, np.nan, 2.0, -np.inf])).tolist() == [3, 0, 1, 4, 2]


class TestAgreements:
    def test_are_the_metrics(self):
        random = np.random.default_rng(0)
        true, params = random.standard_normal(12), random.standard_normal(12)
        ours = true + random.standard_normal(12)
        ranking = ranking_of(ours=ours, params=params)
        first, second = ranking.agreements({key: float(true[i]) for i, key in enumerate(ranking.keys)} | {"more": 1.0})
        assert (first.proxy, second.proxy) == ("ours", "params")
        assert first.kendall == metrics.kendall(ours, true)
        assert first.spearman == metrics.spearman(ours, true)
        assert first.pearson == metrics.pearson(ours, true)
        assert (first.kendall_low, first.kendall_high) == metrics.kendall_interval(ours, true)
        assert first.kendall_low < first.kendall < first.kendall_high
        assert first.kendall_given_params == metrics.partial_kendall(ours, true, params)
        assert math.isnan(second.kendall_given_params)
        assert first.seconds == 1

    def test_constant_scores(self):
        ranking = ranking_of(x=[1, 1, 1], params=[1, 2, 3])
        first, second = ranking.agreements(dict(zip(ranking.keys, (1.0, 2.0, 3.0), strict=True)))
        assert all(map(math.isnan, (first.kendall, first.spearman, first.pearson, first.kendall_low)))
        assert second.kendall == 1

    def test_missing_truth(self):
        with pytest.raises(KeyError, match="n1"):
            ranking_of(params=[1, 2]).agreements({"n0": 1.0})


class TestCombine:
    def test_sum(self):
        assert combine([[1, 2], [3, math.nan]], how="sum").tolist()[0] == 4

    def test_ranks_with_ties_nan_and_infinity(self):
        found = combine([[3, 1, 1, math.nan, -math.inf], [5, 4, 3, 2, 1]], how="rank")
        np.testing.assert_equal(found, [4 + 5, 2.5 + 4, 2.5 + 3, math.nan, 1 + 1])

    def test_zscore(self):
        np.testing.assert_allclose(combine([[1, 2, 3, math.nan, -math.inf]], how="zscore"),
                                   [-math.sqrt(1.5), 0, math.sqrt(1.5), math.nan, -math.inf])  # fmt: skip

    def test_zscore_of_constants(self):
        assert combine([[2, 2], [1, 3]], how="zscore").tolist() == [-1, 1]

    @pytest.mark.parametrize("how", ["sum", "rank", "zscore"])
    def test_nothing_but_nan(self, how):
        assert all(map(math.isnan, combine([[math.nan, math.nan]], how=how)))

    def test_leaves_what_it_takes(self):
        table = np.array([[3.0, 1.0], [1.0, 2.0]])
        combine(table, how="rank")
        assert table.tolist() == [[3, 1], [1, 2]]

    def test_errors(self):
        with pytest.raises(ValueError, match="how='mean' must be one of 'sum', 'rank', 'zscore'"):
            combine([[1]], how="mean")
