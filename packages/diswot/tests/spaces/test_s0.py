import pytest
import timm
import torch

from diswot.spaces import S0


class TestS0:
    def test_keys(self):
        keys = list(S0().enumerate())
        assert len(keys) == S0().size == 64
        assert keys[:2] == ["111", "113"]
        assert keys[-1] == "777"

    def test_build(self):
        model = S0().build("713", num_classes=10, in_chans=1)
        assert model.depths == (7, 1, 3)
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
        assert model.default_cfg["architecture"] == "s0_713"
        state = timm.create_model("s0_713", num_classes=10, in_chans=1).state_dict()
        assert list(model.state_dict()) == list(state)

    def test_other_depths(self):
        """The depths of one official script."""
        space = S0((2, 6, 10, 14))
        assert next(space.enumerate()) == "2-2-2"
        assert space.parse("10-2-14") == "10-2-14"
        assert space.build("10-2-14").depths == (10, 2, 14)

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("", "has 0 depths; expected 3"),
            ("71", "has 2 depths; expected 3, each among 1, 3, 5, 7"),
            ("7133", "has 4 depths"),
            ("7x3", "has 'x' at position 1; expected a depth among 1, 3, 5, 7, as in '111'"),
            ("712", "has '2' at position 2"),
            ("7²3", "has '²' at position 1"),
        ],
    )
    def test_errors(self, key, message):
        with pytest.raises(ValueError, match=message):
            S0().parse(key)
        with pytest.raises(ValueError, match=message):
            S0().build(key)

    def test_bad_depths(self):
        for depths in ((), (3,), (0, 1), (1, 10**6)):
            with pytest.raises(ValueError, match="depths"):
                S0(depths)
        with pytest.raises(ValueError, match="has '3' at position 3"):
            S0((2, 10)).parse("10-3-2")
