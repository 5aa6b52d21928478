"""Runs the golden cases of the official G2SD through this package's public API."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

import g2sd.vit  # noqa: F401 - registers the models
from g2sd.blocks import LeanAttention, create_block
from g2sd.generic import GenericDistiller
from g2sd.lars import Lars
from g2sd.mae import MaskedAutoencoder, pixel_loss, pixel_patches, pixels_of
from g2sd.masking import PatchMask
from g2sd.positions import interpolate_positions, sincos_positions
from g2sd.segmentation_losses import channel_wise_loss, pixel_kl_loss
from g2sd.specific import hard_distillation_loss, relation_loss
from visionkernels.ops.feature_smooth_l1 import feature_smooth_l1
from visionkernels.ops.nkd_loss import nkd_loss
from visionkernels.testing.golden import check_cases, compare_case, load_module, make_input, recipe_weights

Case = Mapping[str, Any]
Stored = Mapping[str, np.ndarray]
Outputs = dict[str, Tensor]


def check(folder: Path, data: Path | None = None) -> dict[str, list[str]]:
    """Return the mismatches of every case in `folder`, by name; `data` is unused: no case refers to raw files."""
    return check_cases(folder, _run)


def _run(case: Case, stored: Stored) -> list[str]:
    if case["kind"] not in _RUNNERS:
        return [f"{case['name']}: no runner for kind {case['kind']!r}"]
    torch.manual_seed(0)
    return compare_case(_described(case, stored), stored, _RUNNERS[case["kind"]](case))


def _described(case: Case, stored: Stored) -> Case:
    """Return the case with what its file tells of each whole tensor: mean, standard deviation and absmax."""
    outputs = {}
    for name, spec in case["outputs"].items():
        statistics = stored.get(f"{name}__stats")
        if statistics is None:
            figures = {"absmax": float(np.abs(stored[name]).max(initial=0.0))} if name in stored else {}
        else:
            figures = dict(zip(("mean", "std", "absmax"), map(float, statistics), strict=True))
        outputs[name] = {**spec, **figures}
    return {**case, "outputs": outputs}


def _input(case: Case, name: str) -> Tensor:
    spec = case["inputs"][name]
    return _drawn(spec, spec["seed"], spec["shape"])


def _drawn(spec: Mapping[str, Any], seed: int, shape: list[int]) -> Tensor:
    """Return an input of the kinds of this index: see its conventions."""
    if spec["kind"] == "randint":
        found = torch.from_numpy(np.random.RandomState(seed).randint(spec["low"], spec["high"], shape))
    elif spec["kind"] == "simplex":
        found = torch.from_numpy(np.random.RandomState(seed).random_sample(shape) ** 8)
        found = (found / found.sum(-1, keepdim=True)).float()
    else:
        found = make_input({**spec, "seed": seed, "shape": shape})
    found = found * spec["scale"] if "scale" in spec else found
    found = found + spec["add"] if "add" in spec else found
    if "where" in spec:
        found = (found > spec["where"]["above"]).float()
    if "rows_to" in spec:
        rows, value = spec["rows_to"]
        found[..., :rows, :] = value
    return found


def _filled(module: nn.Module, kept: list[str] | None = None) -> nn.Module:
    module.load_state_dict(recipe_weights(module.state_dict(), kept or []))
    return module


def _autoencoder(config: Any, kept: list[str], **options: Any) -> MaskedAutoencoder:
    model = timm.create_model(config, **options) if isinstance(config, str) else MaskedAutoencoder(**config, **options)
    _filled(model, kept)
    assert isinstance(model, MaskedAutoencoder)
    return model


def _generic(case: Case) -> Outputs:
    config = {"supervise": "all", "smooth_l1_beta": 2.0, **case["config"]}
    teacher = _autoencoder(config["teacher"], case["kept_buffers"])
    widths = {"teacher_width": teacher.embed_dim, "teacher_decoder_width": teacher.decoder_width}
    student = _autoencoder(config["student"], case["kept_buffers"], **widths)
    distiller = GenericDistiller(
        teacher, student, teacher_layer=config["teacher_layer"], supervise=config["supervise"],
        mask_ratio=config["mask_ratio"], beta=config["smooth_l1_beta"],
    )  # fmt: skip
    images, noise = _input(case, "images"), _input(case, "noise")
    found = distiller(images, noise)
    mask = found.mask
    with torch.no_grad():
        latent, prenorm = student.encode(images, mask), teacher.encode(images, mask)
        assert student.encoderfeature_pred is not None
        encoder_pred = student.encoderfeature_pred(student.norm(latent))
    outputs = {
        "teacher_prenorm": prenorm,
        "student_encoder_pred": encoder_pred,
        "latent_prenorm": latent,
        "encoder_feature_loss": feature_smooth_l1(encoder_pred, prenorm, beta=distiller.beta).reshape(1),
        "teacher_hidden": _in_order(found.hidden, mask),
        "student_pred": _in_order(found.predictions[0], mask),
        "mask": mask.removed,
        "ids_shuffle": mask.ids_shuffle.float(),
        "decoder_feature_loss": found.loss.reshape(1),
    }
    hidden = outputs["teacher_hidden"]
    outputs["label"] = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
    found.loss.backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            outputs[f"grad:{name}"] = parameter.grad
    without = {name for name, parameter in student.named_parameters() if parameter.grad is None}
    expected = set(case.get("params_without_gradient", without)) | {"pos_embed", "decoder_pos_embed"}
    if without | {"pos_embed", "decoder_pos_embed"} != expected:
        raise ValueError(f"parameters without gradient differ: {sorted(without ^ expected)}")
    counts = {"trainable_params_student": student, "all_params_student": student, "all_params_teacher": teacher}
    fixed = {id(student.pos_embed), id(student.decoder_pos_embed)}
    for name, model in counts.items():
        # heads that the distiller leaves alone are trainable in the official code
        found_count = sum(p.numel() for p in model.parameters() if name.startswith("all") or id(p) not in fixed)
        if case.get(name, found_count) != found_count:
            raise ValueError(f"{name} is {found_count} instead of {case[name]}")
    return outputs


def _in_order(tokens: Tensor, mask: PatchMask) -> Tensor:
    """Return tokens in the order of the image; removed ones alone row by row, [removed, channels]."""
    if tokens.shape[1] > mask.ids_shuffle.shape[1]:
        return mask.unshuffle(tokens)
    order = mask.ids_shuffle[:, mask.num_visible :].argsort(1)
    return tokens.gather(1, order[:, :, None].expand_as(tokens)).flatten(0, 1)


def _attention(case: Case) -> Outputs:
    config = case["config"]
    module = _filled(LeanAttention(config["dim"], config["num_heads"], qkv_bias=config["qkv_bias"]))
    x = _input(case, "x")
    query, key, value = module.qkv(x).chunk(3, -1)
    return {"out": module(x), "q": query, "k": key, "v": value}


def _block(case: Case) -> Outputs:
    config = case["config"]
    block = _filled(create_block(config["dim"], config["num_heads"], config["mlp_ratio"]))
    return {"out": block(_input(case, "x"))}


def _sincos(case: Case) -> Outputs:
    return {
        f"table_{call['embed_dim']}_{call['grid']}": sincos_positions(call["embed_dim"], (call["grid"],) * 2)[0]
        for call in case["config"]["calls"]
    }


def _pixels(case: Case) -> Outputs:
    images, prediction, removed = (_input(case, name) for name in ("images", "pred", "mask"))
    patch = (case["config"]["patch"],) * 2
    grid = (images.shape[2] // patch[0], images.shape[3] // patch[1])
    patches = pixel_patches(images, patch)
    return {
        "patches": patches,
        "unpatchified": pixels_of(prediction, grid, patch),
        "loss": pixel_loss(prediction, patches, removed, is_normalised=False).reshape(1),
        "loss_norm_pix": pixel_loss(prediction, patches, removed).reshape(1),
    }


def _classifier(case: Case, *, distilled: bool) -> VisionTransformer:
    config = case["config"]["model"]
    if isinstance(config, str):
        name, options = f"g2sd_{config}_224", {"num_classes": case["config"]["num_classes"]}
    else:
        name, options = "g2sd_vit_tiny_patch16_224", config
    model = _filled(timm.create_model(name, distilled=distilled, **options))
    assert isinstance(model, VisionTransformer)
    if sum(p.numel() for p in model.parameters()) != case.get("num_params", -1):
        raise ValueError(f"the model has not {case['num_params']} parameters")
    return model


def _distilled(case: Case) -> Outputs:
    model: Any = _classifier(case, distilled=True)
    images = _input(case, "images")
    model.set_distilled_training(True)
    logits = model.train()(images)
    outputs = {"train_cls_logits": logits[0], "train_dist_logits": logits[1], "eval_logits": model.eval()(images)}
    model.eval_head = "class"
    return outputs | {"eval_logits_cls_only": model(images)}


def _average(case: Case) -> Outputs:
    return {"logits": _classifier(case, distilled=False).eval()(_input(case, "images"))}


def _specific(case: Case) -> Outputs:
    student, teacher, soft, distillation = (
        _input(case, name) for name in ("student_logits", "teacher_logits", "soft_labels", "dist_logits")
    )
    outputs = {}
    for setting in case["config"]["nkd"]:
        for name, labels in (("hard", _input(case, "labels")), ("soft", soft.argmax(1))):
            logits = student.clone().requires_grad_()
            loss = nkd_loss(logits, teacher, labels, alpha=setting["alpha"], temperature=setting["temp"])
            loss.backward()
            place = f"nkd_T{setting['temp']:g}_a{setting['alpha']:g}_{name}"
            outputs |= {place: loss.reshape(1), f"{place}_grad": logits.grad}
    total = hard_distillation_loss(student, distillation, teacher, soft)
    twice = hard_distillation_loss(student, student, teacher, soft)
    told = F.cross_entropy(distillation, teacher.argmax(1))
    # the two halves, each from the public loss
    halves = {"hard_distill_dist": told, "hard_distill_gt": 2 * twice - F.cross_entropy(student, teacher.argmax(1))}
    return outputs | {"hard_distill_total": total.reshape(1)} | {name: each.reshape(1) for name, each in halves.items()}


def _relation(case: Case) -> Outputs:
    config = case["config"]

    def layers(name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        spec = case["inputs"][name]
        found = []
        for layer in range(config["layers"]):
            seeds = [spec["seed"] + spec["layer_step"] * layer + spec["seed_step"] * i for i in range(3)]
            query, key, value = (_drawn(spec, seed, spec["shape"]) for seed in seeds)
            found.append((query, key, value))
        return found

    student, teacher = layers("student"), layers("teacher")
    heads = {"loss_Ar1": 1, "loss_Ar": config["Ar"]}
    return {name: relation_loss(student, teacher, num_heads=count).reshape(1) for name, count in heads.items()}


def _segmentation_losses(case: Case) -> Outputs:
    outputs = {}
    teacher = _input(case, "teacher")
    for setting in case["config"]["cases"]:
        tau, weight = setting["tau"], setting["weight"]
        student = _input(case, "student").requires_grad_()
        loss = weight * channel_wise_loss(student, teacher, temperature=tau)
        loss.backward()
        place = f"tau{tau:g}_w{weight:g}"
        outputs |= {f"cwd_{place}": loss.reshape(1), f"cwd_{place}_grad": student.grad}
        for reduction in ("mean", "batchmean", "sum"):
            value = weight * pixel_kl_loss(student, teacher, temperature=tau, reduction=reduction)
            outputs[f"kl_{place}_{reduction}"] = value.reshape(1)
    return outputs


def _lars(case: Case) -> Outputs:
    parameters = [nn.Parameter(_input(case, name)) for name in ("weight", "bias")]
    optimizer = Lars(parameters, **case["config"])
    spec = case["inputs"]["grads"]
    for step in range(spec["steps"]):
        for parameter, name in zip(parameters, ("weight", "bias"), strict=True):
            parameter.grad = _drawn(spec, spec[f"{name}_seed"] + spec["seed_step"] * step, list(parameter.shape))
        optimizer.step()
    return {"weight": parameters[0], "bias": parameters[1]}


def _interpolation(case: Case) -> Outputs:
    side = case["config"]["dst"]
    return {"pos_embed": interpolate_positions(_input(case, "pos_embed"), (side, side))}


_segmentation_cases, _detection_cases = (
    load_module(Path(__file__).with_name(f"parity_{part}.py")) for part in ("segmentation", "detection")
)
_RUNNERS: dict[str, Callable[[Case], Outputs]] = {
    "seg_model": _segmentation_cases.run_segmentation,
    "det_distill_loss": _detection_cases.run_imitation,
    "vitdet_backbone": _detection_cases.run_backbone,
    "generic": _generic,
    "generic_named": _generic,
    "attention": _attention,
    "block": _block,
    "sincos_pos_embed": _sincos,
    "mae_pixel_loss": _pixels,
    "vit_distilled": _distilled,
    "vit_gap": _average,
    "sd_losses": _specific,
    "relation_loss": _relation,
    "seg_losses": _segmentation_losses,
    "lars": _lars,
    "interpolate_pos_embed": _interpolation,
}
