"""Golden cases: outputs measured on an official implementation, with generated weights and inputs, compared by rule.

A folder holds `index.json` (its cases) and one `.npz` a case. A package runs a case through its public API and hands
the outputs to `compare_case`; what comes back is the list of mismatches.
"""

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "check_cases",
    "compare_array",
    "compare_case",
    "compare_param_grads",
    "make_inputs",
    "recipe_weights",
]

Case = Mapping[str, Any]


def check_cases(folder: Path, run: Callable[[Case, Mapping[str, np.ndarray]], list[str]]) -> dict[str, list[str]]:
    """Run every case of `folder`/index.json and return its mismatches by case name; empty means that it agrees.

    `run(case, stored)` returns the mismatches of one case. An exception is a mismatch of that case, never a pass.
    """
    results = {}
    for case in json.loads((folder / "index.json").read_text(encoding="utf-8"))["cases"]:
        try:
            with np.load(folder / case["file"]) as stored:
                results[case["name"]] = run(case, dict(stored))
        except Exception as error:
            results[case["name"]] = [f"{case['name']}: {type(error).__name__}: {error}"]
    return results


def recipe_weights(state: Mapping[str, Tensor], kept: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return generated values for a state dict under official keys: each a function of its key and shape alone.

    Counters, integers and the keys in `kept` stay as they are. Matrices have rows of about unit length, scales are
    near one, biases near zero.
    """
    return {
        key: value if key in kept or not value.is_floating_point() else _recipe_tensor(key, value)
        for key, value in state.items()
    }


def _recipe_tensor(key: str, value: Tensor) -> Tensor:
    noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(size=tuple(value.shape))
    if key.endswith("running_var"):
        array = 1 + 0.1 * np.abs(noise)
    elif key.endswith("running_mean"):
        array = 0.1 * noise
    elif value.ndim >= 2:
        array = noise / np.sqrt(value.numel() / value.shape[0])
    elif key.endswith(("weight", "gamma")):
        array = 1 + 0.1 * noise
    else:
        array = 0.1 * noise
    return torch.from_numpy(np.asarray(array, dtype=np.float32))


def make_inputs(case: Case) -> dict[str, Tensor]:
    """Return the case's inputs by name: float32 standard normal numbers from their seeds."""
    inputs = {}
    for spec in case["inputs"]:
        if spec["generator"] != "standard_normal":
            raise ValueError(f"generator {spec['generator']!r} is unknown; known: standard_normal")
        random = np.random.RandomState(spec["seed"])
        inputs[spec["name"]] = torch.from_numpy(random.standard_normal(spec["shape"]).astype(np.float32))
    return inputs


def compare_case(case: Case, stored: Mapping[str, np.ndarray], outputs: Mapping[str, Tensor]) -> list[str]:
    """Compare the case's outputs, by the tolerance |a - b| <= atol + rtol * absmax of the full tensor.

    A case with a `loss` compares outputs["loss"] too, with sqrt(numel of the first output) times that tolerance.
    """
    mismatches = []
    if "loss" in case:
        first = case["outputs"][0]
        tolerance = (case["atol"] + case["rtol"] * first["absmax"]) * math.prod(first["shape"]) ** 0.5
        stored_loss = np.asarray([case["loss"]])
        loss = outputs["loss"].reshape(1)
        mismatches += compare_array(f"{case['name']}.loss", loss, stored_loss, shape=[1], tolerance=tolerance)
    for spec in case["outputs"]:
        name = spec["name"]
        if name not in outputs:
            mismatches.append(f"{case['name']}.{name}: not computed")
            continue
        tolerance = case["atol"] + case["rtol"] * spec.get("absmax", 0.0)
        mismatches += compare_array(
            f"{case['name']}.{name}", outputs[name], stored[spec["npz_key"]],
            shape=spec["shape"], stride=spec.get("flat_stride", 1), tolerance=tolerance,
        )  # fmt: skip
    return mismatches


def compare_array(
    name: str, value: Tensor, stored: np.ndarray, *, shape: Sequence[int], stride: int = 1, tolerance: float
) -> list[str]:
    """Compare `value` of the stated shape with every `stride`-th stored element; an empty list means agreement."""
    if list(value.shape) != list(shape):
        return [f"{name}: shape {list(value.shape)} instead of {list(shape)}"]
    ours = value.detach().double().cpu().numpy().reshape(-1)[::stride]
    difference = np.abs(ours - stored.reshape(-1).astype(np.float64))
    worst = float(difference.max(initial=0.0))
    # written so that a NaN on either side is a mismatch
    if not worst <= tolerance:
        return [f"{name}: differs by {worst:.3g}, tolerated {tolerance:.3g}"]
    return []


def compare_param_grads(case: Case, gradients: Mapping[str, Tensor | None]) -> list[str]:
    """Compare the norm and the sum of each parameter's gradient, under official keys, by the rule of the format."""
    expected = case["param_grads"]["values"]
    name = case["name"]
    if set(gradients) != set(expected):
        return [f"{name}: gradients of other parameters: {sorted(set(gradients) ^ set(expected))[:5]}"]
    floor = 1e-4 * max((entry[0] for entry in expected.values() if entry), default=0.0)
    mismatches = []
    for key, entry in expected.items():
        gradient = gradients[key]
        if entry is None or gradient is None:
            if (entry is None) != (gradient is None):
                mismatches.append(f"{name}.grad[{key}]: {'none' if gradient is None else 'some'}, expected otherwise")
            continue
        norm, total = entry
        wide = gradient.double()
        if not abs(wide.norm().item() - norm) <= 2e-3 * norm + floor:
            mismatches.append(f"{name}.grad[{key}]: norm {wide.norm().item():.6g} instead of {norm:.6g}")
        if not abs(wide.sum().item() - total) <= 2e-3 * norm * gradient.numel() ** 0.5 + floor:
            mismatches.append(f"{name}.grad[{key}]: sum {wide.sum().item():.6g} instead of {total:.6g}")
    return mismatches
