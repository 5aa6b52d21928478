"""A training run: its state, one step of it, and how it is saved and taken up again."""

import json
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator, DistributedType  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from timm.task import TrainingTask
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]
from torch import Tensor, nn
from tqdm import tqdm

from visionkernels.checkpoints import save_weights
from visionkernels.extras import require
from visionkernels.files import write_json
from visionkernels.training.batches import EVALUATION, STEP, BatchPlan, TrainingData, seed_generators
from visionkernels.training.folder import RunFolder, describe_run
from visionkernels.training.loop import FitResult
from visionkernels.training.optimization import LearningRate, create_optimizer
from visionkernels.training.recipes import FitRecipe

__all__ = ["Run"]

_log = logging.getLogger(__name__)

# Updates between looks at the loss on an accelerator, where each look waits for the device.
CHECK_EVERY_UPDATES = 50


class Run:
    """The state of a run. `update` counts optimiser updates since the start, `epoch` finished epochs."""

    epoch = 0
    update = 0
    best: float | None = None

    def __init__(
        self,
        task: TrainingTask,
        recipe: FitRecipe,
        data: TrainingData,
        folder: RunFolder,
        details: Mapping[str, Any],
    ) -> None:
        self.task, self.recipe, self.data, self.folder = task, recipe, data, folder
        self.accelerator = _create_accelerator(recipe, folder.path)
        self.plan = BatchPlan(
            data,
            batch_size=recipe.batch_size,
            accumulation_steps=recipe.accumulation_steps,
            seed=recipe.seed,
            rank=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        per_epoch = self.plan.updates_per_epoch
        self.total_updates = recipe.updates or (recipe.epochs or 0) * per_epoch
        self.num_epochs = math.ceil(self.total_updates / per_epoch)
        self.micro_step = 0  # of the running epoch
        self.sums: dict[str, Tensor] = {}  # of the epoch's losses
        self.first_bad = torch.tensor(-1, device=self.accelerator.device)  # micro-step of a loss that is not finite
        self.interrupted = False
        self.description = describe_run(
            asdict(recipe),
            details,
            samples_per_epoch=self.plan.samples,
            device=str(self.accelerator.device),
            processes=self.accelerator.num_processes,
        )

    def _prepare(self) -> None:
        module = self.task.get_trainable_module()
        if module is None or module is self.task:
            raise TypeError(f"{type(self.task).__name__} must have trainable_module, which owns all trained parameters")
        optimizer = create_optimizer(module, self.recipe.optimizer)
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.task.trainable_module = self.module
        self.task.to(self.accelerator.device)
        self.learning_rate = LearningRate(
            self.optimizer,
            self.recipe.schedule,
            updates_per_epoch=self.plan.updates_per_epoch,
            total_updates=self.total_updates,
        )
        self.ema = self._create_ema()

    @classmethod
    def open(
        cls, task: TrainingTask, recipe: FitRecipe, data: TrainingData, path: Path, details: Mapping[str, Any]
    ) -> "Run":
        """Start a run in the folder `path`, or take up the one that it holds."""
        run = cls(task, recipe, data, RunFolder(path), details)
        if run.accelerator.is_main_process:
            run.folder.claim(run.description)
        run.accelerator.wait_for_everyone()
        run._prepare()
        if checkpoint := run.folder.latest():
            run._load(checkpoint)
        if recipe.trackers:
            run.accelerator.init_trackers(path.name, {"recipe": json.dumps(run.description["recipe"])})
        return run

    def __enter__(self) -> "Run":
        self._old_handler: Any = None
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._old_handler is not None:
            signal.signal(signal.SIGINT, self._old_handler)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.task.trainable_module = self.accelerator.unwrap_model(self.module, keep_fp32_wrapper=False)

    def _interrupt(self, *signal_and_frame: object) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, self._old_handler)  # a second Ctrl-C stops at once

    def batches(self, epoch: int) -> Iterator[Any]:
        """Yield the rest of the epoch's micro-batches for this process, on its device."""
        self.module.train()
        if self.recipe.norm_eval:
            for part in self.module.modules():
                if isinstance(part, nn.modules.batchnorm._BatchNorm):
                    part.eval()
        done = self.update - epoch * self.plan.updates_per_epoch
        left = min(self.plan.updates_per_epoch - done, self.total_updates - self.update)
        device = self.accelerator.device
        loader = self.plan.loader(epoch, done, workers=self.recipe.num_workers, pin_memory=device.type == "cuda")
        self.micro_step = done * self.recipe.accumulation_steps
        with tqdm(
            desc=f"epoch {epoch + 1}/{self.num_epochs}",
            total=done + left,
            initial=done,
            unit="update",
            disable=None if self.accelerator.is_main_process else True,
        ) as self.progress:
            for batch in islice(loader, left * self.recipe.accumulation_steps):
                yield send_to_device(batch, device, non_blocking=True)

    def step(self, batch: Any) -> None:
        """Train on one micro-batch; the last one of an update moves the weights."""
        accelerator = self.accelerator
        seed_generators(self.recipe.seed, STEP, self.update, self.micro_step, accelerator.process_index)
        if self.data.batch_transform is not None:
            batch = self.data.batch_transform(batch)
        with accelerator.accumulate(self.module):
            with accelerator.autocast():
                losses = _call(self.task, batch)
            accelerator.backward(losses["loss"])
            self._add(losses)
            if accelerator.sync_gradients and self.recipe.optimizer.clip_norm is not None:
                accelerator.clip_grad_norm_(self.module.parameters(), self.recipe.optimizer.clip_norm)
            self.learning_rate.set(self.update)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.micro_step += 1
        if accelerator.sync_gradients:
            self._finish_update()

    def _add(self, losses: Mapping[str, Any]) -> None:
        for name, value in losses.items():
            if isinstance(value, Tensor) and value.ndim == 0:
                value = value.detach().float()
                self.sums[name] = self.sums[name] + value if name in self.sums else value
        is_bad = ~torch.isfinite(losses["loss"].detach()) & (self.first_bad < 0)
        self.first_bad = torch.where(is_bad, self.micro_step, self.first_bad)

    def _finish_update(self) -> None:
        self.update += 1
        self.progress.update()
        if self.ema is not None:
            self.ema.update(self.accelerator.unwrap_model(self.module))
        on_cpu = self.accelerator.device.type == "cpu"
        alone = self.accelerator.num_processes == 1
        if on_cpu or self.update % CHECK_EVERY_UPDATES == 0 or (alone and self.interrupted):
            self._check()
        every = self.recipe.save_every_updates
        if every is not None and self.update % every == 0:
            self.save()

    def _check(self) -> None:
        """Stop, all processes together, on a loss that is not finite or on Ctrl-C."""
        status = torch.stack([self.first_bad, torch.tensor(int(self.interrupted), device=self.first_bad.device)])
        status = self.accelerator.gather(status[None]).tolist()
        for rank, (micro_step, _) in enumerate(status):
            if micro_step >= 0:
                self._stop_on_bad_loss(micro_step, rank)
        if any(interrupted for _, interrupted in status):
            self.save()
            raise KeyboardInterrupt(
                f"stopped and saved after update {self.update} of {self.total_updates}; "
                f"the same command goes on from {self.folder.path}"
            )

    def _stop_on_bad_loss(self, micro_step: int, rank: int) -> None:
        update = self.epoch * self.plan.updates_per_epoch + micro_step // self.recipe.accumulation_steps
        order = self.plan.order(self.epoch)
        samples = [int(order[position]) for position in self.plan.positions(micro_step, rank)]
        raise FloatingPointError(
            f"the loss is not finite at update {update} (epoch {self.epoch + 1}), samples {samples}; "
            f"the last good checkpoint is {self.folder.latest() or 'none yet'}"
        )

    def finish_epoch(self) -> None:
        """Measure, log and save."""
        self._check()
        self.epoch += 1
        entry: dict[str, float] = {
            "epoch": self.epoch,
            "update": self.update,
            "lr": max(group["lr"] for group in self.optimizer.param_groups),
            **{
                name: self.accelerator.reduce(total, "mean").item() / self.micro_step
                for name, total in self.sums.items()
            },
        }
        self.sums = {}
        if self.epoch % self.recipe.evaluate_every_epochs == 0 or self.epoch == self.num_epochs:
            entry |= self._evaluate()
            self._keep_best(entry)
        if self.accelerator.is_main_process:
            earlier = [line for line in self.folder.history() if line["epoch"] < self.epoch]
            self.folder.write_history([*earlier, entry])
        self.accelerator.log(entry, step=self.update)
        self.save()

    def _evaluate(self) -> dict[str, float]:
        if self.data.evaluate is None:
            return {}
        metrics: dict[str, float] = {}
        is_sharded = self.accelerator.distributed_type == DistributedType.FSDP
        model = self.module if is_sharded else self.accelerator.unwrap_model(self.module)
        averaged = {} if self.ema is None else {"ema_": self.ema.module}
        for prefix, candidate in {"": model, **averaged}.items():
            seed_generators(self.recipe.seed, EVALUATION, self.update)
            candidate.eval()
            with torch.no_grad():
                measured = self.data.evaluate(candidate)
            metrics |= {prefix + name: float(value) for name, value in measured.items()}
        return metrics

    def _keep_best(self, entry: Mapping[str, float]) -> None:
        name = self.recipe.best_metric
        if name is None:
            return
        if name not in entry:
            raise ValueError(f"best_metric={name!r} must be one of {', '.join(entry)}")
        sign = 1 if self.recipe.best == "max" else -1
        if self.best is None or sign * entry[name] > sign * self.best:
            self.best = entry[name]
            self._write_weights("best.safetensors", averaged=name.startswith("ema_"))

    def save(self) -> None:
        """Write a checkpoint from which the run goes on exactly here."""
        name = f"epoch-{self.epoch:05d}-update-{self.update:09d}"
        if (self.folder.checkpoints / name).exists():
            return
        accelerator = self.accelerator
        sums = {key: accelerator.reduce(total, "sum").item() for key, total in self.sums.items()}
        if accelerator.is_main_process:
            self.folder.begin(name)
        accelerator.wait_for_everyone()
        partial_folder = self.folder.checkpoints / f".{name}"
        accelerator.save_state(str(partial_folder))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if self.ema is not None:
                save_weights(partial_folder / "ema.safetensors", self.ema.module.state_dict(), metadata={})
            progress = {"epoch": self.epoch, "update": self.update, "best": self.best, "sums": sums}
            write_json(partial_folder / "progress.json", progress)
            self.folder.publish(partial_folder, keep=self.recipe.keep_checkpoints)
        accelerator.wait_for_everyone()

    def _load(self, checkpoint: Path) -> None:
        self.accelerator.load_state(str(checkpoint))
        if self.ema is not None:
            self.ema.module.load_state_dict(safetensors.torch.load_file(checkpoint / "ema.safetensors"))
        progress = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        self.epoch, self.update, self.best = progress["epoch"], progress["update"], progress["best"]
        share = 1.0 if self.accelerator.is_main_process else 0.0  # the sums are over all processes
        device = self.accelerator.device
        self.sums = {name: torch.tensor(share * total, device=device) for name, total in progress["sums"].items()}

    def result(self) -> FitResult:
        """Write the final weights and return what the run came to."""
        weights = self._write_weights("weights.safetensors", averaged=False)
        averaged = self._write_weights("ema.safetensors", averaged=True) if self.ema is not None else None
        self.accelerator.wait_for_everyone()
        history = self.folder.history()
        return FitResult(history[-1], history, weights, averaged)

    def _write_weights(self, name: str, *, averaged: bool) -> Path:
        path = self.folder.path / name
        if averaged and self.ema is not None:
            state = self.ema.module.state_dict()
        else:
            state = self.accelerator.get_state_dict(self.module)  # a collective call where weights are sharded
        if self.accelerator.is_main_process:
            details = {key: str(value) for key, value in self.description["details"].items()}
            metadata = {**details, "update": str(self.update), "recipe": json.dumps(self.description["recipe"])}
            save_weights(path, state, metadata=metadata, overwrite=True)
        return path

    def _create_ema(self) -> ModelEmaV3 | None:
        if self.recipe.ema_decay is None:
            return None
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("ema_decay needs whole weights in every process; FSDP shards them, so set ema_decay=None")
        return ModelEmaV3(self.accelerator.unwrap_model(self.module), decay=self.recipe.ema_decay)


def _create_accelerator(recipe: FitRecipe, project: Path) -> Accelerator:
    for tracker in recipe.trackers:
        require(tracker, tracker)
    environment = os.environ
    on_cpu = environment.get("ACCELERATE_USE_CPU") == "True"
    if on_cpu and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        _log.warning("`accelerate launch --cpu` starts one process on one machine; for more use torchrun")
    # a second fit in one process may ask for another precision or device
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    return Accelerator(
        cpu=recipe.device == "cpu",
        mixed_precision=recipe.precision,
        gradient_accumulation_steps=recipe.accumulation_steps,
        log_with=list(recipe.trackers) or None,
        project_dir=project,
    )


def _call(task: TrainingTask, batch: Any) -> dict[str, Any]:
    losses: dict[str, Any]
    if isinstance(batch, Mapping):
        losses = task(**batch)
    else:
        losses = task(*batch) if isinstance(batch, tuple | list) else task(batch)
    return losses
