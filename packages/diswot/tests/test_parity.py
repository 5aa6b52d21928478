"""The golden cases agree, and what does not agree is reported."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visionkernels.testing.golden import load_check

check = load_check(__file__)

GOLDEN = Path(__file__).parent / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "index.json").read_text())["cases"]
STORED = [case for case in CASES if case.get("file")]
FACTS = [case for case in CASES if not case.get("file")]


@pytest.fixture(scope="module")
def results() -> dict[str, list[str]]:
    return check(GOLDEN)


@pytest.mark.parametrize("name", [case["name"] for case in CASES])
def test_golden(results: dict[str, list[str]], name: str) -> None:
    assert results[name] == []


def mismatches(folder: Path, case: dict[str, Any], arrays: dict[str, np.ndarray] | None = None) -> list[str]:
    (folder / "index.json").write_text(json.dumps({"cases": [case]}))
    shutil.copy(GOLDEN / "state_layout.json", folder)
    if arrays is not None:
        np.savez(folder / case["file"], **arrays)  # type: ignore[arg-type]
    found: list[str] = check(folder)[case["name"]]
    return found


@pytest.mark.parametrize("case", STORED, ids=lambda case: case["name"])
def test_finds_perturbed_outputs(tmp_path: Path, case: dict[str, Any]) -> None:
    """Every output moved by ten times its tolerance in a single element is reported, by its name."""
    stored = dict(np.load(GOLDEN / case["file"]))
    tolerance, moved = case["tolerance"], {}
    for name, spec in case["outputs"].items():
        # the ill-conditioned proxies have a tolerance of their own
        rtol = 2e-2 if name in ("jacov", "fisher", "ntk_cond_train_b8") else tolerance["rtol"]
        array = stored[name].astype(np.float64).reshape(-1)
        array[array.size // 2] += 10 * (tolerance["atol"] + rtol * spec["absmax"])
        moved[name] = array.reshape(stored[name].shape)
    found = mismatches(tmp_path, case, moved)
    assert [name for name in case["outputs"] if not any(f".{name}: differs" in each for each in found)] == []


@pytest.mark.parametrize("case", FACTS, ids=lambda case: case["name"])
def test_finds_changed_facts(tmp_path: Path, case: dict[str, Any]) -> None:
    """A changed number in the configuration of a case without arrays is reported."""
    changed = json.loads(json.dumps(case))
    for entry in changed["config"].values():
        name = next(name for name, value in entry.items() if isinstance(value, int) and name != "res")
        entry[name] += 1
    assert len(mismatches(tmp_path, changed)) >= len(changed["config"])


def test_unknown_kind_is_a_mismatch(tmp_path: Path) -> None:
    case = STORED[0] | {"kind": "conv3d"}
    (mismatch,) = mismatches(tmp_path, case, dict(np.load(GOLDEN / case["file"])))
    assert "kind 'conv3d'" in mismatch


def test_failure_is_a_mismatch(tmp_path: Path) -> None:
    case = next(case for case in STORED if case["kind"] == "score")
    broken = case | {"config": case["config"] | {"num_classes": 3}}
    assert "labels reach" in mismatches(tmp_path, broken, dict(np.load(GOLDEN / case["file"])))[0]
