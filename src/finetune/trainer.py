"""The only training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from finetune import sample, tracking
from finetune.autoguidance import load_guide
from finetune.batching import Batch, first_batch, make_loader
from finetune.conditioning import build_conditioner
from finetune.config import TrainConfig
from finetune.config_launch import batch_plan
from finetune.data import open_data
from finetune.ema import Ema, drop_snapshots_after
from finetune.errors import CheckpointError, NonFiniteError, surviving
from finetune.identity import run_settings
from finetune.meter import Meter
from finetune.models import bind, build_unet
from finetune.objective import LossTerms, Objective, build_objective
from finetune.optimization import build_optimizer, learning_rate
from finetune.pipelines import build_pipeline
from finetune.processes import build_accelerator, over_processes, set_kernels
from finetune.provenance import run_facts, write_run_files
from finetune.resume import Resumed, RunFacts, find_checkpoint
from finetune.saving import Saver, nonfinite
from finetune.seeding import PositionRandom, key
from finetune.signals import StopSignals, preempted
from finetune.space import build_space
from finetune.training_state import TrainingState, parameter_names

if TYPE_CHECKING:
    from datasets import Dataset
    from diffusers import DiffusionPipeline
    from torch.utils.data import DataLoader

log = logging.getLogger(__name__)


class Trainer:
    """Trains the UNet that a TrainConfig describes.

    What changes meanwhile is its `state`; everything else is a function of that and the configuration.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        *,
        dataset: Dataset | None = None,
        objective: Objective | None = None,
        trust: Collection[str] = (),
    ) -> None:
        """Load data and models and resume if `cfg.output_dir` holds checkpoints.

        dataset: an in-memory data set used instead of the one cfg.data names. objective: used instead of
        cfg.objective's. trust: the packages whose code cfg.objective may name. Raises ConfigError, DataError or
        CheckpointError before anything is trained.
        """
        self.cfg = cfg
        self.output_dir = Path(cfg.output_dir)
        self.accelerator = build_accelerator(cfg)
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        set_kernels(cfg.train)
        self.global_batch, self.accumulation, self.micro_batch = batch_plan(cfg, self.accelerator.num_processes)

        with self.accelerator.local_main_process_first():  # its check of the data is cached for the others
            self.data = open_data(cfg, dataset=dataset)
        self.steps = cfg.train.max_train_steps or math.ceil(
            cfg.train.num_train_epochs * len(self.data) / self.global_batch
        )
        device = self.accelerator.device
        self.space = build_space(cfg, device)
        self.conditioner = build_conditioner(cfg, self.data.class_names, device)
        clip = cfg.space.kind == "pixel"
        self.objective = objective or build_objective(
            cfg.objective, clip_sample=clip, global_batch=self.global_batch, trust=trust
        )
        self.objective.to(device)
        self.unet = build_unet(cfg, self.space, self.conditioner, seed=cfg.seed).to(device)
        weaker = cfg.sample.autoguidance
        self.guide = None if weaker is None else load_guide(weaker, self.unet, self.objective.scheduler)
        if cfg.train.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if cfg.train.channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if cfg.train.compile:
            self.unet.compile()  # in place: the names of the weights stay
        self.has_dropout = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in self.unet.modules())

        self.parameters = {name: p for name, p in self.unet.named_parameters() if p.requires_grad}
        self.trained = list(parameter_names(self.unet, self.objective))
        optimizer = build_optimizer(cfg.optimizer, self.trained)
        self.learning_rate = learning_rate(cfg.optimizer, self.steps)
        self.ema = Ema(self.parameters, cfg.ema) if cfg.ema.use_ema else None
        self.network, self.optimizer = self.accelerator.prepare(self.unet, optimizer)
        scaler = self.accelerator.scaler
        self.state = TrainingState(self.unet, optimizer, self.objective, ema=self.ema, scaler=scaler)
        self.saver = Saver(self.output_dir, cfg.checkpoint)
        self.resumed = self._resume()

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    # -- the loop ------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the last step; then a checkpoint and the samples of the finished weights are on the disk.

        Raises Preempted after a signal, NonFiniteError after max_nonfinite_steps bad steps in a row.
        """
        cfg, tracker = self.cfg, tracking.Tracker(self.accelerator, self.cfg, resumed_step=self.step)
        self.pipeline()  # refuses now what could not be sampled at the end
        if self.accelerator.is_main_process:
            write_run_files(cfg, data=self.data.facts, data_fingerprint=self.data.fingerprint)
            drop_snapshots_after(self.output_dir / "ema_snapshots", self.step)
            self.saver.tidy()
        meter = Meter(self.accelerator, self.objective)
        how = "the same command" + " without resume_from_checkpoint" * (cfg.resume_from_checkpoint != "latest")
        with StopSignals() as signals, self._progress() as bar, contextlib.closing(tracker), ExitStack() as closing:
            closing.callback(self.saver.wait)  # an error must not cut short the checkpoint that is being written
            loader = iter(self._loader())
            # Loader processes that are left to the interpreter's end keep it waiting after an error in one of them.
            closing.callback(getattr(loader, "_shutdown_workers", lambda: None))
            batches = meter.waiting(loader)
            if self.step == self.steps:  # stopped between the last checkpoint and its samples
                self.sample()
            while self.step < self.steps:
                taken = self.train_step(batches, meter)
                bar.update(self.step - bar.n)
                if taken and tracking.due(self.step, cfg.tracking.log_every, self.steps):
                    tracker.log(self._log_line(meter, bar), step=self.step)
                if number := over_processes(self.accelerator, signals.received):
                    self.save(required=True)
                    raise preempted(number, self.step, how=how)
                if taken and cfg.ema.snapshot_every and tracking.due(self.step, cfg.ema.snapshot_every, self.steps):
                    self.snapshot()  # before the checkpoint: what is resumed from has all that came before it
                if taken and tracking.due(self.step, cfg.checkpoint.checkpointing_steps, self.steps):
                    self.save(required=self.step == self.steps)
                if taken and tracking.due(self.step, cfg.sample.sample_every, self.steps):
                    self.sample()
            if number := over_processes(self.accelerator, signals.received):  # while the last samples were drawn
                raise preempted(number, self.step, how=how)

    def train_step(self, batches: Iterator[Batch], meter: Meter) -> bool:
        """One optimizer step over a global batch. Returns whether it was taken; if not, only counters changed."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        rows, taken_in = [], []
        for micro in range(self.accumulation):
            batch = next(batches)
            rows += batch.rows.tolist()
            last = micro == self.accumulation - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.network):
                terms = self._loss(batch, micro)
                self.accelerator.backward((terms.per_sample * terms.weight).mean() / self.accumulation)
            meter.add(terms)
            taken_in.append(terms)
        self.state.batches += 1
        for parameter in self.objective.parameters().values():  # DDP averages those of the network only
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")
        # DDP has averaged the gradients, so this norm, and with it the decision, is the same on every process.
        max_norm = self.cfg.train.max_grad_norm or math.inf
        grad_norm = float(self.accelerator.clip_grad_norm_(self.trained, max_norm))
        if math.isfinite(grad_norm) or self.accelerator.scaler:  # fp16's scaler skips by itself, and lowers its scale
            self.optimizer.step()
        self.optimizer.zero_grad()
        if not math.isfinite(grad_norm):
            self._skipped(meter, rows, grad_norm)
            return False
        self.state.step += 1
        self.state.nonfinite_in_a_row = 0
        meter.commit(grad_norm)
        for terms in taken_in:
            self.objective.update(terms, self.accelerator.gather)
        if self.ema:
            self.ema.step()
        return True

    def _loss(self, batch: Batch, micro: int) -> LossTerms:
        random = PositionRandom(self.cfg.seed, batch.positions, self.accelerator.device)
        x0 = self.space.encode(batch.pixel_values.to(self.accelerator.device, non_blocking=True), random)
        condition = self.conditioner(batch, random)
        if self.has_dropout:  # the one draw that torch makes for itself: keyed by batch, micro-step and process
            torch.manual_seed(key(self.cfg.seed, "dropout", self.state.batches, micro, self.accelerator.process_index))
        return self.objective.loss(bind(self.network, condition), x0, random)

    def _skipped(self, meter: Meter, rows: list[int], grad_norm: float) -> None:
        """Count a step that was not taken. With fp16, an overflow is routine until the loss scale is down to 1."""
        loss_was_finite = not over_processes(self.accelerator, not meter.discard())
        if loss_was_finite and self.accelerator.scaler and self.accelerator.scaler.get_scale() >= 1:
            return
        self.state.nonfinite_steps += 1
        self.state.nonfinite_in_a_row += 1
        log.warning(
            "step %d skipped on all processes: %s, gradient norm %s, rows of this process %s; %d in a row",
            self.step,
            "finite loss" if loss_was_finite else "non-finite loss",
            grad_norm,
            rows[:16],
            self.state.nonfinite_in_a_row,
        )
        if self.state.nonfinite_in_a_row >= self.cfg.train.max_nonfinite_steps:
            raise NonFiniteError(
                f"loss or gradient was NaN or infinite {self.state.nonfinite_in_a_row} times in a row at step "
                f"{self.step} (train.max_nonfinite_steps): lower optimizer.learning_rate, or use mixed_precision bf16 "
                f"or no. The last finite checkpoint is kept in {self.output_dir / 'checkpoints'}."
            )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self, *, required: bool) -> None:
        """Write a checkpoint of this moment, or begin to (main process; the others wait).

        Raises, on all processes alike, NonFiniteError if there is nothing finite to save, and CheckpointError if it
        cannot be written although it is required, or for the third time in a row.
        """
        self._refuse_nonfinite()
        failed = None
        if self.accelerator.is_main_process:
            try:
                self._write_checkpoint(required=required)
            except CheckpointError as error:
                failed = error
        if over_processes(self.accelerator, failed is not None):
            raise failed or CheckpointError("the main process could not write a checkpoint: its own message says why")

    def snapshot(self) -> None:
        """Keep the power-function averages of this moment in ema_snapshots/ (main process; nobody waits)."""
        self._refuse_nonfinite()
        if self.accelerator.is_main_process:
            self.ema.snapshot(self.output_dir / "ema_snapshots")

    def _write_checkpoint(self, *, required: bool) -> None:
        run = {
            "samples_seen": self.state.batches * self.global_batch,
            **dataclasses.asdict(self._run_facts()),
        }
        self.saver.save(self.state.parts(), self.state.facts() | run, required=required)

    def _refuse_nonfinite(self) -> None:
        """Of a finite loss and gradient the step may still be too large for float32."""
        parts = nonfinite(self.state.parts())
        if over_processes(self.accelerator, len(parts)):
            where = ", ".join(parts) or "the weights of another process"
            raise NonFiniteError(
                f"{where} held NaN or infinite values at step {self.step}: lower optimizer.learning_rate, or use "
                f"mixed_precision bf16 or no. The last finite checkpoint is kept in {self.output_dir / 'checkpoints'}."
            )

    def _run_facts(self) -> RunFacts:
        facts, train = run_facts(self.cfg), self.cfg.train
        split = {"accumulation": self.accumulation, "micro_batch": self.micro_batch}
        kernels = {name: getattr(train, name) for name in ("channels_last", "compile", "gradient_checkpointing")}
        return RunFacts(
            settings=run_settings(
                self.cfg,
                global_batch=self.global_batch,
                steps=self.steps,
                mixed_precision=self.accelerator.mixed_precision,
                fingerprint=self.data.fingerprint,
            ),
            machine=facts["versions"] | facts["environment"] | split | kernels,
        )

    def _resume(self) -> Resumed | None:
        """Take over the checkpoint that cfg.resume_from_checkpoint means, if there is one."""
        with self.accelerator.main_process_first():  # a broken one is renamed by the first that sees it
            resumed = find_checkpoint(self.cfg, self._run_facts(), steps=self.steps)
        if resumed is not None:
            self.state.load(resumed.found)
        return resumed

    # -- samples -------------------------------------------------------------------------------------------------------

    def pipeline(self) -> DiffusionPipeline:
        """The pipeline around the live modules (no copies). Inside `averaged_weights` it samples from the average."""
        parts = (self.unet, self.space, self.conditioner, self.objective.scheduler)
        return build_pipeline(*parts, self.cfg, guide=self.guide)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the UNet is in evaluation mode and holds the first average, if averages are kept."""
        self.unet.eval()
        try:
            with self.ema.swapped_in() if self.ema else contextlib.nullcontext():
                yield
        finally:
            self.unet.train()

    @torch.no_grad()
    def sample(self) -> None:
        """Draw samples/step-N.png (main process; the others wait). Touches no state of the training.

        One that cannot be written (OSError, such as a full disk) ends the run if it is the last, which is exported.
        """
        if self.accelerator.is_main_process:
            with self.averaged_weights(), self.accelerator.autocast():
                upscales = "low_res" in self.conditioner.parts
                shown = first_batch(self.data, self.cfg.sample.num_images) if upscales else None
                with surviving(f"samples at step {self.step}", required=self.step == self.steps):
                    sample.draw_grid(self.pipeline(), self.cfg, self.sample_path, shown)
        self.accelerator.wait_for_everyone()

    @property
    def sample_path(self) -> Path:
        """Where `sample` draws at this step."""
        return self.output_dir / "samples" / f"step-{self.step:08d}.png"

    # -- small parts ---------------------------------------------------------------------------------------------------

    def _loader(self) -> DataLoader:
        return make_loader(
            self.data,
            self.cfg,
            start=self.state.batches,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            accumulation=self.accumulation,
            micro_batch=self.micro_batch,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _progress(self) -> tqdm:
        hidden = not self.accelerator.is_local_main_process
        return tqdm(total=self.steps, initial=self.step, desc="train", unit="step", disable=hidden)

    def _log_line(self, meter: Meter, bar: tqdm) -> dict[str, Any]:
        line = {
            "epoch": self.state.batches * self.global_batch / len(self.data),
            "samples_seen": self.state.batches * self.global_batch,
            **meter.read(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "nonfinite_steps": self.state.nonfinite_steps,
            "peak_memory_mb": tracking.peak_memory_mb(self.accelerator),
        }
        bar.set_postfix(loss=f"{line['loss']:.4f}", lr=f"{line['lr']:.1e}", img_s=f"{line['images_per_second']:.1f}")
        return line
