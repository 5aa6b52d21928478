"""Golden cases: outputs measured on an official implementation, with generated weights and inputs, compared by rule.

A folder holds `index.json` with its cases, a list or a dict by name, and their arrays: one `.npz` a case, or one of all
with the case's name before each key. A case describes its arrays under `outputs` or `tensors`, a list or a dict by name
of `{shape, stride or flat_stride, npz_key, mean, std, absmax}`; what is stored is `full.reshape(-1)[::stride]`. A
package runs a case through its public API and hands the outputs to `compare_case`, which returns the mismatches.
"""

import importlib.util
import json
import math
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Case",
    "check_cases",
    "compare_array",
    "compare_case",
    "compare_param_grads",
    "load_check",
    "load_module",
    "make_input",
    "make_inputs",
    "recipe_weights",
]

Case = Mapping[str, Any]


def load_check(test_file: str) -> Callable[..., dict[str, list[str]]]:
    """Return `check` of the `parity.py` beside a test: a file of its own, since tests are no package."""
    check: Callable[..., dict[str, list[str]]] = load_module(Path(test_file).with_name("parity.py")).check
    return check


def load_module(path: Path) -> ModuleType:
    """Return a Python file as a module, under a name of its own."""
    name = f"{path.parent.parent.name}_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def check_cases(folder: Path, run: Callable[[Case, Mapping[str, np.ndarray]], list[str]]) -> dict[str, list[str]]:
    """Run every case of `folder`/index.json and return its mismatches by case name; empty means that it agrees.

    `run(case, stored)` returns the mismatches of one case; `stored` is empty where the case has no arrays. An exception
    is a mismatch of that case, never a pass.
    """
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    cases = index["cases"]
    if isinstance(cases, Mapping):
        cases = [{**case, "name": name} for name, case in cases.items()]
    results = {}
    for case in cases:
        try:
            results[case["name"]] = run(case, _stored(folder, case, case.get("file") or index.get("npz")))
        except Exception as error:
            results[case["name"]] = [f"{case['name']}: {type(error).__name__}: {error}"]
    return results


def _stored(folder: Path, case: Case, file: str | None) -> dict[str, np.ndarray]:
    if file is None:
        return {}
    with np.load(folder / file) as arrays:
        own = (f"{case['name']}/", f"{case['name']}.")
        prefix = next((prefix for prefix in own if any(key.startswith(prefix) for key in arrays)), "")
        return {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}


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
    """Return the case's inputs by name."""
    return {name: make_input(spec) for name, spec in _by_name(case["inputs"]).items()}


def make_input(spec: Mapping[str, Any]) -> Tensor:
    """Return the float32 tensor of `{seed, shape, generator or kind}`: standard normal, or uniform from 0 to 1."""
    generator = spec.get("generator", spec.get("kind", "standard_normal"))
    if generator not in _GENERATORS:
        raise ValueError(f"generator {generator!r} is unknown; known: {', '.join(_GENERATORS)}")
    draw = getattr(np.random.RandomState(spec["seed"]), _GENERATORS[generator])
    return torch.from_numpy(np.asarray(draw(spec["shape"]), dtype=np.float32))


_GENERATORS = {
    **dict.fromkeys(("standard_normal", "normal", "randn"), "standard_normal"),
    **dict.fromkeys(("random_sample", "uniform", "rand"), "random_sample"),
}


def _by_name(specs: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return dict(specs) if isinstance(specs, Mapping) else {spec["name"]: spec for spec in specs}


def compare_case(
    case: Case,
    stored: Mapping[str, np.ndarray],
    outputs: Mapping[str, Tensor],
    *,
    rtol: float | None = None,
    atol: float | None = None,
    label: str = "",
) -> list[str]:
    """Compare all outputs that the case describes, by the tolerance |a - b| <= atol + rtol * absmax of the full tensor.

    The tolerance is the case's own, or its `tolerance`, unless given. Mean, standard deviation and absmax, where the
    case states them, tell of the elements that are not stored. A case with a `loss` compares outputs["loss"] too, with
    sqrt(numel of the first output) times that tolerance. A case that compares nothing is a mismatch. `label` tells
    several runs of one case apart.
    """
    own = case.get("tolerance", case)
    rtol = own["rtol"] if rtol is None else rtol
    atol = own["atol"] if atol is None else atol
    place = f"{case['name']}.{label}".rstrip(".")
    specs = _by_name(case.get("outputs", case.get("tensors", {})))
    mismatches = [] if specs else [f"{place}: the case describes no outputs"]
    if "loss" in case:
        first = next(iter(specs.values()))
        tolerance = (atol + rtol * first["absmax"]) * math.prod(first["shape"]) ** 0.5
        loss = outputs["loss"].reshape(1)
        mismatches += compare_array(f"{place}.loss", loss, np.array([case["loss"]]), shape=[1], tolerance=tolerance)
    for name, spec in specs.items():
        key = spec.get("npz_key", name)
        if name not in outputs or key not in stored:
            mismatches.append(f"{place}.{name}: not {'stored' if name in outputs else 'computed'}")
            continue
        absmax = spec.get("absmax", 0.0)
        allowed = atol + rtol * absmax
        stride = spec.get("stride", spec.get("flat_stride", 1))
        mismatches += compare_array(
            f"{place}.{name}", outputs[name], stored[key], shape=spec["shape"], stride=stride, tolerance=allowed
        )
        # the statistics in an index are rounded to float32
        allowed = max(allowed, 1e-6 * absmax)
        mismatches += [
            f"{place}.{name}: {figure} {value:.7g} instead of {spec[figure]:.7g}"
            for figure, value in _statistics(outputs[name]).items()
            if figure in spec and not abs(value - spec[figure]) <= allowed
        ]
    return mismatches


def _statistics(value: Tensor) -> dict[str, float]:
    if value.is_complex() or not value.numel():
        return {}
    wide = value.detach().double()
    return {"mean": wide.mean().item(), "std": wide.std(correction=0).item(), "absmax": wide.abs().max().item()}


def compare_array(
    name: str,
    value: Tensor,
    stored: np.ndarray,
    *,
    shape: Sequence[int],
    stride: int | Sequence[int] = 1,
    tolerance: float,
) -> list[str]:
    """Compare `value` of the stated shape with the stored elements; an empty list means agreement.

    Stored is every `stride`-th element of the flat tensor, or every `stride[i]`-th along dimension i. Complex numbers
    are compared as pairs of real ones. NaN never agrees, an infinity agrees with itself.
    """
    if list(value.shape) != list(shape):
        return [f"{name}: shape {list(value.shape)} instead of {list(shape)}"]
    ours = value.detach().cpu().to(torch.complex128 if value.is_complex() else torch.float64).numpy()
    steps = (stride,) if isinstance(stride, int) else stride
    ours = (ours.reshape(-1) if isinstance(stride, int) else ours)[tuple(slice(None, None, step) for step in steps)]
    if stored.size != ours.size:
        return [f"{name}: {stored.size} stored numbers instead of {ours.size}"]
    ours, theirs = _real_numbers(ours), _real_numbers(stored)
    if ours.size != theirs.size:
        return [f"{name}: complex numbers against real ones"]
    with np.errstate(invalid="ignore"):
        difference = np.where(ours == theirs, 0.0, np.abs(ours - theirs))
    worst = float(difference.max(initial=0.0))
    # written so that a NaN on either side is a mismatch
    if not worst <= tolerance:
        return [f"{name}: differs by {worst:.3g}, tolerated {tolerance:.3g}"]
    return []


def _real_numbers(array: np.ndarray) -> np.ndarray:
    is_complex = np.iscomplexobj(array)
    flat = np.ascontiguousarray(array, dtype=np.complex128 if is_complex else np.float64).reshape(-1)
    return flat.view(np.float64)


def compare_param_grads(case: Case, gradients: Mapping[str, Tensor | None]) -> list[str]:
    """Compare the norm and the sum of each parameter's gradient, under official keys, by the rule of the format."""
    expected = case["param_grads"]["values"]
    name = case["name"]
    if not expected:
        return [f"{name}: the case states no gradients"]
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
