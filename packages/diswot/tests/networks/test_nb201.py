import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diswot.networks.nb201 import NB201_OPS, NB201_WINNERS, nb201_text, parse_nb201

CELLS = st.lists(st.sampled_from(NB201_OPS), min_size=6, max_size=6)


class TestStrings:
    @settings(max_examples=40, deadline=None)
    @given(CELLS)
    def test_round_trip(self, operations):
        assert parse_nb201(nb201_text(operations)) == tuple(operations)

    @pytest.mark.parametrize("arch", NB201_WINNERS.values())
    def test_winners(self, arch):
        assert nb201_text(parse_nb201(arch)) == arch

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", r"has the end at position 0; expected '\|'"),
            ("|none~0", r"has the end at position 7; expected '\|'"),
            ("|none~0|", r"has the end at position 8; expected '\+\|'"),
            ("|none~1|", r"has '1\|' at position 6; expected the input node 0"),
            ("|nonne~0|", "at position 1: unknown operation 'nonne'; did you mean 'none'"),
            ("|none|", r"has 'none\|' at position 1; expected an operation and ~0"),
            (nb201_text(["none"] * 6) + "x", "has 'x' at position 47; expected the end"),
        ],
    )
    def test_errors(self, text, message):
        with pytest.raises(ValueError, match=message):
            parse_nb201(text)

    @settings(max_examples=40, deadline=None)
    @given(CELLS, st.data())
    def test_damaged(self, operations, data):
        """A string with a character left out is an error that tells a position, or another cell."""
        text = nb201_text(operations)
        position = data.draw(st.integers(0, len(text) - 1))
        with pytest.raises(ValueError, match="position"):
            parse_nb201(text[:position] + text[position + 1 :])


class TestNetwork:
    def test_all_none(self):
        """Nothing passes: maps are zero, gradients finite."""
        model = timm.create_model("nb201", arch=nb201_text(["none"] * 6), width=4, cells=1, num_classes=3)
        maps, logits = model.forward_maps(torch.randn(2, 3, 16, 16))
        assert not maps[1].any()
        logits.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        groups, _ = model.forward_group_maps(torch.randn(2, 3, 16, 16))
        assert all(value.isfinite().all() for value in groups)

    def test_none_keeps_infinities_visible(self):
        cell = timm.create_model("nb201", arch=nb201_text(["none"] * 6), width=2, cells=1).cells[0]
        assert cell(torch.full((1, 2, 4, 4), torch.inf)).isnan().all()

    def test_cell(self):
        """Nodes sum over the edges in the order of the string."""
        arch = "|skip_connect~0|+|none~0|avg_pool_3x3~1|+|skip_connect~0|skip_connect~1|none~2|"
        cell = timm.create_model("nb201", arch=arch, width=2, cells=1).cells[0]
        x = torch.randn(2, 2, 5, 5)
        torch.testing.assert_close(cell(x), 2 * x)
        arch = "|skip_connect~0|+|none~0|avg_pool_3x3~1|+|none~0|none~1|skip_connect~2|"
        cell = timm.create_model("nb201", arch=arch, width=2, cells=1).cells[0]
        ones = torch.ones(1, 2, 5, 5)
        torch.testing.assert_close(cell(ones), ones)  # padding does not count

    @pytest.mark.parametrize("cells", [1, 3])
    def test_maps(self, cells):
        model = timm.create_model("nb201_diswot", width=4, cells=cells).eval()
        x = torch.randn(2, 3, 16, 16)
        maps, logits = model.forward_maps(x)
        assert len(maps) == 3 * cells + 2 + 2
        groups, same = model.forward_group_maps(x)
        assert torch.equal(same, logits)
        assert torch.equal(groups[0], maps[cells])
        assert torch.equal(groups[1], maps[2 * cells + 1])
        assert torch.equal(groups[2], model.forward_features(x))
        assert torch.equal(groups[3], maps[-1])

    @pytest.mark.parametrize(("options", "message"), [({"width": 0}, "width=0"), ({"cells": 10**6}, "cells=1000000")])
    def test_errors(self, options, message):
        with pytest.raises(ValueError, match=message):
            timm.create_model("nb201", **options)
