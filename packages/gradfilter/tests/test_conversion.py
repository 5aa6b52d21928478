"""Converting: what is filtered, frozen and lean, what stays as it was, and the way back."""

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradfilter
from gradfilter import CompactConv2d, FilteredConv2d, convert, profile, restore
from visionkernels.testing.adapters import ADAPTERS


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


CHANGES = {name: ADAPTERS[name] for name in ("parametrization", "pruning", "forward")} | {
    "weight norm": lambda parent, name: nn.utils.weight_norm(getattr(parent, name)),
    "spectral norm": lambda parent, name: nn.utils.spectral_norm(getattr(parent, name)),
    "new weight norm": lambda parent, name: nn.utils.parametrizations.weight_norm(getattr(parent, name)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
class TestConvert:
    def test_last_n(self, net, images):
        keys, values = list(net.state_dict()), copy.deepcopy(net.state_dict())
        parameters = dict(net.named_parameters())
        report = convert(net, radius=2, last_n=2, example_input=images)
        assert report.filtered == ("middle", "last")
        assert [layer.status for layer in report.layers] == ["frozen", "frozen", "filtered", "filtered"]
        assert trainable(net) == {
            "middle.weight", "middle.bias", "norm3.weight", "norm3.bias", "last.weight", "last.bias",
            "head.weight", "head.bias",
        }  # fmt: skip
        assert report.frozen_norms == ("norm1", "norm2")
        assert report.lean_activations == ("relu", "dropout")
        assert report.functional_activations == ("the model: relu",)
        assert list(net.state_dict()) == keys
        for name, parameter in net.named_parameters():
            assert parameter is parameters[name]
            torch.testing.assert_close(parameter, values[name], rtol=0, atol=0)

    def test_forward_is_unchanged(self, net, images):
        net.eval()
        expected = net(images)
        convert(net, last_n=3, example_input=images)
        torch.testing.assert_close(net(images), expected)

    @pytest.mark.parametrize("lean", [False, True, "all"])
    def test_gradients_of_a_chain(self, net, images, lean):
        """Gradients equal those of the same network written with `filtered_conv2d`."""
        net.eval()
        twin = copy.deepcopy(net)
        convert(net, radius=(2, 3), last_n=2, example_input=images, lean_activations=lean)
        net(images).square().sum().backward()
        x = twin.relu(twin.norm1(twin.stem(images)))
        x = twin.relu6(twin.norm2(twin.depthwise(x))).detach()
        x = gradfilter.filtered_conv2d(x, twin.middle.weight, twin.middle.bias, 2, 1, radius=(2, 3))
        x = torch.relu(twin.norm3(x))
        x = torch.relu(gradfilter.filtered_conv2d(x, twin.last.weight, twin.last.bias, 1, 1, radius=(2, 3)))
        twin.head(x.mean((2, 3))).square().sum().backward()
        for name, parameter in net.named_parameters():
            expected = dict(twin.named_parameters())[name].grad
            assert (parameter.grad is None) == (not parameter.requires_grad)
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, expected)

    def test_names_and_patterns(self, net, images):
        assert convert(net, layers=["mid*", "stem"], example_input=images).filtered == ("stem", "middle")
        assert convert(net, example_input=images).filtered == ("stem", "depthwise", "middle", "last")

    def test_radius_by_layer(self, net, images):
        report = convert(net, {"*": 2, "last": (4, 2), "stem": None}, example_input=images)
        assert [layer.radius for layer in report.layers] == [None, (2, 2), (2, 2), (4, 2)]
        assert report.layers[0].status == "exact" and "stem.weight" in trainable(net)

    def test_twice(self, net, images):
        convert(net, 2, last_n=3, example_input=images)
        convert(net, 4, last_n=1, example_input=images)
        assert (net.last.radius, type(net.middle), type(net.relu6)) == ((4, 4), nn.Conv2d, nn.ReLU6)
        assert "middle.weight" not in trainable(net)

    def test_restore(self, net, images):
        net.stem.weight.requires_grad_(False)
        kinds = {name: type(module) for name, module in net.named_modules()}
        parameters, before = dict(net.named_parameters()), trainable(net)
        convert(net, last_n=2, example_input=images, compact=True)
        restore(net)
        assert {name: type(module) for name, module in net.named_modules()} == kinds
        assert trainable(net) == before
        for name, parameter in net.named_parameters():
            assert parameter is parameters[name]
        assert "radius" not in net.last.__dict__
        restore(net)

    def test_restore_after_surgery(self, net, images):
        """Modules and parameters that were added or removed since converting are left alone."""
        convert(net, last_n=1, example_input=images)
        net.head, net.stem.bias = nn.Identity(), nn.Parameter(torch.zeros(8), requires_grad=False)
        nn.utils.parametrizations.weight_norm(net.norm3)
        restore(net)
        assert type(net.last) is nn.Conv2d and net.stem.weight.requires_grad and not net.stem.bias.requires_grad
        assert nn.utils.parametrize.is_parametrized(net.norm3)

    def test_restore_of_a_whole(self, net, images):
        """`restore` may get a larger model than `convert` got, or a part of it."""
        whole = nn.Sequential(net)
        convert(net, last_n=1, example_input=images)
        restore(whole)
        assert trainable(net) == set(dict(net.named_parameters())) and type(net.last) is nn.Conv2d
        convert(whole, last_n=1, example_input=images)
        restore(net)
        assert trainable(net) == set(dict(net.named_parameters())) and type(net.last) is nn.Conv2d

    @pytest.mark.parametrize("kind", [FilteredConv2d, CompactConv2d])
    @pytest.mark.parametrize("options", [{}, {"radius": None}, {"compact": True}, {"last_n": 1}], ids=str)
    def test_own_layer(self, kind, options):
        """A layer that was filtered before takes the new radius while converted, and is restored afterwards."""
        own = kind(4, 4, 3, padding=1, radius=4)
        model, x = nn.Sequential(own, nn.Conv2d(4, 4, 3, padding=1)), torch.randn(1, 4, 9, 8)
        parameters, before = dict(own.named_parameters()), trainable(own)
        report = convert(model, **({"radius": 3} | options), example_input=x)
        chosen = "last_n" not in options
        assert ("0" in report.filtered) == chosen
        assert own.radius == ((3, 3) if chosen and "radius" not in options else (4, 4))
        model(x).sum().backward()
        assert any(parameter.grad is not None for parameter in own.parameters()) == chosen
        restore(model)
        assert type(own) is kind and own.radius == (4, 4) and trainable(own) == before
        restored = dict(own.named_parameters())
        assert list(restored) == list(parameters)
        assert all(restored[name] is parameters[name] for name in restored)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointed(self, reentrant):
        """Filtered layers in a checkpoint give one warning and are listed."""

        class Checkpointed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
                self.last = nn.Conv2d(3, 3, 3, padding=1)

            def forward(self, x: Tensor) -> Tensor:
                return self.last(checkpoint(self.body, x, use_reentrant=reentrant))

        model, x = Checkpointed(), torch.randn(1, 3, 9, 8, requires_grad=True)
        with pytest.warns(UserWarning) as caught:
            report = convert(model, example_input=x)
        assert [str(warning.message) for warning in caught] == [
            "2 filtered convolutions run in an activation checkpoint (first: body.0); it already drops their inputs, "
            "so both together save little memory"
        ]
        assert report.checkpointed == ("body.0", "body.1")
        assert "in an activation checkpoint: body.1" in str(report)
        assert convert(model, last_n=1, example_input=x).checkpointed == ()

    def test_checkpointed_by_timm(self):
        model = timm.create_model("resnet18", num_classes=5)
        model.set_grad_checkpointing()
        with pytest.warns(UserWarning, match=r"2 filtered convolutions .* \(first: layer4.1.conv1\)"):
            assert convert(model, last_n=2).checkpointed == ("layer4.1.conv1", "layer4.1.conv2")

    @pytest.mark.parametrize(
        ("train_norm", "norms"), [("after", {"norm3"}), ("none", set()), ("all", {"norm1", "norm2", "norm3"})]
    )
    def test_train_norm(self, net, images, train_norm, norms):
        report = convert(net, last_n=2, example_input=images, train_norm=train_norm)
        assert {name.split(".")[0] for name in trainable(net) if "norm" in name} == norms
        assert set(report.frozen_norms) == {"norm1", "norm2", "norm3"} - norms

    def test_frozen_norms_stay_in_training(self, net, images):
        convert(net, last_n=2, example_input=images)
        net.train()
        means = net.norm1.running_mean.clone(), net.norm3.running_mean.clone()
        net(images)
        assert torch.equal(net.norm1.running_mean, means[0])
        assert not torch.equal(net.norm3.running_mean, means[1])
        convert(net, last_n=2, example_input=images, norm_stats="update")
        net(images)
        assert not torch.equal(net.norm1.running_mean, means[0])

    def test_synchronised_norms_are_frozen(self, net, images):
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net).eval()
        assert type(net.norm1) is nn.SyncBatchNorm
        expected = net(images)
        assert convert(net, last_n=2, example_input=images).frozen_norms == ("norm1", "norm2")
        torch.testing.assert_close(net(images), expected)
        mean = net.norm1.running_mean.clone()
        net.train()(images).sum().backward()
        assert torch.equal(net.norm1.running_mean, mean) and "norm1.running_mean" not in gradfilter.trainable_delta(net)
        restore(net)
        assert type(net.norm1) is nn.SyncBatchNorm

    def test_norms_that_move(self, net, images):
        """Norms of unknown classes are reported and left alone."""

        class OwnNorm(nn.BatchNorm2d):
            pass

        net.norm1, net.norm3 = OwnNorm(8), OwnNorm(12)
        net.head = nn.Sequential(nn.BatchNorm1d(16, affine=False), net.head)
        report = convert(net, last_n=2, example_input=images)
        assert report.frozen_norms == ("norm2",)
        assert report.moving_norms == ("norm1: OwnNorm", "head.0: BatchNorm1d")
        assert "statistics not frozen, unknown class: norm1: OwnNorm" in str(report)
        assert convert(net, last_n=2, example_input=images, norm_stats="update").moving_norms == ()

    def test_not_frozen(self, net, images):
        convert(net, last_n=1, example_input=images, freeze_rest=False)
        assert trainable(net) == set(dict(net.named_parameters()))
        assert type(net.norm1) is nn.BatchNorm2d

    def test_coverage(self, net):
        """On a map of 2 x 2 pixels most taps read padding."""
        small = torch.randn(1, 3, 4, 4)
        with pytest.warns(UserWarning, match=r"left exact: last \(gradient overestimated: coverage 0.44\); name them"):
            report = convert(net, last_n=2, example_input=small)
        assert [layer.status for layer in report.layers[2:]] == ["filtered", "exact"]
        assert "last.weight" in trainable(net)
        assert convert(net, layers=["last"], example_input=small).filtered == ("last",)
        assert convert(net, last_n=1, example_input=small, border="covered").filtered == ("last",)
        assert net.last.border == "covered"

    def test_other_convolutions(self):
        model = nn.Sequential(
            Conv2dSame(3, 4, 3, stride=2), ScaledStdConv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 2),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        )  # fmt: skip
        x = torch.randn(2, 3, 9, 10)
        expected = model(x)
        report = convert(model, example_input=x)
        assert {layer.name: (layer.status, layer.reason) for layer in report.layers} == {
            "0": ("filtered", ""),
            "1": ("exact", "ScaledStdConv2d computes its weight at each call"),
            "2": ("frozen", "ConvTranspose2d has no filter"),
            "3": ("filtered", ""),
        }
        torch.testing.assert_close(model(x), expected)
        model(x).sum().backward()
        assert model[0].weight.grad.any() and model[3].weight.grad.any()

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_changed_layers(self, change):
        """A layer that does more than convolve stays exact between filtered ones: counted, trained, and reported."""
        model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
        images = torch.randn(2, 3, 8, 8)
        change(model, "1")
        # the older norms leave a computed weight behind; spectral norm changes at each call in training
        model(images)
        expected = model.eval()(images)
        trained = {name for name, _ in model.named_parameters()}
        profile(model, images)
        report = convert(model, example_input=images)
        assert [layer.name for layer in report.layers] == ["0", "1", "2"]
        assert report.filtered == ("0", "2") and report.layers[1].status == "exact" and report.layers[1].reason
        assert trainable(model) == trained
        torch.testing.assert_close(model(images), expected)
        model(images).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        restore(model)
        torch.testing.assert_close(model(images), expected)

    @pytest.mark.parametrize("layers", [None, ["0"]], ids=str)
    def test_tied_weights(self, layers):
        """Two layers of one weight; filtered they stay tied, and compact layers would each train a weight."""
        model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2)))
        model[1].weight = model[0].weight
        images = torch.randn(2, 3, 8, 8)
        with pytest.raises(ValueError, match=r"would untie 0\.weight and 1\.weight, which are one weight"):
            convert(model, example_input=images, layers=layers, compact=True)
        assert type(model[0]) is nn.Conv2d and model[1].weight is model[0].weight
        assert convert(model, example_input=images).filtered == ("0", "1")
        assert model[1].weight is model[0].weight

    def test_child_module(self):
        """A convolution with a child that its forward does not call is filtered like any other."""
        model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
        model[0].observer = nn.Identity()
        assert convert(model, example_input=torch.ones(1, 3, 8, 8)).filtered == ("0",)

    def test_nothing_filtered(self):
        with pytest.warns(UserWarning, match="no convolution is filtered: 0: radius None"):
            report = convert(nn.Sequential(nn.Conv2d(3, 4, 1)), None)
        assert report.filtered == ()

    def test_nothing_left(self):
        """If every chosen layer is skipped there are both warnings, no filtered layer, and all are trained."""
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1))
        with pytest.warns(UserWarning) as caught:
            report = convert(model, example_input=torch.ones(1, 3, 1, 1))
        reasons = [f"{name}{{}}gradient overestimated: coverage 0.11" for name in "01"]
        assert [str(warning.message) for warning in caught] == [
            f"left exact: {', '.join(reason.format(' (') + ')' for reason in reasons)}; name them in layers, or pass "
            "border='covered'",
            f"no convolution is filtered: {'; '.join(reason.format(': ') for reason in reasons)}",
        ]
        assert report.filtered == () and trainable(model) == set(dict(model.named_parameters()))

    def test_other_dimensions(self):
        """Convolutions along one axis or three are listed and left alone."""
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 2, 1), nn.Flatten(1, 2),
            nn.Flatten(2), nn.Conv1d(4, 4, 1),
        )  # fmt: skip
        report = convert(model, example_input=torch.ones(1, 3, 9, 8))
        assert report.filtered == ("0",)
        assert {layer.name: layer.reason for layer in report.layers[1:]} == {
            "2": "Conv3d has no filter",
            "5": "Conv1d has no filter",
        }
        assert type(model[2]) is nn.Conv3d and type(model[5]) is nn.Conv1d

    def test_image_without_a_batch(self):
        """An image without a batch axis counts as a batch of one, as example and in training."""
        model, image = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()), torch.randn(3, 9, 8)
        assert convert(model, example_input=image).filtered == ("0",)
        grads = [torch.autograd.grad(model(x).square().sum(), model[0].weight)[0] for x in (image, image[None])]
        torch.testing.assert_close(grads[0], grads[1])

    def test_objective_time(self, net, images, monkeypatch):
        monkeypatch.setattr("gradfilter.conversion.wins_time", lambda call, radius, **_: call.name == "last")
        report = convert(net, last_n=2, example_input=images, objective="time")
        assert [(layer.status, layer.reason) for layer in report.layers[2:]] == [
            ("exact", "filtering would be slower"),
            ("filtered", ""),
        ]
        assert "middle.weight" in trainable(net)

    def test_lucky_measurement(self, net, images, monkeypatch):
        """A layer that wins once, and loses when all that won are measured again, stays exact."""
        measured = []

        def wins(call, radius, **_):
            measured.append(call.name)
            return measured.count(call.name) == 1 or call.name == "last"

        monkeypatch.setattr("gradfilter.conversion.wins_time", wins)
        report = convert(net, last_n=2, example_input=images, objective="time")
        assert measured == ["middle", "last"] * 2 and report.filtered == ("last",)

    def test_copies(self, net, images):
        convert(net, last_n=2, example_input=images, compact=True)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            torch.testing.assert_close(twin.eval()(images), net.eval()(images))
            twin(images).sum().backward()
            assert twin.last.offset.grad.any()
            restore(twin)
            assert type(twin.last) is nn.Conv2d

    def test_report_reads(self, net, images):
        text = str(convert(net, last_n=2, example_input=images))
        assert "middle" in text and "2x2" in text and "2 convolutions frozen" in text
        assert "not lean, called as a function: the model: relu" in text

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"last_n": 0}, r"last_n=0 must be in \[1, 4\]"),
            ({"last_n": 5}, r"last_n=5 must be in \[1, 4\], the convolutions that the model runs"),
            ({"last_n": -1}, r"last_n=-1 must be in \[1, 4\]"),
            ({"last_n": True}, r"last_n=True must be an integer in \[1, 4\]"),
            ({"last_n": 1.0}, r"last_n=1.0 must be an integer in \[1, 4\]"),
            ({"last_n": "2"}, r"last_n='2' must be an integer in \[1, 4\]"),
            ({"layers": []}, r"layers=\[\] names no convolution; give names or patterns, or None for all"),
            ({"layers": 3}, "layers=3 names no convolution"),
            ({"layers": ["last", 3]}, "3 must be a string: the name or pattern of a convolution"),
            ({"border": "x"}, "border='x' must be one of 'plain', 'covered'"),
            ({"last_n": 1, "layers": ["last"]}, "exclude each other"),
            ({"layers": ["lst"]}, "'lst' names no convolution that the model runs; the nearest are last, stem, "),
            (
                {"layers": ["last", "block*"]},
                r"'block\*' names no .*; the nearest are (stem|depthwise|middle|last), \w+, \w+$",
            ),
            ({"layers": ["head"]}, "'head' names no convolution"),
            ({"radius": 0}, "radius=0 must be a positive integer or pair"),
            ({"radius": {"last": 2}, "last_n": 2}, "radius names no value for middle"),
            ({"radius": {"stem": 2}, "last_n": 2}, "'stem' names no convolution"),
            ({"objective": "speed"}, "objective='speed' must be one of 'memory', 'time'"),
            ({"lean_activations": "some"}, "lean_activations='some' must be one of True, False, 'all'"),
            ({"train_norm": "before"}, "train_norm='before' must be one of"),
            ({"norm_stats": "eval"}, "norm_stats='eval' must be one of"),
            ({"compact": True, "border": "covered"}, "compact=True with border='covered' is not exact"),
        ],
    )
    def test_errors(self, net, images, options, message):
        with pytest.raises(ValueError, match=message):
            convert(net, **({"example_input": images} | options))
        assert type(net.last) is nn.Conv2d and trainable(net) == set(dict(net.named_parameters()))
        # one that was converted before stays converted
        convert(net, 3, last_n=2, example_input=images, compact=True)
        parameters, kinds = dict(net.named_parameters()), [type(module) for module in net.modules()]
        with pytest.raises(ValueError, match=message):
            convert(net, **({"example_input": images} | options))
        assert net.last.radius == (3, 3) and kinds == [type(module) for module in net.modules()]
        after = dict(net.named_parameters())
        assert after.keys() == parameters.keys() and all(after[name] is parameters[name] for name in after)
        assert trainable(net) == {name for name, parameter in parameters.items() if parameter.requires_grad}

    def test_wrong_example(self, net, images):
        convert(net, last_n=2, example_input=images)
        with pytest.raises(ValueError, match="Net does not run on example_input"):
            convert(net, last_n=1, example_input=images[:, :2])
        assert isinstance(net.middle, FilteredConv2d)

    def test_failed_measurement(self, net, images, monkeypatch):
        """A failing measurement leaves a converted model as it was; it gets stock layers."""
        convert(net, 3, last_n=2, example_input=images, compact=True)

        def fails(call, radius, **_):
            assert type(call.module) is nn.Conv2d
            raise RuntimeError("out of memory")

        monkeypatch.setattr("gradfilter.conversion.wins_time", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            convert(net, last_n=1, example_input=images, objective="time")
        assert type(net.last) is CompactConv2d and net.last.radius == (3, 3) and "middle.offset" in trainable(net)

    def test_no_convolutions(self):
        with pytest.raises(ValueError, match=r"the model runs no nn\.Conv2d"):
            convert(nn.Linear(3, 4), example_input=torch.ones(1, 3))
