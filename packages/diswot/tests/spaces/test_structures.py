import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diswot.networks import parse_structure
from diswot.networks.structure import block_kinds, parse_block
from diswot.networks.structure_net import CIFAR_STRUCTURE, IMAGENET_STRUCTURE
from diswot.spaces import StructureSpace, mutation_candidates


class TestMutationCandidates:
    def test_unique(self):
        """Nine widths, nine bottlenecks, four depths (0 is none) and six kinds."""
        block = parse_block("SuperResK3K3(64,64,2,64,2)")
        found = mutation_candidates(block, "xxbl")
        assert len(found) == len(set(found)) == 9 * 9 * 4 * 6
        assert found == sorted(found, key=str)
        assert {(each.channels_in, each.stride) for each in found} == {(64, 2)}
        assert block in found

    def test_rounding(self):
        """Widths are multiples of 8 from 8 to 2048, halves rounded to even: 20 / 8 = 2.5 gives 16."""
        widths = {each.channels_out for each in mutation_candidates(parse_block("SuperConvK3BNRELU(3,20,1,1)"), "xxbl")}
        assert widths == {8, 16, 24, 32, 40, 48}
        wide = mutation_candidates(parse_block("SuperConvK3BNRELU(3,2000,1,1)"), "res18")
        assert max(each.channels_out for each in wide) == 2048

    def test_plain_convolution(self):
        """Only the width varies, and the sub-layers become one."""
        found = mutation_candidates(parse_block("SuperConvK3BNRELU(3,64,2,4)"), "res18")
        assert {(each.kind, each.layers, each.stride) for each in found} == {("SuperConvK3BNRELU", 1, 2)}

    def test_errors(self):
        with pytest.raises(ValueError, match="space='res50' must be one of 'xxbl', 'res18'"):
            mutation_candidates(parse_block("SuperConvK3BNRELU(3,64,2,4)"), "res50")


class TestStructureSpace:
    @pytest.mark.parametrize("blocks", ["xxbl", "res18"])
    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1))
    def test_mutate(self, blocks, seed):
        """Chains fit and keep to the limit, and deep blocks have been split."""
        space, generator = StructureSpace(blocks), np.random.default_rng(seed)
        child = parse_structure(space.sample(generator))
        assert child.num_layers <= 18
        assert child.blocks[0].channels_in == 3
        assert all(block.layers <= 5 for block in child.blocks)
        assert {block.kind for block in child.blocks} <= set(block_kinds())

    @pytest.mark.parametrize("blocks", ["xxbl", "res18"])
    def test_draws_candidates(self, blocks):
        """All replacements of a block are among its candidates, and most candidates come."""
        text = "SuperResK3K3(3,8,1,8,1)"
        space = StructureSpace(blocks, initial=text)
        candidates = {str(each) for each in mutation_candidates(parse_block(text), blocks)}
        drawn = {space.mutate(text, np.random.default_rng(seed)) for seed in range(600)}
        assert drawn <= candidates - {text}
        assert len(drawn) > 0.9 * len(candidates)

    def test_one_replacement(self):
        """Of the initial structure: one block differs but for the channels that it takes."""
        space = StructureSpace("res18")
        before = parse_structure(space.initial).blocks
        for seed in range(20):
            after = parse_structure(space.mutate(space.initial, np.random.default_rng(seed), replacements=1)).blocks
            differing = [
                index
                for index, (one, other) in enumerate(zip(before, after, strict=True))
                if (one.kind, one.channels_out, one.bottleneck, one.layers)
                != (other.kind, other.channels_out, other.bottleneck, other.layers)
            ]
            assert len(differing) == 1

    def test_initial(self):
        assert StructureSpace("xxbl").initial == CIFAR_STRUCTURE
        assert StructureSpace("xxbl").input_size == (3, 32, 32)
        assert StructureSpace("res18").initial == IMAGENET_STRUCTURE
        assert StructureSpace("res18").input_size == (3, 224, 224)
        own = "SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(8,16,2,8,2)"
        space = StructureSpace("res18", initial=own, image_size=32)
        model = space.build(space.mutate(own, np.random.default_rng(0)), num_classes=5)
        assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)
        assert isinstance(model, type(timm.create_model("structure_net")))

    def test_max_layers(self):
        space = StructureSpace("res18", max_layers=9)
        generator = np.random.default_rng(0)
        assert all(parse_structure(space.sample(generator)).num_layers <= 9 for _ in range(10))
        with pytest.raises(ValueError, match=r"key=.* of at most max_layers=9 sub-layers, not 16"):
            space.parse(CIFAR_STRUCTURE)
        with pytest.raises(ValueError, match="max_layers=3"):
            StructureSpace("res18", max_layers=3)

    def test_errors(self):
        with pytest.raises(ValueError, match="blocks='res50' must be one of"):
            StructureSpace("res50")
        with pytest.raises(ValueError, match="mutations=0"):
            StructureSpace("res18", mutations=0)
        with pytest.raises(ValueError, match=r"at position 26, .* takes 9 channels; expected 8"):
            StructureSpace("res18").parse("SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(9,16,2,8,2)")

    def test_no_way_out(self):
        """One block of one width, with no room for a layer more, has no neighbour."""
        space = StructureSpace("res18", initial="SuperConvK3BNRELU(3,8,1,1)", max_layers=1)
        assert space.mutate(space.initial, np.random.default_rng(0)) == "SuperConvK3BNRELU(3,16,1,1)"
