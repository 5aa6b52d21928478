"""The detector: what it replaces of torchvision's beside definitions, its losses, detections and errors."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou
from torchvision.transforms import v2

from g2sd.mask_rcnn import MaskRCNN, _AlignedPool, _Anchors, _masks_in, detection_model

SIZES = {
    "num_classes": 4, "img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3, "window_size": 2,
    "window_blocks": (0,), "pretrain_size": 64, "drop_path_rate": 0.0, "pyramid_channels": 16, "head_width": 32,
    "regions_per_image": 16,
}  # fmt: skip


def micro(**options) -> MaskRCNN:
    return detection_model("tiny", **(SIZES | options))


def square(left, top, side, label, size=(64, 64)):
    masks = torch.zeros(1, *size, dtype=torch.uint8)
    masks[:, top : top + side, left : left + side] = 1
    boxes = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
    return {"boxes": boxes, "labels": torch.tensor([label]), "masks": masks}


def pictures():
    """Two pictures with a bright square each, and what it is."""
    targets = [square(8, 8, 32, 1), square(20, 12, 24, 2, (48, 60))]
    images = []
    for target in targets:
        inside = target["masks"][0].float()
        shade = torch.stack([inside * (place == target["labels"].item()) for place in range(3)])
        images.append(0.2 + 0.7 * shade)
    return images, targets


def lively(model):
    """Weights at which every part of the model shows in what it returns."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1 if "predictor" in name else 0.3)
    return model


class TestParts:
    @pytest.mark.parametrize("stride", [4.0, 3.5])
    def test_anchors(self, stride):
        """Around the places' corners, areas of eight strides squared, heights of the ratios times the widths."""
        # of an image whose size the map does not divide
        images = ImageList(torch.zeros(1, 3, 9, 13), [(9, 13)])
        (found,) = _Anchors([stride])(images, [torch.zeros(1, 8, 2, 3)])
        assert found.shape == (2 * 3 * 3, 4)
        for place, (row, column) in enumerate((row, column) for row in range(2) for column in range(3)):
            for ratio, (left, top, right, bottom) in zip((0.5, 1, 2), found[3 * place : 3 * place + 3], strict=True):
                centre = torch.tensor([stride * column, stride * row])
                assert_close(torch.stack([left + right, top + bottom]) / 2, centre, rtol=1e-5, atol=1e-5)
                assert_close((right - left) * (bottom - top), torch.tensor(64 * stride**2))
                assert_close((bottom - top) / (right - left), torch.tensor(float(ratio)))

    @pytest.mark.parametrize(("patch", "size"), [(14, 84), (16, 80), (6, 48)])
    def test_places_of_maps(self, patch, size):
        """Anchors and pools of every map are where its pixels are, whatever the patch and the image."""
        model = micro(patch_size=patch, img_size=size, pretrain_size=size)
        features, _ = model.maps(torch.zeros(1, 3, size, size))
        anchors = model.rpn.anchor_generator(ImageList(torch.zeros(1, 3, size, size), [(size, size)]), features)[0]
        counts = [each.shape[2] for each in features]
        for level, found in enumerate(anchors.split([3 * count**2 for count in counts])):
            stride = patch / 4 * 2**level
            last = (found[-1, :2] + found[-1, 2:]) / 2
            assert_close(last, torch.full((2,), stride * (counts[level] - 1)))
        side = counts[0]
        centres = (torch.arange(side) + 0.5) * patch / 4
        maps = {"p2": centres.expand(1, 1, side, side)} | {
            f"p{level}": features[level - 2][:, :1] for level in (3, 4, 5)
        }
        box = torch.tensor([[0.5 * size, 0.5 * size, 0.5 * size + 2 * patch, 0.5 * size + 2 * patch]])
        pooled = model.roi_heads.box_roi_pool(maps, [box], [])
        assert_close(pooled.mean(), box[0, ::2].mean(), rtol=1e-3, atol=1e-3)

    def test_settings(self):
        """Those of section 2.6 of the specification."""
        with torch.device("meta"):
            model = detection_model("small")
        rpn, heads = model.rpn, model.roi_heads
        assert rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
        assert len(rpn.head.conv) == 2
        assert (rpn.proposal_matcher.low_threshold, rpn.proposal_matcher.high_threshold) == (0.3, 0.7)
        assert rpn.proposal_matcher.allow_low_quality_matches
        assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, 0.5)
        assert rpn._pre_nms_top_n == {"training": 2000, "testing": 1000}
        assert rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
        assert (rpn.nms_thresh, rpn.score_thresh) == (0.7, 0.0)
        assert (heads.proposal_matcher.low_threshold, heads.proposal_matcher.high_threshold) == (0.5, 0.5)
        assert not heads.proposal_matcher.allow_low_quality_matches
        assert (heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction) == (512, 0.25)
        assert heads.box_coder.weights == (10.0, 10.0, 5.0, 5.0)
        assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
        assert [(pool.side, pool.strides) for pool in (heads.box_roi_pool, heads.mask_roi_pool)] == [
            (7, (4, 8, 16, 32)), (14, (4, 8, 16, 32))
        ]  # fmt: skip
        assert (heads.box_head[5].in_features, heads.box_head[5].out_features) == (256 * 49, 1024)
        assert (heads.box_predictor.cls_score.out_features, heads.box_predictor.bbox_pred.out_features) == (81, 324)
        mean, std = (torch.tensor(each) for each in (model.transform.image_mean, model.transform.image_std))
        assert_close(255 * mean, torch.tensor([123.675, 116.28, 103.53]))
        assert_close(255 * std, torch.tensor([58.395, 57.12, 57.375]))

    def test_pool_is_aligned(self):
        """On a map of its pixels' centres, means of regions are their own centres."""
        side = 64
        centres = (torch.arange(side) + 0.5) * 4
        maps = {"p2": torch.stack([centres.expand(side, side), centres[:, None].expand(side, side)])[None]}
        boxes = torch.tensor([[20.0, 30.0, 160.0, 100.0], [33.3, 41.7, 47.9, 90.1]])
        pooled = _AlignedPool((4,), 7)(maps, [boxes], [(256, 256)])
        for box, found in zip(boxes, pooled, strict=True):
            for axis in range(2):
                start, stop = box[axis], box[axis + 2]
                bins = start + (torch.arange(7) + 0.5) * (stop - start) / 7
                assert_close(found[axis].mean(axis), bins, rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize(("side", "level"), [(8, 0), (111, 0), (112, 1), (223, 1), (224, 2), (448, 3), (1000, 3)])
    def test_pool_takes_the_map_of_the_size(self, side, level):
        maps = {str(i): torch.full((2, 1, 256 >> i, 256 >> i), float(i)) for i in range(5)}
        empty = torch.zeros(0, 4)
        pooled = _AlignedPool((4, 8, 16, 32), 7)(maps, [empty, torch.tensor([[1.0, 1, 1 + side, 1 + side]])], [])
        assert_close(pooled, torch.full((1, 1, 7, 7), float(level)))

    def test_pool_of_no_regions(self):
        maps = {str(i): torch.zeros(2, 3, 16 >> i, 16 >> i) for i in range(5)}
        assert _AlignedPool((4, 8, 16, 32), 7)(maps, [torch.zeros(0, 4)] * 2, []).shape == (0, 3, 7, 7)

    def test_masks_in_regions(self):
        masks = torch.zeros(2, 8, 8, dtype=torch.uint8)
        masks[1, :, :4] = 1
        found = _masks_in(masks, torch.tensor([1, 0]), torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 8]]), 4)
        assert found.tolist() == [[[1, 1, 0, 0]] * 4, [[0] * 4] * 4]

    def test_region_proposal_losses(self):
        """Sums over drawn anchors, divided by the 256 that may be drawn of each picture."""
        proposals = micro().rpn
        labels = [torch.tensor([1.0, 0, -1, 0]), torch.tensor([0.0, 1, 1, -1])]
        objectness, deltas = torch.randn(8), torch.randn(8, 4)
        wanted = [torch.randn(4, 4), torch.randn(4, 4)]
        classes, boxes = proposals.compute_loss(objectness, deltas, labels, wanted)
        flat = torch.cat(labels)
        entropy = F.binary_cross_entropy(objectness.sigmoid()[flat >= 0], flat[flat >= 0], reduction="sum")
        assert_close(classes, entropy / 512)
        assert_close(boxes, (deltas - torch.cat(wanted))[flat == 1].abs().sum() / 512)

    def test_head_losses(self):
        """Beside the definitions, from what the heads see of the regions that were drawn."""
        torch.manual_seed(1)
        model = lively(micro(regions_per_image=4)).train()
        images, targets = pictures()
        heads, seen = model.roi_heads, {}
        for name in ("box_predictor", "mask_predictor", "mask_roi_pool"):
            getattr(heads, name).register_forward_hook(
                lambda _, inputs, out, name=name: seen.update({name: (inputs, out)})
            )
        drawn = heads.select_training_samples

        def select(*arguments):
            seen["drawn"] = drawn(*arguments)
            return seen["drawn"]

        heads.select_training_samples = select
        losses = model(images, targets)
        regions, matches, labels, deltas = seen["drawn"]
        logits, box_deltas = seen["box_predictor"][1]
        classes, wanted = torch.cat(labels), torch.cat(deltas)
        assert (classes > 0).sum() >= 2
        expected = -logits.log_softmax(1)[torch.arange(len(classes)), classes].mean()
        assert_close(losses["loss_classifier"], expected)
        rows = [box_deltas[i, 4 * c : 4 * c + 4] - wanted[i] for i, c in enumerate(classes) if c > 0]
        assert_close(losses["loss_box_reg"], torch.stack(rows).abs().sum() / len(classes))
        mask_logits = seen["mask_predictor"][1]
        pooled_regions = torch.cat(seen["mask_roi_pool"][0][1])
        assert_close(pooled_regions, torch.cat([r[lab > 0] for r, lab in zip(regions, labels, strict=True)]))
        entropies, place = [], 0
        for target, match, region, label in zip(targets, matches, regions, labels, strict=True):
            for i in torch.where(label > 0)[0]:
                inside = _masks_in(target["masks"], match[i : i + 1], region[i : i + 1], 28)[0]
                logit = mask_logits[place, label[i]]
                entropies.append(F.binary_cross_entropy(logit.sigmoid(), inside))
                place += 1
        assert_close(losses["loss_mask"], torch.stack(entropies).mean(), rtol=1e-4, atol=1e-5)


class TestMaskRCNN:
    def test_losses_and_gradients(self):
        model = micro().train()
        losses = model(*pictures())
        assert set(losses) == {
            "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"
        }  # fmt: skip
        torch.stack(list(losses.values())).sum().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []

    def test_losses_at_the_start(self):
        """Undecided heads: log 2 for objects and masks, the logarithm of the classes for these."""
        losses = micro(num_classes=21).train()(*pictures())
        assert losses["loss_objectness"].item() == pytest.approx(math.log(2), rel=0.1)
        assert losses["loss_mask"].item() == pytest.approx(math.log(2), rel=0.1)
        assert losses["loss_classifier"].item() == pytest.approx(math.log(21), rel=0.1)

    @pytest.mark.slow
    def test_learns(self):
        """Boxes, classes and masks of two pictures, by heart."""
        torch.manual_seed(0)
        model, (images, targets) = micro().train(), pictures()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(160):
            loss = torch.stack(list(model(images, targets).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for found, target in zip(model.eval()(images), targets, strict=True):
            assert found["labels"][0] == target["labels"][0] and found["scores"][0] > 0.3
            assert box_iou(found["boxes"][:1], target["boxes"]) > 0.5
            inside, mask = found["masks"][0, 0] > 0.5, target["masks"][0].bool()
            assert (inside & mask).sum() > 0.5 * (inside | mask).sum()

    def test_detections_are_in_pixels_of_the_picture(self):
        model = lively(micro()).eval()
        images = [torch.rand(3, 33, 80), torch.rand(3, 100, 20)]
        with torch.no_grad():
            for image, found in zip(images, model(images), strict=True):
                height, width = image.shape[1:]
                count = len(found["boxes"])
                assert 0 < count <= 100
                assert found["boxes"].min() >= 0
                assert (found["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()
                assert set(found["labels"].tolist()) <= {1, 2, 3}
                assert found["masks"].shape == (count, 1, height, width)
                assert (found["scores"][:-1] >= found["scores"][1:]).all()

    def test_pictures_of_a_batch_do_not_mix(self):
        model = lively(micro()).eval()
        images = [torch.rand(3, 40, 64), torch.rand(3, 64, 64)]
        with torch.no_grad():
            together, alone = model(images), [model([image])[0] for image in images]
        for left, right in zip(together, alone, strict=True):
            assert_close(left, right, rtol=1e-3, atol=1e-3)

    def test_prepared_batch(self):
        """Training pads pictures as they are; evaluation makes the longer side the model's first."""
        model, (images, targets) = micro().train(), pictures()
        found = model.outputs(images, targets)
        assert found.images.shape == (2, 3, 64, 64)
        assert not found.images[1, :, 48:].any() and not found.images[1, :, :, 60:].any()
        features, objectness = model.maps(found.images)
        assert_close(found.features, features)
        assert_close(found.objectness, objectness)
        assert [each.shape[1:] for each in objectness] == [(3, side, side) for side in (16, 8, 4, 2, 1)]
        prepared, _ = model.eval().transform([torch.rand(3, 20, 32)])
        assert (prepared.tensors.shape, prepared.image_sizes) == ((1, 3, 64, 64), [(40, 64)])

    @pytest.mark.parametrize(
        ("size", "resized"),
        [((1, 65), (1, 64)), ((100, 33), (64, 21)), ((103, 7), (64, 4)), ((5, 5), (64, 64))],
        ids=str,
    )
    def test_evaluation_resizes(self, size, resized):
        """To the model's size, rounded, as smoothly as training pictures are."""
        model, image = micro().eval(), torch.rand(3, *size)
        prepared, _ = model.transform([image])
        assert prepared.image_sizes == [resized]
        expected = v2.functional.resize(image, list(resized), antialias=True)
        mean, std = (
            torch.tensor(each)[:, None, None] for each in (model.transform.image_mean, model.transform.image_std)
        )
        assert_close(prepared.tensors[0, :, : resized[0], : resized[1]] * std + mean, expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert model([image])[0]["masks"].shape[2:] == size

    def test_compile_export(self):
        """The pyramid, which images come to in one size; heads draw, sort and leave out."""
        pyramid, images = micro().eval().backbone, torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            expected = pyramid(images)
            assert_close(torch.compile(pyramid, fullgraph=True, backend="aot_eager")(images), expected)
            assert_close(torch.export.export(pyramid, (images,)).module()(images), expected)

    def test_no_objects(self):
        images, targets = pictures()
        empty = [{key: value[:0] for key, value in target.items()} for target in targets]
        losses = micro().train()(images, empty)
        assert losses["loss_box_reg"] == losses["loss_mask"] == losses["loss_rpn_box_reg"] == 0
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        assert torch.isfinite(total)

    def test_bfloat16(self):
        """Boxes and losses stay float32: a bfloat16 of 60 is a quarter of a pixel from the next."""
        torch.manual_seed(0)
        model, (images, targets) = micro(), pictures()
        with torch.autocast("cpu", torch.bfloat16):
            found = model.train().outputs(images, targets)
            detections = lively(model).eval()(images)[0]
        kinds = {each.dtype for each in (*found.losses.values(), *found.features, *found.objectness)}
        assert kinds == {torch.float32}
        assert {detections[key].dtype for key in ("boxes", "scores", "masks")} == {torch.float32}
        assert (detections["boxes"] != detections["boxes"].to(torch.bfloat16)).any()
        torch.manual_seed(0)
        exact = micro().train()(images, targets)
        for name in ("loss_objectness", "loss_classifier", "loss_mask"):
            assert found.losses[name].item() == pytest.approx(exact[name].item(), rel=0.05)

    def test_windows_of_a_larger_model(self):
        with torch.device("meta"):
            model = detection_model("large")
        blocks = model.backbone.net.blocks
        assert [i for i, block in enumerate(blocks) if not block.window_size] == [5, 11, 17, 23]
        assert {len(blocks[i].attn.rel_pos_h) for i in (5, 23)} == {127} and len(blocks[0].attn.rel_pos_h) == 27

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_classes": 1}, "num_classes=1 must be at least 2: the background and one kind of object"),
            ({"regions_per_image": 0}, "regions_per_image=0 must be at least 1"),
            ({"head_width": 0}, "head_width=0 must be at least 1"),
            ({"window_size": 5}, "window_size=5 must be at most 4, the patches of a side"),
            ({"window_blocks": (0, 1)}, r"window_blocks=\(0, 1\) must be fewer, so that a block attends everywhere"),
            ({"num_heads": 0}, "num_heads=0 must be at least 1"),
            ({"patch_size": 0}, "patch_size=0 must be at least 1"),
            ({"pyramid_channels": 0}, "out_channels=0 must be at least 1"),
            ({"drop_path_rate": 2}, r"drop_path_rate=2 must be in \[0, 1\)"),
            ({"pretrain_size": 8}, "pretrain_size=8 must be at least patch_size=16"),
        ],
    )
    def test_sizes(self, options, message):
        with pytest.raises(ValueError, match=message):
            micro(**options)
        with pytest.raises(ValueError, match="size='huge' must be one of 'tiny', 'small', 'base', 'large'"):
            detection_model("huge")

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ([], "images are none"),
            ([torch.zeros(1, 8, 8)], r"image 0 is \[1, 8, 8\], torch.float32; expected \[3, H, W\] of floats"),
            ([torch.zeros(3, 8, 8), torch.zeros(3, 0, 8)], r"image 1 is \[3, 0, 8\]"),
            ([torch.zeros(3, 8, 8, dtype=torch.uint8)], "torch.uint8; expected"),
            (torch.zeros(3, 8, 8), r"image 0 is \[8, 8\]"),
        ],
    )
    def test_images(self, images, message):
        with pytest.raises(ValueError, match=message):
            micro().eval()(images)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"labels": torch.tensor([4])}, "target 0 has labels other than integers of 1 to 3"),
            ({"labels": torch.tensor([0])}, "labels other than integers of 1 to 3"),
            ({"labels": torch.tensor([1.0])}, "labels other than integers of 1 to 3"),
            ({"labels": torch.tensor([1, 1])}, r"boxes \[1, 4\], labels \[2\], masks \[1, 64, 64\]; expected \[N, 4\]"),
            ({"masks": torch.zeros(1, 64, 32)}, r"expected \[N, 4\], \[N\] and \[N, 64, 64\]"),
            ({"boxes": torch.tensor([[4.0, 4, 4, 9]])}, "target 0 has a box without width or height"),
            ({"boxes": torch.full((1, 4), math.nan)}, "target 0 has a box without width or height"),
            ({"boxes": torch.tensor([[4.0, 4, 9, math.inf]])}, "target 0 has a box without width or height"),
        ],
    )
    def test_targets(self, change, message):
        images, targets = pictures()
        with pytest.raises(ValueError, match=message):
            micro().train()(images, [targets[0] | change, targets[1]])

    def test_missing_targets(self):
        model, (images, targets) = micro().train(), pictures()
        with pytest.raises(ValueError, match="targets are missing"):
            model(images)
        with pytest.raises(ValueError, match="targets are 1 for 2 images"):
            model(images, targets[:1])
        del targets[1]["masks"]
        with pytest.raises(ValueError, match="target 1 lacks masks"):
            model(images, targets)
        with pytest.raises(ValueError, match=r"image 0 is \[3, 65, 8\], in training at most 64 pixels a side"):
            model([torch.zeros(3, 65, 8)], targets[:1])
