"""The golden cases agree, what does not agree is reported, and unseen cases of the same kinds run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from g2sd.baselines import plain_decode, plain_encode
from g2sd.mae import MaskedAutoencoder
from g2sd.masking import mask_patches
from visionkernels.testing.golden import load_check, make_input, recipe_weights

check = load_check(__file__)
RUNNERS = check.__globals__["_RUNNERS"]

GOLDEN = Path(__file__).parent / "golden"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "index.json").read_text())["cases"]
RUN = [case for case in CASES if case["kind"] in RUNNERS]


def params(cases):
    """Cases by name; those of ViT-B, which take seconds for its weights alone, are slow but for one."""
    return [
        pytest.param(case, id=case["name"], marks=[pytest.mark.slow] if case["name"] == "gd_named_small" else [])
        for case in cases
    ]


def mismatches(folder, case, arrays):
    (folder / "index.json").write_text(json.dumps({"cases": [case]}))
    np.savez(folder / case["file"], **arrays)
    return check(folder)[case["name"]]


@pytest.mark.parametrize("case", params(RUN))
def test_golden(tmp_path, case):
    assert mismatches(tmp_path, case, dict(np.load(GOLDEN / case["file"]))) == []


def test_kinds_without_runner(tmp_path):
    """What cannot be run is a mismatch, never a pass."""
    unknown = [case for case in CASES if case["kind"] not in RUNNERS] + [CASES[0] | {"kind": "strange"}]
    for case in unknown:
        found = mismatches(tmp_path, case, dict(np.load(GOLDEN / case["file"])))
        assert found == [f"{case['name']}: no runner for kind {case['kind']!r}"]
    assert len(RUN) >= 16


@pytest.mark.parametrize("case", params([case for case in RUN if case["name"] != "gd_named_tiny"]))
def test_finds_perturbed_outputs(tmp_path, case):
    """Every output moved by ten times its tolerance in a single stored number is reported, by its name."""
    stored, tolerance, moved = dict(np.load(GOLDEN / case["file"])), case["tolerance"], {}
    for name in case["outputs"]:
        absmax = stored.get(f"{name}__stats", np.abs(stored[name]).max(initial=0.0, keepdims=True))[-1]
        array = stored[name].astype(np.float64).reshape(-1)
        array[array.size // 2] += 10 * (tolerance["atol"] + tolerance["rtol"] * absmax)
        moved[name] = array.reshape(stored[name].shape)
    found = mismatches(tmp_path, case, stored | moved)
    assert [name for name in case["outputs"] if not any(f".{name}: differs" in each for each in found)] == []


@pytest.mark.parametrize("name", ["gd_tiny_all", "seg_losses", "vit_distilled"])
def test_finds_what_is_between_stored_numbers(tmp_path, name):
    """Mean, deviation and largest number of a whole tensor are compared too."""
    case = next(case for case in CASES if case["name"] == name)
    stored = dict(np.load(GOLDEN / case["file"]))
    with_statistics = [key for key in case["outputs"] if f"{key}__stats" in stored]
    assert with_statistics
    for key in with_statistics[:3]:
        moved = stored[f"{key}__stats"].copy()
        moved[0] += 10 * (case["tolerance"]["atol"] + case["tolerance"]["rtol"] * moved[2])
        found = mismatches(tmp_path, case, stored | {f"{key}__stats": moved})
        assert any(f".{key}: mean" in each for each in found), key


def test_wrong_shape_is_a_mismatch(tmp_path):
    case = json.loads(json.dumps(next(case for case in CASES if case["name"] == "block")))
    case["outputs"]["out"]["shape"] = [2, 17, 24]
    found = mismatches(tmp_path, case, dict(np.load(GOLDEN / case["file"])))
    assert found == ["block.out: shape [2, 17, 48] instead of [2, 17, 24]"]


def test_failure_is_a_mismatch(tmp_path):
    case = next(case for case in CASES if case["name"] == "gd_tiny_all")
    broken = case | {"config": case["config"] | {"teacher_layer": 99}}
    (found,) = mismatches(tmp_path, broken, dict(np.load(GOLDEN / case["file"])))
    assert "teacher_layer=99 must be 1 to" in found


def test_missing_output_is_a_mismatch(tmp_path):
    case = next(case for case in CASES if case["name"] == "lars")
    stored = dict(np.load(GOLDEN / case["file"]))
    del stored["bias"]
    assert "lars.bias: not stored" in mismatches(tmp_path, case, stored)
    more = case | {"outputs": case["outputs"] | {"momentum": {"shape": [1], "stride": 1}}}
    assert "lars.momentum: not computed" in mismatches(
        tmp_path, more, dict(np.load(GOLDEN / case["file"])) | {"momentum": np.zeros(1)}
    )


def test_gradients_of_other_parameters_are_a_mismatch(tmp_path):
    case = next(case for case in CASES if case["name"] == "gd_tiny_all")
    stored = dict(np.load(GOLDEN / case["file"]))
    without = case | {"params_without_gradient": [*case["params_without_gradient"], "norm.weight"]}
    (found,) = mismatches(tmp_path, without, stored)
    assert "parameters without gradient differ: ['norm.weight']" in found


class TestUnseenCases:
    """Other sizes, seeds and settings of a kind, with outputs computed here by the definition."""

    def agree(self, folder, name, changes, outputs):
        case = json.loads(json.dumps(next(case for case in CASES if case["name"] == name)))
        case |= changes | {"name": "unseen", "file": "unseen.npz"}
        case["outputs"] = {key: {"shape": list(value.shape), "stride": 1} for key, value in outputs.items()}
        arrays = {key: np.asarray(value, dtype=np.float32).reshape(-1) for key, value in outputs.items()}
        assert mismatches(folder, case, arrays) == []
        first = next(iter(arrays))
        arrays[first] = arrays[first] + 0.1
        assert mismatches(folder, case, arrays) != []

    def test_sincos(self, tmp_path):
        calls, outputs = [{"embed_dim": 16, "grid": 3}, {"embed_dim": 8, "grid": 5}], {}
        for call in calls:
            width, side = call["embed_dim"], call["grid"]
            rates = 10000 ** -(np.arange(width // 4) / (width / 4))
            rows = [np.zeros(width)]
            for y in range(side):
                for x in range(side):
                    rows.append(np.concatenate([wave(at * rates) for at in (x, y) for wave in (np.sin, np.cos)]))
            outputs[f"table_{width}_{side}"] = np.stack(rows)
        self.agree(tmp_path, "sincos_pos_embed", {"config": {"calls": calls}}, outputs)

    def test_interpolation(self, tmp_path):
        spec = {"kind": "normal", "seed": 7, "shape": [1, 26, 4]}
        table = make_input(spec)
        resized = F.interpolate(
            table[:, 1:].view(1, 5, 5, 4).permute(0, 3, 1, 2), (8, 8), mode="bicubic", align_corners=False
        )
        wanted = torch.cat([table[:, :1], resized.flatten(2).mT], 1).numpy()
        changes = {"config": {"src": 5, "dst": 8, "dim": 4}, "inputs": {"pos_embed": spec}}
        self.agree(tmp_path, "interpolate_pos_embed", changes, {"pos_embed": wanted})

    def test_lars(self, tmp_path):
        config = {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.5, "trust_coefficient": 0.01}
        draw = {name: np.random.RandomState(seed).standard_normal for name, seed in (("weight", 3), ("bias", 4))}
        shapes = {"weight": (3, 5), "bias": (5,)}
        values = {name: draw[name](shapes[name]) for name in shapes}
        velocity = dict.fromkeys(shapes, 0.0)
        for step in range(4):
            for name, seed in (("weight", 20), ("bias", 40)):
                gradient = np.random.RandomState(seed + step).standard_normal(shapes[name])
                if name == "weight":
                    gradient = gradient + 0.1 * values[name]
                    gradient = gradient * 0.01 * np.linalg.norm(values[name]) / np.linalg.norm(gradient)
                velocity[name] = 0.5 * velocity[name] + gradient
                values[name] = values[name] - 0.1 * velocity[name]
        inputs = {
            name: {"kind": "normal", "seed": seed, "shape": shapes[name]} for name, seed in (("weight", 3), ("bias", 4))
        }
        inputs["grads"] = {"kind": "normal", "steps": 4, "seed_step": 1, "weight_seed": 20, "bias_seed": 40}
        self.agree(tmp_path, "lars", {"config": config, "inputs": inputs}, values)

    @pytest.mark.parametrize("supervise", ["all", "masked"])
    def test_generic(self, tmp_path, supervise):
        """The plain algorithm in the order of the image, at another size, ratio, layer and beta."""
        sizes = {"img_size": 40, "patch_size": 8, "mlp_ratio": 2.0}
        names = ("embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
        teacher_sizes = sizes | dict(zip(names, (24, 1, 2, 16, 2, 4), strict=True))
        student_sizes = sizes | dict(zip(names, (12, 2, 3, 8, 1, 2), strict=True))
        config = {
            "teacher": teacher_sizes, "student": student_sizes, "teacher_layer": 1, "mask_ratio": 0.6,
            "supervise": supervise, "smooth_l1_beta": 0.5,
        }  # fmt: skip
        inputs = {
            "images": {"kind": "normal", "seed": 5, "shape": [3, 3, 40, 40]},
            "noise": {"kind": "uniform", "seed": 6, "shape": [3, 25]},
        }
        kept = ["pos_embed", "decoder_pos_embed"]
        models = []
        for each, widths in ((teacher_sizes, {}), (student_sizes, {"teacher_width": 24, "teacher_decoder_width": 16})):
            model = MaskedAutoencoder(**each, **widths)
            model.load_state_dict(recipe_weights(model.state_dict(), kept))
            models.append(model)
        images, mask = make_input(inputs["images"]), mask_patches(make_input(inputs["noise"]), 0.6)
        with torch.no_grad():
            before = plain_encode(models[0], images, mask)
            hidden = plain_decode(models[0], before, mask, 1)
            encoded = plain_encode(models[1], images, mask)
            decoded = plain_decode(models[1], encoded, mask, 1)
            if supervise == "masked":
                hidden, decoded = (each[:, 1:][mask.removed.bool()] for each in (hidden, decoded))
            prediction = models[1].decoderfeature_pred(decoded)
        label = F.layer_norm(hidden, (16,), eps=1e-6)
        outputs = {
            "teacher_hidden": hidden, "student_pred": prediction, "label": label, "mask": mask.removed,
            "teacher_prenorm": before, "latent_prenorm": encoded,
            "decoder_feature_loss": F.smooth_l1_loss(prediction, label, beta=0.5).reshape(1),
        }  # fmt: skip
        changes = {"config": config, "inputs": inputs, "kept_buffers": kept}
        case = f"gd_tiny_{supervise}"
        without = list(next(c for c in CASES if c["name"] == case)["params_without_gradient"])
        self.agree(tmp_path, case, changes | {"params_without_gradient": without}, outputs)
