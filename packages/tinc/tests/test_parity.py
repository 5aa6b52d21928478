"""The golden cases agree, and the check reports perturbed outputs."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from visionkernels.testing.golden import load_check

check = load_check(__file__)

GOLDEN = Path(__file__).parent / "golden"
DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "tinc"
INDEX = json.loads((GOLDEN / "index.json").read_text())
CASES = INDEX["cases"]
HAS_VOLUME = any((place / "test.tif").is_file() for place in (DATA, GOLDEN))


def named(name: str):
    """Return a case as a parameter; cases of the official volume need its file."""
    needs = isinstance(CASES[name].get("volume"), str)
    marks = [pytest.mark.skipif(not HAS_VOLUME, reason=f"test.tif is not in {DATA}")] if needs else []
    return pytest.param(name, marks=marks)


@pytest.fixture(scope="module")
def results() -> dict[str, list[str]]:
    return check(GOLDEN)


@pytest.mark.parametrize("name", [named(name) for name in CASES])
def test_golden(results: dict[str, list[str]], name: str) -> None:
    assert results[name] == []


def write(folder: Path, name: str, case: dict, changed: dict[str, np.ndarray] | None = None) -> Path:
    """Write a folder with one case."""
    (folder / "index.json").write_text(json.dumps({**INDEX, "cases": {name: case}}))
    shutil.copy(GOLDEN / "state_layout.json", folder)
    np.savez(folder / "data.npz", **{**np.load(GOLDEN / "data.npz"), **(changed or {})})
    return folder


def tolerance(case: dict, name: str, value: float) -> float:
    """Return the tolerance of the index at one element."""
    match case["kind"], name:
        case "tree", "grad":
            return 1e-3 * case["stats"]["grad"]["absmax"] + 1e-3 * abs(value)
        case ("tree", "predict") | ("norm", "inverse") | ("hidden_width", _):
            return 1.0
        case "tree", _:
            return 2e-4 + 1e-4 * abs(value)
        case "coords", _:
            return 1e-6
        case "train", "loss":
            return 2e-3 * abs(value)
        case "train", "lr":
            return 1e-6 * abs(value)
        case "train", "weights":
            return 2e-3
        case _:
            return 1e-5 + 1e-5 * abs(value)


@pytest.mark.parametrize("name", [named(name) for name, case in CASES.items() if case["tensors"]])
def test_finds_perturbed_outputs(tmp_path: Path, name: str) -> None:
    """Every output is reported by name if one of its elements moves by ten times the tolerance."""
    case, stored, changed = CASES[name], np.load(GOLDEN / "data.npz"), {}
    for key in case["tensors"]:
        array = stored[key].copy()
        # the column of widths in the table
        place = 4 if case["kind"] == "hidden_width" else array.size // 2
        step = 10 * tolerance(case, key.partition(".")[2], float(array.flat[place]))
        array.flat[place] += array.dtype.type(step)
        changed[key] = array
    mismatches = check(write(tmp_path, name, case, changed))[name]
    names = ["row 0"] if case["kind"] == "hidden_width" else [key.partition(".")[2] for key in case["tensors"]]
    assert [item for item in names if not any(f"{name}.{item}:" in mismatch for mismatch in mismatches)] == []


CHANGES = {
    "alloc_testtif_multi1_16x": [
        (("params_total",), 4105),
        (("node_dims_input_hidden_output_layers", "1-0-1-0", 1), 14),
    ],
    "tree_aoi_3lv": [(("aoi", 3), 18.0), (("var", 2), 866.0), (("loss",), 19930.0), (("leaf_order", 1), "2-0-1-0")],
    "metrics": [(("cases", 0, "psnr"), 38.32), (("cases", 2, "iou_acc_precision_at", "50", 0), 0.2733)],
    "ssim_msssim": [(("ssim",), 0.9664), (("ms_ssim",), 0.9713)],
    "sampler_schedule": [(("cases", 0, "evals_step_epoch", 1, 0), 26), (("cases", 1, "steps"), 6)],
    "files_multi1_16x": [(("files", "0-0-0-0/0-B", 1), "8055d84060c12ab5"), (("total_bytes",), 16420)],
}


@pytest.mark.parametrize("name", [named(name) for name in CHANGES])
def test_finds_perturbed_numbers(tmp_path: Path, name: str) -> None:
    case = copy.deepcopy(CASES[name])
    for path, value in CHANGES[name]:
        *stem, last = path
        place = case
        for key in stem:
            place = place[key]
        assert place[last] != value
        place[last] = value
    assert len(check(write(tmp_path, name, case))[name]) >= len(CHANGES[name])


def test_unknown_kind_is_a_mismatch(tmp_path: Path) -> None:
    (mismatch,) = check(write(tmp_path, "coords", CASES["coords"] | {"kind": "polar"}))["coords"]
    assert "kind 'polar'" in mismatch


def test_missing_volume_is_a_mismatch(tmp_path: Path) -> None:
    name = "alloc_testtif_multi0_16x"
    (mismatch,) = check(write(tmp_path, name, CASES[name]), tmp_path / "nowhere")[name]
    assert "test.tif is in none of" in mismatch


def test_missing_numbers_are_a_mismatch(tmp_path: Path) -> None:
    name = "tree_single_level"
    short = np.load(GOLDEN / "data.npz")[f"{name}.grad"][:-1]
    assert check(write(tmp_path, name, CASES[name], {f"{name}.grad": short}))[name] == [
        f"{name}.grad: 612 numbers instead of 611"
    ]
    case = CASES[name] | {"tensors": [*CASES[name]["tensors"], f"{name}.hessian"]}
    assert check(write(tmp_path, name, case))[name] == [f"{name}: {name}.hessian not stored"]


def test_other_configurations_run(tmp_path: Path) -> None:
    """A case of a known kind with another volume and tree is computed, and reported as different."""
    case = copy.deepcopy(CASES["tree_var_2lv"])
    case["volume"] |= {"seed": 99, "shape": [8, 8, 16, 1], "kind": "sparse"}
    mismatches = check(write(tmp_path, "tree_var_2lv", case))["tree_var_2lv"]
    assert any("predict shape: [8, 8, 16, 1]" in item for item in mismatches)
