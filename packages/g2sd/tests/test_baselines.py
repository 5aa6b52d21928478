"""The plain algorithms, which ours are compared with, against definitions that share no code with either."""

import pytest
import torch
from timm.layers import Attention
from torch.nn import functional as F

from g2sd.baselines import (
    plain_attention,
    plain_biased_attention,
    plain_channel_wise,
    plain_decode,
    plain_encode,
    plain_generic_loss,
    two_softmax_channel_wise,
)
from g2sd.masking import mask_patches
from g2sd.segmentation_backbone import BiasedAttention, relative_index


class TestPlainAttention:
    def test_timm(self):
        module = Attention(12, 3, qkv_bias=True).double()
        x = torch.randn(2, 7, 12, dtype=torch.float64)
        mixed, *projections = plain_attention(module, x)
        torch.testing.assert_close(mixed, module(x))
        torch.testing.assert_close(torch.cat(projections, 2), module.qkv(x))


class TestPlainBiasedAttention:
    def test_ours(self):
        """With a bias for each pair of tokens, gathered from a table that is no constant."""
        grid = (2, 3)
        module = BiasedAttention(12, 3, grid).double().eval()
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        x, index = torch.randn(2, 7, 12, dtype=torch.float64), relative_index(grid)
        torch.testing.assert_close(plain_biased_attention(module, x, index), module(x, index))


class TestPlainPasses:
    def test_by_patches(self, teacher):
        """Encoder and decoder, patch by patch: where each token comes from and which position it has."""
        model = teacher(depth=0, decoder_depth=1).double()
        images, mask = torch.randn(2, 3, 32, 32, dtype=torch.float64), mask_patches(torch.rand(2, 16), 0.75)
        encoded = plain_encode(model, images, mask)
        patches = model.patch_embed(images)
        for image in range(2):
            torch.testing.assert_close(encoded[image, 0], model.cls_token[0, 0] + model.pos_embed[0, 0])
            for place, patch in enumerate(mask.visible[image].tolist()):
                torch.testing.assert_close(
                    encoded[image, 1 + place], patches[image, patch] + model.pos_embed[0, 1 + patch]
                )
        known = model.decoder_embed(model.norm(encoded))
        whole = model.mask_token.expand(2, 17, -1).clone()
        whole[:, 0] = known[:, 0]
        for image in range(2):
            for place, patch in enumerate(mask.visible[image].tolist()):
                whole[image, 1 + patch] = known[image, 1 + place]
        wanted = model.decoder_blocks[0](whole + model.decoder_pos_embed)
        torch.testing.assert_close(plain_decode(model, encoded, mask, 1), wanted)


class TestPlainGenericLoss:
    def test_encoder_head_costs_nothing(self, distiller):
        """Its weight is 0: the loss is the same without it, and gives it gradients of 0."""
        ours = distiller().double()
        images, noise = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.rand(2, 16)
        (student,) = ours.students.members
        student.encoderfeature_pred.requires_grad_(True)
        loss = plain_generic_loss(ours, images, noise)
        loss.backward()
        assert all(parameter.grad.eq(0).all() for parameter in student.encoderfeature_pred.parameters())
        student.encoderfeature_pred = None
        torch.testing.assert_close(plain_generic_loss(ours, images, noise), loss)

    def test_definition(self, distiller):
        ours = distiller().double()
        images, noise = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.rand(2, 16)
        mask, (student,) = mask_patches(noise, 0.75), ours.students.members
        hidden = plain_decode(ours.teacher, plain_encode(ours.teacher, images, mask), mask, 2)
        prediction = student.decoderfeature_pred(
            plain_decode(student, plain_encode(student, images, mask), mask, len(student.decoder_blocks))
        )
        wanted = F.smooth_l1_loss(prediction, F.layer_norm(hidden, (24,), eps=1e-6), beta=2.0)
        torch.testing.assert_close(plain_generic_loss(ours, images, noise), wanted)


@pytest.mark.parametrize("loss", [plain_channel_wise, two_softmax_channel_wise])
def test_channel_wise(loss):
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    told = (teacher.view(6, 20) / 2).softmax(1)
    wanted = 4 * F.cross_entropy(student.view(6, 20) / 2, told, reduction="sum") / 6
    torch.testing.assert_close(loss(student, teacher, 2.0), wanted)
