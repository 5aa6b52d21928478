import pytest
import torch

from visionkernels.testing.ops import check_backend


def gathered(x, index, scale=1.0):
    """Rows and their largest elements, with the places of these."""
    rows = scale * x[index]
    return rows, *rows.max(-1)


class TestCheckBackend:
    X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    INDEX = torch.tensor([4, 0, 4])

    def test_several_outputs_and_indices(self):
        check_backend(gathered, gathered, [self.X, self.INDEX])

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (lambda x, index: gathered(x, index, scale=1.01), "output 0: "),
            (lambda x, index: (gathered(x, index)[0], *gathered(-x, index)[1:]), "output 1: "),
            (lambda x, index: (*gathered(x, index)[:2], 1 - gathered(x, index)[2]), "output 2: "),
            (lambda x, index: gathered(x, index)[:2], "instead of"),
            (lambda x, index: (gathered(x, index)[0], *gathered(x.detach(), index)[1:]), "gradient 0: "),
            (lambda x, index: tuple(out.double() for out in gathered(x, index)), "output 0 is torch.float64"),
        ],
        ids=["values", "second", "integers", "number", "gradient", "dtype"],
    )
    def test_differences(self, wrong, message):
        with pytest.raises(AssertionError, match=message):
            check_backend(wrong, gathered, [self.X, self.INDEX])
