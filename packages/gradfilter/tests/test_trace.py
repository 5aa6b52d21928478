"""Tracing: which convolutions run, in which order and how often; the model does not change."""

import copy
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn

from gradfilter import convert
from gradfilter.trace import trace


class TestTrace:
    def test_order(self, net, images):
        traced = trace(net, images)
        assert [call.name for call in traced.convolutions] == ["stem", "depthwise", "middle", "last"]
        assert traced.convolutions[2].input_size == (4, 8, 16, 12)
        assert traced.convolutions[2].output_size == (4, 12, 8, 6)
        assert traced.order.count("relu") == 2
        assert traced.functions == ["the model: relu"]

    def test_default_input(self, net):
        assert trace(net).convolutions[0].input_size == (1, 3, 224, 224)

    def test_nothing_changes(self, net, images):
        net.train()
        before = copy.deepcopy(net.state_dict())
        trace(net, images)
        assert net.training
        for key, value in net.state_dict().items():
            torch.testing.assert_close(value, before[key], rtol=0, atol=0)

    def test_errors(self):
        class TwoInputs(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 1)

            def forward(self, x: Tensor, gain: Tensor) -> Tensor:
                return self.conv(x) * gain

        model = TwoInputs()
        with pytest.raises(ValueError, match=r"TwoInputs does not run on the default input .*; pass example_input"):
            convert(model, last_n=1)
        for inputs in ((torch.ones(1, 3, 4, 4), torch.ones(())), {"x": torch.ones(1, 3, 4, 4), "gain": torch.ones(())}):
            assert convert(model, last_n=1, example_input=inputs).filtered == ("conv",)
        with pytest.raises(ValueError, match="lazy parameters; run it once"):
            convert(nn.Sequential(nn.LazyConv2d(4, 1)))

    def test_shared_convolution(self):
        """Each call of a layer, on maps of two sizes; among the convolutions it stands once."""
        shared = nn.Conv2d(3, 3, 3, padding=1)
        traced = trace(nn.Sequential(shared, nn.MaxPool2d(2), shared, nn.Conv2d(3, 4, 1)), torch.empty(2, 3, 8, 6))
        assert [(call.name, call.input_size) for call in traced.calls] == [
            ("0", (2, 3, 8, 6)), ("0", (2, 3, 4, 3)), ("3", (2, 3, 4, 3)),
        ]  # fmt: skip
        assert traced.convolutions == [traced.calls[0], traced.calls[2]]

    def test_hooks_do_not_run(self, net, images):
        """Forward hooks do not see the trace, and the model keeps them."""
        calls, handed = [], {}
        net.stem.register_forward_hook(lambda *_: calls.append("forward"))
        net.last.register_forward_hook(partial(lambda name, *_: calls.append(name), "last"), always_call=True)
        net.middle.register_forward_hook(handed.setdefault, with_kwargs=True)
        convert(net, last_n=2, example_input=images)
        assert calls == [] and handed == {}
        net.stem(images)
        assert calls == ["forward"] and len(net.last._forward_hooks) == 1

    def test_pre_hooks_run(self):
        """They may change what a layer takes, and make its weight."""
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)))
        net.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :3],))
        assert [call.input_size[1] for call in trace(net, torch.empty(1, 5, 9, 9)).convolutions] == [3, 4]

    def test_features_by_hooks(self):
        """timm gathers maps by methods as hooks, without which the model returns nothing."""
        net = timm.create_model("resnet18", features_only=True, feature_cls="hook", out_indices=(1, 2))
        counts = []
        model = nn.Sequential(net, _Note(counts))
        trace(model, torch.empty(1, 3, 32, 32))
        assert counts == [2]


class _Note(nn.Module):
    """Notes how many maps come, in a list that copies share."""

    def __init__(self, counts: list[int]) -> None:
        super().__init__()
        self.append = counts.append

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        self.append(len(maps))
        return maps
