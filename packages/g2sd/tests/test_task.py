"""One step of each stage: the loss, and the ones beside it that need no model."""

import pytest
import torch
from torch.nn import functional as F

from g2sd.generic import GenericDistiller
from g2sd.mae import pixel_loss, pixel_patches
from g2sd.masking import mask_patches
from g2sd.specific import SpecificDistiller, hard_distillation_loss
from g2sd.task import AutoencoderTask, ClassifierTask, GenericTask
from visionkernels.training import FitRecipe, OptimizerRecipe, TrainingData, fit

LABELS = torch.tensor([0, 1, 2])


def images(batch=3):
    return torch.randn(batch, 3, 32, 32)


class TestAutoencoderTask:
    @pytest.mark.parametrize("is_normalised", [True, False])
    def test_definition(self, teacher, is_normalised):
        model, x = teacher(), images()
        task = AutoencoderTask(model, mask_ratio=0.5, is_normalised=is_normalised)
        torch.manual_seed(3)
        found = task(x, LABELS)
        torch.manual_seed(3)
        prediction, mask = model(x, torch.rand(3, 16), mask_ratio=0.5)
        patches = pixel_patches(x, (8, 8))
        torch.testing.assert_close(
            found["loss"], pixel_loss(prediction, patches, mask.removed, is_normalised=is_normalised)
        )
        flat = torch.zeros_like(patches) if is_normalised else patches.mean(2, keepdim=True).expand_as(patches)
        torch.testing.assert_close(
            found["flat_loss"], pixel_loss(flat, patches, mask.removed, is_normalised=is_normalised)
        )

    def test_flat_loss_of_normalised_pixels(self, teacher):
        """The mean square of normalised pixels is (n - 1) / n of 1, n numbers a patch."""
        found = AutoencoderTask(teacher())(images())
        assert found["flat_loss"].item() == pytest.approx(191 / 192, rel=1e-3)

    def test_every_parameter_learns(self, teacher):
        model = teacher()
        AutoencoderTask(model)(images())["loss"].backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []

    def test_students_are_refused(self, student):
        for options in ({}, {"teacher_width": None}, {"teacher_decoder_width": None}):
            with pytest.raises(ValueError, match="model has feature heads, which pixels do not train"):
                AutoencoderTask(student(**options))


class TestGenericTask:
    def step(self, task, x, seed=0):
        torch.manual_seed(seed)
        return task(x, LABELS)

    @pytest.mark.parametrize("supervise", ["all", "masked"])
    @pytest.mark.parametrize("num_students", [1, 2])
    def test_definition(self, distiller, supervise, num_students):
        ours, x = distiller(supervise=supervise, num_students=num_students), images()
        found = self.step(GenericTask(ours), x)
        torch.manual_seed(0)
        wanted = ours(x)
        torch.testing.assert_close(found["loss"], wanted.loss)
        each = [found[f"loss_{i}"] for i in range(num_students)] if num_students > 1 else [found["loss"]]
        torch.testing.assert_close(each, list(wanted.losses))

    @pytest.mark.parametrize("supervise", ["all", "masked"])
    @pytest.mark.parametrize("num_students", [1, 2])
    def test_zero_loss(self, distiller, supervise, num_students):
        """What students that always say 0 would lose: together as many times as there are students."""
        ours, x = distiller(supervise=supervise, num_students=num_students), images()
        found = self.step(GenericTask(ours), x)
        torch.manual_seed(0)
        hidden = ours(x).hidden
        target = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
        zero = F.smooth_l1_loss(torch.zeros_like(target), target, beta=2.0)
        torch.testing.assert_close(found["zero_loss"], num_students * zero)
        assert zero < 0.25 + 1e-6  # the targets' mean square is 1 at most

    @pytest.mark.parametrize("supervise", ["all", "masked"])
    def test_position_loss(self, distiller, supervise):
        """The guess is the mean of the targets of all steps before, for each position of the image."""
        ours = distiller(supervise=supervise)
        task, seen = GenericTask(ours), []
        for step, batch in enumerate((3, 2, 4)):
            x = images(batch)
            found = self.step(task, x, seed=step)
            torch.manual_seed(step)
            mask = mask_patches(ours.draw_noise(x), ours.mask_ratio)
            hidden = mask.unshuffle(ours.target(x, mask))
            target = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
            guess = torch.cat(seen).mean(0) if seen else torch.zeros_like(target[0])
            guess = guess.expand_as(target)
            if supervise == "masked":
                chosen = mask.removed.bool()
                pair = guess[:, 1:][chosen], target[:, 1:][chosen]
            else:
                pair = guess, target
            torch.testing.assert_close(found["position_loss"], F.smooth_l1_loss(*pair, beta=2.0))
            seen.append(target)
        torch.testing.assert_close(task.mean_target, torch.cat(seen).mean(0))
        assert task.num_targets == 9

    def test_stored_targets(self, distiller):
        """Targets that come with the batch spare the teacher's pass."""
        ours, x = distiller(), images()
        noise = torch.rand(3, 16)
        hidden = ours.target(x, mask_patches(noise, 0.75))
        wanted = ours(x, noise).loss
        task = GenericTask(ours)
        ours.teacher.encode = None
        torch.testing.assert_close(task(x, noise, hidden)["loss"], wanted)

    def test_several_masks(self, distiller):
        ours = distiller(num_masks=2)
        found = self.step(GenericTask(ours), images())
        assert found["loss"].isfinite() and found["position_loss"].isfinite()

    def test_teacher_stays(self, distiller):
        task = GenericTask(distiller()).train()
        assert not any(module.training for module in task.teacher.modules())
        assert task.trainable_module.training
        self.step(task, images())["loss"].backward()
        assert all(parameter.grad is None for parameter in task.teacher.parameters())
        trained = {id(parameter) for parameter in task.trainable_module.parameters()}
        assert all(id(p) in trained for p in task.parameters() if p.requires_grad)

    def test_final_state(self, distiller):
        """A student alone has its own names; several have their places. The teacher is in neither."""
        for count in (1, 2):
            ours = distiller(num_students=count)
            task = GenericTask(ours)
            state = task.final_state(task.trainable_module.state_dict())
            for place, student in enumerate(ours.students.members):
                prefix = "" if count == 1 else f"{place}."
                for key, value in student.state_dict().items():
                    torch.testing.assert_close(state.pop(prefix + key), value)
            assert state == {}

    def test_autocast(self, distiller):
        ours, x = distiller(), images()
        wanted = self.step(GenericTask(ours), x)
        with torch.autocast("cpu", torch.bfloat16):
            found = self.step(GenericTask(ours), x)
        for name, value in wanted.items():
            assert found[name].dtype == torch.float32
            # rounding of some ten layers
            torch.testing.assert_close(found[name], value, rtol=2e-2, atol=0)

    def test_mean_target_resumes(self, teacher, student, tmp_path):
        """A checkpoint holds the running mean: a run in two parts ends with that of a whole one."""
        samples = [(torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)), 0) for i in range(8)]

        def run(folder, interrupt):
            torch.manual_seed(0)
            task = GenericTask(GenericDistiller(teacher(), student(), teacher_layer=2))
            left = [3]
            forward = task.forward

            def stop(*batch):
                if interrupt and left[0] == 0:
                    raise RuntimeError("power cut")
                left[0] -= 1
                return forward(*batch)

            task.forward = stop
            recipe = FitRecipe(
                epochs=2, batch_size=4, device="cpu", save_every_updates=1, optimizer=OptimizerRecipe(lr=1e-3)
            )
            fit(task, recipe, TrainingData(train=samples), tmp_path / folder)
            return task

        whole = run("whole", interrupt=False)
        with pytest.raises(RuntimeError, match="power cut"):
            run("cut", interrupt=True)
        again = run("cut", interrupt=False)
        torch.testing.assert_close(again.mean_target, whole.mean_target, rtol=0, atol=0)
        assert again.num_targets == whole.num_targets == 16


class TestClassifierTask:
    def test_labels_alone(self, vit):
        model = vit(distilled=False)
        found = ClassifierTask(model)(images(), LABELS)
        torch.testing.assert_close(found["loss"], F.cross_entropy(model(images()), LABELS), rtol=1, atol=1)
        torch.testing.assert_close(found["loss"], F.cross_entropy(found["output"], LABELS))

    def test_mixed_labels(self, vit):
        target = torch.rand(3, 5).softmax(1)
        found = ClassifierTask(vit(distilled=False))(images(), target)
        torch.testing.assert_close(found["loss"], -(target * found["output"].log_softmax(1)).sum(1).mean())

    def test_distiller(self, vit):
        student, teacher, x = vit(), vit(distilled=False), images()
        found = ClassifierTask(student, SpecificDistiller(student, teacher))(x, LABELS)
        logits = student(x)
        torch.testing.assert_close(found["loss"], hard_distillation_loss(*logits, teacher(x), LABELS))
        torch.testing.assert_close(found["output"], logits[0])

    def test_teacher_stays(self, vit):
        student, teacher = vit(), vit(distilled=False, drop_path_rate=0.5)
        task = ClassifierTask(student, SpecificDistiller(student, teacher)).train()
        assert student.training and not any(module.training for module in teacher.modules())
        task(images(), LABELS)["loss"].backward()
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []

    def test_half_precision(self, vit):
        with torch.autocast("cpu", torch.bfloat16):
            assert ClassifierTask(vit(distilled=False))(images(), LABELS)["loss"].dtype == torch.float32
