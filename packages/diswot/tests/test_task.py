"""A step of distillation: what it sums up, what it trains, and what stays as it is."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from diswot.features import plan_features, read_features
from diswot.losses import create, names
from diswot.losses.contrastive import ContrastMemory
from diswot.models import create_network
from diswot.task import DEFAULT_BETA, DistillationTask, DistilledStudent

CLASSES, SAMPLES, SIZE = 8, 32, (16, 16)
FEATURE_LOSSES = [name for name in names() if name != "kd"]


def student(**options):
    return timm.create_model("s0_111", num_classes=CLASSES, widths=(8, 8, 12, 16), **options)


def teacher(**options):
    return timm.create_model("cifar_resnet8x4", **{"num_classes": CLASSES, "widths": (8, 16, 24, 32)} | options)


def task_of(distiller: str, **options) -> DistillationTask:
    if distiller == "crd":
        options = {"num_samples": SAMPLES, "num_negatives": 16, "width": 8} | options
    return DistillationTask(student(), teacher(), distiller=distiller, image_size=SIZE, **options)


def batch(count: int = 8):
    return torch.randn(count, 3, *SIZE), torch.arange(count) % CLASSES, torch.arange(count)


class TestEveryDistiller:
    @pytest.mark.parametrize("name", names())
    def test_trains(self, name):
        """Two updates on one batch: all that is trained has a gradient and moves."""
        task = task_of(name).train()
        module = task.trainable_module
        before = {key: value.detach().clone() for key, value in module.named_parameters()}
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
        images, labels, index = batch()
        for _ in range(2):
            optimizer.zero_grad()
            found = task(images, labels, index)
            found["loss"].backward()
            optimizer.step()
            assert found["loss"].dtype == torch.float32
            assert found["loss"].isfinite()
            assert [key for key, value in module.named_parameters() if value.grad is None] == []
        still = [key for key, value in module.named_parameters() if torch.equal(value, before[key])]
        assert still == []
        assert all(parameter.grad is None for parameter in task.teacher.parameters())

    @pytest.mark.parametrize("name", FEATURE_LOSSES)
    def test_bf16(self, name):
        """The same loss as in float32, up to what the networks lose, and in float32."""
        images, labels, index = batch()
        losses = []
        for is_half in (False, True):
            torch.manual_seed(0)
            task = task_of(name).train()
            with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
                losses.append(task(images, labels, index)["feature_loss"])
        assert losses[1].dtype == torch.float32
        # a cosine of gradients or a sign of a singular vector turns by more than a rounding
        torch.testing.assert_close(*losses, rtol=0.2, atol=0.02)
        task(images, labels, index)["loss"].backward()

    @pytest.mark.parametrize("name", FEATURE_LOSSES)
    def test_evaluation_is_the_student(self, name):
        task = task_of(name)
        images = batch()[0]
        module = task.trainable_module.eval()
        torch.testing.assert_close(module(images), module.student(images), rtol=0, atol=0)

    def test_adapters(self):
        """Where widths differ some losses train layers of their own."""
        trained = {name for name in FEATURE_LOSSES if list(task_of(name).trainable_module.distiller.parameters())}
        assert trained == {"hint", "ickd", "cc", "fsp", "ab", "ft", "vid", "kdsvd", "crd"}


class TestLoss:
    def test_sum(self):
        task = task_of("vid", ce_weight=0.3, kd_weight=0.5, beta=2.0, temperature=2.0).eval()
        images, labels, _ = batch()
        pair = task.trainable_module.student, task.teacher.model
        (ours, our_maps), (theirs, their_maps) = (
            read_features(model, images, plan_features(model, "stage_maps")) for model in pair
        )
        parts = {
            "ce_loss": F.cross_entropy(ours, labels),
            "kd_loss": create("kd", temperature=2.0)(ours, theirs),
            "feature_loss": task.trainable_module.distiller(our_maps, their_maps),
        }
        found = task(images, labels)
        torch.testing.assert_close({name: found[name] for name in parts}, parts)
        wanted = 0.3 * parts["ce_loss"] + 0.5 * parts["kd_loss"] + 2.0 * parts["feature_loss"]
        torch.testing.assert_close(found["loss"], wanted)
        torch.testing.assert_close(found["output"], ours)

    @pytest.mark.parametrize("name", ["none", "kd"])
    def test_kd_alone(self, name):
        """The module is the student itself, and the weights are the published ones."""
        task = task_of(name).eval()
        images, labels, _ = batch()
        found = task(images, labels)
        torch.testing.assert_close(found["loss"], 0.1 * found["ce_loss"] + 0.9 * found["kd_loss"])
        assert not isinstance(task.trainable_module, DistilledStudent)

    def test_without_teacher(self):
        images, labels, _ = batch()
        model = student()
        found = DistillationTask(model)(images, labels)
        torch.testing.assert_close(found["loss"], F.cross_entropy(model(images), labels))

    def test_probabilities(self):
        images, labels, _ = batch()
        task = task_of("none").eval()
        soft = F.one_hot(labels, CLASSES).float()
        torch.testing.assert_close(task(images, soft)["loss"], task(images, labels)["loss"])

    def test_betas(self):
        assert [task_of(name).beta for name in ("sp", "rkd", "crd")] == [3000, 1, 0.8]
        assert [task_of(name).beta for name in ("ab", "ickd", "rmi", "pearson_interclass")] == [DEFAULT_BETA] * 4
        assert task_of("sp", beta=0.0).beta == 0
        assert task_of("none").beta is None

    def test_learns_in_any_loop(self):
        """The student comes nearer to its teacher."""
        task = task_of("sp").train()
        optimizer = torch.optim.SGD(task.trainable_module.parameters(), lr=0.02, momentum=0.9)
        images, labels, _ = batch()
        history = []
        for _ in range(15):
            optimizer.zero_grad()
            found = task(images, labels)
            found["loss"].backward()
            optimizer.step()
            history.append({name: found[name].item() for name in ("kd_loss", "feature_loss")})
        assert history[-1]["kd_loss"] < 0.7 * history[0]["kd_loss"]
        assert history[-1]["feature_loss"] < 0.7 * history[0]["feature_loss"]


class TestTeacher:
    def test_stays_as_it_is(self):
        task = task_of("at")
        before = {key: value.clone() for key, value in task.teacher.state_dict().items()}
        task.train()
        images, labels, _ = batch()
        task(images, labels)["loss"].backward()
        assert not any(module.training for module in task.teacher.modules())
        torch.testing.assert_close(task.teacher.state_dict(), before)

    def test_normalises_anew(self):
        """Images come by the student's statistics, and the teacher sees its own."""
        model = teacher()
        model.pretrained_cfg = {**model.pretrained_cfg, "mean": (0.0, 0.1, 0.2), "std": (1.0, 2.0, 4.0)}
        mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
        task = DistillationTask(student(), model, mean=mean, std=std, image_size=SIZE)
        pixels = torch.rand(4, 3, *SIZE)

        def normalised(mean, std):
            return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

        wanted = model(normalised((0.0, 0.1, 0.2), (1.0, 2.0, 4.0)))
        torch.testing.assert_close(task.teacher(normalised(mean, std))[0], wanted)

    def test_same_statistics(self):
        model = teacher()
        cfg = model.pretrained_cfg
        task = DistillationTask(student(), model, mean=list(cfg["mean"]), std=cfg["std"], image_size=SIZE)
        assert task.teacher.scale is None


class TestCRD:
    def test_remembers_the_batch(self):
        task = task_of("crd").train()
        [memory] = [module for module in task.modules() if isinstance(module, ContrastMemory)]
        before = memory.memory_v1.clone()
        images, labels, _ = batch(4)
        task(images, labels, torch.tensor([3, 5, 7, 9]))
        moved = (memory.memory_v1 != before).any(1).nonzero().flatten().tolist()
        assert moved == [3, 5, 7, 9]
        torch.testing.assert_close(memory.memory_v1[moved].norm(dim=1), torch.ones(4))
        assert (memory.params[2:4] > 0).all()

    def test_memory_is_state(self):
        state = task_of("crd").trainable_module.state_dict()
        assert {key for key in state if "contrast" in key} == {
            f"distiller.contrast.{name}" for name in ("params", "memory_v1", "memory_v2")
        }

    def test_errors(self):
        images, labels, _ = batch()
        with pytest.raises(ValueError, match="CRD needs index"):
            task_of("crd")(images, labels)
        with pytest.raises(ValueError, match="size of the training set"):
            task_of("crd", num_samples=None)


class TestNetworks:
    @pytest.mark.parametrize("name", ["test_resnet", "torchvision:resnet18"])
    @pytest.mark.parametrize("distiller", ["hint", "crd"])
    def test_students_of_others(self, name, distiller):
        model = create_network(name, num_classes=CLASSES)
        options = {"num_samples": SAMPLES, "num_negatives": 16} if distiller == "crd" else {}
        task = DistillationTask(model, teacher(), distiller=distiller, **options).train()
        found = task(torch.randn(4, 3, 32, 32), torch.arange(4), torch.arange(4))
        found["loss"].backward()
        assert all(parameter.grad is not None for parameter in task.trainable_module.parameters())

    def test_layers(self):
        """Four stages pair with three where both are named."""
        model = timm.create_model("test_resnet", num_classes=CLASSES)
        with pytest.raises(
            ValueError,
            match=r"student has 4 maps and teacher 3.*student: layer1, .*layer4; teacher: layer1, layer2, layer3; "
            r"student_layers and teacher_layers name others",
        ):
            DistillationTask(model, teacher(), distiller="at")
        layers = {"student_layers": ("layer1", "layer2", "layer4")}
        task = DistillationTask(model, teacher(), distiller="at", **layers)
        assert task(torch.randn(2, 3, 32, 32), torch.arange(2))["feature_loss"].isfinite()

    def test_networks_stay_as_they_are(self):
        """Looking at their features moves no statistics and draws no random numbers."""
        model = student().train()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        state = torch.get_rng_state()
        DistillationTask(model, teacher(), distiller="sp", image_size=SIZE)
        assert model.training
        torch.testing.assert_close(model.state_dict(), before)
        untouched = torch.get_rng_state()
        torch.set_rng_state(state)
        teacher()
        assert torch.equal(torch.get_rng_state(), untouched)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"distiller": "spp"}, "unknown distiller 'spp'; did you mean 'sp'"),
            ({"kd_weight": -1.0}, "kd_weight=-1.0 must be at least 0"),
            ({"beta": -1.0, "distiller": "sp"}, "beta=-1.0 must be at least 0"),
            ({"width": 8}, "options={'width': 8} must be none for distiller='none'"),
            ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ],
    )
    def test_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            DistillationTask(student(), teacher(), image_size=SIZE, **options)

    def test_no_teacher(self):
        with pytest.raises(ValueError, match="distiller='sp' must be 'none' without a teacher"):
            DistillationTask(student(), distiller="sp")

    def test_other_classes(self):
        with pytest.raises(ValueError, match="student CifarResNet has 8 classes, teacher CifarResNet 10"):
            DistillationTask(student(), teacher(num_classes=10), image_size=SIZE)

    def test_other_channels(self):
        with pytest.raises(ValueError, match="student CifarResNet takes 3 input channels, teacher CifarResNet 1"):
            DistillationTask(student(), teacher(in_chans=1), image_size=SIZE)

    def test_no_stages(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
        with pytest.raises(ValueError, match="stages of Sequential are not known; name them by layers"):
            DistillationTask(model, teacher(), distiller="sp", image_size=SIZE)
        options = {"distiller": "sp", "image_size": SIZE, "student_layers": ("0",)}
        assert DistillationTask(model, teacher(), **options).beta == 3000
