"""Classifiers with a distillation token: official logits, and everything that timm's users expect of a model."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from g2sd.positions import interpolate_positions
from g2sd.vit import DistilledViT
from visionkernels.profiling import count_parameters
from visionkernels.testing.golden import recipe_weights
from visionkernels.testing.tracing import check_traced

# parameters in millions with 1,000 classes, counted on the official code
PARAMETERS = {
    ("tiny", False): 5.717, ("small", False): 22.051, ("base", False): 86.568,
    ("tiny", True): 5.911, ("small", True): 22.436, ("base", True): 87.337,
}  # fmt: skip
SIZES = {
    "tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16),
}  # fmt: skip


def lively(model):
    """Weights of which none is a constant."""
    model.load_state_dict(recipe_weights(model.state_dict()))
    return model


def plain_tokens(model, images):
    """Normed tokens as the official model has them: class, patches, and the distillation token last."""
    x = model.patch_embed(images)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + model.pos_embed
    x = model.blocks(torch.cat([x, model.dist_token.expand(len(x), -1, -1)], 1))
    return model.norm(x)


class TestDistilledViT:
    def test_reference(self, vit):
        """The token stands second here and last there; logits are the same."""
        model = lively(vit()).double().eval()
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        tokens = plain_tokens(model, images)
        wanted = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, -1])) / 2
        torch.testing.assert_close(model(images), wanted)
        ours = model.forward_features(images)
        torch.testing.assert_close(torch.cat([ours[:, :1], ours[:, 2:], ours[:, 1:2]], 1), tokens)

    def test_outputs(self, vit):
        model, images = lively(vit()), torch.randn(2, 3, 32, 32)
        model.set_distilled_training(True)
        class_logits, distillation_logits = model.train()(images)
        mean = (class_logits + distillation_logits) / 2
        torch.testing.assert_close(model.eval()(images), mean)
        model.eval_head = "class"
        torch.testing.assert_close(model(images), class_logits)
        assert len(model.train()(images)) == 2
        model.set_distilled_training(False)
        torch.testing.assert_close(model(images), class_logits)

    def test_position(self, vit):
        """The distillation token has none: its table is of class and patches."""
        assert vit().pos_embed.shape == (1, 17, 24)
        model = vit(img_size=(16, 40))
        assert model.pos_embed.shape == (1, 11, 24)

    def test_initial_weights(self):
        model = timm.create_model("g2sd_vit_tiny_patch16_224", depth=1)
        for weight in (model.dist_token, model.head_dist.weight, model.head.weight, model.pos_embed):
            assert 0.015 < weight.std() < 0.025
        assert model.head_dist.bias.eq(0).all()
        assert {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}

    @pytest.mark.parametrize("head", ["mean", "class"])
    def test_no_classes(self, vit, head):
        model, images = lively(vit(num_classes=0, eval_head=head)).eval(), torch.randn(2, 3, 32, 32)
        tokens = model.forward_features(images)
        wanted = tokens[:, 0] if head == "class" else tokens[:, :2].mean(1)
        torch.testing.assert_close(model(images), wanted)
        torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), wanted)

    def test_reset_classifier(self, vit):
        model, images = vit().eval(), torch.randn(2, 3, 32, 32)
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        model.reset_classifier(7)
        assert model(images).shape == (2, 7) and model.num_classes == 7
        assert [head.out_features for head in model.get_classifier()] == [7, 7]
        model.reset_classifier(0)
        torch.testing.assert_close(model(images), features)
        with pytest.raises(ValueError, match="global_pool='avg' must be 'token'"):
            model.reset_classifier(5, "avg")

    def test_other_channels(self, vit):
        assert vit(in_chans=1)(torch.randn(2, 1, 32, 32)).shape == (2, 5)

    @pytest.mark.parametrize("distilled", [True, False])
    def test_features_only(self, vit, distilled):
        model = vit(features_only=True, distilled=distilled, out_indices=(0, 2))
        whole = vit(distilled=distilled)
        whole.load_state_dict(model.model.state_dict(), strict=False)
        images = torch.randn(2, 3, 32, 32)
        maps = model.eval()(images)
        assert [each.shape for each in maps] == [(2, 24, 4, 4)] * 2
        assert model.feature_info.reduction() == [8, 8] and model.feature_info.channels() == [24, 24]
        tokens = whole.eval()._pos_embed(whole.patch_embed(images))
        prefix = 2 if distilled else 1
        for block, found in ((0, maps[0]), (2, maps[1])):
            for each in whole.blocks[: block + 1] if block == 0 else whole.blocks[1 : block + 1]:
                tokens = each(tokens)
            torch.testing.assert_close(found, tokens[:, prefix:].mT.reshape(2, 24, 4, 4))

    def test_forward_intermediates(self, vit):
        model, images = lively(vit()).eval(), torch.randn(2, 3, 32, 32)
        final, maps = model.forward_intermediates(images, norm=True, return_prefix_tokens=True)
        torch.testing.assert_close(final, model.forward_features(images))
        patches, prefix = maps[-1]
        torch.testing.assert_close(torch.cat([prefix, patches.flatten(2).mT], 1), final)

    @pytest.mark.parametrize("img_size", [(16, 48), (40, 24), 8], ids=str)
    def test_image_sizes(self, vit, img_size):
        model = lively(vit(img_size=img_size)).eval()
        images = torch.randn(1, 3, *((img_size,) * 2 if isinstance(img_size, int) else img_size))
        tokens = plain_tokens(model, images)
        wanted = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, -1])) / 2
        torch.testing.assert_close(model(images), wanted)

    def test_set_input_size(self, vit):
        model = lively(vit()).eval()
        table = model.pos_embed.detach().clone()
        model.set_input_size((48, 16))
        torch.testing.assert_close(model.pos_embed.detach(), interpolate_positions(table, (6, 2)))
        assert model(torch.randn(1, 3, 48, 16)).shape == (1, 5)
        model.set_input_size((16, 40))  # from a grid that is no square
        assert model(torch.randn(1, 3, 16, 40)).shape == (1, 5)
        for size in ((44, 16), 3):
            with pytest.raises(ValueError, match=r"img_size=\d+x\d+ must be a multiple of patch_size=8x8"):
                model.set_input_size(size)
        assert model(torch.randn(1, 3, 16, 40)).shape == (1, 5)  # as it was

    def test_grad_checkpointing(self, vit):
        model, images = lively(vit()).train(), torch.randn(2, 3, 32, 32)
        found = []
        for enable in (False, True):
            model.zero_grad()
            model.set_grad_checkpointing(enable)
            model(images).square().sum().backward()
            found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        torch.testing.assert_close(*found)

    def test_no_parameter_without_gradient(self, vit):
        model = vit()
        model.set_distilled_training(True)
        sum(each.sum() for each in model.train()(torch.randn(2, 3, 32, 32))).backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    def test_patch_drop(self, vit):
        """Dropped patches are patches: both tokens of the heads stay where heads look for them."""
        model = vit(patch_drop_rate=0.5, depth=1).train()
        nn.init.constant_(model.dist_token, 100.0)
        tokens = model.patch_drop(model._pos_embed(model.patch_embed(torch.randn(2, 3, 32, 32))))
        assert tokens.shape[1] == 2 + 8
        torch.testing.assert_close(tokens[:, 1], model.dist_token[0].expand(2, -1))

    @pytest.mark.parametrize("options", [{"scale_mlp_norm": True}, {"proj_bias": False}, {"proj_drop_rate": 0.0}])
    def test_options_of_timm(self, vit, options):
        """Training and evaluation, which go different ways, compute one function."""
        model, images = lively(vit(**options)), torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(model.train()(images), model.eval()(images))

    def test_traced(self, vit):
        check_traced(lively(vit(depth=1)), torch.randn(2, 3, 32, 32))

    def test_compile_export(self, vit):
        model, images = lively(vit(depth=1)).eval(), torch.randn(2, 3, 32, 32)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(images), model(images))
            exported = torch.export.export(model, (images,), strict=True).module()
            torch.testing.assert_close(exported(images), model(images))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"eval_head": "dist"}, "eval_head='dist' must be one of 'mean', 'class'"),
            ({"img_size": 30}, "img_size=30x30 must be a multiple of patch_size=8x8"),
            ({"img_size": (32, 4)}, "img_size=32x4"),
            ({"img_size": 30, "distilled": False}, "img_size=30x30 must be a multiple of patch_size=8x8"),
            ({"global_pool": "avg"}, "global_pool='avg' must be 'token'"),
            ({"global_pool": ""}, "global_pool='' must be 'token'"),
            ({"class_token": False}, "class_token=False must be True"),
            ({"reg_tokens": 2}, "reg_tokens=2 must be 0"),
            ({"pos_embed": "none"}, "pos_embed='none' must be 'learn'"),
            ({"no_embed_class": True}, "no_embed_class=True must be False"),
            ({"dynamic_img_size": True}, "dynamic_img_size=True must be False"),
            ({"dynamic_img_pad": True}, "dynamic_img_pad=True must be False"),
            ({"qk_norm": True}, "qk_norm=True must be left out"),
            ({"attn_drop_rate": 0.5}, "attn_drop=0.5 must be left out"),
        ],
    )
    def test_errors(self, vit, options, message):
        with pytest.raises(ValueError, match=message):
            vit(**options)

    @pytest.mark.parametrize("shape", [(2, 3, 40, 32), (2, 3, 64, 16), (3, 32, 32)], ids=str)
    def test_other_images(self, vit, shape):
        with pytest.raises(
            ValueError, match=r"images have shape \[.* takes \[batch, channels, 32, 32\].*set_input_size"
        ):
            vit()(torch.zeros(shape))


class TestRegistry:
    @pytest.mark.parametrize("distilled", [True, False])
    @pytest.mark.parametrize("size", SIZES)
    def test_sizes(self, size, distilled):
        patch = 14 if size == "huge" else 16
        with torch.device("meta"):
            model = timm.create_model(f"g2sd_vit_{size}_patch{patch}_224", distilled=distilled)
        assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == SIZES[size]
        assert model.patch_embed.patch_size == (patch, patch)
        if (size, distilled) in PARAMETERS:
            assert round(count_parameters(model) / 1e6, 3) == PARAMETERS[size, distilled]

    @pytest.mark.parametrize("name", timm.list_models("g2sd_vit_*"))
    def test_config(self, name):
        config = timm.get_pretrained_cfg(name)
        assert config.input_size == (3, 224, 224) and config.interpolation == "bicubic"
        for distilled, classifier in ((True, ("head", "head_dist")), (False, "head")):
            with torch.device("meta"):
                model = timm.create_model(name, distilled=distilled, depth=1)
            assert model.pretrained_cfg["classifier"] == classifier
            names = (classifier,) if isinstance(classifier, str) else classifier
            assert all(isinstance(model.get_submodule(each), nn.Linear) for each in names)

    def test_average(self, vit):
        """Without the token it is timm's model of the mean of the patches."""
        model, images = lively(vit(distilled=False)).eval(), torch.randn(2, 3, 32, 32)
        assert type(model) is VisionTransformer
        assert isinstance(model.norm, nn.Identity)
        x = model.patch_embed(images)
        x = model.blocks(torch.cat([model.cls_token.expand(2, -1, -1), x], 1) + model.pos_embed)
        torch.testing.assert_close(model(images), model.head(model.fc_norm(x[:, 1:].mean(1))))

    @pytest.mark.parametrize(("layout", "distilled"), [("vit_distilled", True), ("vit_teacher_gap", False)])
    def test_official_names(self, layouts, index, layout, distilled):
        config = next(case["config"]["model"] for case in index["cases"] if case["name"] == layout)
        state = timm.create_model("g2sd_vit_tiny_patch16_224", distilled=distilled, **config).state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == layouts[f"{layout}/model"]

    def test_official_names_of_tiny(self, layouts):
        with torch.device("meta"):
            state = timm.create_model("g2sd_vit_tiny_patch16_224").state_dict()
        wanted = layouts["vit_tiny_patch16_distilled/model"]
        assert {key: list(value.shape) for key, value in state.items()} == wanted

    def test_no_weights_are_published(self):
        with pytest.raises(RuntimeError, match="No pretrained weights"):
            timm.create_model("g2sd_vit_tiny_patch16_224", pretrained=True)


class TestHub:
    """What `timm.models.push_to_hf_hub` uploads, and `hf-hub:` names load, is a folder."""

    @pytest.fixture
    def folder(self, vit, tmp_path):
        self.model = lively(vit()).eval()
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
        timm.models.save_for_hf(self.model, tmp_path, model_args=sizes, safe_serialization=True)
        return f"local-dir:{tmp_path}"

    def test_opens(self, folder):
        opened, images = timm.create_model(folder, pretrained=True).eval(), torch.randn(2, 3, 32, 32)
        assert isinstance(opened, DistilledViT)
        torch.testing.assert_close(opened(images), self.model(images))

    @pytest.mark.parametrize("img_size", [48, (24, 40)], ids=str)
    def test_opens_at_another_size(self, folder, img_size):
        opened = timm.create_model(folder, pretrained=True, img_size=img_size).eval()
        self.model.set_input_size(img_size)
        images = torch.randn(1, 3, *((img_size,) * 2 if isinstance(img_size, int) else img_size))
        torch.testing.assert_close(opened(images), self.model(images))

    def test_opens_with_other_classes(self, folder):
        opened = timm.create_model(folder, pretrained=True, num_classes=7)
        torch.testing.assert_close(opened.dist_token, self.model.dist_token)
        assert [head.out_features for head in opened.get_classifier()] == [7, 7]
