"""Models of timm as teachers of generic distillation."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from g2sd.generic import GenericDistiller
from g2sd.masking import mask_patches
from g2sd.teachers import TokenTeacher, token_teacher
from visionkernels.weights import CheckpointError


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
        """They are resized to the teacher's."""
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
        teacher, mask = TokenTeacher(model), mask_patches(torch.rand(1, 4), 0.5)
        images = torch.randn(1, 3, 48, 48)
        small = F.interpolate(images, (32, 32), mode="bicubic", antialias=True)
        torch.testing.assert_close(teacher(images, mask), teacher(small, mask))

    def test_other_statistics(self):
        """Images are normalised anew as the teacher was trained."""
        model = create()
        pixels, mask = torch.rand(1, 3, 64, 64), mask_patches(torch.rand(1, 16), 0.5)
        ours = TokenTeacher(model, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3))
        mean, std = (torch.tensor(values)[:, None, None] for values in ((0.1, 0.2, 0.3), (0.5, 0.4, 0.3)))
        expected = TokenTeacher(model)((pixels - 0.5) / 0.5, mask)
        torch.testing.assert_close(ours((pixels - mean) / std, mask), expected, rtol=1e-4, atol=1e-5)

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


NAMES = [
    "vit_small_patch14_reg4_dinov2",
    "vit_xsmall_patch16_clip_224",
    "deit3_small_patch16_224",
    "eva02_tiny_patch14_224",
]


class TestTokenTeacherByName:
    @pytest.mark.parametrize("name", NAMES)
    def test_weights_of_a_file(self, name, tmp_path):
        """Whatever the size of its patches, on the grid of the student, in the layout of timm."""
        source = timm.create_model(name, num_classes=7)
        torch.save(source.state_dict(), tmp_path / "weights.pth")
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        teacher = token_teacher(f"timm:{name}", tmp_path / "weights.pth", grid=(4, 4), mean=mean, std=std).eval()
        assert teacher.grid == (4, 4)
        torch.testing.assert_close(teacher.model.blocks[0].norm1.weight, source.blocks[0].norm1.weight)
        found = teacher(torch.randn(1, 3, 64, 64), mask_patches(torch.rand(1, 16), 0.75))
        assert found.shape == (1, 17, source.embed_dim)

    def test_errors(self, tmp_path):
        with pytest.raises(ValueError, match="unknown model 'vit_smal_patch16_224'; did you mean"):
            token_teacher("vit_smal_patch16_224", grid=(4, 4))
        with pytest.raises(ValueError, match="teacher resnet18 is no ViT of timm, and no file"):
            token_teacher("resnet18", grid=(4, 4))
        torch.save(timm.create_model("vit_tiny_patch16_224", depth=3).state_dict(), tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match="keys missing"):
            token_teacher("vit_tiny_patch16_224", tmp_path / "other.pth", grid=(4, 4))
