"""Masked autoencoders: official layouts, decoding in shuffled order, pixels and their loss."""

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from g2sd.baselines import plain_decode, plain_encode
from g2sd.mae import MaskedAutoencoder, create_autoencoder, pixel_loss, pixel_patches, pixels_of
from g2sd.masking import draw_noise, mask_patches
from g2sd.positions import sincos_positions
from visionkernels.testing.adapters import ADAPTERS

# grids and patches that are neither square nor powers of two
SIZES = {
    "square": {},
    "rectangular": {"img_size": (24, 40)},
    "odd": {"img_size": (15, 21), "patch_size": (5, 7)},
    "one-row": {"img_size": (8, 40)},
}


def inputs(model, batch=2, ratio=0.75):
    images = torch.randn(batch, 3, *model.patch_embed.img_size, dtype=next(model.parameters()).dtype)
    return images, mask_patches(torch.rand(batch, model.num_patches), ratio)


class TestMaskedAutoencoder:
    @pytest.mark.parametrize(
        ("layout", "name", "options"),
        [
            ("gd_named_tiny/teacher", "mae_vit_base_patch16", {}),
            ("gd_named_tiny/student", "mae_vit_tiny_patch16", {"teacher_width": 768, "teacher_decoder_width": 512}),
            ("gd_named_small/student", "mae_vit_small_patch16", {"teacher_width": 768, "teacher_decoder_width": 512}),
        ],
    )
    def test_official_names(self, layouts, layout, name, options):
        with torch.device("meta"):
            state = create_autoencoder(name, **options).state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == layouts[layout]

    @pytest.mark.parametrize("layout", ["gd_tiny_all/teacher", "gd_tiny_all/student", "gd_tiny_masked/student"])
    def test_official_names_of_small_models(self, layouts, index, layout):
        name, _, role = layout.partition("/")
        config = next(case["config"] for case in index["cases"] if case["name"] == name)
        widths = {"teacher_width": 96, "teacher_decoder_width": 64} if role == "student" else {}
        state = MaskedAutoencoder(**config[role], **widths).state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == layouts[layout]

    @pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
    @pytest.mark.parametrize("num_blocks", [1, 2, 3])
    def test_decode_reference(self, teacher, sizes, num_blocks):
        """In shuffled order, with a table for removed patches, it is the plain algorithm in the order of the image."""
        model = teacher(**sizes).double()
        images, mask = inputs(model)
        encoded = model.encode(images, mask)
        torch.testing.assert_close(encoded, plain_encode(model, images, mask))
        decoded = mask.unshuffle(model.decode(encoded, mask, num_blocks=num_blocks))
        torch.testing.assert_close(decoded, plain_decode(model, encoded, mask, num_blocks))

    @pytest.mark.parametrize(("batch", "ratio", "visible"), [(1, 0.75, 4), (1, 0.9375, 1), (3, 0.9375, 1), (2, 0, 16)])
    def test_few_visible(self, teacher, batch, ratio, visible):
        model = teacher().double()
        images, mask = inputs(model, batch, ratio)
        assert mask.num_visible == visible
        decoded = mask.unshuffle(model.decode(model.encode(images, mask), mask))
        torch.testing.assert_close(decoded, plain_decode(model, plain_encode(model, images, mask), mask, 3))

    @pytest.mark.parametrize("change", ADAPTERS.values(), ids=ADAPTERS)
    @pytest.mark.parametrize("name", ["patch_embed.proj", "decoder_blocks.0.attn.qkv", "decoder_blocks.0.attn.proj"])
    def test_adapters(self, teacher, change, name):
        """The work that masks save leaves out no layer that a user has changed."""
        model = teacher().double()
        parent, _, layer = name.rpartition(".")
        change(model.get_submodule(parent), layer)
        images, mask = inputs(model.double())
        images = images.double()
        patches = model.embed(images)
        visible = patches[torch.arange(2)[:, None], mask.visible]
        torch.testing.assert_close(model.embed(images, mask), visible)
        tokens = model.encode(images, mask)
        decoded = model.decode(tokens, mask, num_blocks=1)
        # a block with a hook that changes nothing goes the plain way
        model.decoder_blocks[0].register_forward_hook(lambda *_: None)
        torch.testing.assert_close(model.decode(tokens, mask, num_blocks=1), decoded)

    def test_hooks_of_blocks(self, teacher):
        """A hook of the block or of its attention is called for the first block of the decoder as for the others."""
        model = teacher()
        images, mask = inputs(model)
        calls = []
        for block in model.decoder_blocks:
            for part in (block, block.attn):
                part.register_forward_hook(lambda module, *_: calls.append(module))
        model.decode(model.encode(images, mask), mask)
        assert len(calls) == 2 * len(model.decoder_blocks)

    def test_encode_without_mask(self, teacher):
        """All patches in the order of the image; a mask that removes none only shuffles them."""
        model = teacher().double()
        images, mask = inputs(model, ratio=0)
        whole = model.encode(images)
        torch.testing.assert_close(mask.unshuffle(model.encode(images, mask)), whole)
        torch.testing.assert_close(model.forward_features(images), model.norm(whole))

    def test_several_masks(self, teacher):
        """All images for the first masks, again for the second ones."""
        model = teacher().double()
        images, mask = inputs(model, 6)
        images = images[:2]
        torch.testing.assert_close(model.encode(images, mask), model.encode(images.repeat(3, 1, 1, 1), mask))

    @pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
    def test_forward(self, teacher, sizes):
        model = teacher(**sizes).double()
        images, _ = inputs(model)
        prediction, found = model(images, torch.rand(2, model.num_patches), mask_ratio=0.5)
        decoded = plain_decode(model, plain_encode(model, images, found), found, 3)
        torch.testing.assert_close(prediction, model.decoder_pred(model.decoder_norm(decoded))[:, 1:])
        assert prediction.shape == pixel_patches(images, model.patch_embed.patch_size).shape

    def test_noise_is_drawn(self, teacher):
        model, images = teacher(), torch.randn(2, 3, 32, 32)
        found = [model(images, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        torch.testing.assert_close(found[0], found[1])
        assert not torch.equal(found[0][1].ids_shuffle, found[2][1].ids_shuffle)

    def test_initial_weights(self):
        model = MaskedAutoencoder(64, 16, embed_dim=96, num_heads=3, depth=1, decoder_depth=1, teacher_decoder_width=64)
        for name, parameter in model.named_parameters():
            if "pos_embed" in name:
                width = parameter.shape[2]
                torch.testing.assert_close(parameter.detach(), sincos_positions(width, (4, 4)))
                assert not parameter.requires_grad
            elif "token" in name:
                assert 0.01 < parameter.std() < 0.03
            elif name.endswith("weight") and parameter.ndim > 1:
                rows = parameter.flatten(1)
                bound = math.sqrt(6 / sum(rows.shape))
                assert 0.9 * bound < rows.abs().max() <= bound, name
            elif "norm" not in name and name != "patch_embed.proj.bias":
                assert parameter.eq(0).all(), name

    def test_no_parameter_without_gradient(self, teacher):
        model = teacher()
        images, _ = inputs(model)
        prediction, mask = model(images)
        pixel_loss(prediction, pixel_patches(images, (8, 8)), mask.removed).backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert without == ["pos_embed", "decoder_pos_embed"]

    @pytest.mark.parametrize("run", ["pixels", "features"])
    def test_checkpointing_keeps_less(self, teacher, run):
        """The same gradients, and blocks are computed again."""
        model, images = teacher().train(), torch.randn(2, 3, 32, 32)
        mask = mask_patches(draw_noise(2, 16), 0.75)
        found, kept = [], []
        for is_on in (False, True):
            model.set_grad_checkpointing(is_on)
            model.zero_grad()
            sizes = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
                torch.manual_seed(3)
                out = model(images)[0] if run == "pixels" else model.decode(model.encode(images, mask), mask)
            out.square().mean().backward()
            kept.append(sum(sizes))
            found.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
        torch.testing.assert_close(found[0], found[1])
        assert kept[1] < 0.6 * kept[0]

    def test_other_channels(self):
        model = MaskedAutoencoder(16, 8, in_chans=1, embed_dim=8, depth=1, num_heads=2, decoder_depth=1)
        assert model(torch.randn(2, 1, 16, 16))[0].shape == (2, 4, 64)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"img_size": 30}, "img_size=30x30 must be a multiple of patch_size=8x8"),
            ({"img_size": (32, 20)}, "img_size=32x20 must be a multiple of patch_size=8x8"),
            ({"img_size": 0}, "img_size=0x0"),
            ({"embed_dim": 30}, "embed_dim=30 must be a multiple of num_heads=4"),
            ({"decoder_embed_dim": 25}, "decoder_embed_dim=25 must be a multiple of decoder_num_heads=3"),
            ({"embed_dim": 30, "num_heads": 3}, "width=30 must be a multiple of 4"),
            ({"num_heads": 0}, "num_heads=0 must be at least 1"),
            ({"num_classes": 10}, "num_classes=10 must be 0"),
        ],
    )
    def test_errors(self, teacher, options, message):
        with pytest.raises(ValueError, match=message):
            teacher(**options)

    @pytest.mark.parametrize("shape", [(2, 3, 40, 32), (2, 3, 16, 64), (0, 3, 32, 32), (3, 32, 32)], ids=str)
    def test_other_images(self, teacher, shape):
        """Says both sizes, and the way out."""
        with pytest.raises(ValueError, match=r"images have shape \[.*takes \[batch, channels, 32, 32\].*interpolates"):
            teacher()(torch.zeros(shape))

    @pytest.mark.parametrize("shape", [(2, 15), (3, 16), (2, 17)], ids=str)
    def test_other_noise(self, teacher, shape):
        with pytest.raises(ValueError, match=rf"\[{shape[0]}, {shape[1]}\] images and patches; expected a multiple of"):
            teacher()(torch.zeros(2, 3, 32, 32), torch.rand(shape))

    @pytest.mark.parametrize("num_blocks", [0, 4])
    def test_other_blocks(self, teacher, num_blocks):
        model = teacher()
        images, mask = inputs(model)
        with pytest.raises(ValueError, match=f"num_blocks={num_blocks} must be 1 to 3"):
            model.decode(model.encode(images, mask), mask, num_blocks=num_blocks)


# parameters in millions as students with heads to widths of 768 and 512, counted on the official code
STUDENTS = {
    "mae_vit_tiny_patch16": 7.471, "mae_vit_tiny_patch16_12h_dec128d4b": 7.471, "mae_vit_tiny_patch16_dec64d4b": 6.784,
    "mae_vit_small_patch16": 26.326, "mae_vit_small_patch16_dec128d2b": 23.350,
    "mae_vit_small_patch16_dec128d4b": 23.747, "mae_vit_small_patch16_dec128d8b": 24.540,
    "mae_vit_small_patch16_dec192d4b": 24.840, "mae_vit_small_patch16_dec256d2b": 24.747,
    "mae_vit_small_patch16_dec256d8b": 29.485, "mae_vit_small_patch16_dec512d2b": 29.899,
    "mae_vit_small_patch16_dec512d4b": 36.204, "mae_vit_small_patch16_dec512d8b": 48.813,
    "mae_vit_base_patch16_dec256d4b": 90.777, "mae_vit_base_patch16_dec512d4b": 100.753,
}  # fmt: skip
ALIASES = {
    "mae_vit_tiny_patch16": "mae_vit_tiny_patch16_dec128d4b",
    "mae_vit_small_patch16": "mae_vit_small_patch16_dec256d4b",
    "mae_vit_base_patch16": "mae_vit_base_patch16_dec512d8b",
}


class TestCreateAutoencoder:
    @pytest.mark.parametrize("name", timm.list_models("mae_vit_*"))
    def test_every_name(self, name):
        with torch.device("meta"):
            model = create_autoencoder(name, depth=1, decoder_depth=1)
        assert model.patch_embed.patch_size == ((14, 14) if "patch14" in name else (16, 16))
        assert timm.get_pretrained_cfg(name).input_size == (3, 224, 224)

    def test_heads(self):
        """What no weights show: one name differs from another by its heads alone."""
        heads = {
            "mae_vit_tiny_patch16": (3, 4), "mae_vit_tiny_patch16_12h_dec128d4b": (12, 4),
            "mae_vit_small_patch16": (6, 8), "mae_vit_small_patch16_dec192d4b": (6, 8),
            "mae_vit_base_patch16": (12, 16),
            "mae_vit_large_patch16_dec512d8b": (16, 16), "mae_vit_huge_patch14_dec512d8b": (16, 16),
        }  # fmt: skip
        for name, wanted in heads.items():
            with torch.device("meta"):
                model = create_autoencoder(name, depth=1, decoder_depth=1)
            assert (model.blocks[0].attn.num_heads, model.decoder_blocks[0].attn.num_heads) == wanted, name

    @pytest.mark.parametrize(("alias", "name"), ALIASES.items())
    def test_aliases(self, alias, name):
        with torch.device("meta"):
            models = [create_autoencoder(each) for each in (alias, name)]
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in models]
        assert shapes[0] == shapes[1]

    @pytest.mark.parametrize("name", ["mae_vit_tinny_patch16", "resnet18"])
    def test_unknown(self, name):
        with pytest.raises(ValueError, match=f"unknown masked autoencoder '{name}'; .*known: mae_vit_tiny_patch16"):
            create_autoencoder(name)

    def test_features_only(self):
        with pytest.raises(ValueError, match="features_only=True must be left out: take feature maps from g2sd_vit"):
            timm.create_model("mae_vit_tiny_patch16", features_only=True)


class TestPixelPatches:
    def test_order(self):
        """Row of patches, column of patches; within one row, column, channel."""
        images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
        patches = pixel_patches(images, (2, 3))
        for patch in range(4):
            for pixel in range(18):
                (row, column), (y, x) = divmod(patch, 2), divmod(pixel // 3, 3)
                assert patches[1, patch, pixel] == images[1, pixel % 3, 2 * row + y, 3 * column + x]

    @settings(max_examples=30)
    @given(*(st.integers(1, 4) for _ in range(6)))
    def test_round_trip(self, batch, channels, rows, columns, height, width):
        images = torch.randn(batch, channels, rows * height, columns * width)
        patches = pixel_patches(images, (height, width))
        torch.testing.assert_close(pixels_of(patches, (rows, columns), (height, width)), images)

    def test_errors(self):
        with pytest.raises(ValueError, match="images of 30x32 pixels do not divide into patches of 8x8"):
            pixel_patches(torch.zeros(1, 3, 30, 32), (8, 8))

    def test_conv_equals_linear(self):
        """The patch embedding is a linear layer on flattened patches, channels first."""
        conv, images = nn.Conv2d(3, 5, 4, 4), torch.randn(2, 3, 8, 12)
        cut = pixel_patches(images, (4, 4)).view(2, 6, 4, 4, 3).permute(0, 1, 4, 2, 3).flatten(2)
        wanted = nn.functional.linear(cut, conv.weight.flatten(1), conv.bias)
        torch.testing.assert_close(conv(images).flatten(2).mT, wanted, rtol=1e-4, atol=1e-5)


class TestPixelLoss:
    @pytest.mark.parametrize("is_normalised", [True, False])
    def test_definition(self, is_normalised):
        prediction, patches = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
        removed = torch.tensor([[1.0, 0, 1, 0, 0], [1, 1, 1, 1, 0]])
        losses = []
        for image, patch in removed.nonzero().tolist():
            target = patches[image, patch].double()
            if is_normalised:
                mean = target.mean()
                target = (target - mean) / (((target - mean) ** 2).sum() / 11 + 1e-6) ** 0.5
            losses.append(((prediction[image, patch] - target) ** 2).mean())
        found = pixel_loss(prediction, patches, removed, is_normalised=is_normalised)
        torch.testing.assert_close(found, torch.stack(losses).mean().float())

    def test_flat_patches(self):
        """A patch of one colour has no deviation to divide by."""
        prediction = torch.zeros(1, 2, 12, requires_grad=True)
        loss = pixel_loss(prediction, torch.ones(1, 2, 12), torch.ones(1, 2))
        loss.backward()
        assert loss == 0 and prediction.grad.isfinite().all()

    def test_half_precision(self):
        prediction, patches = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
        removed = torch.ones(2, 5)
        found = pixel_loss(prediction.bfloat16(), patches.bfloat16(), removed)
        assert found.dtype == torch.float32
        torch.testing.assert_close(
            found, pixel_loss(prediction.bfloat16().float(), patches.bfloat16().float(), removed)
        )

    def test_nothing_removed(self):
        with pytest.raises(ValueError, match=r"removed is all zero.*larger mask_ratio"):
            pixel_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.zeros(1, 2))
