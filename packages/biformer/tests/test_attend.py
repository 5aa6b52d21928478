import numpy as np
import pytest
import timm
import torch
from PIL import Image

from biformer import BiLevelRoutingAttention
from biformer.attend import RoutingRecorder, attend, routed_layers, token_heat


@pytest.fixture(scope="module")
def model():
    return timm.create_model("biformer_tiny", depth=(1, 1, 2, 1), num_classes=5).eval()


class TestRoutingRecorder:
    def test_records(self, model):
        with RoutingRecorder(model) as recorder, torch.no_grad():
            model(torch.randn(2, 3, 224, 224))
        assert list(recorder) == ["stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1"]
        routing = recorder["stages.2.1"]
        assert routing.index.shape == (2, 49, 16)
        assert routing.attention.shape == (2, 49, 8, 4, 64)
        torch.testing.assert_close(routing.attention.sum(-1), torch.ones(2, 49, 8, 4))

    def test_hooks_are_removed(self, model):
        with RoutingRecorder(model, ["stages.0.0"]) as recorder:
            pass
        with torch.no_grad():
            model(torch.randn(1, 3, 64, 64))
        assert len(recorder) == 0

    def test_errors(self, model):
        with pytest.raises(ValueError, match=r"layer 'stages.3.0' has no routed attention; choose among stages.0.0"):
            RoutingRecorder(model, ["stages.3.0"])


class TestTokenHeat:
    def test_lies_on_routed_regions(self):
        layer = BiLevelRoutingAttention(8, num_heads=2, n_win=3, topk=2)
        routing = layer.routing(torch.randn(1, 9, 6, 8))
        heat = token_heat(routing, (4, 3))
        assert heat.shape == (9, 6)
        torch.testing.assert_close(heat.sum(), torch.tensor(1.0))
        regions = {int(row) // 3 * 3 + int(column) // 2 for row, column in heat.nonzero().tolist()}
        assert regions == set(routing.index[0, 4].tolist())

    def test_pooled_keys_have_no_place(self):
        layer = BiLevelRoutingAttention(8, 2, 3, 2, kv_downsample_mode="avgpool", kv_downsample_ratio=2)
        with pytest.raises(ValueError, match="this layer pools keys inside regions"):
            token_heat(layer.routing(torch.randn(1, 12, 12, 8)), (0, 0))


class TestAttend:
    @pytest.mark.parametrize("layer", [None, "stages.2.0"])
    @pytest.mark.parametrize("suffix", ["png", "svg"])
    def test_draws(self, model, tmp_path, layer, suffix):
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 91, 3), dtype=np.uint8))
        out = tmp_path / f"out.{suffix}"
        attend(picture, model, layer, (59, 90), out)
        if suffix == "png":
            with Image.open(out) as drawn:
                assert drawn.width > (1000 if layer is None else 300)
        else:
            assert "</svg>" in out.read_text()
        assert len(routed_layers(model)) == 4

    def test_errors(self, model, tmp_path):
        picture = Image.new("RGB", (91, 60))
        with pytest.raises(ValueError, match="query=60 0 is outside the picture of 60 rows, 91 columns"):
            attend(picture, model, None, (60, 0), tmp_path / "out.png")
        with pytest.raises(ValueError, match=r"layer 'stages.9.9' has no routed attention"):
            attend(picture, model, "stages.9.9", (0, 0), tmp_path / "out.png")
        with pytest.raises(ValueError, match="the picture is 1 x 999 pixels; a side may be 20 times the other at most"):
            attend(Image.new("RGB", (1, 999)), model, None, (0, 0), tmp_path / "out.png")
        with pytest.raises(FileNotFoundError, match="missing"):
            attend(tmp_path / "missing.png", model, None, (0, 0), tmp_path / "out.png")
        assert list(tmp_path.iterdir()) == []
