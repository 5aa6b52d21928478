import json
from pathlib import Path

import numpy as np
import pytest

from visionkernels.testing.golden import load_check

check = load_check(__file__)

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "index.json").read_text())["cases"]


# they differ from biformer_tiny in their sizes alone
SLOW = ("biformer_small_224", "biformer_base_224")


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case["name"], marks=[pytest.mark.slow] * (case["name"] in SLOW)) for case in CASES]
)
def test_golden(tmp_path, case):
    (tmp_path / case["file"]).symlink_to(GOLDEN / case["file"])
    (tmp_path / "index.json").write_text(json.dumps({"cases": [case]}))
    assert check(tmp_path) == {case["name"]: []}


def _write(folder: Path, case: dict, arrays: dict[str, np.ndarray]) -> None:
    (folder / "index.json").write_text(json.dumps({"cases": [case]}))
    np.savez(folder / case["file"], **arrays)


@pytest.mark.parametrize("case", [c for c in CASES if not c["name"].endswith("_224")], ids=lambda case: case["name"])
def test_finds_perturbed_outputs(tmp_path, case):
    """Every output moved by ten times its tolerance in a single element is reported, by its name if it is real."""
    stored = dict(np.load(GOLDEN / case["file"]))
    moved, real = dict(stored), []
    for spec in case["outputs"]:
        tolerance = case["atol"] + case["rtol"] * spec.get("absmax", 0.0)
        array = stored[spec["npz_key"]].reshape(-1).copy()
        is_integer = array.dtype.kind == "i"
        array[len(array) // 2] += max(10 * tolerance, 1 if is_integer else 0)
        array = array.reshape(stored[spec["npz_key"]].shape)
        if is_integer:
            # slots are compared in the order of the stored indices, so that a wrong one shows in other outputs
            _write(tmp_path, case, stored | {spec["npz_key"]: array})
            assert check(tmp_path)[case["name"]], spec["name"]
        else:
            real.append(spec["name"])
            moved[spec["npz_key"]] = array
    _write(tmp_path, case, moved)
    mismatches = check(tmp_path)[case["name"]]
    assert [name for name in real if not any(name in text for text in mismatches)] == []


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
