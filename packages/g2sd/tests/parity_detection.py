"""The golden cases of detection through the public API."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection.rpn import RPNHead

from g2sd.detection_checkpoint import detector_rules
from g2sd.detection_losses import FeatureAdapter, objectness_weighted_losses
from g2sd.vitdet import LEVELS, SimpleFeaturePyramid, ViTDetBackbone
from visionkernels.testing.golden import make_input, recipe_weights

Case = Mapping[str, Any]


def run_imitation(case: Case) -> dict[str, Tensor]:
    """Run a case of kind det_distill_loss."""
    config, inputs = case["config"], case["inputs"]

    def pyramid(name: str) -> list[Tensor]:
        spec = inputs[name]
        found = []
        for level, size in enumerate(config["sizes"]):
            shape = [*spec["shape"][:2], *size]
            drawn = make_input({**spec, "seed": spec["seed"] + spec["seed_step"] * level, "shape": shape})
            found.append(drawn * spec.get("scale", 1) + spec.get("add", 0))
        return found

    adapter = FeatureAdapter(config["channels"], len(config["sizes"]))
    adapter.load_state_dict(recipe_weights(adapter.state_dict()))
    features, objectness = pyramid("student_feats"), pyramid("student_objectness")
    for each in (features[0], objectness[0]):
        each.requires_grad_()
    adapted = adapter(features)
    found = objectness_weighted_losses(adapted, pyramid("teacher_feats"), objectness, pyramid("teacher_objectness"))
    weights = config["weights_feat_cls"]
    total = weights[0] * found.features + weights[1] * found.objectness
    total.backward()
    assert features[0].grad is not None and objectness[0].grad is not None
    return {
        "feat_loss": found.features.reshape(1), "cls_loss": found.objectness.reshape(1),
        "weighted_total": total.reshape(1), "grad_feat0": features[0].grad, "grad_obj0": objectness[0].grad,
        "adapted0": adapted[0],
    }  # fmt: skip


def run_backbone(case: Case) -> dict[str, Tensor]:
    """Run a case of kind vitdet_backbone."""
    config = case["config"]
    sizes = dict(config["vit"])
    sizes["window_blocks"] = sizes.pop("window_block_indexes")
    sizes["pretrain_size"] = sizes.pop("pretrain_img_size")
    pyramid = SimpleFeaturePyramid(ViTDetBackbone(**sizes), config["out_channels"])
    pyramid.load_state_dict(recipe_weights(pyramid.state_dict()))
    pyramid.eval()
    spec = case["inputs"]["images"]
    images = torch.from_numpy(np.random.RandomState(spec["seed"]).standard_normal(spec["shape"]).astype(np.float32))
    rpn = config["rpn"]
    head = RPNHead(config["out_channels"], rpn["num_anchors"], conv_depth=len(rpn["conv_dims"]))
    ours, theirs, rules = "rpn.head.", "proposal_generator.rpn_head.", detector_rules()
    official = rules.inverse().rename({f"{ours}{key}": value for key, value in head.state_dict().items()})
    drawn = recipe_weights({key.removeprefix(theirs): value for key, value in official.items()})
    loaded = rules.rename({f"{theirs}{key}": value for key, value in drawn.items()})
    head.load_state_dict({key.removeprefix(ours): value for key, value in loaded.items()})
    with torch.no_grad():
        maps = pyramid(images)
        objectness, deltas = head([maps[name] for name in LEVELS])
        outputs = {"last_feat": pyramid.net(images), **maps}
    outputs |= {f"objectness_{name}": each for name, each in zip(LEVELS, objectness, strict=True)}
    return outputs | {f"deltas_{name}": each for name, each in zip(LEVELS, deltas, strict=True)}
