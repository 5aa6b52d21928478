"""The tree of a file: trained for a number of bytes and coded; as the only layer, trained until it meets a target."""

from dataclasses import replace

import numpy as np

from tinc.contents import Contents, TreeSection
from tinc.encoding.candidate import packed_size
from tinc.encoding.job import Job
from tinc.encoding.targets import OutOfReachError
from tinc.entropy import BitWriter
from tinc.tree.design import design_tree, leaf_splits
from tinc.tree.fitting import FitPlan, Progress, fit_tree
from tinc.tree.quantized import QuantizedTree
from tinc.tree.shape import TreeShape
from tinc.tree.weights import write_constants, write_weights

__all__ = ["TRAINING_STEPS", "train_tree", "tree_alone", "with_tree"]

TRAINING_STEPS: dict[str, int] = {"fast": 1000, "balanced": 2500, "best": 6000}
"""Steps of a tree's training by preset."""


def train_tree(job: Job, budget: float) -> QuantizedTree:
    """Train a tree of about `budget` bytes; leaves of one value become constants."""
    channels, *extent = job.signal.extent
    splits = leaf_splits(extent, budget)
    everywhere = TreeShape(tuple(extent), splits, ((1,),) * (len(splits) - 1) + ((channels,),))
    boxes = [(slice(None), *everywhere.box(leaf)) for leaf in range(everywhere.num_leaves)]
    values = [job.signal.working[box].reshape(channels, -1) for box in boxes]
    constant = np.array([bool((leaf == leaf[:, :1]).all()) for leaf in values])
    if constant.all():
        constant[0] = False
    shape = design_tree(extent, channels, budget, constant)
    plan = FitPlan(steps=TRAINING_STEPS[job.preset])

    def callback(progress: Progress) -> None:
        error = progress.mse * job.signal.working.size
        job.report(f"tree, step {progress.step} of {progress.steps}", job.signal.psnr(error))
        if job.report.is_stopped:
            raise KeyboardInterrupt

    working = job.signal.working
    tree = fit_tree(shape, working, budget, plan=plan, seed=job.seed, deadline=job.deadline, callback=callback)
    constants = [leaf[:, 0] for leaf, is_constant in zip(values, constant, strict=True) if is_constant]
    return replace(tree, constants=np.array(constants, dtype=np.int64).reshape(-1, channels))


def with_tree(contents: Contents, tree: QuantizedTree) -> Contents:
    """Return contents with a tree, whose stream is the first one."""
    writer = BitWriter()
    spreads = write_weights(writer, tree)
    write_constants(writer, tree)
    section = TreeSection(
        tree.shape,
        tuple(layer.multiplier for layer in tree.layers),
        tuple(layer.shift for layer in tree.layers),
        spreads,
        tree.base,
    )
    return replace(contents, tree=section, streams=(writer.finish(),))


def tree_alone(job: Job) -> Contents:
    """Train trees until one meets the target; a tree that is slightly too large gets coarser weights."""
    target = job.target
    budget = job.signal.samples.nbytes / 64 if target.bytes is None else target.bytes
    for attempt in range(8):
        tree = train_tree(job, budget)
        contents = with_tree(job.contents, tree)
        size = packed_size(contents)
        if job.allowed_error is not None:
            if job.signal.squared_error(tree.decode(job.signal.box)) <= job.allowed_error:
                return contents
            budget *= 1.5
            continue
        if size <= target.size_limit:
            return contents
        is_last = attempt == 2 or job.report.is_stopped
        for power in range(1, 400 if is_last else 6):
            coarser = with_tree(job.contents, tree.coarser(1.02**power))
            if packed_size(coarser) <= target.size_limit:
                return coarser
        if is_last:
            break
        budget *= 0.995 * target.size_limit / size
    raise OutOfReachError(f"the target is out of reach of a tree alone: the last one has {size} bytes")
