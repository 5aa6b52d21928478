"""Runs the golden cases, measured on the official implementation, through the public API."""

import copy
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import diswot.networks  # noqa: F401 - registers the models
from diswot import metrics
from diswot.observation import observe
from diswot.proxies import compute, inputs
from diswot.similarity import relation_loss, semantic_loss
from visionkernels.testing.golden import (
    Case,
    check_cases,
    compare_case,
    load_module,
    make_input,
    make_inputs,
    recipe_weights,
)

__all__ = ["check"]


def check(folder: Path, data: Path | None = None) -> dict[str, list[str]]:
    """Return the mismatches of every case in `folder`, by name; `data` is unused: no case refers to raw files."""
    return check_cases(folder, _mismatches)


def _mismatches(case: Case, stored: Mapping[str, np.ndarray]) -> list[str]:
    for kinds, run in _RUNNERS:
        if case["kind"] in kinds:
            return run(case, stored)
    return [f"no runner for kind {case['kind']!r}"]


def _labels(spec: Mapping[str, Any]) -> Tensor:
    return torch.from_numpy(np.random.RandomState(spec["seed"]).randint(0, spec["high"], spec["n"]))


def _s0(depths: list[int], num_classes: int, prefix: str = "", **options: Any) -> nn.Module:
    model = timm.create_model("s0_111", depths=tuple(depths), num_classes=num_classes, **options)
    state = recipe_weights({prefix + key: value for key, value in model.state_dict().items()})
    model.load_state_dict({key.removeprefix(prefix): value for key, value in state.items()})
    return model


def _score(case: Case, stored: Mapping[str, np.ndarray]) -> list[str]:
    config, images = case["config"], make_input(case["inputs"]["x"])
    labels = _labels(case["inputs"]["labels"])
    teacher, student = (
        _s0(config[f"{role}_depths"], config["num_classes"], f"{role}.") for role in ("teacher", "student")
    )
    ours, theirs = observe(student, images, labels), observe(teacher, images, labels)
    losses = {
        "semantic": semantic_loss(ours.gradient, theirs.gradient),
        "relation": relation_loss(ours.map, theirs.map),
        "semantic_from_weights_bug": semantic_loss(student.fc.weight, teacher.fc.weight),
        "relation_sample0_bug": relation_loss(ours.map[0], theirs.map[0]),
        "relation_pooled_sample0_bug": relation_loss(ours.pooled[0][:, None], theirs.pooled[0][:, None]),
        "relation_pooled": relation_loss(ours.pooled, theirs.pooled),
    }
    losses["total"] = losses["semantic"] + losses["relation"]
    outputs = {name: -loss for name, loss in losses.items()}
    for role, seen in (("teacher", theirs), ("student", ours)):
        outputs[f"ce_{role}"] = F.cross_entropy(seen.logits, labels)
        outputs[f"{role}_fc_grad"] = seen.gradient
    return compare_case(case, stored, outputs)


def _proxies(case: Case, stored: Mapping[str, np.ndarray]) -> list[str]:
    config, images = case["config"], make_inputs({"inputs": {name: case["inputs"][name] for name in ("x", "x2")}})
    x, labels = images["x"], _labels(case["inputs"]["labels"])
    block = {"basicblock": "basic"}.get(config["block"], config["block"])
    model = _s0(config["depths"], config["num_classes"], block=block)
    names = [
        name
        for name in case["outputs"]
        if name
        in (
            "fisher",
            "grad_norm",
            "grasp",
            "jacov",
            "l2_norm",
            "nwot",
            "plain",
            "snip",
            "synflow",
            "synflow_bn",
            "epe_nas",
        )
    ]
    outputs = {
        name: torch.tensor(value, dtype=torch.float64) for name, value in compute(names, model, x, labels).items()
    }
    outputs["zen"] = torch.tensor(inputs.zen(copy.deepcopy(model), x, images["x2"]))
    outputs["bn_logvar_sum_diswot_measure"] = torch.tensor(inputs.bn_logvar(copy.deepcopy(model), x))
    outputs["ntk_cond_train_b8"] = torch.tensor(inputs.ntk_condition(copy.deepcopy(model).train(), x[:8]))
    loose = {"jacov", "ntk_cond_train_b8", "fisher"}
    mismatches = []
    for name, spec in case["outputs"].items():
        # ill-conditioned, says the case
        rtol = 2e-2 if name in loose else None
        mismatches += compare_case({**case, "outputs": {name: spec}}, stored, outputs, rtol=rtol)
    return mismatches


def _rank_metrics(case: Case, stored: Mapping[str, np.ndarray]) -> list[str]:
    n, seeds = case["config"]["n"], {name: spec["seed"] for name, spec in case["inputs"].items()}
    true = np.random.RandomState(seeds["a"]).standard_normal(n)
    predicted = 0.5 * true + np.random.RandomState(seeds["b"]).standard_normal(n)
    ratios = (0.01, 0.05, 0.1, 0.5)
    best = [
        (ratio, first, first / n, last, last / n)
        for ratio, _, first, last in metrics.best_in_top(predicted, true, ratios)
    ]
    shares = [
        (each.ratio, each.k, each.top_precision, each.bottom_precision, each.top_kendall, each.bottom_kendall)
        for each in metrics.top_precision(predicted, true, ratios)
    ]
    outputs = {
        "kendalltau": metrics.kendall(predicted, true),
        "spearman": metrics.spearman(predicted, true),
        "pearson": metrics.pearson(predicted, true),
        "rank_difference": metrics.rank_difference(predicted, true),
        "concordant_pair_ratio": metrics.same_sign_ratio(predicted, true),
        "minmax_n_at_k": best,
        "p_at_tb_k": shares,
    }
    return compare_case(
        case, stored, {name: torch.tensor(value, dtype=torch.float64) for name, value in outputs.items()}
    )


Run = Callable[[Case, Mapping[str, np.ndarray]], list[str]]
_KINDS: dict[str, Run] = {"score": _score, "proxies": _proxies, "rank_metrics": _rank_metrics}
_RUNNERS: list[tuple[Collection[str], Run]] = [
    (_KINDS, lambda case, stored: _KINDS[case["kind"]](case, stored)),
    *(
        (module.KINDS, module.run)
        for module in (load_module(Path(__file__).with_name(f"parity_{part}.py")) for part in ("losses", "networks"))
    ),
]
