"""Draws depend on seed and key alone, and what is borrowed comes back as it was."""

import math

import pytest
import torch
from torch import nn

from diswot.initialisation import draws_of, generator_for, initialise, preserved, undrawn


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 5), nn.BatchNorm2d(64), nn.PReLU(), nn.ConvTranspose2d(64, 32, 3), nn.GroupNorm(4, 32),
        nn.Flatten(), nn.Linear(288, 40), nn.LayerNorm(40), nn.Linear(40, 7),
    )  # fmt: skip


def drawn(init="gaussian", seed=0, key="a", draws="own", model=None):
    model = network() if model is None else model
    initialise(model, init, draws_of(seed, key, draws))
    return model


class TestGeneratorFor:
    def test_depends_on_both_and_on_nothing_else(self):
        first = [torch.rand(3, generator=generator_for(*args)).tolist() for args in ((0, "a"), (1, "a"), (0, "b"))]
        torch.manual_seed(123)
        assert torch.rand(3, generator=generator_for(0, "a")).tolist() == first[0]
        assert first[0] != first[1] != first[2] != first[0]

    def test_seed_and_key_do_not_run_together(self):
        assert generator_for(1, "1/a").initial_seed() != generator_for(11, "a").initial_seed()


class TestDrawsOf:
    def test_shared_by_layers_of_one_name(self):
        one, other = nn.ModuleDict(), nn.ModuleDict()
        one["a"], one["b"] = nn.Linear(3, 4), nn.Linear(4, 4)
        other["new"], other["b"] = nn.Linear(9, 9), nn.Linear(4, 4)
        drawn(key="one", draws="shared", model=one)
        drawn(key="other", draws="shared", model=other)
        torch.testing.assert_close(one["b"].weight, other["b"].weight, rtol=0, atol=0)
        assert not torch.equal(one["a"].weight[:, :3], one["b"].weight[:, :3])

    def test_own(self):
        assert not torch.equal(drawn(key="one")[0].weight, drawn(key="two")[0].weight)

    def test_errors(self):
        with pytest.raises(ValueError, match="draws='none' must be one of 'own', 'shared'"):
            draws_of(0, "a", "none")


class TestInitialise:
    def test_gaussian(self):
        model = drawn()
        for index in (0, 3, 6):
            torch.testing.assert_close(model[index].weight.std(), torch.tensor(1.0), rtol=0.06, atol=0)
            assert model[index].weight.mean().abs() < 0.05
            assert not model[index].bias.any()

    def test_kaiming(self):
        model = drawn("kaiming")
        torch.testing.assert_close(model[0].weight.std(), torch.tensor(math.sqrt(2 / (64 * 25))), rtol=0.06, atol=0)
        assert not model[0].bias.any()
        for index in (6, 8):
            bound = 1 / math.sqrt(model[index].in_features)
            for values in (model[index].weight, model[index].bias):
                assert bound * 0.5 < values.abs().max() <= bound

    @pytest.mark.parametrize("init", ["gaussian", "kaiming"])
    def test_norms_become_the_identity_and_other_layers_stay(self, init):
        model = network()
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.3)
        drawn(init, model=model)
        for index in (1, 4, 7):
            assert (model[index].weight == 1).all()
            assert not model[index].bias.any()
        assert (model[2].weight == 0.3).all()

    def test_keep(self):
        model = network()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        drawn("keep", model=model)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_precision_does_not_matter(self, dtype):
        torch.testing.assert_close(drawn(model=network().to(dtype))[6].weight, drawn()[6].weight.to(dtype))

    def test_norms_without_weights(self):
        drawn(model=nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.LayerNorm(3, elementwise_affine=False)))

    def test_global_random_state_is_not_touched(self):
        state = torch.random.get_rng_state()
        model = network()
        torch.random.set_rng_state(state)
        drawn("kaiming", model=model)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_errors(self):
        with pytest.raises(ValueError, match="init='orthogonal' must be one of 'gaussian', 'kaiming', 'keep'"):
            drawn("orthogonal")


class TestUndrawn:
    def test_what_initialise_leaves(self):
        model = network()
        buffers = list(model.buffers())
        assert [id(each) for each in undrawn(model, "kaiming")] == list(map(id, [model[2].weight, *buffers]))
        assert len(undrawn(model, "keep")) == len(list(model.parameters())) + len(buffers)


class TestPreserved:
    def snapshot(self, model):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        strides = [each.stride() for each in model.parameters()]
        flags = [each.requires_grad for each in model.parameters()]
        modes = [module.training for module in model.modules()]
        grads = [None if each.grad is None else each.grad.clone() for each in model.parameters()]
        return state, strides, flags, modes, grads, torch.random.get_rng_state()

    @pytest.mark.parametrize("fails", [False, True])
    def test_everything_comes_back(self, fails):
        model = network().to(memory_format=torch.channels_last)
        model[0].weight.requires_grad_(False)
        model[6].weight.grad = torch.ones(40, 288)
        model[1].eval()
        before = self.snapshot(model)
        addresses = [each.data_ptr() for each in model.parameters()]
        try:
            with preserved(model):
                assert not any(each.requires_grad for each in model.parameters())
                drawn(model=model.train())
                model[1].running_mean.fill_(math.nan)
                torch.rand(3)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        torch.testing.assert_close(self.snapshot(model), before, rtol=0, atol=0)
        assert [each.data_ptr() for each in model.parameters()] == addresses
