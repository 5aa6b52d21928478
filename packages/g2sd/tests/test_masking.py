"""Which patches stay visible, and the way back into the order of the image."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from g2sd.masking import PatchMask, count_visible, draw_noise, mask_patches


class TestMaskPatches:
    def test_definition(self):
        mask = mask_patches(torch.tensor([[0.3, 0.1, 0.9, 0.2], [0.0, 0.7, 0.6, 0.5]]), 0.5)
        assert mask.num_visible == 2
        assert mask.ids_shuffle.tolist() == [[1, 3, 0, 2], [0, 3, 2, 1]]
        assert mask.visible.tolist() == [[1, 3], [0, 3]]
        assert mask.removed.tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]
        assert mask.ids_restore.tolist() == [[2, 0, 3, 1], [0, 3, 2, 1]]

    @pytest.mark.parametrize("count", [7, 196, 1024])
    def test_equal_noise(self, count):
        """Of equal noise the first patches stay, whatever sorts them."""
        mask = mask_patches(torch.full((3, count), 0.5), 0.75)
        torch.testing.assert_close(mask.ids_shuffle, torch.arange(count).expand(3, -1))

    @given(
        st.lists(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75]), min_size=9, max_size=9), min_size=1, max_size=4),
        st.floats(0, 0.88),
    )
    def test_properties(self, noise, ratio):
        """A permutation that keeps those of least noise, ties in the order of the image."""
        values = torch.tensor(noise)
        mask = mask_patches(values, ratio)
        assert mask.num_visible == count_visible(9, ratio)
        torch.testing.assert_close(mask.ids_shuffle.sort(1).values, torch.arange(9).expand(len(noise), -1))
        assert mask.removed.sum(1).tolist() == [9 - mask.num_visible] * len(noise)
        for row, order in zip(noise, mask.ids_shuffle.tolist(), strict=True):
            assert order == sorted(range(9), key=lambda place: (row[place], place))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_not_finite(self, value):
        noise = torch.rand(2, 16)
        noise[1, 5] = value
        with pytest.raises(ValueError, match="noise is not finite"):
            mask_patches(noise, 0.75)

    @pytest.mark.parametrize("noise", [torch.rand(16), torch.rand(2, 4, 4), torch.zeros(2, 16, dtype=torch.int64)])
    def test_errors(self, noise):
        with pytest.raises(ValueError, match=r"noise is torch\.\w+ \[.*it must be floating \[batch, patches\]"):
            mask_patches(noise, 0.75)


class TestPatchMask:
    def test_unshuffle(self):
        """Tokens come back where their patches are; the class token stays first."""
        mask = mask_patches(torch.rand(3, 12), 0.6)
        image = torch.randn(3, 13, 4)
        shuffled = image[:, 1:].gather(1, mask.ids_shuffle[:, :, None].expand(-1, -1, 4))
        torch.testing.assert_close(mask.unshuffle(torch.cat([image[:, :1], shuffled], 1)), image)

    def test_unshuffle_is_differentiable(self):
        mask = PatchMask(torch.tensor([[2, 0, 1]]), 1)
        tokens = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(mask.unshuffle, (tokens,))


class TestCountVisible:
    # int() of the float64 product, as the official code has it
    @pytest.mark.parametrize(
        ("patches", "ratio", "count"), [(196, 0.75, 49), (196, 0.9, 19), (196, 0, 196), (16, 0.9375, 1), (1, 0.0, 1)]
    )
    def test_definition(self, patches, ratio, count):
        assert count_visible(patches, ratio) == count

    @pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
    def test_outside(self, ratio):
        with pytest.raises(ValueError, match=rf"mask_ratio={ratio} must be in \[0, 1\)"):
            count_visible(196, ratio)

    @pytest.mark.parametrize(("patches", "ratio"), [(10, 0.9), (16, 0.95), (1, 0.5)])
    def test_none_visible(self, patches, ratio):
        with pytest.raises(ValueError, match=f"mask_ratio={ratio} leaves none of {patches} patches visible"):
            count_visible(patches, ratio)


class TestDrawNoise:
    def test_generator(self):
        draws = [draw_noise(4, 50, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
        torch.testing.assert_close(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])
        assert draws[0].min() >= 0 and draws[0].max() < 1

    def test_device(self):
        assert draw_noise(2, 3, device=torch.device("meta")).device.type == "meta"
