"""The official procedure on one volume, in a run folder that can be resumed.

It has a loop of its own: `visionkernels.training.fit` counts epochs of a data set and batches of a loader, while here
an epoch is often a single step of milliseconds on points drawn with replacement, evaluation follows the first step of
some epochs, and a scheduler of torch is stepped with every update. Folder, lock and log are the shared ones, and
accelerate owns the processes, which share the points of a step.
"""

import math
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tinc.metrics import TYPE_RANGES, DataRange, psnr, ssim
from tinc.official.allocation import plan_tree
from tinc.official.folder import save_official
from tinc.official.model import OctreeMLP, decode, split
from tinc.official.procedure import (
    create_optimizer,
    create_scheduler,
    draw_points,
    evaluation_label,
    num_steps,
    points_per_leaf,
    steps_per_epoch,
    weighted_loss,
)
from tinc.official.volume import Rounding, normalise, read_volume
from tinc.recipes import LossWeight, OfficialRecipe
from visionkernels.checks import check, check_choice
from visionkernels.extras import require
from visionkernels.recipes import FitRecipe

__all__ = ["TrainResult", "train"]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Quality of the last weights, and the folders of weights."""

    psnr: float
    """Decibels over the range of the type (65535 for 16 bits), or over that of the values for types without a range."""
    psnr_values: float
    """Decibels over the range of the volume's values."""
    ssim: float
    best_psnr: float
    parameters: int
    ratio: float
    """Bytes of the input file / bytes of the parameters as float32."""
    folder_ratio: float
    """Bytes of the input file / bytes of the official folder."""
    last: Path
    """Official folder of the last weights."""
    best: Path
    """Official folder of the weights with the best PSNR."""
    history: list[dict[str, float]]
    """Step, epoch, loss, PSNR and SSIM of every evaluation."""


def train(
    recipe: OfficialRecipe,
    volume: str | Path,
    run_dir: str | Path,
    *,
    device: Literal["auto", "cpu"] = "auto",
    precision: Literal["no", "bf16"] = "no",
    save_every_steps: int = 1000,
) -> TrainResult:
    """Train a tree on a volume; repeat the same call to resume an interrupted run.

    The run folder contains run.json (recipe, versions, seed, device, command), log.jsonl (a line for each evaluation),
    checkpoints/, and the official folders best/ and last/. On a CPU a resumed run ends with the same weights, bit for
    bit. Under `accelerate launch` the processes share the points of each step.

    Args:
        recipe: settings of the tree and of the training
        volume: path of a .tif or .npy file
        run_dir: the run folder
        device: "auto" is the device that accelerate chooses
        precision: precision of the products in training; weights and evaluation are float32
        save_every_steps: steps between checkpoints, besides those at evaluations

    Raises ValueError for a volume and a recipe that do not fit each other, and for a run folder of another run or in
    use; FloatingPointError for a loss that is not finite; ImportError without the extra `train`; KeyboardInterrupt on
    Ctrl-C, after saving.
    """
    for module in ("accelerate", "filelock", "timm"):
        require(module, "tinc-vision[train]")
    from visionkernels.training.process import catch_interrupt

    check_choice("precision", precision, Literal["no", "bf16"])
    check(save_every_steps >= 1, "save_every_steps", save_every_steps, "at least 1")
    run = _Run(recipe, Path(volume), Path(run_dir), device, precision)
    with run.folder.lock() if run.is_main else nullcontext():
        run.resume()
        with catch_interrupt(run.interrupt):
            run.finish(save_every_steps)
        return run.result()


class _Run:
    """A training and its files; `step` is the number of finished steps."""

    def __init__(
        self,
        recipe: OfficialRecipe,
        path: Path,
        run_dir: Path,
        device: Literal["auto", "cpu"],
        precision: Literal["no", "bf16"],
    ) -> None:
        from visionkernels.profiling import warn_of_emulated_bf16
        from visionkernels.training.folder import RunFolder
        from visionkernels.training.process import create_accelerator

        self.recipe, self.path, self.precision = recipe, path, precision
        self.original = read_volume(path)
        self.origin_bytes = path.stat().st_size
        normalised, self.side_info = normalise(self.original, scale_min=recipe.normal_min, scale_max=recipe.normal_max)
        self.model = OctreeMLP(plan_tree(recipe, normalised, self.origin_bytes), seed=recipe.seed)
        num_levels = len(recipe.levels)
        self.target = split(torch.from_numpy(normalised), num_levels).contiguous()
        self.population = self.target.shape[1]
        self.points = points_per_leaf(recipe.batch_size, num_levels, population=self.population, compat=recipe.compat)
        reaches = ((self.target >= recipe.weight.low) & (self.target <= recipe.weight.high)).any()
        # weighting costs time in every step, so it is skipped if no voxel is in the interval
        self.weight = recipe.weight if reaches else LossWeight(scale=1.0)
        self.per_epoch = steps_per_epoch(self.population, self.points)
        self.total = num_steps(self.population, self.points, recipe.epochs)
        self.data_range: DataRange = "dtype" if self.original.dtype.name in TYPE_RANGES else "values"
        self.accelerator = create_accelerator(FitRecipe(updates=1, batch_size=1, device=device), run_dir)
        self.is_main, self.device = self.accelerator.is_main_process, self.accelerator.device
        if precision == "bf16":
            warn_of_emulated_bf16(self.device)
        self.target = self.target.to(self.device)
        self.module = self.accelerator.prepare_model(self.model)
        self.optimizer = create_optimizer(self.model.parameters(), recipe)
        self.scheduler = create_scheduler(self.optimizer, recipe)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.step, self.best, self.interrupted = 0, -math.inf, False
        self.folder = RunFolder(run_dir)

    def interrupt(self) -> None:
        self.interrupted = True

    def resume(self) -> None:
        """Claim the run folder, and load its latest checkpoint."""
        if self.is_main:
            self._claim()
        self.accelerator.wait_for_everyone()
        checkpoint = self.folder.latest()
        if checkpoint is not None:
            if self.is_main:
                self.folder.verify(checkpoint)
            self._load(checkpoint)

    def _claim(self) -> None:
        from visionkernels.training.folder import describe_run
        from visionkernels.weights import Trained

        facts = {"shape": list(self.original.shape), "dtype": self.original.dtype.name, "bytes": self.origin_bytes}
        trained = Trained(kind="tree", package="tinc", details={"volume": facts, "precision": self.precision})
        description = describe_run(
            asdict(self.recipe), trained, samples_per_epoch=self.population,
            device=str(self.device), path=str(self.path), processes=self.accelerator.num_processes,
        )  # fmt: skip
        is_new = self.folder.claim(description)
        for leftover in (*self.folder.path.glob(".best-*"), *self.folder.path.glob(".last-*")):
            shutil.rmtree(leftover)  # from a run that was killed while writing
        checkpoint = self.folder.latest()
        step = int(checkpoint.name) if checkpoint is not None else 0
        if not is_new and step < self.total:
            self.folder.note_resumption(description)
        self.folder.cut_history(sum(entry["step"] <= step for entry in self.folder.history()))

    def finish(self, save_every_steps: int) -> None:
        """Run the remaining steps."""
        hidden = None if self.is_main else True
        with tqdm(total=self.total, initial=self.step, unit="step", desc=self.recipe.name, disable=hidden) as progress:
            while self.step < self.total:
                loss = self._advance()
                label = evaluation_label(
                    self.step, per_epoch=self.per_epoch, epochs=self.recipe.epochs, every=self.recipe.eval_epochs
                )
                stops = self._is_interrupted()
                if label is not None or stops or self.step % save_every_steps == 0:
                    mean = self._mean(loss)
                    if label is not None and self.is_main:
                        progress.set_postfix(psnr=f"{self._evaluate(label, mean):.2f} dB")
                    if self.is_main:
                        self._save()
                progress.update()
                if stops and self.step < self.total:
                    raise KeyboardInterrupt(f"stopped at step {self.step}; rerun the same command to resume")

    def _advance(self) -> Tensor:
        points = draw_points(self.population, self.points, self.generator, compat=self.recipe.compat)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        points = points[rank::processes].to(self.device)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            prediction = self.module(points)
        loss = weighted_loss(prediction.float(), self.target.index_select(1, points), self.weight)
        if processes > 1:
            # gradients are averaged over processes, whose numbers of points may differ by one
            loss = loss * (len(points) * processes / self.points)
        loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1
        return loss.detach()

    def _is_interrupted(self) -> bool:
        """Return whether any process received Ctrl-C, so that all stop after the same step."""
        if self.accelerator.num_processes == 1:
            return self.interrupted
        flags = self.accelerator.gather(torch.tensor([int(self.interrupted)], device=self.device))
        return bool(flags.any())

    def _mean(self, loss: Tensor) -> float:
        """Return the loss over all processes. Raises FloatingPointError unless it is finite."""
        value = float(self.accelerator.gather(loss.reshape(1)).mean())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss of step {self.step} is {value}; the last good checkpoint is {self.folder.latest()}"
            )
        return value

    def _decode(self) -> np.ndarray:
        rounding: Rounding = "truncate" if self.recipe.compat == "official" else "nearest"
        return decode(self.model, self.side_info, batch_size=self.recipe.eval_batch_size, rounding=rounding)

    def _evaluate(self, label: int, loss: float) -> float:
        """Log PSNR and SSIM, save the weights if they are the best so far, and return the PSNR."""
        decoded = self._decode()
        entry = {
            "step": self.step,
            "epoch": label,
            "loss": loss,
            "psnr": psnr(self.original, decoded, data_range=self.data_range),
            "ssim": ssim(self.original, decoded, data_range=self.data_range, channel_axis=-1),
        }
        if entry["psnr"] > self.best:
            self.best = entry["psnr"]
            save_official(self.folder.path / "best", self.model, self.recipe, side_info=self.side_info, overwrite=True)
        self.folder.append(entry)
        return entry["psnr"]

    def _save(self) -> None:
        state = {
            "step": self.step,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
        }
        partial = self.folder.begin(f"{self.step:010d}")
        torch.save(state, partial / "state.pt")
        self.folder.publish(partial, keep=2)

    def _load(self, checkpoint: Path) -> None:
        state: Mapping[str, Any] = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])
        self.step, self.best = state["step"], state["best"]

    def result(self) -> TrainResult:
        """Write the last weights, and return their quality."""
        last = self.folder.path / "last"
        if self.is_main:
            save_official(last, self.model, self.recipe, side_info=self.side_info, overwrite=True)
        self.accelerator.wait_for_everyone()
        num_bytes = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
        decoded = self._decode()
        parameters, history = self.model.plan.num_parameters, self.folder.history()
        return TrainResult(
            psnr=psnr(self.original, decoded, data_range=self.data_range),
            psnr_values=psnr(self.original, decoded, data_range="values"),
            ssim=ssim(self.original, decoded, data_range=self.data_range, channel_axis=-1),
            best_psnr=max(entry["psnr"] for entry in history),
            parameters=parameters,
            ratio=self.origin_bytes / (4 * parameters),
            folder_ratio=self.origin_bytes / num_bytes,
            last=last,
            best=self.folder.path / "best",
            history=history,
        )
