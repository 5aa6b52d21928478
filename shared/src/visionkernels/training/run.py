"""A training run: its state, one step of it, and how it is saved and taken up again."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from accelerate import DistributedType  # type: ignore[import-untyped]
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from visionkernels.checks import InputError
from visionkernels.recipes import FitRecipe
from visionkernels.training.batches import EVALUATION, STEP, BatchPlan, TrainingData, seed_generators
from visionkernels.training.compiled import name_as_uncompiled
from visionkernels.training.folder import RunFolder, describe_run
from visionkernels.training.means import RunningMeans, share
from visionkernels.training.optimization import LearningRate, create_optimizer
from visionkernels.training.process import catch_interrupt, create_accelerator
from visionkernels.training.result import FitResult
from visionkernels.training.task import Task
from visionkernels.weights.trained import Trained, save_weights

__all__ = ["Run"]

# Updates between looks at the loss, by device; on accelerators, each look waits for the device.
CHECK_EVERY_UPDATES = {"cpu": 1}
CHECK_EVERY_UPDATES_ELSEWHERE = 50


class Run:
    """The state of a run. `update` counts optimiser updates since the start, `epoch` finished epochs."""

    epoch = 0
    update = 0
    best: float | None = None
    entry: dict[str, float] | None = None
    """The log's line of an epoch that ended, until it is measured and logged."""

    def __init__(
        self,
        task: Task,
        recipe: FitRecipe,
        data: TrainingData,
        folder: RunFolder,
        trained: Trained,
    ) -> None:
        if not isinstance(task, Task):
            raise TypeError(f"task is a {type(task).__name__}; expected a visionkernels.training.task.Task")
        self.task, self.recipe, self.data, self.folder, self.trained = task, recipe, data, folder, trained
        self.accelerator = create_accelerator(recipe, folder.path)
        self.plan = BatchPlan(
            data,
            batch_size=recipe.batch_size,
            accumulation_steps=recipe.accumulation_steps,
            seed=recipe.seed,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        per_epoch = self.plan.updates_per_epoch
        self.total_updates = recipe.updates or (recipe.epochs or 0) * per_epoch
        self.num_epochs = math.ceil(self.total_updates / per_epoch)
        self.micro_step = 0  # of the running epoch
        self.means = RunningMeans()  # of the epoch's losses
        self.first_bad = torch.tensor(-1, device=self.accelerator.device)  # micro-step of a loss that is not finite
        self.interrupted = False
        self.description = describe_run(
            asdict(recipe),
            trained,
            samples_per_epoch=self.plan.num_samples,
            device=str(self.accelerator.device),
            processes=self.accelerator.num_processes,
        )

    def _prepare(self) -> None:
        module = self.task.get_trainable_module()
        if module is None or module is self.task:
            raise TypeError(f"{type(self.task).__name__} must have trainable_module, which owns all trained parameters")
        owned = set(map(id, module.parameters()))
        untrained = [
            name for name, value in self.task.named_parameters() if value.requires_grad and id(value) not in owned
        ]
        if untrained:
            raise TypeError(
                f"trainable parameters of {type(self.task).__name__} outside trainable_module would not be trained: "
                f"{', '.join(untrained)}; move them into it, or freeze them with requires_grad_(False)"
            )
        optimizer = create_optimizer(module, self.recipe.optimizer)
        self.module, self.optimizer = self.accelerator.prepare(module, optimizer)
        name_as_uncompiled(self.module)
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
    @contextmanager
    def open(cls, task: Task, recipe: FitRecipe, data: TrainingData, path: Path, trained: Trained) -> Iterator["Run"]:
        """Start a run in the folder `path`, or take up the one that it holds."""
        run = cls(task, recipe, data, RunFolder(path), trained)
        is_main = run.accelerator.is_main_process
        with run.folder.lock() if is_main else nullcontext():
            is_new = run.folder.claim(run.description) if is_main else False
            run.accelerator.wait_for_everyone()
            run._prepare()
            try:
                run._take_up(is_new)
                with catch_interrupt(run._interrupt):
                    yield run
            finally:
                for tracker in run.accelerator.trackers:
                    tracker.finish()
                task.trainable_module = run.accelerator.unwrap_model(run.module, keep_fp32_wrapper=False)

    def _take_up(self, is_new: bool) -> None:
        if checkpoint := self.folder.latest():
            self._load(checkpoint)
        if self.accelerator.is_main_process:
            self.folder.cut_history(self.epoch)
            if not is_new and self.update < self.total_updates:
                self.folder.note_resumption(self.description)
        self.accelerator.wait_for_everyone()
        history = self.folder.history(least=self.epoch - (self.entry is not None))
        if len(history) == self.epoch:
            self.entry = None
        for entry in history:  # which also tells the best so far
            self._is_best(entry)
        if self.recipe.trackers:
            recipe = json.dumps(self.description["recipe"])
            self.accelerator.init_trackers(self.folder.path.name, {"recipe": recipe})

    def _interrupt(self) -> None:
        self.interrupted = True

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
        if self.micro_step % self.recipe.accumulation_steps == 0:
            self.task.begin_update(self.update, self.total_updates)
        if self.data.batch_transform is not None:
            batch = self.data.batch_transform(batch)
        with accelerator.accumulate(self.module):
            with accelerator.autocast():
                losses = _call(self.task, batch)
            accelerator.backward(losses["loss"])
            self.means.add(losses)
            is_bad = ~torch.isfinite(losses["loss"].detach()) & (self.first_bad < 0)
            self.first_bad = torch.where(is_bad, self.micro_step, self.first_bad)
            if accelerator.sync_gradients and self.recipe.optimizer.clip_norm is not None:
                accelerator.clip_grad_norm_(self.module.parameters(), self.recipe.optimizer.clip_norm)
            self.learning_rate.set(self.update)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.micro_step += 1
        if accelerator.sync_gradients:
            self._finish_update()

    def _finish_update(self) -> None:
        self.update += 1
        self.progress.update()
        if self.ema is not None:
            self.ema.update(self.accelerator.unwrap_model(self.module))
        check_every = CHECK_EVERY_UPDATES.get(self.accelerator.device.type, CHECK_EVERY_UPDATES_ELSEWHERE)
        save_every = self.recipe.save_every_updates
        saves = save_every is not None and self.update % save_every == 0
        alone = self.accelerator.num_processes == 1
        if saves or self.update % check_every == 0 or (alone and self.interrupted):
            self._check()
        if saves:
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
                f"rerun the same command to resume from {self.folder.path}"
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
        """Close the epoch and save."""
        self._check()
        self.epoch += 1
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        self.entry = {"epoch": self.epoch, "update": self.update, "lr": lr, **self.means.means()}
        self.means = RunningMeans()
        if self.epoch % self.recipe.save_every_epochs == 0 or self.epoch == self.num_epochs:
            self.save()

    def report(self) -> None:
        """Measure and log the epoch that ended, after it is saved: measuring can take long."""
        if self.entry is None:
            return
        entry, self.entry = self.entry, None
        if self.epoch % self.recipe.evaluate_every_epochs == 0 or self.epoch == self.num_epochs:
            entry |= self._evaluate()
            self._keep_best(entry)
        if self.accelerator.is_main_process:
            self.folder.append(entry)
        self.accelerator.log(entry, step=self.update)

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
        if name is not None and name not in entry:
            raise InputError(f"best_metric={name!r} must be one of {', '.join(entry)}")
        if self._is_best(entry):
            self._write_weights("best.safetensors", averaged=str(name).startswith("ema_"))

    def _is_best(self, entry: Mapping[str, float]) -> bool:
        """Whether no entry before was better; this one counts from now on."""
        value = entry.get(self.recipe.best_metric or "", math.nan)
        sign = 1 if self.recipe.best == "max" else -1
        is_best = math.isfinite(value) and (self.best is None or sign * value > sign * self.best)
        if is_best:
            self.best = value
        return is_best

    def save(self) -> None:
        """Write a checkpoint from which the run goes on exactly here; the loss has been checked."""
        name = f"epoch-{self.epoch:05d}-update-{self.update:09d}"
        if (self.folder.checkpoints / name).exists():
            return
        accelerator = self.accelerator
        progress = {
            "epoch": self.epoch,
            "update": self.update,
            "entry": self.entry,
            "totals": self.means.of_processes(),
            "buffers": self._own_buffers(),
            "task": self.task.get_task_state(),
        }
        if accelerator.is_main_process:
            self.folder.begin(name)
        accelerator.wait_for_everyone()
        partial_folder = self.folder.checkpoints / f".{name}"
        accelerator.save_state(str(partial_folder))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if self.ema is not None:
                save_weights(partial_folder / "ema.safetensors", self.ema.module.state_dict(), metadata={})
            # a process's own name of a device, as cpu:0, means nothing to the one that resumes
            on_cpu = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), progress)
            torch.save(on_cpu, partial_folder / "progress.pt")
            self.folder.publish(partial_folder, keep=self.recipe.keep_checkpoints)
        accelerator.wait_for_everyone()

    def _own_buffers(self) -> dict[str, Tensor]:
        """The buffers of the task outside its module, by name."""
        of_module = set(map(id, self.module.buffers()))
        return {name: value for name, value in self.task.named_buffers() if id(value) not in of_module}

    def _load(self, checkpoint: Path) -> None:
        if self.accelerator.is_main_process:
            self.folder.verify(checkpoint)
        try:
            self.accelerator.load_state(str(checkpoint))
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            first = str(error).splitlines()[1].strip()
            raise InputError(f"{self.folder.path} holds a run of another model: {first}") from error
        if self.ema is not None:
            self.ema.module.load_state_dict(safetensors.torch.load_file(checkpoint / "ema.safetensors"))
        device = self.accelerator.device
        progress = torch.load(checkpoint / "progress.pt", map_location=_on_cpu, weights_only=True)
        progress = tree_map_only(Tensor, lambda tensor: tensor.to(device), progress)
        self.epoch, self.update, self.entry = progress["epoch"], progress["update"], progress["entry"]
        own = share(progress["totals"], self.accelerator.process_index, self.accelerator.num_processes)
        self.means = RunningMeans(own, device=device)
        for name, value in progress["buffers"].items():
            owner, _, buffer = name.rpartition(".")
            setattr(self.task.get_submodule(owner), buffer, value)
        self.task.load_task_state(progress["task"])

    def result(self) -> FitResult:
        """Write the final weights, unless they are there, and return what the run came to."""
        files = {"weights.safetensors": False, **({} if self.ema is None else {"ema.safetensors": True})}
        for name, averaged in files.items():
            if _update_of(self.folder.path / name) != self.update:
                self._write_weights(name, averaged=averaged)
        self.accelerator.wait_for_everyone()
        history = self.folder.history()
        weights, averaged_weights = (self.folder.path / name for name in ("weights.safetensors", "ema.safetensors"))
        return FitResult(history[-1], history, weights, None if self.ema is None else averaged_weights)

    def _write_weights(self, name: str, *, averaged: bool) -> None:
        if averaged and self.ema is not None:
            state = self.ema.module.state_dict()
        else:
            state = self.accelerator.get_state_dict(self.module)  # a collective call where weights are sharded
        if self.accelerator.is_main_process:
            finished = replace(
                self.trained,
                fit=self.description["recipe"],
                versions=self.description["versions"],
                update=self.update,
            )
            finished.save(self.folder.path / name, self.task.final_state(state), overwrite=True)

    def _create_ema(self) -> ModelEmaV3 | None:
        if self.recipe.ema_decay is None:
            return None
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise InputError("ema_decay needs whole weights in every process; FSDP shards them, so set ema_decay=None")
        ema = ModelEmaV3(self.accelerator.unwrap_model(self.module), decay=self.recipe.ema_decay)
        name_as_uncompiled(ema)
        return ema


def _on_cpu(storage: Any, location: str) -> Any:
    return storage


def _update_of(weights: Path) -> int | None:
    """The update after which a file of weights was written; None where there is none."""
    if not weights.exists():
        return None
    with safetensors.safe_open(weights, "pt") as file:
        update: int | None = json.loads(file.metadata()["trained"])["update"]
    return update


def _call(task: Task, batch: Any) -> dict[str, Any]:
    losses: dict[str, Any]
    if isinstance(batch, Mapping):
        losses = task(**batch)
    else:
        losses = task(*batch) if isinstance(batch, tuple | list) else task(batch)
    return losses
