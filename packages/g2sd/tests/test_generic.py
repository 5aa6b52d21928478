"""Generic distillation: the fast way is the plain algorithm, and the teacher stays as it is."""

import pytest
import torch
from torch.nn import functional as F

from g2sd.baselines import plain_decode, plain_encode, plain_generic_loss
from g2sd.generic import GenericDistiller, supervised
from g2sd.masking import mask_patches
from visionkernels.testing.ops import TOLERANCES

SIZES = {
    "square": {},
    "rectangular": {"img_size": (24, 40)},
    "odd": {"img_size": (15, 21), "patch_size": (5, 7)},
}
UNUSED = ("pos_embed", "decoder_pos_embed", "decoder_norm", "decoder_pred", "encoderfeature_pred")


def inputs(distiller, batch=2, dtype=None):
    dtype = dtype or next(distiller.students.parameters()).dtype
    images = torch.randn(batch, 3, *distiller.teacher.patch_embed.img_size, dtype=dtype)
    return images, torch.rand(batch * distiller.num_masks, distiller.teacher.num_patches)


def gradients(distiller, loss):
    distiller.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in distiller.students.named_parameters() if p.grad is not None}


def assert_same(found, wanted, dtype=torch.float64):
    assert found.keys() == wanted.keys()
    rtol, atol = TOLERANCES[dtype][1]
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: name + text)


class TestGenericDistiller:
    @pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
    @pytest.mark.parametrize("ratio", [0.75, 0.5, 0.0])
    @pytest.mark.parametrize("beta", [2.0, 0.5])
    def test_reference(self, distiller, sizes, ratio, beta):
        """Loss and every gradient of the plain algorithm, which sorts tokens back and runs the encoder's head."""
        ours = distiller(sizes=sizes, mask_ratio=ratio, beta=beta).double()
        images, noise = inputs(ours)
        loss, plain = ours(images, noise).loss, plain_generic_loss(ours, images, noise)
        torch.testing.assert_close(loss, plain, rtol=1e-10, atol=1e-12)
        assert_same(gradients(ours, loss), gradients(ours, plain_generic_loss(ours, images, noise)))

    def test_reference_in_float32(self, distiller):
        ours = distiller()
        images, noise = inputs(ours)
        torch.testing.assert_close(ours(images, noise).loss, plain_generic_loss(ours, images, noise))

    @pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
    def test_masked(self, distiller, sizes):
        """Of removed patches alone, without the class token: the mean over those of the whole batch."""
        ours = distiller(sizes=sizes, supervise="masked").double()
        images, noise = inputs(ours)
        found = ours(images, noise)
        mask, (student,) = found.mask, ours.students.members
        hidden = plain_decode(ours.teacher, plain_encode(ours.teacher, images, mask), mask, 2)[:, 1:]
        decoded = plain_decode(student, plain_encode(student, images, mask), mask, len(student.decoder_blocks))[:, 1:]
        chosen = mask.removed.bool()
        target = F.layer_norm(hidden[chosen], hidden.shape[-1:], eps=1e-6)
        plain = F.smooth_l1_loss(student.decoderfeature_pred(decoded[chosen]), target, beta=2.0)
        torch.testing.assert_close(found.loss, plain, rtol=1e-10, atol=1e-12)
        assert_same(gradients(ours, found.loss), gradients(ours, plain))

    def test_definition_of_the_loss(self, distiller):
        ours = distiller(beta=0.7).double()
        found = ours(*inputs(ours))
        (prediction,) = found.predictions
        mean = found.hidden.mean(-1, keepdim=True)
        variance = ((found.hidden - mean) ** 2).mean(-1, keepdim=True)
        error = (prediction - (found.hidden - mean) / (variance + 1e-6).sqrt()).abs()
        wanted = torch.where(error < 0.7, error**2 / 1.4, error - 0.35).mean()
        torch.testing.assert_close(found.loss, wanted)

    def test_several_masks(self, distiller):
        """Every image under each of its masks: the loss of as many copies of the images."""
        ours = distiller(num_masks=3).double()
        images, noise = inputs(ours)
        assert noise.shape == (6, 16)
        found = ours(images, noise)
        assert found.hidden.shape[:2] == (6, 17)
        alone = GenericDistiller(ours.teacher, ours.students.members[0], teacher_layer=2)
        again = alone(images.repeat(3, 1, 1, 1), noise)
        torch.testing.assert_close(found.loss, again.loss)
        assert_same(gradients(ours, found.loss), gradients(ours, again.loss))

    def test_several_students(self, distiller):
        """The sum of the losses; each student gets what it would get alone."""
        ours = distiller(num_students=3).double()
        images, noise = inputs(ours)
        found = ours(images, noise)
        torch.testing.assert_close(found.loss, sum(found.losses))
        together = gradients(ours, found.loss)
        for place, student in enumerate(ours.students.members):
            alone = GenericDistiller(ours.teacher, student, teacher_layer=2)
            own = alone(images, noise)
            torch.testing.assert_close(found.losses[place], own.loss)
            start = f"members.{place}."
            part = {
                name.removeprefix(start): value.clone() for name, value in together.items() if name.startswith(start)
            }
            theirs = gradients(alone, own.loss)
            assert_same(part, {name.removeprefix("members.0."): value for name, value in theirs.items()})

    @pytest.mark.parametrize("supervise", ["all", "masked"])
    def test_cached_hidden(self, distiller, supervise):
        """A target that was computed before spares the teacher's pass."""
        ours = distiller(supervise=supervise)
        images, noise = inputs(ours)
        hidden = ours.target(images, mask_patches(noise, 0.75))
        wanted = ours(images, noise)
        ours.teacher.forward = ours.teacher.encode = None
        torch.testing.assert_close(ours(images, noise, hidden=hidden).loss, wanted.loss)

    def test_hidden_of_another_shape(self, distiller):
        ours = distiller()
        images, noise = inputs(ours)
        with pytest.raises(ValueError, match=r"hidden has shape \[2, 17, 20\]"):
            ours(images, noise, hidden=torch.zeros(2, 17, 20))

    def test_order_of_images(self, distiller):
        """The loss of a batch is the mean of those of its images, whatever their order."""
        ours = distiller().double()
        images, noise = inputs(ours, 4)
        whole = ours(images, noise).loss
        alone = [ours(images[i : i + 1], noise[i : i + 1]).loss for i in range(4)]
        torch.testing.assert_close(whole, torch.stack(alone).mean())
        torch.testing.assert_close(whole, ours(images.flip(0), noise.flip(0)).loss)

    @pytest.mark.parametrize("supervise", ["all", "masked"])
    @pytest.mark.parametrize("batch", [1, 3])
    def test_one_visible_patch(self, distiller, supervise, batch):
        ours = distiller(mask_ratio=0.9375, supervise=supervise).double()
        images, noise = inputs(ours, batch)
        found = ours(images, noise)
        assert found.mask.num_visible == 1
        assert all(value.isfinite().all() for value in gradients(ours, found.loss).values())
        if supervise == "all":
            torch.testing.assert_close(found.loss, plain_generic_loss(ours, images, noise))

    def test_equal_noise(self, distiller):
        ours = distiller()
        images, _ = inputs(ours)
        noise = torch.zeros(2, 16)
        found = ours(images, noise)
        assert found.mask.visible.tolist() == [[0, 1, 2, 3]] * 2
        torch.testing.assert_close(found.loss, plain_generic_loss(ours, images, noise))

    def test_autocast(self, distiller):
        """In bfloat16 the loss is float32, and near that of float32, as the gradients are."""
        ours = distiller()
        images, noise = inputs(ours)
        wanted = ours(images, noise).loss
        exact = {name: value.clone() for name, value in gradients(ours, wanted).items()}
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(images, noise).loss
        assert found.dtype == torch.float32
        # rounding of some ten layers
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=0)
        for name, value in gradients(ours, found).items():
            assert value.isfinite().all()
            assert (value - exact[name]).norm() < 0.1 * exact[name].norm() + 1e-5, name

    def test_half_precision_teacher(self, distiller):
        """A frozen teacher may keep its weights in bfloat16."""
        ours = distiller()
        images, noise = inputs(ours)
        wanted = ours(images, noise)
        hidden = ours.teacher.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = ours.target(images, wanted.mask)
        found = ours(images, noise, hidden=hidden)
        assert found.loss.dtype == torch.float32
        torch.testing.assert_close(found.loss, wanted.loss, rtol=2e-2, atol=0)

    def test_teacher_stays(self, distiller):
        ours = distiller().train()
        assert not any(module.training for module in ours.teacher.modules())
        assert all(module.training for module in ours.students.modules())
        ours(*inputs(ours)).loss.backward()
        assert not any(parameter.requires_grad for parameter in ours.teacher.parameters())
        assert all(parameter.grad is None for parameter in ours.teacher.parameters())

    def test_what_is_trained(self, distiller):
        """Heads that no loss reaches are frozen, so that neither weight decay nor several processes meet them."""
        ours = distiller()
        ours(*inputs(ours)).loss.backward()
        for name, parameter in ours.students.named_parameters():
            is_unused = name.removeprefix("members.0.").startswith(UNUSED)
            assert parameter.requires_grad != is_unused, name
            assert (parameter.grad is None) == is_unused, name

    def test_noise_is_drawn(self, distiller):
        ours = distiller(num_masks=2)
        images, _ = inputs(ours)
        found = [ours(images, generator=torch.Generator().manual_seed(seed)).mask.ids_shuffle for seed in (1, 1, 2)]
        assert found[0].shape == (4, 16)
        torch.testing.assert_close(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    def test_compile(self, distiller):
        ours = distiller()
        images, noise = inputs(ours)
        wanted = ours(images, noise)
        exact = {name: value.clone() for name, value in gradients(ours, wanted.loss).items()}
        students = torch.compile(ours.students, fullgraph=True, backend="aot_eager")
        (loss,), _ = students(images, wanted.mask, wanted.hidden)
        torch.testing.assert_close(loss, wanted.loss)
        assert_same(gradients(ours, loss), exact, torch.float32)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"teacher_layer": 0}, "teacher_layer=0 must be 1 to 3"),
            ({"teacher_layer": 4}, "teacher_layer=4 must be 1 to 3"),
            ({"supervise": "visible"}, "supervise='visible' must be one of 'all', 'masked'"),
            ({"mask_ratio": 1.0}, r"mask_ratio=1.0 must be in \[0, 1\)"),
            ({"mask_ratio": -0.5}, r"mask_ratio=-0.5 must be in \[0, 1\)"),
            ({"mask_ratio": 0.0, "supervise": "masked"}, "mask_ratio=0.0 must be above 0 for supervise='masked'"),
            ({"beta": 0.0}, "beta=0.0 must be above 0"),
            ({"num_masks": 0}, "num_masks=0 must be at least 1"),
            ({"num_students": 0}, r"students=\(\) must be one or more"),
        ],
    )
    def test_errors(self, distiller, options, message):
        with pytest.raises(ValueError, match=message):
            distiller(**options)

    def test_other_grid(self, teacher, student):
        with pytest.raises(ValueError, match="the teacher has 4x4 patches and the student 4x8"):
            GenericDistiller(teacher(), student(img_size=(32, 64)), teacher_layer=2)

    @pytest.mark.parametrize(("width", "words"), [(None, "no feature head"), (20, "a feature head of 20 channels")])
    def test_other_width(self, teacher, student, width, words):
        with pytest.raises(ValueError, match=f"the student has {words}; create it with teacher_decoder_width=24"):
            GenericDistiller(teacher(), student(teacher_decoder_width=width), teacher_layer=2)

    def test_same_grid_of_other_pixels(self, teacher, student):
        """Teacher and student may cut an image differently only if they take the same image."""
        ours = GenericDistiller(teacher(), student(img_size=16, patch_size=4), teacher_layer=2)
        with pytest.raises(ValueError, match=r"images have shape \[2, 3, 32, 32\]; the model takes .* 16, 16"):
            ours(torch.zeros(2, 3, 32, 32))

    @pytest.mark.parametrize("shape", [(2, 15), (3, 16), (4, 16)], ids=str)
    def test_other_noise(self, distiller, shape):
        with pytest.raises(ValueError, match=rf"noise has shape \[{shape[0]}, {shape[1]}\]; expected \[2, 16\]"):
            distiller()(torch.zeros(2, 3, 32, 32), torch.rand(shape))

    def test_noise_not_finite(self, distiller):
        with pytest.raises(ValueError, match="noise is not finite"):
            distiller()(torch.zeros(2, 3, 32, 32), torch.full((2, 16), torch.nan))

    def test_images_of_another_size(self, distiller):
        with pytest.raises(ValueError, match=r"images have shape \[2, 3, 40, 32\]; the model takes"):
            distiller()(torch.zeros(2, 3, 40, 32))

    def test_empty_batch(self, distiller):
        with pytest.raises(ValueError, match=r"images have shape \[0, 3, 32, 32\]"):
            distiller()(torch.zeros(0, 3, 32, 32))


class TestSupervised:
    def test_definition(self):
        tokens, mask = torch.arange(10.0).view(1, 5, 2), mask_patches(torch.rand(1, 4), 0.5)
        torch.testing.assert_close(supervised(tokens, mask, "all"), tokens)
        torch.testing.assert_close(supervised(tokens, mask, "masked"), tokens[:, 3:])


def test_learns_the_teacher(distiller):
    """On eight images the loss falls far below that of predicting 0."""
    ours = distiller(sizes={"img_size": 16})
    images, noise = torch.randn(8, 3, 16, 16), torch.rand(8, 4)
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(60):
        loss = ours(images, noise).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    target = F.layer_norm(ours(images, noise).hidden, (24,), eps=1e-6)
    zero = F.smooth_l1_loss(torch.zeros_like(target), target, beta=2.0)
    assert losses[-1] < 0.3 * zero
