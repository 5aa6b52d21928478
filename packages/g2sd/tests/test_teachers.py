"""Models of timm as teachers of generic distillation."""

import pytest
import timm
import torch
from torch import nn

from g2sd.generic import GenericDistiller
from g2sd.masking import mask_patches
from g2sd.teachers import TokenTeacher


def create(name="vit_tiny_patch16_224", **options):
    return timm.create_model(name, img_size=64, embed_dim=24, depth=3, num_heads=3, **options).eval()


class TestTokenTeacher:
    @pytest.mark.parametrize("layer", [1, 2, None])
    def test_reference(self, layer):
        """Tokens after that block, before the last norm, class token first, patches in the order of the mask."""
        model = create()
        images, mask = torch.randn(2, 3, 64, 64), mask_patches(torch.rand(2, 16), 0.75)
        tokens = model._pos_embed(model.patch_embed(images))
        for block in model.blocks[:layer]:
            tokens = block(tokens)
        found = TokenTeacher(model, layer=layer)(images, mask)
        assert found.shape == (2, 17, 24)
        torch.testing.assert_close(mask.unshuffle(found), tokens)

    @pytest.mark.parametrize(
        ("name", "options"),
        [("vit_tiny_patch16_224", {"reg_tokens": 3}), ("vit_small_patch14_reg4_dinov2", {"patch_size": 16})],
    )
    def test_registers_are_left_out(self, name, options):
        model = create(name, **options)
        images, mask = torch.randn(1, 3, 64, 64), mask_patches(torch.rand(1, 16), 0.75)
        found = mask.unshuffle(TokenTeacher(model)(images, mask))
        tokens = model.forward_intermediates(images, indices=1, intermediates_only=False)
        (patches,) = model.forward_intermediates(images, indices=1, output_fmt="NLC", intermediates_only=True)
        assert tokens[0].shape[1] > found.shape[1] == 17
        torch.testing.assert_close(found[:, 1:], patches)

    def test_several_masks(self):
        teacher = TokenTeacher(create())
        images, mask = torch.randn(2, 3, 64, 64), mask_patches(torch.rand(6, 16), 0.75)
        found = teacher(images, mask)
        torch.testing.assert_close(found, teacher(images.repeat(3, 1, 1, 1), mask))

    @pytest.mark.parametrize("supervise", ["all", "masked"])
    def test_distils(self, student, supervise):
        teacher = TokenTeacher(create(drop_path_rate=0.5))
        pupil = student(img_size=64, patch_size=16, teacher_width=None)
        distiller = GenericDistiller(teacher, pupil, supervise=supervise).train()
        images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
        losses = [distiller(images, noise).loss for _ in range(2)]
        torch.testing.assert_close(losses[0], losses[1])  # the teacher drops no path
        losses[0].backward()
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert pupil.cls_token.grad.norm() > 0

    def test_images_of_another_size(self):
        teacher = TokenTeacher(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2))
        with pytest.raises(ValueError, match=r"\[1, 3, 48, 48\]; the teacher takes 32x32 pixels"):
            teacher(torch.zeros(1, 3, 48, 48), mask_patches(torch.rand(1, 4), 0.5))

    def test_other_width(self, student):
        with pytest.raises(ValueError, match="create it with teacher_decoder_width=24"):
            GenericDistiller(TokenTeacher(create()), student(img_size=64, patch_size=16, teacher_decoder_width=32))

    def test_other_grid(self, student):
        with pytest.raises(ValueError, match="the teacher has 4x4 patches and the student 8x8"):
            GenericDistiller(TokenTeacher(create()), student(img_size=64))

    @pytest.mark.parametrize(
        ("name", "options"),
        [("resnet18", {}), ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"})],
    )
    def test_no_tokens(self, name, options):
        with pytest.raises(ValueError, match="is no ViT of timm with patches, blocks and a class token"):
            TokenTeacher(timm.create_model(name, **options))

    def test_other_module(self):
        with pytest.raises(ValueError, match="Linear is no ViT of timm"):
            TokenTeacher(nn.Linear(2, 2))

    @pytest.mark.parametrize("layer", [0, 4])
    def test_errors(self, layer):
        with pytest.raises(ValueError, match=f"layer={layer} must be 1 to 3"):
            TokenTeacher(create(), layer=layer)
