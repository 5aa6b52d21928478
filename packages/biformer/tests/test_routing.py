import pytest
import torch

from biformer.routing import pool_regions, route, select_regions


class TestRoute:
    def test_reference(self):
        """Each region's most affine regions by the mean of its tokens, one by one."""
        query, key = torch.randn(2, 6, 9, 4, dtype=torch.float64), torch.randn(2, 6, 9, 4, dtype=torch.float64)
        index, weight = route(query, key, n_win=3, topk=2, scale=0.5)
        for image in range(2):
            for region in range(9):
                row, column = divmod(region, 3)
                mean = query[image, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3].mean((0, 1))
                affinities = torch.stack(
                    [
                        key[image, 2 * r : 2 * r + 2, 3 * c : 3 * c + 3].mean((0, 1)) @ mean
                        for r in range(3)
                        for c in range(3)
                    ]
                )
                best = (0.5 * affinities).topk(2)
                assert index[image, region].tolist() == best.indices.tolist()
                torch.testing.assert_close(weight[image, region], best.values.softmax(0))

    def test_errors(self):
        x = torch.randn(1, 6, 9, 4)
        with pytest.raises(ValueError, match="a 6x9 map does not divide into 4x4 regions"):
            route(x, x, n_win=4, topk=1)
        for topk in (0, 10):
            with pytest.raises(ValueError, match=rf"topk={topk} is outside \[1, 9\]"):
                route(x, x, n_win=3, topk=topk)

    def test_float32_under_half(self):
        """A half-precision map is routed in float32."""
        x = torch.randn(1, 8, 8, 16).bfloat16()
        index, weight = route(x, x, n_win=4, topk=3)
        exact, _ = route(x.float(), x.float(), n_win=4, topk=3)
        assert weight.dtype == torch.float32
        assert torch.equal(index, exact)


class TestPoolRegions:
    def test_valid_size(self):
        """What lies outside does not count; a region without a valid token is zero."""
        x = torch.randn(1, 6, 6, 2)
        padded = x.clone()
        padded[:, 4:] = 1e6
        padded[:, :, 3:] = -1e6
        pooled = pool_regions(padded, (3, 3), (4, 3))
        torch.testing.assert_close(pooled[0, 0], x[0, :3, :3].mean((0, 1)))
        torch.testing.assert_close(pooled[0, 2], x[0, 3:4, :3].mean((0, 1)))
        assert not pooled[0, 1].any()

    def test_ragged(self):
        x = torch.randn(1, 5, 4, 2)
        torch.testing.assert_close(pool_regions(x, (3, 2))[0, 2], x[0, 3:, :2].mean((0, 1)))


class TestSelectRegions:
    def test_empty_come_last(self):
        means = torch.ones(1, 4, 3)
        index, weight = select_regions(means, means, 4, 1.0, torch.tensor([True, False, True, False]))
        assert set(index[0, 0, :2].tolist()) == {1, 3}
        assert weight[0, 0].tolist() == [0.5, 0.5, 0.0, 0.0]
