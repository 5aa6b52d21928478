"""Runs the golden cases of the official TINC through the public API of this package."""

import hashlib
import math
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinc import metrics
from tinc.official import procedure
from tinc.official.allocation import Dims, hidden_width, plan_tree, statistics
from tinc.official.folder import save_official
from tinc.official.model import OctreeMLP, SegmentStack, coordinate_grid, decode, split
from tinc.official.volume import SideInfo, denormalise, normalise, read_volume
from tinc.recipes import LossWeight, OfficialRecipe, Scheduler, levels_from_options
from visionkernels.testing.golden import check_cases, compare_array

Case = Mapping[str, Any]
Stored = Mapping[str, np.ndarray]

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "tinc"


def check(folder: Path, data: Path | None = None) -> dict[str, list[str]]:
    """Return the mismatches of every case in `folder`, by name.

    A volume that a case names by path is looked for in `data`, by default ../shared/data/tinc, and beside the cases.
    """
    return check_cases(folder, partial(_run, places=(data or DATA, folder)))


def _run(case: Case, stored: Stored, places: Sequence[Path]) -> list[str]:
    if case["kind"] not in _KINDS:
        return [f"{case['name']}: no runner for kind {case['kind']!r}"]
    unread = [name for name in case["tensors"] if name.removeprefix(f"{case['name']}.") not in stored]
    if unread:
        return [f"{case['name']}: {', '.join(unread)} not stored"]
    return [f"{case['name']}.{entry}" for entry in _KINDS[case["kind"]](case, stored, places)]


def _volume(spec: Mapping[str, Any] | str, places: Sequence[Path]) -> np.ndarray:
    """Return a generated volume, or the volume of a file by its name."""
    if isinstance(spec, str):
        paths = [place / Path(spec).name for place in places]
        path = next((entry for entry in paths if entry.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{Path(spec).name} is in none of {', '.join(map(str, places))}")
        return read_volume(path)
    random, shape = np.random.RandomState(spec["seed"]), tuple(spec["shape"])
    match spec["kind"]:
        case "noise":
            values = random.random_sample(shape)
        case "smooth":
            values = random.standard_normal(shape)
            for _ in range(3):
                for axis in range(3):
                    values = np.mean([np.roll(values, shift, axis) for shift in range(-2, 3)], axis=0)
            values = (values - values.min()) / (values.max() - values.min())
        case "sparse":
            values = random.random_sample(shape)
            values = np.where(values > 0.7, (values - 0.7) / 0.3, 0.0)
            values[shape[0] // 2 :, : shape[1] // 2] = 0
        case kind:
            raise ValueError(f"volume of kind {kind!r} is unknown")
    dtype = np.dtype(spec["dtype"])
    return np.floor(values * np.iinfo(dtype).max * 0.999).astype(dtype)


def _recipe(config: Mapping[str, Any], name: str) -> OfficialRecipe:
    low, high, scale = config.get("weight", (2001, 65535, 0.01))
    values: dict[str, Any] = {
        key: config[key]
        for key in ("ratio", "normal_min", "normal_max", "w0", "output", "optimizer", "lr", "batch_size")
        if key in config
    }
    if "lr_scheduler" in config:
        schedule = dict(config["lr_scheduler"])
        values["scheduler"] = Scheduler(name=schedule.pop("name"), arguments=tuple(schedule.items()))
    weight = LossWeight(low=low, high=high, scale=scale)
    return OfficialRecipe(name=name, levels=levels_from_options(config["level_info"]), weight=weight, **values)


@dataclass
class _Tree:
    recipe: OfficialRecipe
    model: OctreeMLP
    side_info: SideInfo
    normalised: np.ndarray
    target: Tensor


def _build(case: Case, places: Sequence[Path]) -> _Tree:
    """Return the tree for the volume of the case, with the weights of the recipe."""
    recipe = _recipe(case["config"], case["name"])
    volume = _volume(case["volume"], places)
    normalised, side_info = normalise(volume, scale_min=recipe.normal_min, scale_max=recipe.normal_max)
    model = OctreeMLP(plan_tree(recipe, normalised, case["origin_bytes"]))
    plan = model.plan
    last = f"{plan.nodes[-1].dims.layers - 1}-"
    leaf_gain = 0.1 * (recipe.normal_max - recipe.normal_min)
    leaf_centre = 0.5 * (recipe.normal_min + recipe.normal_max)
    with torch.no_grad():
        for key, parameter in model.node_parameters():
            is_output = key.startswith(f"{plan.num_levels - 1}-") and key.partition("/")[2].startswith(last)
            gain, centre = (leaf_gain, leaf_centre) if is_output else (1 / 30, 0.0)
            parameter.copy_(_weights(key, tuple(parameter.shape), gain, centre))
    return _Tree(recipe, model, side_info, normalised, split(torch.from_numpy(normalised), plan.num_levels))


def _weights(key: str, shape: tuple[int, ...], gain: float, centre: float) -> Tensor:
    noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    values = noise / math.sqrt(shape[1]) * gain if key.endswith("W") else 0.1 * noise + centre
    return torch.from_numpy(values.astype(np.float32))


def _flat(case: Case, stored: Stored, name: str, value: Tensor, rtol: float, atol: float = 0.0) -> list[str]:
    """Compare a flattened tensor, elementwise: |a - b| <= atol + rtol |b|, and its statistics."""
    stride = case.get("stride", {}).get(name, 1)
    ours, theirs = value.detach().double().flatten().numpy(), stored[name].astype(np.float64).flatten()
    if len(ours[::stride]) != len(theirs):
        return [f"{name}: {len(ours[::stride])} numbers instead of {len(theirs)}"]
    excess = np.abs(ours[::stride] - theirs) - atol - rtol * np.abs(theirs)
    # written so that a NaN on either side is a mismatch
    mismatches = [] if (excess <= 0).all() else [f"{name}: beyond the tolerance by {np.nanmax(excess):.3g}"]
    facts = case.get("stats", {}).get(name)
    if facts:
        if math.prod(facts["shape"]) != len(ours):
            mismatches.append(f"{name}: {len(ours)} numbers instead of {facts['shape']}")
        allowed = atol + rtol * facts["absmax"]
        own = {"mean": ours.mean(), "std": ours.std(), "absmax": np.abs(ours).max()}
        mismatches += [
            f"{name}: {figure} {number:.7g} instead of {facts[figure]:.7g}"
            for figure, number in own.items()
            if not abs(number - facts[figure]) <= allowed
        ]
    return mismatches


def _equal(name: str, ours: Any, theirs: Any) -> list[str]:
    return [] if ours == theirs else [f"{name}: {ours} instead of {theirs}"]


def _close(name: str, ours: float, theirs: float | None, *, rtol: float = 0.0, atol: float = 0.0) -> list[str]:
    """Compare two numbers; None stands for NaN."""
    if theirs is None or math.isnan(theirs):
        return [] if math.isnan(ours) else [f"{name}: {ours} instead of NaN"]
    return [] if abs(ours - theirs) <= atol + rtol * abs(theirs) else [f"{name}: {ours:.9g} instead of {theirs:.9g}"]


def _seeds(text: str) -> list[int]:
    """Return the seeds that a sentence names as RandomState(...)."""
    return [int(seed) for seed in re.findall(r"RandomState\((\d+)\)", text)]


def _hidden_width(case: Case, stored: Stored, places: Sequence[Path]) -> list[str]:
    mismatches = []
    for row, (budget, layers, inputs, output, hidden, output_width) in enumerate(stored["table"].tolist()):
        known = None if output == -1 else int(output)
        ours = hidden_width(budget, layers=int(layers), input=int(inputs), output=known)
        mismatches += _equal(f"row {row}", (ours, known or ours), (int(hidden), int(output_width)))
    return mismatches


def _allocation(case: Case, stored: Stored, places: Sequence[Path]) -> list[str]:
    return _dims(case, _build(case, places).model)


def _dims(case: Case, model: OctreeMLP) -> list[str]:
    plan = model.plan
    own = {node.name: list(node.dims) for node in plan.nodes}
    listed = case["node_dims_input_hidden_output_layers"]
    mismatches = [entry for name, dims in listed.items() for entry in _equal(name, own.get(name), dims)]
    order = [name for name in own if name in listed]
    mismatches += _equal("order of nodes", order, list(listed))
    mismatches += _equal("params_total", plan.num_parameters, case["params_total"])
    return mismatches + _close(
        "ratio", case["origin_bytes"] / (4 * plan.num_parameters), case["ratio_theory"], rtol=1e-12
    )


def _tree(case: Case, stored: Stored, places: Sequence[Path]) -> list[str]:
    tree = _build(case, places)
    model, plan, side = tree.model, tree.model.plan, tree.side_info
    leaves = [node.name for node in plan.on_level(plan.num_levels - 1)]
    own = {name: getattr(side, name) for name in case["side_info"]}
    mismatches = _dims(case, model) + _equal("leaf_order", leaves, case["leaf_order"])
    mismatches += _equal("side_info", own, case["side_info"])
    mismatches += _statistics(case, tree)
    features = model.features()
    for level in range(plan.num_levels - 1):
        joined = torch.cat([entry.flatten() for entry in features[level]])
        mismatches += _flat(case, stored, f"feat_level{level}", joined, 1e-4, 2e-4)
    raw = model()
    mismatches += _flat(case, stored, "leaf_raw", raw, 1e-4, 2e-4)
    mismatches += _predict(case, stored, decode(model, side))
    return mismatches + _gradients(case, stored, tree)


def _statistics(case: Case, tree: _Tree) -> list[str]:
    measured = statistics(tree.normalised, tree.model.plan.num_levels)
    mismatches = []
    for name in ("aoi", "var"):
        for node, theirs in zip(tree.model.plan.nodes, case[name], strict=False):
            ours = float(getattr(measured[node.level], name)[node.index])
            # counts are exact, but variances were summed in float32
            mismatches += _close(f"{name} of {node.name}", ours, theirs, rtol=0.0 if name == "aoi" else 1e-4)
    return mismatches


def _predict(case: Case, stored: Stored, volume: np.ndarray) -> list[str]:
    mismatches = _equal("predict_dtype", volume.dtype.name, case["predict_dtype"])
    mismatches += _equal("predict shape", list(volume.shape), case["stats"]["predict"]["shape"])
    ours, theirs = volume.flatten()[:: case["stride"]["predict"]].astype(np.int64), stored["predict"].astype(np.int64)
    if ours.shape != theirs.shape:
        return [*mismatches, f"predict: {len(ours)} numbers instead of {len(theirs)}"]
    apart = np.abs(ours - theirs)
    if apart.max() > 1 or (apart > 0).mean() >= 0.02:
        mismatches.append(f"predict: up to {apart.max()} counts apart, {(apart > 0).mean():.2%} of the voxels differ")
    return mismatches


def _gradients(case: Case, stored: Stored, tree: _Tree) -> list[str]:
    (seed,) = _seeds(case["loss_indices"])
    size = int(re.search(r"size=(\d+)", case["loss_indices"])[1])
    population = tree.target.shape[1]
    points = torch.from_numpy(np.random.RandomState(seed).randint(0, population, size=size))
    loss = procedure.weighted_loss(tree.model(points), tree.target[:, points], tree.recipe.weight)
    loss.backward()
    gradient = torch.cat([entry.flatten() for _, entry in tree.model.node_gradients()])
    largest = case["stats"]["grad"]["absmax"]
    mismatches = _close("loss", loss.item(), case["loss"], rtol=1e-4)
    return mismatches + _flat(case, stored, "grad", gradient, 1e-3, 1e-3 * largest)


def _coords(case: Case, stored: Stored, places: Sequence[Path]) -> list[str]:
    mismatches = []
    for shape in case["shapes"]:
        name = "x".join(map(str, shape))
        grid = coordinate_grid(shape)
        mismatches += compare_array(name, grid, stored[name], shape=[math.prod(shape), 3], tolerance=1e-6)
    return mismatches


def _norm(case: Case, stored: Stored, places: Sequence[Path]) -> list[str]:
    low, high = case["normal"]
    volume = _volume(case["volume"], places)
    normalised, side = normalise(volume, scale_min=low, scale_max=high)
    (seed,) = _seeds(case["prediction"])
    random = np.random.RandomState(seed).random_sample(volume.shape)
    prediction = (random * 1.4 * (high - low) + low - 0.2 * (high - low)).astype(np.float32)
    inverse = denormalise(prediction, side)
    mismatches = _equal("side_info", {name: getattr(side, name) for name in case["side_info"]}, case["side_info"])
    mismatches += compare_array(
        "normalized", torch.from_numpy(normalised), stored["normalized"], shape=volume.shape, tolerance=1e-5
    )
    mismatches += _equal("inverse dtype", inverse.dtype, stored["inverse"].dtype)
    ours = torch.from_numpy(inverse.astype(np.float64))
    return mismatches + compare_array("inverse", ours, stored["inverse"], shape=volume.shape, tolerance=0.0)


def _mlp(case: Case, stored: Stored, places: Sequence[Path]) -> list[str]:
    mismatches = []
    for number, entry in enumerate(case["cases"]):
        dims = Dims(entry["input"], entry["hidden"], entry["output"], entry["layer"])
        stack = SegmentStack(dims, 1, activation=entry["act"], w0=entry["w0"], activates_output=entry["output_act"])
        with torch.no_grad():
            for layer, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
                prefix = f"{entry['key_prefix']}{layer}"
                weight.copy_(_weights(f"{prefix}-W", tuple(weight.shape[1:]), 1 / 30, 0.0))
                bias[0, :, 0] = _weights(f"{prefix}-B", (bias.shape[1],), 1 / 30, 0.0)
        expected = stored[str(number)]
        random = np.random.RandomState(entry["input_seed"]).random_sample((len(expected), entry["input"]))
        x = torch.from_numpy((random * 2 - 1).astype(np.float32))
        mismatches += _flat(case, stored, str(number), stack(x.T[None])[0].T, 1e-5, 1e-5)
    return mismatches


def _train(case: Case, stored: Stored, places: Sequence[Path]) -> list[str]:
    tree = _build(case, places)
    (seed,) = _seeds(case["what"])
    random, population = np.random.RandomState(seed), tree.target.shape[1]
    points_per_leaf = procedure.points_per_leaf(
        tree.recipe.batch_size, tree.model.plan.num_levels, population=population
    )
    mismatches = _equal("pop", population, case["pop"]) + _equal(
        "batch_per_leaf", points_per_leaf, case["batch_per_leaf"]
    )
    optimizer = procedure.create_optimizer(tree.model.parameters(), tree.recipe)
    scheduler = procedure.create_scheduler(optimizer, tree.recipe)
    losses, rates = [], []
    for _ in range(case["steps"]):
        points = torch.from_numpy(random.randint(0, population, size=points_per_leaf))
        optimizer.zero_grad()
        loss = procedure.weighted_loss(tree.model(points), tree.target[:, points], tree.recipe.weight)
        loss.backward()
        losses.append(loss.item())
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    weights = torch.cat([entry.detach().flatten() for _, entry in tree.model.node_parameters()])
    mismatches += _flat(case, stored, "loss", torch.tensor(losses, dtype=torch.float64), 2e-3)
    mismatches += _flat(case, stored, "lr", torch.tensor(rates, dtype=torch.float64), 1e-6)
    return mismatches + _flat(case, stored, "weights", weights, 0.0, 2e-3)


def _metrics(case: Case, stored: Stored, places: Sequence[Path]) -> list[str]:
    mismatches = []
    for number, entry in enumerate(case["cases"]):
        spec = entry["volume"]
        volume = _volume(spec, places)
        if entry["divide_by_100"]:
            volume = volume // 100
        noise = entry["noise"] * np.random.RandomState(spec["seed"] + 1000).standard_normal(volume.shape)
        largest = np.iinfo(volume.dtype).max
        decoded = np.clip(np.floor(volume + noise), 0, largest).astype(volume.dtype)
        place = f"cases[{number}]"
        mismatches += _close(f"{place}.psnr", metrics.psnr(volume, decoded), entry["psnr"], atol=2e-3)
        mismatches += _close(f"{place}.ssim", metrics.ssim(volume, decoded, channel_axis=-1), entry["ssim"], atol=1e-5)
        for name in (key for key in entry if re.fullmatch(r"acc\d+", key)):
            ours = metrics.accuracy(volume, decoded, threshold=int(name[3:]))
            mismatches += _close(f"{place}.{name}", ours, entry[name], atol=1e-6)
        for threshold, theirs in entry["iou_acc_precision_at"].items():
            for figure, value in zip((metrics.iou, metrics.accuracy, metrics.precision), theirs, strict=True):
                ours = figure(volume, decoded, threshold=float(threshold))
                mismatches += _close(f"{place}.{figure.__name__} at {threshold}", ours, value, atol=1e-6)
    return mismatches


def _ssim_msssim(case: Case, stored: Stored, places: Sequence[Path]) -> list[str]:
    shape = tuple(case["shape"])
    x = np.random.RandomState(case["seed_x"]).random_sample(shape) * 255
    y = np.clip(x + case["noise"] * np.random.RandomState(case["seed_y"]).standard_normal(shape), 0, 255)
    x, y = x.astype(np.float32), y.astype(np.float32)
    mismatches = _close("ssim", metrics.ssim(x, y, data_range=255), case["ssim"], atol=1e-4)
    return mismatches + _close("ms_ssim", metrics.ms_ssim(x, y, data_range=255), case["ms_ssim"], atol=1e-4)


def _sampler_schedule(case: Case, stored: Stored, places: Sequence[Path]) -> list[str]:
    mismatches = []
    for number, entry in enumerate(case["cases"]):
        levels = entry["max_level"] + 1
        population = math.prod(size // 2 ** entry["max_level"] for size in entry["volume"])
        points = procedure.points_per_leaf(entry["batch_size"], levels, population=population)
        steps = procedure.num_steps(population, points, entry["epochs"])
        schedule = procedure.evaluation_schedule(population, points, epochs=entry["epochs"], every=entry["eval_every"])
        ours = (points, population, steps, steps, [list(pair) for pair in schedule])
        names = ("batch_per_leaf", "pop", "steps", "len", "evals_step_epoch")
        for name, value in zip(names, ours, strict=True):
            mismatches += _equal(f"cases[{number}].{name}", value, entry[name])
    return mismatches


def _files(case: Case, stored: Stored, places: Sequence[Path]) -> list[str]:
    tree = _build(case, places)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "models"
        save_official(folder, tree.model, tree.recipe)
        ours = {name: [len(data), hashlib.sha256(data).hexdigest()[:16]] for name, data in _contents(folder)}
    names = set(ours) ^ set(case["files"])
    mismatches = [f"files: {', '.join(sorted(names)[:5])} in one listing only"] if names else []
    mismatches += [
        entry for name in ours if name in case["files"] for entry in _equal(name, ours[name], case["files"][name])
    ]
    return mismatches + _equal("total_bytes", sum(size for size, _ in ours.values()), case["total_bytes"])


def _contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the files of weights; the cases do not list opt.yaml."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "opt.yaml":
            yield path.relative_to(folder).as_posix(), path.read_bytes()


_KINDS: dict[str, Callable[[Case, Stored, Sequence[Path]], list[str]]] = {
    "hidden_width": _hidden_width,
    "tree": _tree,
    "allocation": _allocation,
    "coords": _coords,
    "norm": _norm,
    "mlp": _mlp,
    "train": _train,
    "metrics": _metrics,
    "ssim_msssim": _ssim_msssim,
    "sampler_schedule": _sampler_schedule,
    "files": _files,
}
