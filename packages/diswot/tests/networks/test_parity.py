"""Wrong facts about networks, mutations and counts are reported; ../test_parity.py runs the cases themselves."""

import json
from pathlib import Path

import numpy as np
import pytest

from visionkernels.testing.golden import load_module

TESTS = Path(__file__).parents[1]
parity = load_module(TESTS / "parity_networks.py")

INDEX = json.loads((TESTS / "golden" / "index.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in INDEX["cases"] if case["kind"] in parity.KINDS}


def stored(case):
    return dict(np.load(TESTS / "golden" / case["file"])) if case["file"] else {}


@pytest.mark.parametrize(
    ("name", "fact", "value"),
    [
        ("nb201_tiny_diswot", "n_feats", 8),
        ("nb101_tiny", "vertex_channels_last", [24, 8, 8, 8, 8, 7, 24]),
        ("masternet_tiny", "official_model_size", 9962.0),
        ("masternet_tiny", "official_flops_at_res", 1622209.0),
        ("masternet_tiny", "split6", ""),
    ],
)
def test_wrong_facts(name, fact, value):
    case = CASES[name]
    changed = case | {"config": case["config"] | {fact: value}}
    assert [mismatch for mismatch in parity.run(changed, stored(case)) if fact in mismatch]


def test_wrong_counts():
    case = CASES["counts"]
    for fact, value in (("params", 83893), ("macs_millions", 12.507493)):
        config = {"s0:111": case["config"]["s0:111"] | {fact: value}}
        assert len(parity.run(case | {"config": config}, {})) == 1
    mutations = CASES["mutation_candidates"]
    for key, expected in mutations["config"].items():
        for fact in ("n_with_repeats", "n_unique", "crc32"):
            config = {key: expected | {fact: expected[fact] + 1}}
            assert len(parity.run(mutations | {"config": config}, {})) == 1


def test_unknown_kind():
    assert parity.run({"name": "x", "kind": "relation"}, {}) == ["x: unknown kind 'relation'"]
