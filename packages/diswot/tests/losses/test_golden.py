"""The golden cases of losses agree, and the comparison bites."""

import json
from pathlib import Path

import numpy as np
import pytest

from visionkernels.testing.golden import load_module

FOLDER = Path(__file__).parents[1]
parity = load_module(FOLDER / "parity_losses.py")

CASES = [
    case
    for case in json.loads((FOLDER / "golden/index.json").read_text(encoding="utf-8"))["cases"]
    if case["kind"] in parity.KINDS
]


@pytest.fixture(params=CASES, ids=lambda case: case["name"])
def case(request):
    return request.param


@pytest.fixture
def stored(case):
    with np.load(FOLDER / "golden" / case["file"]) as arrays:
        return dict(arrays)


def test_agrees(case, stored):
    assert parity.run(case, stored) == []


def test_every_perturbed_output_is_reported(case, stored):
    allowed = {
        name: case["tolerance"]["atol"] + case["tolerance"]["rtol"] * spec["absmax"]
        for name, spec in case["outputs"].items()
    }
    perturbed = {name: array + 10 * allowed[name] for name, array in stored.items()}
    reported = parity.run(case, perturbed)
    assert all(any(f".{name}: differs" in line for line in reported) for name in case["outputs"])


def test_other_kind():
    assert parity.run({"kind": "rank"}, {}) == ["no runner for kind 'rank'"]
