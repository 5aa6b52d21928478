"""Runs the golden cases of the official BiFormer through this package's public API."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biformer
from biformer.full_attention import FullAttention
from biformer.losses import distillation_loss
from biformer.model import BiFormerBlock
from biformer.official import official_block_rules, official_rules
from biformer.regional import regional_routing_attention, regional_routing_attention_weights
from visionkernels.pictures.transforms import repeated_augmentation_order
from visionkernels.testing.golden import (
    check_cases,
    compare_array,
    compare_case,
    compare_param_grads,
    make_inputs,
    recipe_weights,
)
from visionkernels.weights import KeyRules

Case = Mapping[str, Any]
Stored = Mapping[str, np.ndarray]


def check(folder: Path, data: Path | None = None) -> dict[str, list[str]]:
    """Return the mismatches of every case in `folder`, by name; `data` is unused: no case refers to raw files."""
    return check_cases(folder, _run)


def _run(case: Case, stored: Stored) -> list[str]:
    runners: dict[str, Callable[[Case, Stored], list[str]]] = {
        "bra_nhwc": _attention,
        "bra_nchw": _attention,
        "full_attention": _attention,
        "block": _block,
        "rrsda": _regional_routing,
        "micro_cls": _classifier,
        "micro_train": _classifier,
        "named_model": _classifier,
        "micro_features": _features,
        "seg_backbone": _backbone,
        "det_backbone": _backbone,
        "distillation": _distillation,
        "ra_sampler": _sampler,
    }
    if case["kind"] not in runners:
        return [f"{case['name']}: no runner for kind {case['kind']!r}"]
    torch.manual_seed(0)
    return runners[case["kind"]](case, stored)


def _fill(module: nn.Module, rules: KeyRules) -> KeyRules:
    """Give `module` the recipe's weights, generated under the official names."""
    official = recipe_weights(rules.inverse().rename(module.state_dict()))
    module.load_state_dict(rules.rename(official))
    return rules


def _attention(case: Case, stored: Stored) -> list[str]:
    config = dict(case["config"])
    if case["kind"] == "full_attention":
        has_lepe = config.pop("topk") == -2 or config["data_format"] == "NCHW"
        lepe = {"side_dwconv": config.pop("side_dwconv", 5) if has_lepe else 0}
        config.pop("side_dwconv", None)
        module: nn.Module = FullAttention(**config, **lepe)
    else:
        config["data_format"] = "NCHW" if case["kind"] == "bra_nchw" else "NHWC"
        config.setdefault("auto_pad", False)
        module = biformer.BiLevelRoutingAttention(**config)
    prefix = "attn."
    block = BiFormerBlock(config["dim"], 1, -1)
    block.attn = module
    table = {
        official.removeprefix(prefix): ours.removeprefix(prefix)
        for official, ours in official_block_rules(block).items()
        if official.startswith(prefix)
    }
    rules = _fill(module, KeyRules(table))
    outputs, mismatches = _forward_backward(case, module, rules)
    if any(spec["name"] in ("attn", "r_idx") for spec in case["outputs"]):
        routing = module.routing(make_inputs(case)["x"])
        outputs |= _in_stored_order(case, stored, routing)
    return mismatches + compare_case(case, stored, outputs)


def _in_stored_order(case: Case, stored: Stored, routing: biformer.Routing) -> dict[str, Tensor]:
    """Sort our slots as the stored ones stand; ties and nearly equal affinities may stand in another order."""
    index, weight, attention = routing.index, routing.weight, routing.attention
    if "r_idx" in stored:
        wanted = torch.from_numpy(stored["r_idx"]).long().view(index.shape)
        same = index[..., None, :] == wanted[..., :, None]
        if not same.any(-1).all():
            return {"r_idx": index, "r_weight": weight, "attn": attention}
        order = same.int().argmax(-1)
        index, weight = index.gather(-1, order), weight.gather(-1, order)
        by_slot = attention.unflatten(-1, (order.shape[-1], -1))
        expanded = order[:, :, None, None, :, None].expand(*by_slot.shape)
        attention = by_slot.gather(4, expanded).flatten(4)
    attention = attention.transpose(1, 2) if case["kind"] == "bra_nchw" else attention.flatten(0, 1)
    return {"r_idx": index, "r_weight": weight, "attn": attention}


def _forward_backward(case: Case, module: nn.Module, rules: KeyRules) -> tuple[dict[str, Tensor], list[str]]:
    """Run the module; with a loss, also backward, and compare the gradients of its parameters."""
    module.train(case["mode"] == "train")
    inputs = make_inputs(case)
    x = inputs["x"].requires_grad_("loss" in case)
    out = module(x)
    outputs = {case["outputs"][0]["name"]: out}
    if "loss" not in case:
        return outputs, []
    outputs["loss"] = (out * inputs["w"]).sum()
    outputs["loss"].backward()
    outputs["grad_x"] = x.grad
    present = {name for name, _ in module.named_parameters()}
    placeholders = {name: torch.zeros(()) for name in present}
    official_of = {}
    for name in placeholders:
        (official,) = rules.inverse().rename({name: placeholders[name]})
        official_of[name] = official
    gradients = {official_of[name]: parameter.grad for name, parameter in module.named_parameters()}
    return outputs, compare_param_grads(case, gradients)


def _block(case: Case, stored: Stored) -> list[str]:
    config = _renamed(case["config"])
    if config["topk"] <= 0:
        config.pop("kv_downsample_mode", None)
    else:
        config.setdefault("auto_pad", False)
    config.setdefault("num_heads", 1)
    block = BiFormerBlock(config.pop("dim"), config.pop("num_heads"), config.pop("topk"), **config)
    _fill(block, KeyRules(official_block_rules(block)))
    out = block.eval()(make_inputs(case)["x"].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return compare_case(case, stored, {"out": out})


def _regional_routing(case: Case, stored: Stored) -> list[str]:
    config, inputs = case["config"], make_inputs(case)
    shape, regions, seed = config["region_graph_shape"], config["kv_regions"], config["region_graph_seed"]
    rows = [
        np.random.RandomState(seed + row).permutation(regions)[: shape[-1]] for row in range(int(np.prod(shape[:-1])))
    ]
    graph = torch.from_numpy(np.stack(rows)).view(shape)
    query, key, value = (inputs[name].requires_grad_() for name in ("q", "k", "v"))
    sizes = {"scale": config["scale"], "kv_region_size": tuple(config["kv_region_size"])}
    region_size = tuple(config["region_size"])
    out = regional_routing_attention(query, key, value, graph, region_size, **sizes)
    attn = regional_routing_attention_weights(query, key, graph, region_size, **sizes)
    outputs = {"out": out, "attn": attn}
    if "loss" in case:
        outputs["loss"] = (out * inputs["w"]).sum()
        outputs["loss"].backward()
        outputs |= {"grad_q": query.grad, "grad_k": key.grad, "grad_v": value.grad}
    return compare_case(case, stored, outputs)


def _classifier(case: Case, stored: Stored) -> list[str]:
    model = _model(case)
    rules = _fill(model, official_rules(model))
    outputs, mismatches = _forward_backward(case, model, rules)
    mismatches += compare_case(case, stored, outputs)
    if "logits_f64" in stored:
        wanted = stored["logits_f64"]
        with torch.no_grad():
            logits = model.double()(make_inputs(case)["x"].double())
        mismatches += compare_array(
            f"{case['name']}.logits_f64", logits, wanted, shape=case["outputs"][0]["shape"],
            stride=case["outputs"][0].get("flat_stride", 1), tolerance=1e-9 * float(np.abs(wanted).max()),
        )  # fmt: skip
    return mismatches


def _features(case: Case, stored: Stored) -> list[str]:
    model = _model(case).eval()
    _fill(model, official_rules(model))
    with torch.no_grad():
        maps = model.forward_intermediates(make_inputs(case)["x"], intermediates_only=True)
    names = [spec["name"] for spec in case["outputs"]]
    return compare_case(case, stored, dict(zip(names, maps, strict=True)))


def _backbone(case: Case, stored: Stored) -> list[str]:
    backbone = biformer.BiFormerBackbone(_model(case)).eval()
    _fill(backbone, official_rules(backbone))
    with torch.no_grad():
        maps = backbone(make_inputs(case)["x"])
    names = [spec["name"] for spec in case["outputs"]]
    return compare_case(case, stored, dict(zip(names, maps, strict=True)))


def _model(case: Case) -> biformer.BiFormer:
    config = _renamed(case["config"])
    name = config.pop("model", None)
    if name is not None:
        return timm.create_model(name, **config)
    config.setdefault("auto_pad", False)
    return biformer.BiFormer(**config)


def _renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate official option names; what only says "off" is left out."""
    config = {key: value for key, value in config.items() if key not in ("pe", "kv_per_wins")}
    if "before_attn_dwconv" in config:
        config["pos_conv"] = max(config.pop("before_attn_dwconv"), 0)
    return config


def _distillation(case: Case, stored: Stored) -> list[str]:
    config, inputs = case["config"], make_inputs(case)
    base = F.cross_entropy(inputs["logits"], torch.tensor(config["labels"]))
    loss = distillation_loss(
        base, inputs["logits_kd"], inputs["teacher_logits"],
        kind=config["type"], alpha=config["alpha"], tau=config["tau"],
    )  # fmt: skip
    return compare_case(case, stored, {"loss": loss.reshape(1)} if "loss" not in case else {"loss": loss})


def _sampler(case: Case, stored: Stored) -> list[str]:
    config = case["config"]
    order = repeated_augmentation_order(config["length"], config["epoch"], repeats=config["repeats"])
    ranks = config["num_replicas"]
    per_rank = len(order) // ranks
    indices = torch.as_tensor(order[: per_rank * ranks]).view(per_rank, ranks).T
    return compare_case(case, stored, {"indices": indices})
