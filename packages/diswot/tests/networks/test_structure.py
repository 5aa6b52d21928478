import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diswot.networks.structure import Structure, SuperBlock, block_kinds, parse_block, parse_structure
from diswot.networks.structure_net import NAMED_STRUCTURES
from visionkernels.profiling import count_parameters

TEXT = "SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(8,16,2,8,2)SuperResK1K5K1(16,24,2,8,1)"


@st.composite
def structures(draw, largest=32):
    channels, blocks = 3, []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(sorted(block_kinds())))
        out, layers = draw(st.integers(1, largest)), draw(st.integers(1, 8))
        bottleneck = draw(st.integers(1, largest)) if "Res" in kind else None
        blocks.append(SuperBlock(kind, channels, out, draw(st.sampled_from([1, 2])), bottleneck, layers))
        channels = out
    return Structure(tuple(blocks))


class TestStructure:
    @settings(max_examples=40, deadline=None)
    @given(structures())
    def test_round_trip(self, structure):
        assert parse_structure(str(structure)) == structure

    @settings(max_examples=40, deadline=None)
    @given(structures(largest=8))
    def test_parameters(self, structure):
        with torch.device("meta"):
            model = timm.create_model("structure_net", structure=str(structure), num_classes=3)
        assert structure.count_parameters(num_classes=3) == count_parameters(model)

    @settings(max_examples=40, deadline=None)
    @given(structures(), st.integers(2, 6))
    def test_split(self, structure, threshold):
        split = structure.split(threshold)
        assert split.num_layers == structure.num_layers
        assert split.blocks[-1].channels_out == structure.blocks[-1].channels_out
        if all(block.layers < threshold for block in structure.blocks):
            assert split == structure

    def test_split_seven(self):
        structure = parse_structure("SuperResK3K3(3,8,2,4,7)")
        assert str(structure.split(6)) == "SuperResK3K3(3,8,2,4,3)SuperResK3K3(8,8,1,4,4)"

    def test_rewired(self):
        blocks = [parse_block("SuperConvK3BNRELU(3,8,1,1)"), parse_block("SuperResK3K3(64,16,2,8,2)")]
        assert str(Structure.of(blocks)) == "SuperConvK3BNRELU(3,8,1,1)SuperResK3K3(8,16,2,8,2)"

    def test_official_costs(self):
        """Of one residual block: a norm counts once, the projection without its norm and at a stride too many."""
        structure = parse_structure("SuperResK3K3(3,8,2,4,1)")
        convolutions, norms, projection = 9 * 3 * 4 + 9 * 4 * 8, 4 + 8, 3 * 8 + 8
        assert structure.official_model_size(num_classes=10) == convolutions + norms + projection + 8 * 10 + 1
        flops = (convolutions + norms) * 16**2 + projection * 8**2 + 8 * 10
        assert structure.official_flops(resolution=32, num_classes=10) == flops

    def test_spaces(self):
        assert str(parse_structure("SuperResK3K3( 3 ,8, 2,4,1)")) == "SuperResK3K3(3,8,2,4,1)"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "has the end at position 0; expected a block, e.g. SuperRes"),
            ("SuperResK3K3", "has 'SuperResK3K3' at position 0; expected a block"),
            ("SuperRezK3K3(3,8,1,8,1)", "at position 0: unknown block 'SuperRezK3K3'; did you mean 'SuperResK3K3'"),
            ("SuperResIDWE4K3(3,8,1,8,1)", "unknown block 'SuperResIDWE4K3'"),
            ("SuperResK3K3(3,8,1,8)", r"has '\)' at position 20; expected ',', as in SuperResK3K3\(in-channels"),
            ("SuperResK3K3(3,8,1,8,1,1)", r"has ',1\)' at position 22; expected '\)'"),
            ("SuperResK3K3(3,x,1,8,1)", r"has 'x,1,8,1\)' at position 15; expected a number, the out-channels"),
            ("SuperResK3K3(3,8,1,8,1", "has the end at position 22"),
            ("SuperResK3K3(3,8,1,8,1);", "has ';' at position 23; expected a block"),
            ("SuperResK3K3(3,0,1,8,1)", "at position 0: out-channels=0 must be from 1 to 8192"),
            ("SuperResK3K3(3,-8,1,8,1)", "out-channels=-8"),
            ("SuperResK3K3(3,8,1,8,0)", "sub-layers=0"),
            ("SuperResK3K3(3,8,99,8,1)", "stride=99"),
            ("SuperResK3K3(3,99999999999999999999,1,8,1)", "expected a number"),
            (TEXT + "SuperResK3K3(25,8,1,8,1)", "at position 77, .* takes 25 channels; expected 24"),
            ("SuperResK7K7(3,8192,1,8192,64)", "of at most 250000000 weights, not about"),
            ("SuperConvK1BNRELU(3,3,1,1)" * 257, "of at most 256 blocks"),
        ],
    )
    def test_errors(self, text, message):
        with pytest.raises(ValueError, match=message):
            parse_structure(text)

    def test_block_errors(self):
        with pytest.raises(ValueError, match="position 26; expected the end"):
            parse_block("SuperConvK3BNRELU(3,8,1,1)SuperConvK3BNRELU(8,8,1,1)")
        with pytest.raises(ValueError, match=r"threshold=1 must be at least 2"):
            parse_structure(TEXT).split(1)
        with pytest.raises(ValueError, match="resolution=0"):
            parse_structure(TEXT).official_flops(resolution=0, num_classes=10)
        with pytest.raises(ValueError, match=r"block 1 of the structure, .* takes 64 channels; expected 8"):
            Structure((parse_block("SuperConvK3BNRELU(3,8,1,1)"), parse_block("SuperConvK3BNRELU(64,8,1,1)")))


class TestNetwork:
    def test_projections(self):
        """The first branch of a residual super block has one even where shapes agree; later ones add their input."""
        model = timm.create_model("structure_net", structure="SuperResK3K3(3,8,1,4,1)SuperResK1K3K1(8,8,1,4,2)")
        branches = model.module_list[1].module_list[::2]
        assert [branch.proj is not None for branch in branches] == [True, False, False, False]
        assert branches[0].proj[0].bias is not None
        assert {layer.eps for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)} == {1e-3}

    @pytest.mark.parametrize("name", NAMED_STRUCTURES)
    def test_named(self, name):
        with torch.device("meta"):
            model = timm.create_model(name)
        assert str(model.structure) == NAMED_STRUCTURES[name]
        assert parse_structure(NAMED_STRUCTURES[name]).num_layers <= 20

    def test_block_dropout(self):
        """The last of two blocks drops half of the given rate; in evaluation none does."""
        text = "SuperConvK1BNRELU(3,512,1,1)SuperConvK1BNRELU(512,512,1,1)"
        model = timm.create_model("structure_net", structure=text, block_drop_rate=0.8)
        x = torch.ones(2, 512, 8, 8)
        assert torch.equal(model._drop(x, 0), x)
        assert (model._drop(x, 1) == 0).float().mean().item() == pytest.approx(0.4, abs=0.02)
        assert torch.equal(model.eval()._drop(x, 1), x)
        with pytest.raises(ValueError, match="block_drop_rate=1"):
            timm.create_model("structure_net", structure=text, block_drop_rate=1)

    def test_in_chans(self):
        model = timm.create_model("structure_net", structure=TEXT, in_chans=1)
        assert str(model.structure).startswith("SuperConvK3BNRELU(1,8,1,1)")
