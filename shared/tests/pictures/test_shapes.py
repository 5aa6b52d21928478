"""Drawn shapes."""

import numpy as np
import pytest

from visionkernels.pictures.shapes import draw_shapes


class TestDrawShapes:
    def test_repeats(self):
        first, again, other = draw_shapes(3), draw_shapes(3), draw_shapes(4)
        for one, two in zip(first, again, strict=True):
            np.testing.assert_array_equal(one, two)
        assert (first[0] != other[0]).any()

    def test_shapes(self):
        kinds = set()
        for index in range(30):
            picture, masks, labels = draw_shapes(index, size=(40, 60))
            assert (picture.shape, picture.dtype) == ((40, 60, 3), np.uint8)
            assert (masks.shape, masks.sum(0).max()) == ((len(labels), 40, 60), 1)
            assert masks.sum((1, 2)).min() >= 16
            for mask, kind in zip(masks, labels, strict=True):
                assert picture[mask].mean(0).argmax() == kind - 1
            kinds |= set(labels.tolist())
        assert kinds == {1, 2, 3}

    def test_areas(self):
        """A lone shape fills its circle by its kind: 1, 3 sqrt(3) / 4 pi and 2 / pi."""
        shares: dict[int, list[float]] = {1: [], 2: [], 3: []}
        for index in range(60):
            _, (mask,), (kind,) = draw_shapes(index, size=(300, 300), max_shapes=1)
            rows, columns = np.nonzero(mask)
            points = np.stack([rows, columns], 1)
            centre = points.mean(0)
            radius = np.hypot(*(points - centre).T).max()
            shares[int(kind)].append(mask.sum() / (np.pi * radius**2))
        expected = {1: 1.0, 2: 3 * 3**0.5 / (4 * np.pi), 3: 2 / np.pi}
        assert {kind: np.mean(each) for kind, each in shares.items()} == pytest.approx(expected, rel=0.03)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"size=\(301, 40\) must be 16 to 300"):
            draw_shapes(0, size=(301, 40))
