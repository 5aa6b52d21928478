"""Weights keep what they compute in other projects' layouts, and come back unchanged."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN

import g2sd.vit  # noqa: F401 - registers the models
from g2sd.conversion import convert_file
from g2sd.huggingface import from_huggingface, to_huggingface
from g2sd.mae import MaskedAutoencoder
from g2sd.official import load_encoder, load_official
from visionkernels.pictures.recipes import PictureRecipe
from visionkernels.pictures.transforms import evaluation_transform
from visionkernels.weights import CheckpointError, Trained, read_checkpoint, save_weights

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 2, "num_heads": 3}
WIDTHS = {"decoder_embed_dim": 64, "decoder_depth": 2, "decoder_num_heads": 4}


def lively(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


MODELS = {
    "mae": lambda: MaskedAutoencoder(**SIZES, **WIDTHS),
    "generic": lambda: MaskedAutoencoder(**SIZES, **WIDTHS, teacher_width=96, teacher_decoder_width=48),
    "distilled": lambda: timm.create_model("g2sd_vit_tiny_patch16_224", num_classes=5, **SIZES),
    "average": lambda: timm.create_model("g2sd_vit_tiny_patch16_224", num_classes=5, distilled=False, **SIZES),
    "class": lambda: timm.create_model(
        "g2sd_vit_tiny_patch16_224", num_classes=5, distilled=False, global_pool="token", **SIZES
    ),
    "encoder": lambda: timm.create_model(
        "g2sd_vit_tiny_patch16_224", num_classes=0, distilled=False, global_pool="token", **SIZES
    ),
}


def stored(kind, path):
    model = lively(MODELS[kind]())
    save_weights(path, model.state_dict(), metadata={})
    return model


def save_classifier(path, pictures):
    """Store a classifier of five classes, trained on images prepared by `pictures`."""
    options = SIZES | {"num_classes": 5, "distilled": False, "global_pool": "token"}
    trained = Trained(
        kind="classifier", package="g2sd", model="g2sd_vit_tiny_patch16_224", options=options,
        inputs=pictures.inputs(), class_names=("a", "b", "c", "d", "e"),
    )  # fmt: skip
    trained.save(path, lively(MODELS["class"]()).state_dict())


class TestConvertFile:
    @pytest.mark.parametrize("kind", ["mae", "distilled", "class", "encoder"])
    def test_huggingface_and_back(self, tmp_path, kind):
        model = stored(kind, tmp_path / "a.safetensors")
        said = convert_file(tmp_path / "a.safetensors", tmp_path / "hf", to="hf")
        assert "from_pretrained" in said
        assert {file.name for file in (tmp_path / "hf").iterdir()} == {
            "config.json", "model.safetensors", "preprocessor_config.json"
        }  # fmt: skip
        convert_file(tmp_path / "hf" / "model.safetensors", tmp_path / "back.pth", to="mae")
        back = read_checkpoint(tmp_path / "back.pth").state
        assert set(back) == set(model.state_dict())
        for key, value in model.state_dict().items():
            torch.testing.assert_close(back[key], value, rtol=0, atol=0)

    def test_huggingface_configuration(self, tmp_path):
        stored("mae", tmp_path / "a.safetensors")
        convert_file(tmp_path / "a.safetensors", tmp_path / "hf", to="hf")
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        assert config["architectures"] == ["ViTMAEForPreTraining"]
        assert (config["image_size"], config["patch_size"], config["num_attention_heads"]) == (32, 8, 3)
        assert (config["decoder_hidden_size"], config["decoder_num_attention_heads"]) == (64, 4)
        assert config["layer_norm_eps"] == 1e-6

    def test_huggingface_processor(self, tmp_path):
        """transformers prepares images, and names classes, as the training of the file did."""
        pictures = PictureRecipe(size=32, resize=40, interpolation="bilinear", mean=(0.1, 0.2, 0.3), std=(0.4,) * 3)
        save_classifier(tmp_path / "a.safetensors", pictures)
        convert_file(tmp_path / "a.safetensors", tmp_path / "hf", to="hf")
        processor, config = (
            json.loads((tmp_path / "hf" / name).read_text()) for name in ("preprocessor_config.json", "config.json")
        )
        assert processor["size"] == {"shortest_edge": 40} and processor["crop_size"] == {"height": 32, "width": 32}
        assert (processor["image_mean"], processor["image_std"]) == ([0.1, 0.2, 0.3], [0.4] * 3)
        assert processor["resample"] == 2  # bilinear, in the numbers of PIL
        assert config["id2label"]["1"] == "b" and config["label2id"] == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}

    @pytest.mark.slow
    def test_transformers_outputs(self, tmp_path):
        """Outputs of transformers' models are those of ours."""
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        opens = {
            "class": transformers.ViTForImageClassification, "encoder": transformers.ViTModel,
            "distilled": transformers.DeiTForImageClassificationWithTeacher, "mae": transformers.ViTMAEForPreTraining,
        }  # fmt: skip
        images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
        for kind, opener in opens.items():
            model = stored(kind, tmp_path / f"{kind}.safetensors")
            convert_file(tmp_path / f"{kind}.safetensors", tmp_path / kind, to="hf")
            opened = opener.from_pretrained(tmp_path / kind).eval()
            with torch.no_grad():
                if kind == "encoder":
                    theirs, ours = opened(images).last_hidden_state, model.forward_features(images)
                elif kind == "mae":
                    theirs, ours = opened(images, noise=noise).logits, model(images, noise)[0]
                else:
                    theirs, ours = opened(images).logits, model(images)
            torch.testing.assert_close(theirs, ours)

    @pytest.mark.slow
    def test_transformers_images(self, tmp_path):
        """transformers' image processor prepares a picture as we do (its crop differs at odd margins)."""
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        pictures = PictureRecipe(size=32, resize=40, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
        save_classifier(tmp_path / "a.safetensors", pictures)
        convert_file(tmp_path / "a.safetensors", tmp_path / "hf", to="hf")
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
        theirs = transformers.BitImageProcessorPil.from_pretrained(tmp_path / "hf")(picture, return_tensors="pt")
        ours = evaluation_transform(pictures)(picture)
        torch.testing.assert_close(theirs["pixel_values"][0], ours, rtol=1e-5, atol=1e-5)

    def test_huggingface_defaults(self, tmp_path):
        """Files of the official scripts are prepared as those do, and have ImageNet's classes."""
        model = timm.create_model("g2sd_vit_tiny_patch16_224", distilled=False, global_pool="token", depth=1)
        torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
        convert_file(tmp_path / "a.pth", tmp_path / "hf", to="hf")
        processor, config = (
            json.loads((tmp_path / "hf" / name).read_text()) for name in ("preprocessor_config.json", "config.json")
        )
        assert (processor["size"], processor["resample"]) == ({"shortest_edge": 256}, 3)
        assert processor["crop_size"] == {"height": 224, "width": 224}
        assert processor["image_mean"] == list(IMAGENET_DEFAULT_MEAN)
        assert config["id2label"]["1"].startswith("goldfish") and len(config["label2id"]) == 1000

    def test_huggingface_names(self, tmp_path):
        """As transformers' models of these kinds have them."""
        state, config = to_huggingface(lively(MODELS["distilled"]()).state_dict(), "x")
        assert {
            "deit.embeddings.distillation_token", "deit.encoder.layer.1.attention.attention.value.bias",
            "deit.layernorm.weight", "cls_classifier.weight", "distillation_classifier.bias",
        } <= set(state)  # fmt: skip
        assert state["deit.embeddings.position_embeddings"].shape == (1, 18, 192)
        assert config["id2label"]["4"] == "class 4" and config["label2id"]["class 4"] == 4
        encoder, config = to_huggingface(lively(MODELS["generic"]()).state_dict(), "x")
        assert config["architectures"] == ["ViTModel"]
        assert not any("decoder" in key for key in encoder)
        # transformers adds a pooler of its own
        assert set(from_huggingface({**encoder, "pooler.dense.weight": torch.zeros(2)})) == {
            key for key in MODELS["encoder"]().state_dict() if not key.startswith("head")
        }

    def test_a_position_of_the_distillation_token_moves_into_it(self):
        state, _ = to_huggingface(lively(MODELS["distilled"]()).state_dict(), "x")
        positions = state["deit.embeddings.position_embeddings"]
        positions[:, 1] = 3.0
        found = from_huggingface(state)
        torch.testing.assert_close(found["dist_token"], state["deit.embeddings.distillation_token"] + 3)
        torch.testing.assert_close(found["pos_embed"][:, 1:], positions[:, 2:])

    @pytest.mark.parametrize("kind", ["distilled", "average", "class"])
    def test_timm(self, tmp_path, kind):
        model = stored(kind, tmp_path / "a.safetensors")
        convert_file(tmp_path / "a.safetensors", tmp_path / "timm.pth", to="timm")
        name = "deit_tiny_distilled_patch16_224" if kind == "distilled" else "vit_tiny_patch16_224"
        pooling = {"distilled": {}, "average": {"global_pool": "avg"}, "class": {"global_pool": "token"}}[kind]
        theirs = timm.create_model(name, num_classes=5, **SIZES, **pooling)
        theirs.load_state_dict(read_checkpoint(tmp_path / "timm.pth").state)
        for module in theirs.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-6
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(theirs.eval()(images), model(images), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(("to", "prefix"), [("vitdet", "backbone.net."), ("mmseg", "backbone.")])
    def test_backbones(self, tmp_path, to, prefix):
        model = stored("generic", tmp_path / "a.safetensors")
        said = convert_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=to)
        state = read_checkpoint(tmp_path / "b.safetensors").state
        assert "without decoder" in said
        expected = {key for key in model.state_dict() if key.startswith(("blocks.", "patch_embed.", "pos_embed"))}
        expected |= {"cls_token"} if to == "mmseg" else set()
        assert set(state) == {prefix + key for key in expected}

    def test_a_student_becomes_a_classifier(self, tmp_path):
        """From generic distillation to timm, and from there into a classifier here."""
        student = stored("generic", tmp_path / "a.safetensors")
        convert_file(tmp_path / "a.safetensors", tmp_path / "timm.safetensors", to="timm")
        classifier = MODELS["distilled"]()
        load_encoder(classifier, tmp_path / "timm.safetensors")
        torch.testing.assert_close(classifier.blocks[1].mlp.fc1.weight, student.blocks[1].mlp.fc1.weight)

    @pytest.mark.parametrize(
        ("to", "layout", "prefix"),
        [("vitdet", "vitdet_backbone/backbone", "backbone."), ("mmseg", "seg_model/model", "")],
    )
    def test_whole_models_stay_as_they_are(self, tmp_path, official, to, layout, prefix):
        """From any kind of file to the one that the other project reads."""
        state = official(layout, prefix)
        save_weights(tmp_path / "a.safetensors", state, metadata={})
        said = convert_file(tmp_path / "a.safetensors", tmp_path / "b.pth", to=to)
        assert said.endswith(f"{len(state)} tensors, as they were")
        torch.testing.assert_close(torch.load(tmp_path / "b.pth")["model"], state, rtol=0, atol=0)

    def test_official_scripts_read_it(self, tmp_path):
        stored("mae", tmp_path / "a.safetensors")
        convert_file(tmp_path / "a.safetensors", tmp_path / "mae.pth", to="mae")
        content = torch.load(tmp_path / "mae.pth", weights_only=True)
        assert all(isinstance(value, str) for key, value in content.items() if key != "model")
        assert load_official(tmp_path / "mae.pth").decoder_width == 64

    def test_errors(self, tmp_path):
        stored("average", tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match="classifies the mean of the patches"):
            convert_file(tmp_path / "a.safetensors", tmp_path / "hf", to="hf")
        with pytest.raises(ValueError, match=r"out=.*b\.bin must end in \.pth or \.safetensors"):
            convert_file(tmp_path / "a.safetensors", tmp_path / "b.bin", to="timm")
        with pytest.raises(ValueError, match="to='keras' must be one of"):
            convert_file(tmp_path / "a.safetensors", tmp_path / "b.pth", to="keras")
        (tmp_path / "b.pth").touch()
        with pytest.raises(FileExistsError, match="--overwrite"):
            convert_file(tmp_path / "a.safetensors", tmp_path / "b.pth", to="timm")
        convert_file(tmp_path / "a.safetensors", tmp_path / "d.safetensors", to="vitdet")
        with pytest.raises(CheckpointError, match="holds 'vitdet', whose relative positions"):
            convert_file(tmp_path / "d.safetensors", tmp_path / "c.pth", to="timm")
        (tmp_path / "file").touch()
        stored("class", tmp_path / "e.safetensors")
        with pytest.raises(ValueError, match="is a file"):
            convert_file(tmp_path / "e.safetensors", tmp_path / "file", to="hf")
