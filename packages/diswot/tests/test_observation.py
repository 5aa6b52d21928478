"""What is read of networks: of ours, of timm and torchvision, and of what users write."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from diswot.observation import Reading, check_batch, cross_entropy, observe, read_map


class HeadFirst(nn.Module):
    """The classifier is the first linear layer that is defined, and the last one that runs."""

    def __init__(self):
        super().__init__()
        self.head, self.conv, self.middle = nn.Linear(8, 5), nn.Conv2d(3, 8, 3), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.middle(self.conv(x).relu().mean((2, 3))).relu())


class HeadOnTokens(nn.Module):
    """A classifier of each position, whose logits are averaged."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 5, stride=3), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.norm(self.conv(x).flatten(2).mT)).mean(1)


class HeadTwice(nn.Module):
    """Two halves of the picture through one classifier."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        left, right = (self.head(self.conv(half).square().mean((2, 3))) for half in x.chunk(2, dim=-1))
        return left + right


class Whitened(timm.models.resnet.ResNet):
    """A timm network with a forward pass of its own."""

    def forward(self, x):
        return super().forward(x - 3)


def whitened():
    return Whitened(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(8, 8, 8, 8))


NETWORKS = {
    "s0": (lambda: timm.create_model("s0_113", num_classes=5), "fc"),
    "resnet": (lambda: timm.create_model("test_resnet", num_classes=5), "fc"),
    "vit": (lambda: timm.create_model("test_vit", num_classes=5, img_size=32), "head"),
    "vit-average": (lambda: timm.create_model("test_vit", num_classes=5, img_size=32, global_pool="avg"), "head"),
    "convnext": (lambda: timm.create_model("test_convnext", num_classes=5), "head.fc"),
    "mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=5, drop_rate=0), "classifier"),
    "torchvision": (lambda: torchvision.models.resnet18(num_classes=5), "fc"),
    "torchvision-vit": (
        lambda: torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5),
        "heads.head",
    ),
    "whitened": (whitened, "fc"),
    "head-first": (HeadFirst, "head"),
    "head-on-tokens": (HeadOnTokens, "head"),
    "head-twice": (HeadTwice, "head"),
}


@pytest.fixture(params=NETWORKS, ids=NETWORKS.keys())
def named(request):
    make, head = NETWORKS[request.param]
    return make(), head


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32)


LABELS = torch.tensor([0, 4, 4, 1])


def observed(model, images, labels=LABELS, **reading):
    return observe(model, images, labels, Reading(**reading))


class TestObserve:
    def test_gradient_is_that_of_the_whole_network(self, named, images):
        (model, head), images = named, images.double()
        model.double()
        found = observed(model, images)
        logits = model.train()(images)
        F.cross_entropy(logits, LABELS).backward()
        torch.testing.assert_close(found.gradient, model.get_submodule(head).weight.grad)
        torch.testing.assert_close(found.logits, logits.detach())

    def test_leaves_no_hooks(self, named, images):
        model, _ = named
        observed(model, images)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert "forward_features" not in vars(model)
        assert all(each.grad is None for each in model.parameters())

    def test_eval(self, images):
        model = timm.create_model("s0_111", num_classes=5).eval()
        found = observed(model, images[:1], LABELS[:1], mode="eval")
        torch.testing.assert_close(found.logits, model(images[:1]).detach())

    def test_named_head(self, images):
        class TwoHeads(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.one, self.two = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Linear(8, 5)

            def forward(self, x):
                x = self.conv(x).mean((2, 3))
                return self.one(x) + 2 * self.two(x)

        model = TwoHeads()
        one, two = observed(model, images, head="one"), observed(model, images, head="two")
        torch.testing.assert_close(2 * one.gradient, two.gradient)

    def test_errors(self, images, s0):
        model = s0()
        with pytest.raises(ValueError, match=r"batch of 1, and batch norms in training mode need at least 2"):
            observed(model, images[:1], LABELS[:1])
        with pytest.raises(ValueError, match=r"labels reach from 0 to 5; the network has 5 classes, 0 to 4"):
            observed(model, images, LABELS.clamp(max=1) * 5)
        with pytest.raises(ValueError, match="labels reach from -1 to"):
            observed(model, images, LABELS - 1)
        with pytest.raises(ValueError, match=r"head='conv1' is no linear layer; linear layers: fc"):
            observed(model, images, head="conv1")
        with pytest.raises(ValueError, match=r"feature='layer4' is no module of CifarResNet; near: layer3, layer2"):
            observed(model, images, feature="layer4")
        with pytest.raises(ValueError, match=r"feature='fc' is no module of CifarResNet before the classifier"):
            observed(model, images, feature="fc")
        with pytest.raises(ValueError, match=r"mode='test' must be 'train' or 'eval'"):
            Reading(mode="test")

    @pytest.mark.parametrize(
        "model",
        [
            nn.Sequential(nn.Conv2d(3, 5, 32), nn.Flatten()),
            timm.create_model("test_resnet", num_classes=0),
            timm.create_model("test_vit", num_classes=0, img_size=32),
        ],
        ids=["no-linear", "headless", "headless-vit"],
    )
    def test_no_classifier(self, images, model):
        with pytest.raises(ValueError, match="has no linear classifier"):
            observed(model, images)

    def test_classifier_of_something_else(self, images):
        class Spare(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.linear, self.spare = nn.Conv2d(3, 7, 3), nn.Linear(7, 6), nn.Linear(2, 2)

            def forward(self, x):
                return self.linear(self.conv(x).mean((2, 3)))[:, :5]

        with pytest.raises(
            ValueError, match=r"head='linear' does not give the logits \[batch, 5\]; linear layers: lin"
        ):
            observed(Spare(), images)
        with pytest.raises(ValueError, match="head='spare' has no part in what the network returns"):
            observed(Spare(), images, head="spare")

    def test_outputs_that_are_no_logits(self, images):
        class Pair(HeadFirst):
            def forward(self, x):
                return super().forward(x), x

        with pytest.raises(ValueError, match=r"Pair gives tuple; it must give logits \[batch, classes\]"):
            observed(Pair(), images)

    def test_no_map(self, images):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5))
        with pytest.raises(ValueError, match=r"no module of Sequential before the classifier with positions; name one"):
            observed(model, images)

    def test_a_linear_layer_that_computes_otherwise(self, images):
        class Cosine(nn.Linear):
            def forward(self, x):
                return F.linear(F.normalize(x), F.normalize(self.weight))

        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Cosine(8, 5))
        with pytest.raises(ValueError, match="has no linear classifier"):
            observed(model, images)


class TestReadMap:
    @pytest.mark.parametrize("name", ["s0", "resnet", "vit", "convnext", "mobilenetv3"])
    def test_forward_features(self, images, name):
        model = NETWORKS[name][0]().eval()
        wanted = model.forward_features(images).detach()
        wanted = wanted.mT if wanted.ndim == 3 else wanted
        torch.testing.assert_close(read_map(model, images), wanted)

    def test_overridden_forward(self, images):
        model = whitened().eval()
        torch.testing.assert_close(read_map(model, images), model.forward_features(images - 3).detach())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_torchvision(self, images, dtype):
        """DenseNet's last ReLU is a function that changes the map in place."""
        model = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5).eval().to(dtype)
        images = images.to(dtype)
        torch.testing.assert_close(read_map(model, images), F.relu(model.features(images)).detach().float())

    def test_channels_last(self, images):
        swin = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=32, embed_dim=24, depths=(1, 1), num_heads=(1, 2), window_size=4
        ).eval()
        torch.testing.assert_close(read_map(swin, images), swin.forward_features(images).movedim(-1, 1).detach())

    def test_as_many_tokens_as_channels(self, images):
        model = timm.create_model("test_vit", img_size=32, num_classes=5, class_token=False, global_pool="avg",
                                  patch_size=4, embed_dim=64).eval()  # fmt: skip
        torch.testing.assert_close(read_map(model, images), model.forward_features(images).mT.detach())

    def test_named(self, images, s0):
        model = s0().eval()
        kept = []
        model.layer1.register_forward_hook(lambda _, __, output: kept.append(output))
        found = read_map(model, images, "layer1")
        torch.testing.assert_close(found, kept[0])
        assert not found.requires_grad

    def test_huge_maps_get_the_room_that_products_need(self, images, s0):
        model = s0().eval()
        model.layer3[0].bn2.weight.data.fill_(1e13)
        assert read_map(model, images).dtype == torch.float64
        assert read_map(s0(), images).dtype == torch.float32


class TestCheckBatch:
    @pytest.mark.parametrize(
        ("images", "labels", "message"),
        [
            (torch.zeros(3, 8, 8), torch.zeros(3).long(), r"images are torch.float32 \[3, 8, 8\]"),
            (torch.zeros(0, 3, 8, 8), torch.zeros(0).long(), r"images are torch.float32 \[0, 3, 8, 8\]"),
            (torch.zeros(2, 3, 8, 8).byte(), torch.zeros(2).long(), "images are torch.uint8"),
            (torch.zeros(2, 3, 8, 8), torch.zeros(3).long(), r"labels are torch.int64 \[3\]; they must be int64 \[2\]"),
            (torch.zeros(2, 3, 8, 8), torch.zeros(2), "labels are torch.float32"),
            (torch.zeros(2, 3, 8, 8), torch.zeros(2).int(), "labels are torch.int32"),
            (torch.zeros(2, 3, 8, 8), torch.zeros(2, 5).long(), r"labels are torch.int64 \[2, 5\]"),
        ],
    )
    def test_errors(self, images, labels, message):
        with pytest.raises(ValueError, match=message):
            check_batch(images, labels)

    def test_good(self):
        check_batch(torch.zeros(1, 1, 1, 1), torch.zeros(1).long())


class TestCrossEntropy:
    def test_reference(self):
        logits = torch.randn(3, 4, dtype=torch.float64)
        labels = torch.tensor([0, 3, 3])
        expected = (logits.logsumexp(1) - logits[torch.arange(3), labels]).mean()
        torch.testing.assert_close(cross_entropy(logits, labels), expected)
