"""Limits from text, and what networks cost without being given memory."""

import math

import pytest
import timm
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from diswot import spaces
from diswot.budget import NO_LIMIT, Budget, Cost, cost_of, latency_of


class TestBudget:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("params=5M", {"params": 5e6}),
            (" PARAMS = 300k , Macs=1.5G,latency=20ms ", {"params": 3e5, "macs": 1.5e9, "latency_ms": 20}),
            ("macs=2B", {"macs": 2e9}),
            ("params=12345", {"params": 12345}),
            ("latency=0.5", {"latency_ms": 0.5}),
            ("", {}),
            (",", {}),
        ],
    )
    def test_parse(self, text, expected):
        assert Budget.parse(text) == Budget(**expected)

    @pytest.mark.parametrize(
        "text",
        ["params", "params=", "params=5X", "params=-5M", "params=5 000", "params=5ms", "latency=20M", "latency_ms=3",
         "flops=3M", "params=5M macs=3M", "params=1e6", "params=nan", "params=.5M", "params=5M;macs=1M", "5M", "=5",
         "params=0x10", "params=5,3M"],
    )  # fmt: skip
    def test_parse_errors(self, text):
        with pytest.raises(ValueError, match=r"must be params=NUMBER, macs=NUMBER or latency=MILLISECONDS"):
            Budget.parse(text)

    def test_parse_twice(self):
        with pytest.raises(ValueError, match="budget 'params=1,PARAMS=2' gives PARAMS twice"):
            Budget.parse("params=1,PARAMS=2")

    @pytest.mark.parametrize("text", ["params=0", "latency=0.0", "params=" + "9" * 400])
    def test_parse_of_limits_that_are_none(self, text):
        with pytest.raises(ValueError, match=r"budget \w+=\S+ must be above 0"):
            Budget.parse(text)

    @pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
    @pytest.mark.parametrize("name", ["params", "macs", "latency_ms"])
    def test_values(self, name, value):
        with pytest.raises(ValueError, match=f"budget {name}={value} must be above 0"):
            Budget(**{name: value})

    @example(1234567, 1234568)
    @given(st.integers(1, 10**12), st.integers(1, 10**12))
    def test_text_is_told_apart(self, params, other):
        """The text stands in the settings of a search, so that two limits must not share one."""
        assert (str(Budget(params=params)) == str(Budget(params=other))) == (params == other)

    def test_allows(self):
        budget = Budget(params=100, macs=1000)
        assert budget.allows(Cost(100, 1000))
        assert not budget.allows(Cost(101, 1000))
        assert not budget.allows(Cost(100, 1001))
        assert NO_LIMIT.allows(Cost(10**15, 10**15))
        assert str(NO_LIMIT) == "no limit"


class TestCostOf:
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("s0", {}),
            ("nasbench201", {"width": 8, "cells": 2}),
            ("nasbench101", {}),
            ("xxbl", {}),
            ("timm_resnet", {}),
            ("timm_vit", {}),
        ],
    )
    def test_equals_the_count_of_the_real_network(self, name, options):
        import numpy as np

        space = spaces.create(name, **options)
        key = space.sample(np.random.default_rng(1))
        cost = cost_of(lambda: space.build(key, num_classes=7), space.input_size)
        model = space.build(key, num_classes=7).eval()
        assert cost.params == sum(each.numel() for each in model.parameters())
        macs = 0

        def add(layer, inputs, output):
            nonlocal macs
            inside = layer.in_features if isinstance(layer, nn.Linear) else layer.weight[0].numel()
            macs += output.numel() * (inside + (layer.bias is not None))

        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(add)
        with torch.no_grad():
            model(torch.zeros(1, *space.input_size))
        assert cost.macs == macs

    def test_shared_parameters_count_once(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.one = self.other = nn.Conv2d(3, 3, 1, bias=False)

            def forward(self, x):
                return self.other(self.one(x))

        assert cost_of(Twice, (3, 4, 4)) == Cost(9, 2 * 9 * 16)

    def test_published_counts(self):
        cost = cost_of(lambda: timm.create_model("s0_713", num_classes=100), (3, 32, 32))
        assert cost.params == 259_892
        assert round(cost.macs / 1e6, 2) == 50.26


class TestLatencyOf:
    def test_larger_takes_longer(self, s0):
        small, large = (latency_of(s0(key), (3, 32, 32)) for key in ("111", "777"))
        assert 0 < small < large < 10_000

    def test_leaves_the_mode(self, s0):
        model = s0()
        model.layer1.eval()
        latency_of(model, (3, 8, 8))
        assert [model.training, model.layer1.training, model.layer2.training] == [True, False, True]
