import json
from pathlib import Path

import numpy as np
import pytest

from visionkernels.testing.golden import load_check

check = load_check(__file__)

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "index.json").read_text())["cases"]


@pytest.fixture(scope="module")
def results():
    return check(GOLDEN)


@pytest.mark.parametrize("name", [case["name"] for case in CASES])
def test_golden(results, name):
    assert results[name] == []


def _write(folder: Path, case: dict, arrays: dict[str, np.ndarray]) -> None:
    (folder / "index.json").write_text(json.dumps({"cases": [case]}))
    np.savez(folder / case["file"], **arrays)


@pytest.mark.parametrize("case", [c for c in CASES if not c["name"].endswith("_224")], ids=lambda case: case["name"])
def test_finds_perturbed_outputs(tmp_path, case):
    """Each output moved by ten times its tolerance is reported, also in a single element."""
    stored = dict(np.load(GOLDEN / case["file"]))
    for spec in case["outputs"]:
        moved = {key: value.copy() for key, value in stored.items()}
        tolerance = case["atol"] + case["rtol"] * spec.get("absmax", 0.0)
        array = moved[spec["npz_key"]].reshape(-1)
        array[len(array) // 2] += max(10 * tolerance, 1 if array.dtype.kind == "i" else 0)
        moved[spec["npz_key"]] = array.reshape(stored[spec["npz_key"]].shape)
        _write(tmp_path, case, moved)
        assert check(tmp_path)[case["name"]], spec["name"]


def test_unknown_kind_is_a_mismatch(tmp_path):
    case = CASES[0] | {"kind": "bra_3d"}
    _write(tmp_path, case, dict(np.load(GOLDEN / case["file"])))
    assert check(tmp_path) == {case["name"]: [f"{case['name']}: no runner for kind 'bra_3d'"]}


def test_failure_is_a_mismatch(tmp_path):
    case = CASES[0] | {"config": CASES[0]["config"] | {"topk": 99}}
    _write(tmp_path, case, dict(np.load(GOLDEN / case["file"])))
    assert "topk=99 is outside [1, 16]" in check(tmp_path)[case["name"]][0]


def test_other_configuration_runs(tmp_path):
    """An unseen case of a known kind runs, and is compared: here its outputs are wrong, its shapes right."""
    case = json.loads(json.dumps(CASES[0]))
    # without the stored indices slots are compared as they come
    case["outputs"] = [spec for spec in case["outputs"] if spec["name"] != "r_idx"]
    case["inputs"] = [spec | {"shape": [1, 8, 12, 32], "seed": spec["seed"] + 1} for spec in case["inputs"]]
    for spec in case["outputs"]:
        spec["shape"] = {"out": [1, 8, 12, 32], "grad_x": [1, 8, 12, 32], "attn": [16, 4, 6, 18]}.get(
            spec["name"], [1, 16, 3]
        )
        spec["flat_stride"] = 1
    arrays = {spec["npz_key"]: np.zeros(spec["shape"], spec["dtype"]) for spec in case["outputs"]}
    _write(tmp_path, case, arrays)
    mismatches = check(tmp_path)[case["name"]]
    assert any(".out: differs by" in text for text in mismatches)
    assert not any("shape" in text or "Error" in text for text in mismatches)
