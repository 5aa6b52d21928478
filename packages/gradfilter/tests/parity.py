"""Runs the golden cases, computed from the definition in float64, through this package's public API."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import gradfilter
from visionkernels.testing.golden import check_cases, compare_case, make_input, recipe_weights

Case = Mapping[str, Any]


def check(folder: Path, data: Path | None = None) -> dict[str, list[str]]:
    """Return the mismatches of every case in `folder`, by name; `data` is unused: no case refers to raw files."""
    layouts = json.loads((folder / "state_layout.json").read_text(encoding="utf-8"))
    return check_cases(folder, partial(_run, layouts=layouts))


def _run(case: Case, stored: Mapping[str, np.ndarray], layouts: Mapping[str, Any]) -> list[str]:
    match case["kind"]:
        case "accounting":
            return _account(case)
        case "conv":
            outputs = {str(dtype): _convolve(case, dtype) for dtype in (torch.float64, torch.float32)}
        case "model":
            layout = layouts[case["name"]]
            outputs = {str(dtype): _train(case, layout, dtype, lean=False) for dtype in (torch.float64, torch.float32)}
            # keeping less must not change a digit
            outputs["lean"] = _train(case, layout, torch.float64, lean=True)
        case kind:
            return [f"no runner for kind {kind!r}"]
    mismatches = []
    for label, values in outputs.items():
        allowed = case["tolerance"]["float32" if label == "torch.float32" else "float64"]
        # both parts are relative to the largest number of a tensor
        relative = allowed["rtol"] + allowed["atol"]
        mismatches += compare_case(case, stored, values, rtol=relative, atol=0.0, label=label)
    return mismatches


def _convolve(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    config, inputs = case["config"], {name: make_input(spec).double() for name, spec in case["inputs"].items()}
    # of unit length: divided by the root of the products in one output
    inputs["weight"] /= inputs["weight"][0].numel() ** 0.5
    x, weight, grad = (inputs[name].to(dtype) for name in ("x", "weight", "grad_output"))
    bias = inputs["bias"].to(dtype).requires_grad_() if config["bias"] else None
    radius = config["radius"] if isinstance(config["radius"], int) else tuple(config["radius"])
    geometry = {name: _pair(config[name]) for name in ("stride", "padding", "dilation")}
    leaves = [x.requires_grad_(), weight.requires_grad_(), *([] if bias is None else [bias])]
    y = gradfilter.filtered_conv2d(x, weight, bias, groups=config["groups"], radius=radius, **geometry)
    names = ("grad_input", "grad_weight", "grad_bias")
    grads = dict(zip(names, torch.autograd.grad(y, leaves, grad), strict=False))
    kernel_size = _pair(config["kernel_size"])
    return {
        "y": y,
        **grads,
        "patch_mean_grad": gradfilter.patch_mean(grad, radius),
        "saved_input": gradfilter.saved_input(x, kernel_size, radius=radius, **geometry),
        "kernel_sum": gradfilter.kernel_sum(weight),
    }


def _pair(value: int | list[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _train(case: Case, layout: Mapping[str, list[int]], dtype: torch.dtype, *, lean: bool) -> dict[str, Tensor]:
    config = case["config"]
    model = _network(config, layout)
    state = recipe_weights(model.state_dict())
    if {name: list(value.shape) for name, value in state.items()} != dict(layout):
        raise ValueError(f"the layout of {case['name']} is not that of {config['model']}")
    model.load_state_dict(state)
    model.to(dtype)
    x = make_input(case["inputs"]["x"]).to(dtype)
    random = np.random.RandomState(case["inputs"]["labels"]["seed"])
    labels = torch.from_numpy(random.randint(0, config["num_classes"], len(x)))
    gradfilter.convert(
        model, config["radius"], layers=config["filtered_layers"], example_input=x, norm_stats="update",
        lean_activations=lean,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in config["trainable"])
    model.train(config["bn_training"])
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=config["lr"], momentum=config["momentum"])
    outputs: dict[str, Tensor] = {}
    losses = []
    for _ in range(max(1, config["sgd_steps"])):
        logits = model(x)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        if not outputs:
            outputs = {"logits": logits.detach(), "loss": loss.detach()[None]}
            outputs |= {f"grad/{name}": parameter.grad.clone() for name, parameter in trained.items()}
        optimizer.step()
    return outputs | {"loss_curve": torch.stack(losses)}


def _network(config: Mapping[str, Any], layout: Mapping[str, list[int]]) -> nn.Module:
    kind, _, name = config["model"].partition(" ")
    if kind == "tinynet":
        return TinyNet(layout)
    if kind != "torchvision":
        raise ValueError(f"unknown model {config['model']!r}")
    model = getattr(torchvision.models, name)(num_classes=config["num_classes"])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class TinyNet(nn.Module):
    """Three stages with a depthwise and a pointwise convolution, in the widths that the layout states."""

    def __init__(self, layout: Mapping[str, list[int]]) -> None:
        super().__init__()
        first, second, pointwise, third = (layout[f"{name}.weight"][0] for name in ("conv1", "conv2", "pw", "conv3"))
        self.conv1, self.bn1 = nn.Conv2d(3, first, 3, 2, 1, bias=False), nn.BatchNorm2d(first)
        self.conv2, self.bn2 = nn.Conv2d(first, second, 3, 1, 1, bias=False), nn.BatchNorm2d(second)
        self.dw = nn.Conv2d(second, second, 3, 2, 1, groups=second, bias=False)
        self.bn3 = nn.BatchNorm2d(second)
        self.pw = nn.Conv2d(second, pointwise, 1)
        self.conv3, self.bn4 = nn.Conv2d(pointwise, third, 3, 1, 1, bias=False), nn.BatchNorm2d(third)
        self.fc = nn.Linear(third, layout["fc.weight"][0])
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(4))
        self.relu6 = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relus[0](self.bn1(self.conv1(x)))
        x = self.relus[1](self.bn2(self.conv2(x)))
        x = self.relu6(self.bn3(self.dw(x)))
        x = self.relus[2](self.pw(x))
        x = self.relus[3](self.bn4(self.conv3(x)))
        return self.fc(x.mean((2, 3)))


def _account(case: Case) -> list[str]:
    mismatches = []
    for expected in case["expected"]:
        with torch.device("meta"):
            model = getattr(torchvision.models, expected["model"].split()[1])()
        size, radius = expected["input"], expected["radius"]
        costs = gradfilter.profile(
            model, torch.empty(1, 3, size, size), last_n=expected["last_n"], radii=[radius], measures_memory=False
        )
        name = costs.radii[0]
        ours: dict[str, Any] = {
            "layers": [
                {
                    "layer": layer.name,
                    "saved_elems_exact": layer.saved_bytes["exact"] // 4,
                    "saved_elems_filtered": layer.saved_bytes[name] // 4,
                    "backward_flops_exact": layer.flops["exact"],
                    "backward_flops_filtered": layer.flops[name],
                }
                for layer in costs.layers
            ],
            "saved_KiB_exact": costs.total("exact", "saved_bytes") / 1024,
            "saved_KiB_filtered": costs.total(name, "saved_bytes") / 1024,
            "backward_mflops_exact": costs.total("exact", "flops") / 1e6,
            "backward_mflops_filtered": costs.total(name, "flops") / 1e6,
        }
        mismatches += [
            f"{expected['model']} last {expected['last_n']} radius {radius}: {key} {value} instead of {expected[key]}"
            for key, value in ours.items()
            if value != expected[key]
        ]
    return mismatches
