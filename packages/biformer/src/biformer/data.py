"""The order of training images: repeated augmentation, as the paper's recipe uses it (sec. 4.1, after DeiT)."""

from collections.abc import Sequence

from timm.data.distributed_sampler import RepeatAugSampler

__all__ = ["repeated_augmentation_order"]


def repeated_augmentation_order(length: int, epoch: int, *, repeats: int = 3) -> Sequence[int]:
    """Return the images of one epoch: a permutation seeded by `epoch`, each image `repeats` times in a row.

    The order is cut to as many entries as the dataset has, in whole groups of 256. Process r of R takes entries
    r, r + R, ..., so that the copies of an image meet different processes.
    """
    sampler = RepeatAugSampler(range(length), num_replicas=1, rank=0, num_repeats=repeats)
    sampler.set_epoch(epoch)
    return list(sampler)
