import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from visionkernels.testing.golden import load_check

check = load_check(__file__)

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "index.json").read_text())["cases"]
# the small cases of all kinds with stored outputs
SMALL = [case for case in CASES if case["file"] is not None and "torchvision" not in case["config"].get("model", "")]


@pytest.fixture(scope="module")
def results():
    return check(GOLDEN)


@pytest.mark.parametrize("name", [case["name"] for case in CASES])
def test_golden(results, name):
    assert results[name] == []


def _write(folder: Path, case: dict, arrays: dict[str, np.ndarray] | None) -> None:
    (folder / "index.json").write_text(json.dumps({"cases": [case]}))
    shutil.copy(GOLDEN / "state_layout.json", folder)
    if arrays is not None:
        np.savez(folder / case["file"], **arrays)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case["name"])
def test_finds_perturbed_outputs(tmp_path, case):
    """Every output moved by ten times its tolerance in a single element is reported, by its name."""
    stored = dict(np.load(GOLDEN / case["file"]))
    for name, spec in case["tensors"].items():
        array = stored[name].reshape(-1).astype(np.float64)
        array[len(array) // 2] += 10 * 2e-6 * spec["absmax"]
        stored[name] = array.reshape(stored[name].shape)
    _write(tmp_path, case, stored)
    mismatches = check(tmp_path)[case["name"]]
    assert [name for name in case["tensors"] if not any(f"{name}: differs" in each for each in mismatches)] == []


def test_finds_perturbed_accounts(tmp_path):
    (case,) = (case for case in CASES if case["kind"] == "accounting")
    changed = json.loads(json.dumps(case))
    changed["expected"] = changed["expected"][:2]
    changed["expected"][0]["layers"][0]["saved_elems_filtered"] += 1
    changed["expected"][1]["backward_mflops_exact"] *= 1.001
    _write(tmp_path, changed, None)
    assert len(check(tmp_path)[case["name"]]) == 2


def test_unknown_kind_is_a_mismatch(tmp_path):
    case = CASES[0] | {"kind": "conv3d"}
    _write(tmp_path, case, dict(np.load(GOLDEN / case["file"])))
    (mismatch,) = check(tmp_path)[case["name"]]
    assert "kind 'conv3d'" in mismatch


def test_failure_is_a_mismatch(tmp_path):
    case = CASES[0] | {"config": CASES[0]["config"] | {"radius": 0}}
    _write(tmp_path, case, dict(np.load(GOLDEN / case["file"])))
    assert "radius=0 must be a positive integer" in check(tmp_path)[case["name"]][0]


def test_missing_numbers_are_a_mismatch(tmp_path):
    stored = dict(np.load(GOLDEN / CASES[0]["file"]))
    _write(tmp_path, CASES[0], stored | {"y": stored["y"].reshape(-1)[:1]})
    assert any("y" in each for each in check(tmp_path)[CASES[0]["name"]])
