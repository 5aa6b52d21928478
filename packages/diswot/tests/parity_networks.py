"""Runs the golden cases of networks, mutations and counts; everything is taken from the case."""

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from diswot import networks, spaces
from diswot.networks.nb101 import GraphCell
from diswot.networks.structure import parse_block
from visionkernels.profiling import count_parameters
from visionkernels.testing.golden import Case, compare_case, make_inputs, recipe_weights

__all__ = ["KINDS", "run"]


def run(case: Case, stored: Mapping[str, np.ndarray]) -> list[str]:
    """Return the mismatches of one case of `KINDS`; empty means that it agrees."""
    if case["kind"] not in KINDS:
        return [f"{case['name']}: unknown kind {case['kind']!r}"]
    return KINDS[case["kind"]](case, stored)


def _resnet(case: Case, stored: Mapping[str, np.ndarray]) -> list[str]:
    config = case["config"]
    options = {"widths": config["widths"]} if "widths" in config else {}
    block = "zen" if "zen" in config.get("block", "basicblock") else "basic"
    model = timm.create_model(
        "s0_111", depths=config["depths"], num_classes=config["num_classes"], block=block, **options
    )
    x = _prepare(model, case)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        maps, logits = model.forward_maps(x)
        model.load_state_dict(before)
        preactivated, _ = model.forward_maps(x, preact=True)
    outputs = {f"feat{index}": value for index, value in enumerate(maps)} | {"logits": logits}
    outputs |= {f"preact{index}": value for index, value in enumerate(preactivated) if 0 < index < 4}
    return compare_case(case, stored, outputs)


def _nb201(case: Case, stored: Mapping[str, np.ndarray]) -> list[str]:
    config = case["config"]
    model = timm.create_model(
        "nb201", arch=config["arch_str"], width=config["C"], cells=config["N"], num_classes=config["num_classes"]
    )
    x = _prepare(model, case)
    with torch.no_grad():
        maps, logits = model.forward_maps(x)
        groups, _ = model.forward_group_maps(x)
    outputs = {"feat_first": maps[0], "feat_mid": maps[len(maps) // 2], "feat_prelast": maps[-2]}
    outputs |= {"pooled": maps[-1], "logits": logits}
    outputs |= {f"fwf{index}": value for index, value in enumerate(groups)}
    return compare_case(case, stored, outputs) + _differences(case, {"n_feats": len(maps)})


def _nb101(case: Case, stored: Mapping[str, np.ndarray]) -> list[str]:
    config = case["config"]
    model = timm.create_model(
        "nb101",
        matrix=config["matrix"],
        ops=config["ops"],
        stem_channels=config["stem_out_channels"],
        stacks=config["num_stacks"],
        cells=config["num_modules_per_stack"],
        num_classes=config["num_classes"],
    )
    x = _prepare(model, case)
    with torch.no_grad():
        maps, logits = model.forward_maps(x)
        model_cells, _ = model.forward_cell_maps(x)
    cells = [layer for layer in model.layers if isinstance(layer, GraphCell)]
    outputs = {"stem": maps[0], "last_map": maps[-2], "pooled": maps[-1], "logits": logits}
    outputs |= {f"cell{index}": value for index, value in enumerate(model_cells[:-1], 1)}
    facts = {
        "n_feats": len(maps),
        "n_fwf": len(model_cells),
        "vertex_channels_first": cells[0].vertex_channels,
        "vertex_channels_last": cells[-1].vertex_channels,
        "hash": model.cell.hash(),
    }
    return compare_case(case, stored, outputs) + _differences(case, facts)


def _structure(case: Case, stored: Mapping[str, np.ndarray]) -> list[str]:
    config = case["config"]
    classes = config["num_classes"]
    structure = networks.parse_structure(config["struct"])
    model = timm.create_model("structure_net", structure=config["struct"], num_classes=classes)
    x = _prepare(model, case)
    with torch.no_grad():
        maps, logits = model.forward_maps(x)
    outputs = {f"feat{index}": value for index, value in enumerate(maps)} | {"logits": logits}
    facts = _structure_facts(model, structure, classes) | {
        "official_flops_at_res": structure.official_flops(resolution=config["res"], num_classes=classes),
        "true_params": count_parameters(model),
        "split6": str(structure.split(6)),
        "to_string": str(structure),
    }
    return compare_case(case, stored, outputs) + _differences(case, facts)


def _structure_facts(model: Any, structure: networks.Structure, classes: int) -> dict[str, Any]:
    return {
        "official_model_size": structure.official_model_size(num_classes=classes),
        "num_layers": structure.num_layers,
    }


def _prepare(model: Any, case: Case) -> Tensor:
    """Load the generated weights, set the mode, return the input."""
    model.load_state_dict(recipe_weights(model.state_dict(), case.get("kept_buffers", ())))
    model.train(case["config"].get("training", False))
    return make_inputs(case)["x"]


def _differences(case: Case, facts: Mapping[str, Any], config: Mapping[str, Any] | None = None) -> list[str]:
    """Compare the facts that the configuration states."""
    config = case["config"] if config is None else config
    return [
        f"{case['name']}.{name}: {value} instead of {config[name]}"
        for name, value in facts.items()
        if name in config and not _equal(config[name], value)
    ]


def _equal(expected: Any, value: Any) -> bool:
    if isinstance(expected, float):
        return math.isclose(expected, value, rel_tol=1e-9)
    return bool(expected == value)


def _mutations(case: Case, stored: Mapping[str, np.ndarray]) -> list[str]:
    mismatches = [] if case["config"] else [f"{case['name']}: the case states no blocks"]
    for key, expected in case["config"].items():
        space, _, text = key.partition(":")
        block = parse_block(text)
        found = sorted(map(str, spaces.mutation_candidates(block, space)))
        facts = {
            "n_unique": len(found),
            # the official list of a residual block doubles with each of the three kernels of a kind
            "n_with_repeats": len(found) * 8 // 3 if block.is_residual else len(found),
            "crc32": zlib.crc32("\n".join(found).encode()),
            "first": found[: len(expected.get("first", []))],
            "last": found[len(found) - len(expected.get("last", [])) :],
        }
        mismatches += _differences({"name": f"{case['name']}.{key}"}, facts, expected)
    return mismatches


def _counts(case: Case, stored: Mapping[str, np.ndarray]) -> list[str]:
    mismatches = [] if case["config"] else [f"{case['name']}: the case states no networks"]
    for key, expected in case["config"].items():
        options = {"num_classes": expected["num_classes"]} if "num_classes" in expected else {}
        model = timm.create_model(_model_name(key), **options)
        side = expected["res"]
        facts = {
            "params": count_parameters(model),
            "macs_millions": networks.count_macs(model, (3, side, side)) / 1e6,
        }
        if isinstance(model, networks.StructureNet):
            facts |= _structure_facts(model, model.structure, model.num_classes)
            facts["official_flops"] = model.structure.official_flops(resolution=side, num_classes=model.num_classes)
        mismatches += _differences({"name": f"{case['name']}.{key}"}, facts, expected)
    return mismatches


def _model_name(official: str) -> str:
    """Return our name of an official network: "s0:713", "resnet56", "searched_nb201_cifar_ea", "zen_cifar_res32_1M"."""
    name = official.lower().replace("s0:", "s0_").replace("searched_nb201_cifar_", "nb201_")
    name = {"shufflev1": "shufflenetv1", "shufflev2": "shufflenetv2"}.get(name, name)
    return next((each for each in (name, f"cifar_{name}") if each in networks.variant_names()), name)


KINDS: dict[str, Callable[[Case, Mapping[str, np.ndarray]], list[str]]] = {
    "resnet_s0": _resnet,
    "nb201": _nb201,
    "nb101": _nb101,
    "masternet": _structure,
    "mutation_candidates": _mutations,
    "counts": _counts,
}
