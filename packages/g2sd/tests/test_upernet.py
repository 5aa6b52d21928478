"""Heads and the whole segmentation model: official names, golden case, sizes, errors."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from g2sd.upernet import FCNHead, SegmentationModel, UPerHead, segmentation_model
from visionkernels.tasks.segmentation import predict
from visionkernels.testing.golden import compare_case

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
LAYOUT = json.loads((GOLDEN / "state_layout.json").read_text())["seg_model/model"]
CASE = next(case for case in json.loads((GOLDEN / "index.json").read_text())["cases"] if case["kind"] == "seg_model")
STORED = dict(np.load(GOLDEN / CASE["file"]))
# of tensors that are not stored whole the file tells mean, standard deviation and absmax
OUTPUTS = {
    name: {**spec, "absmax": float(STORED.get(f"{name}__stats", np.abs(STORED[name]).max(keepdims=True)).flat[-1])}
    for name, spec in CASE["outputs"].items()
}


def micro(**options) -> SegmentationModel:
    sizes = {"patch_size": 8, "embed_dim": 12, "depth": 4, "num_heads": 3, "out_indices": (0, 1, 2, 3)}
    more = {"img_size": 32, "num_classes": 5, "drop_path_rate": 0.0, "auxiliary_channels": 8}
    return segmentation_model("tiny", **(sizes | more | options))


def parity() -> ModuleType:
    spec = importlib.util.spec_from_file_location("g2sd_parity_segmentation", HERE / "parity_segmentation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestGolden:
    def test_golden(self):
        found = parity().run_segmentation(CASE)
        assert set(found) == set(CASE["outputs"])
        assert compare_case({**CASE, "outputs": OUTPUTS}, STORED, found) == []

    def test_perturbed_output_is_reported(self):
        found = parity().run_segmentation(CASE)
        tolerance = CASE["tolerance"]
        for name, spec in OUTPUTS.items():
            stored = {key: value.copy() for key, value in STORED.items()}
            stored[name].reshape(-1)[0] += 10 * (tolerance["atol"] + tolerance["rtol"] * spec["absmax"])
            mismatches = compare_case({**CASE, "outputs": OUTPUTS}, stored, found)
            assert [mismatch.partition(": differs by")[0] for mismatch in mismatches] == [f"seg_model.{name}"]

    @pytest.mark.parametrize("change", [{"align_corners": True}, {"eps": 1e-5}, {"bn_eps": 1e-3}], ids=str)
    def test_other_models_are_no_pass(self, change):
        with pytest.raises(ValueError, match=f"and not {{'{next(iter(change))}'"):
            parity().run_segmentation({**CASE, "config": CASE["config"] | change})

    def test_layout(self):
        config = CASE["config"]
        model = micro(
            **config["backbone"], num_classes=config["num_classes"], decoder_channels=config["decode_channels"],
            auxiliary_channels=config["aux_channels"],
        )  # fmt: skip
        found = {key: list(value.shape) for key, value in model.state_dict().items()}
        assert found == {key: shape for key, shape in LAYOUT.items() if not key.endswith("relative_position_index")}


class TestSegmentationModel:
    @pytest.mark.parametrize(("size", "millions"), [("tiny", 11.028), ("small", 41.998), ("base", 163.877)])
    def test_parameters(self, size, millions):
        with torch.device("meta"):
            model = segmentation_model(size)
        assert round(sum(each.numel() for each in model.parameters()) / 1e6, 3) == millions

    def test_large(self):
        with torch.device("meta"):
            backbone = segmentation_model("large").backbone
        assert (backbone.out_indices, backbone.blocks[23].drop_path.drop_prob) == ((7, 11, 15, 23), pytest.approx(0.2))

    @pytest.mark.parametrize("size", [(32, 32), (17, 32), (9, 1)], ids=str)
    def test_shapes(self, size):
        model, images = micro(), torch.randn(2, 3, *size)
        assert model.eval()(images).shape == (2, 5, *size)
        assert [each.shape for each in model.train()(images)] == [(2, 5, *size)] * 2
        assert [each.shape for each in model.class_maps(images)] == [(2, 5, 16, 16), (2, 5, 4, 4)]

    def test_rectangle(self):
        model = micro(img_size=(16, 40)).eval()
        assert model(torch.randn(1, 3, 16, 40)).shape == (1, 5, 16, 40)

    def test_padding(self):
        model, images = micro().eval(), torch.randn(1, 3, 20, 30)
        assert_close(model(images), model(F.pad(images, (0, 2, 0, 12)))[..., :20, :30])

    def test_windows(self):
        """A larger picture is computed in windows of the model's size, by the model's own settings."""
        model = micro().eval()
        assert (model.scene.crop, model.scene.inference) == (32, "slide")
        found = predict(model, torch.randn(3, 50, 90), model.scene)
        assert_close(found.sum(0), torch.ones(50, 90))

    def test_every_parameter_learns(self):
        model = micro(dropout=0.0).train()
        sum(each.square().mean() for each in model(torch.randn(4, 3, 32, 32))).backward()
        assert [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()] == []

    def test_no_auxiliary(self):
        assert len(micro(auxiliary_channels=None).train()(torch.randn(2, 3, 32, 32))) == 1

    def test_autocast(self):
        model, images = micro().eval(), torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            exact = model(images)
            with torch.autocast("cpu", torch.bfloat16):
                rounded = model(images)
        assert (rounded.float() - exact).norm() < 0.05 * exact.norm()

    @pytest.mark.slow
    def test_compile(self):
        model, images = micro().eval(), torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            assert_close(torch.compile(model, fullgraph=True, backend="eager")(images), model(images))

    def test_state(self):
        model, other, images = micro().eval(), micro().eval(), torch.randn(1, 3, 32, 32)
        other(images)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(images), model(images))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": "giant"}, "size='giant' must be one of 'tiny', 'small', 'base', 'large'"),
            ({"num_classes": 0}, "num_classes=0 must be 1 to 255"),
            ({"num_classes": 256}, "num_classes=256 must be 1 to 255"),
            ({"img_size": 100}, "img_size=100 and 100 must be multiples of patch_size=16"),
            ({"depth": 4}, r"out_indices=\(3, 5, 7, 11\) must be 4 rising numbers below depth=4"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=message):
            segmentation_model(**({"size": "tiny"} | options))

    @pytest.mark.parametrize("shape", [(1, 3, 33, 32), (0, 3, 32, 32), (3, 32, 32)], ids=str)
    def test_input_errors(self, shape):
        with pytest.raises(ValueError, match=r"images have shape .* the model takes \[batch, channels, 32, 32\]"):
            micro().eval()(torch.zeros(shape))


class TestHeads:
    def test_one_image(self):
        head = UPerHead([4] * 4, 6, 3).train()
        maps = [torch.randn(1, 4, side, side) for side in (16, 8, 4, 2)]
        with pytest.raises(ValueError, match="batch of 1 image in training"):
            head(maps)
        # FitRecipe.norm_eval
        for module in head.modules():
            module.train(not isinstance(module, torch.nn.BatchNorm2d))
        assert head(maps).shape == (1, 3, 16, 16)
        assert head.eval()(maps).shape == (1, 3, 16, 16)

    def test_odd_sizes(self):
        maps = [torch.randn(2, 4, *size) for size in ((20, 12), (10, 6), (5, 3), (2, 1))]
        assert UPerHead([4] * 4, 6, 3).train()(maps).shape == (2, 3, 20, 12)

    def test_paper_sizes(self):
        head, auxiliary = UPerHead([8] * 4, 8, 150), FCNHead(8, 256, 150)
        assert [module[0].output_size for module in head.psp_modules] == [1, 2, 3, 6]
        assert (head.dropout.p, auxiliary.dropout.p, auxiliary.convs[0].conv.kernel_size) == (0.1, 0.1, (3, 3))
        assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.2)
