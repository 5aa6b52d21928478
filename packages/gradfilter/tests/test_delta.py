"""Task files: what fine-tuning changed, small, and refused on another base."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradfilter import convert, restore
from gradfilter.delta import apply_delta, compute_delta, read_delta, save_delta, trainable_delta
from visionkernels.weights import CheckpointError


def tune(net, images, targets=(0, 1, 2, 3), **options):
    """Return the state dicts before and after training the last two convolutions, and the converted model."""
    base = copy.deepcopy(net.state_dict())
    convert(net, last_n=2, example_input=images, **options)
    optimizer = torch.optim.SGD(
        [p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9, weight_decay=1e-3
    )
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(net(images), torch.tensor(targets)).backward()
        optimizer.step()
    twin = copy.deepcopy(net)
    restore(twin)
    return base, twin.state_dict(), net


@pytest.mark.parametrize("compact", [False, True])
class TestDelta:
    def test_from_two_states(self, net, images, compact):
        base, tuned, _ = tune(net, images, compact=compact)
        delta = compute_delta(base, tuned)
        assert delta["last.weight.offset"].shape == (16, 12)
        assert "stem.weight" not in delta and "norm1.running_mean" not in delta
        for key, value in apply_delta(base, delta).items():
            torch.testing.assert_close(value, tuned[key], msg=key)

    def test_from_the_model(self, net, images, compact):
        base, tuned, model = tune(net, images, compact=compact)
        delta = trainable_delta(model)
        assert ("last.weight.offset" in delta) == compact
        for key, value in apply_delta(base, delta).items():
            torch.testing.assert_close(value, tuned[key], msg=key)

    def test_file(self, net, images, compact, tmp_path):
        base, tuned, _ = tune(net, images, compact=compact)
        save_delta(tmp_path / "task.safetensors", base, compute_delta(base, tuned))
        delta = read_delta(tmp_path / "task.safetensors", base)
        torch.testing.assert_close(apply_delta(base, delta)["last.weight"], tuned["last.weight"])
        with pytest.raises(CheckpointError, match="made from other base weights"):
            read_delta(tmp_path / "task.safetensors", base | {"last.weight": base["last.weight"] + 1})


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm_stats", ["frozen", "update"])
def test_statistics_that_move(net, images, affine, norm_stats):
    """The delta holds the moving statistics of norms that are not trained, but no frozen ones."""
    if not affine:
        net.norm1, net.norm3 = nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(12, affine=False)
    base, tuned, model = tune(net, images, train_norm="none", norm_stats=norm_stats)
    delta = trainable_delta(model)
    assert ("norm1.running_mean" in delta) == (norm_stats == "update")
    for key, value in apply_delta(base, delta).items():
        torch.testing.assert_close(value, tuned[key], msg=key)


def test_statistics_without_conversion(net):
    """A model that was never converted, and a norm of another kind."""
    model = nn.Sequential(nn.Linear(3, 4).requires_grad_(False), nn.BatchNorm1d(4, affine=False))
    assert set(trainable_delta(model)) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_exact_training_is_kept_whole(net, images):
    base, tuned, _ = tune(net, images, radius={"*": None}, warns=False)
    delta = compute_delta(base, tuned)
    assert "last.weight" in delta and "last.weight.offset" not in delta
    assert torch.equal(apply_delta(base, delta)["last.weight"], tuned["last.weight"])


def test_errors(net, images, tmp_path):
    base, tuned, _ = tune(net, images)
    delta_part = {"scale": torch.ones(()), "offset": torch.ones(16, 12)}
    with pytest.raises(CheckpointError, match=r"differ in 1 names; the first is extra"):
        compute_delta(base, tuned | {"extra": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"head.bias is \[5\] in the base and \[5, 1\]"):
        compute_delta(base, tuned | {"head.bias": torch.ones(5, 1)})
    with pytest.raises(CheckpointError, match=r"head.weight is \[5, 16\] in the base and \[5, 8\]"):
        compute_delta(base, tuned | {"head.weight": torch.ones(5, 8)})
    with pytest.raises(CheckpointError, match=r"the delta's head.weight \[5, 8\] fits no tensor of the base"):
        apply_delta(base, {"head.weight": torch.ones(5, 8)})
    with pytest.raises(CheckpointError, match=r"the delta's other \[1\] fits no tensor of the base"):
        apply_delta(base, {"other": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"last.weight.offset is \[3, 3\]; the base's kernel is \[16, 12, 3, 3\]"):
        apply_delta(base, {"last.weight.scale": torch.ones(()), "last.weight.offset": torch.ones(3, 3)})
    for part, other in (("scale", "offset"), ("offset", "scale")):
        with pytest.raises(CheckpointError, match=f"the delta has last.weight.{part} without last.weight.{other}"):
            apply_delta(base, {f"last.weight.{part}": delta_part[part]})
    with pytest.raises(CheckpointError, match=r"last.weight.scale is \[2\]; it must be one number"):
        apply_delta(base, {"last.weight.scale": torch.ones(2), "last.weight.offset": torch.ones(16, 12)})
    with pytest.raises(CheckpointError, match=r"last.bias.offset is \[16\]; the base's kernel is \[16\]"):
        apply_delta(base, {"last.bias.scale": torch.ones(()), "last.bias.offset": torch.ones(16)})
    torch.save(base, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="is not a file of `gradfilter delta save`"):
        read_delta(tmp_path / "weights.pth", base)


def test_types_must_agree():
    base = {"weight": torch.ones(2, 2)}
    with pytest.raises(CheckpointError, match=r"weight is torch\.float32 in the base and torch\.float16 in the tuned"):
        compute_delta(base, {"weight": torch.ones(2, 2, dtype=torch.float16)})


def test_other_classes(net, images, tmp_path):
    """A new classifier is stored whole, and other bases are still detected."""
    base = copy.deepcopy(net.state_dict())
    net.head = nn.Linear(16, 3)
    _, tuned, model = tune(net, images, targets=[0, 1, 2, 0])
    for delta in (compute_delta(base, tuned), trainable_delta(model)):
        assert delta["head.weight"].shape == (3, 16) and delta["head.bias"].shape == (3,)
        torch.testing.assert_close(apply_delta(base, delta), dict(tuned))
    save_delta(tmp_path / "task.safetensors", base, compute_delta(base, tuned))
    again = apply_delta(base, read_delta(tmp_path / "task.safetensors", base))
    torch.testing.assert_close(again, dict(tuned))
    for other in ({"head.bias": base["head.bias"] + 1}, {"head.weight": torch.zeros(4, 16)}):
        with pytest.raises(CheckpointError, match="made from other base weights"):
            read_delta(tmp_path / "task.safetensors", base | other)
    content = (tmp_path / "task.safetensors").read_bytes()
    for length in (4, 100, len(content) - 1):
        (tmp_path / "part.safetensors").write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_delta(tmp_path / "part.safetensors", base)


def test_nothing_changed(net, tmp_path):
    """A file all the same, which leads to the base."""
    base = net.state_dict()
    assert compute_delta(base, base) == {}
    save_delta(tmp_path / "task.safetensors", base, {})
    torch.testing.assert_close(apply_delta(base, read_delta(tmp_path / "task.safetensors", base)), dict(base))
    assert (tmp_path / "task.safetensors").stat().st_size < 1000
