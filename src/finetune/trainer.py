"""The only training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from finetune import tracking
from finetune.batching import Batch, make_loader, on_device
from finetune.caches import fill_caches
from finetune.class_images import with_class_images
from finetune.compilation import eager, tried_out
from finetune.config import TrainConfig
from finetune.config_launch import batch_plan
from finetune.data import open_data
from finetune.ema import Ema, drop_snapshots_after, refuse_unmoved
from finetune.errors import CheckpointError
from finetune.failures import MicroBatch, command_to_resume, losing_nothing, whereabouts
from finetune.foundation import resolve, with_prompts
from finetune.kohya_config import refuse_differences
from finetune.meter import Meter
from finetune.models import bind
from finetune.modules import build_modules
from finetune.objective import Objective
from finetune.optimization import build_optimizer, evaluation_weights, learning_rate, require_package
from finetune.pipelines import build_pipeline
from finetune.previews import draw_samples
from finetune.prior import make_class_images
from finetune.processes import build_accelerator, largest, set_kernels
from finetune.provenance import write_run_files
from finetune.resume import as_the_run_began, find_checkpoint, resume, run_facts_of
from finetune.samples import report_replaced
from finetune.saving import Saver, nonfinite, parts_of, refuse_nonfinite, write_checkpoint
from finetune.seeding import PositionRandom, key
from finetune.sharding import unsharded
from finetune.signals import SIGNALS, preempted
from finetune.stepping import Stepper
from finetune.text_conditions import with_token_facts
from finetune.training_state import TrainingState
from finetune.transfer import to_device
from finetune.validation import HeldOut
from finetune.watchdog import Watchdog, patiently

if TYPE_CHECKING:
    from datasets import Dataset
    from diffusers import DiffusionPipeline
    from torch import Tensor
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
        self.output_dir = Path(cfg.output_dir)
        self.accelerator = build_accelerator(cfg)
        with self.accelerator.local_main_process_first():  # a single file is unpacked by the first
            cfg = resolve(cfg)
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        set_kernels(cfg.train)
        require_package(cfg.optimizer)
        self.global_batch, self.accumulation, self.micro_batch = batch_plan(cfg, self.accelerator.num_processes)
        with self.accelerator.main_process_first():  # a broken one is renamed by the first that sees it
            found = find_checkpoint(cfg)
        with self.accelerator.local_main_process_first():  # its check of the data is cached for the others
            refuse_differences(cfg)
            data = open_data(cfg, dataset=dataset)
        make_class_images(cfg, self.accelerator, trust=trust)
        with self.accelerator.local_main_process_first():
            data = with_class_images(cfg, data)
        self.data = as_the_run_began(data, found, self.accelerator)
        self.cfg = cfg = with_prompts(cfg, self.data)
        self.replaced: set[int] = set()
        """Rows of which it was said that others stand in for them."""
        self.modules = build_modules(
            cfg, self.data, self.accelerator.device, global_batch=self.global_batch, objective=objective, trust=trust
        )
        data, texts = with_token_facts(self.data.in_buckets(self.modules.side_multiple), self.modules.conditioner)
        self.data, self.cached = fill_caches(cfg, data, self.modules, self.accelerator, texts)
        self.steps = cfg.train.max_train_steps or self.data.steps(
            cfg.train.num_train_epochs, global_batch=self.global_batch
        )
        refuse_unmoved(cfg.ema, self.steps)
        optimizer = build_optimizer(cfg.optimizer, self.modules.param_groups(cfg.optimizer))
        self.learning_rate = learning_rate(cfg.optimizer, self.steps)
        self.network, self.optimizer = self.accelerator.prepare(self.modules.unet, optimizer)
        self.parameters = self.modules.trained  # now: FSDP2 has put others in the place of those that it shards
        self.ema = Ema(self.modules.averaged, cfg.ema) if cfg.ema.use_ema else None
        self.state = TrainingState(self.modules, optimizer, ema=self.ema, scaler=self.accelerator.scaler)
        self.facts = run_facts_of(self)
        self.saver = Saver(self.output_dir, cfg.checkpoint)
        self.validation = None if self.data.held_out is None else HeldOut(self.data, cfg.validation)
        self.stop = 0
        """The signal that all processes have agreed to stop for."""
        self.whole = True
        """Whether the state is that after a step, and not half of the next."""
        self.stepper = Stepper(self)
        self.resumed = None if found is None else resume(self, found)
        self.compiled = tried_out(self, self._loss)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    # -- the loop ------------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the last step; then a checkpoint and the samples of the finished weights are on the disk.

        Raises Preempted after a signal, NonFiniteError after max_nonfinite_steps bad steps in a row.
        """
        cfg, resumed_step = self.cfg, self.step if self.resumed else -1  # a fresh start writes step 0 anew
        tracker = tracking.Tracker(self.accelerator, cfg, resumed_step=resumed_step)
        self.pipeline(hollow=True)  # refuses now what could not be sampled at the end
        if self.accelerator.is_main_process:
            write_run_files(cfg, data=self.data.facts, data_fingerprint=self.data.fingerprint)
            drop_snapshots_after(self.output_dir / "ema_snapshots", self.step)
            self.saver.tidy()
        meter, timeout = Meter(self.accelerator, self.modules.objective), 60 * cfg.train.timeout_minutes
        with (
            self.saver,
            Watchdog(timeout, lambda: whereabouts(self)) as watchdog,
            contextlib.closing(tracker),
            contextlib.closing(on_device(patiently(self.loader(), timeout), self.accelerator.device)) as loaded,
            self._progress() as bar,
        ):
            if self.validation and (self._due(cfg.validation.every) or self.validation.ends):
                self.validate(tracker)
            if cfg.sample.at_start if self.step == 0 else self._due(cfg.sample.sample_every):
                # a step after the first: the run was stopped between this checkpoint and its samples
                self.sample(again=self.step == self.steps)
            batches = meter.waiting(loaded)
            if self.step < self.steps:  # the first batch takes long, and while it does there is nothing to be saved
                batches = itertools.chain([next(batches)], batches)
            with SIGNALS.noting(), losing_nothing(self):
                while self.step < self.steps and not self.stop:
                    with watchdog.step():
                        taken = self.train_step(batches, meter)
                    bar.update(self.step - bar.n)
                    if taken and self.validation and self._due(cfg.validation.every) and not self.stop:
                        self.validate(tracker)  # first, as it may decide that this step is the last
                    if taken and self._due(cfg.tracking.log_every):
                        tracker.log(line := tracking.line_of(self, meter, bar), step=self.step)
                        self.saver.note(line)
                    if taken and cfg.ema.snapshot_every and self._due(cfg.ema.snapshot_every):
                        self.snapshot()  # before the checkpoint: what is resumed from has all that came before it
                    if taken and self._due(cfg.checkpoint.checkpointing_steps) and not self.stop:
                        self.save(required=self.step == self.steps)
                    if taken and self._due(cfg.sample.sample_every) and not self.stop:
                        self.sample()
                if self.stop:
                    self.save(required=True)
                    raise preempted(self.stop, self.step, how=command_to_resume(cfg))

    def train_step(self, batches: Iterator[Batch], meter: Meter) -> bool:
        """One optimizer step over a global batch. Returns whether it was taken; if not, only counters changed. False
        also while nothing that is due hangs on it: the next call learns of it, or `stepper.settle`.

        `stop` then holds the signal that all processes have agreed to stop for, if one of them received one.
        """
        micro_batches: list[MicroBatch] = []
        for micro in range(self.accumulation):
            batch = next(batches)
            report_replaced(batch.replaced, self.replaced)
            last = micro == self.accumulation - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.network):
                done, loss = self._loss(batch, micro)
                self.stepper.backward(loss / self.accumulation)
            micro_batches.append(done)
            meter.add(done.terms)
        return self.stepper.step(micro_batches, meter)

    def _loss(self, batch: Batch, micro: int) -> tuple[MicroBatch, Tensor]:
        random = PositionRandom(self.cfg.seed, batch.positions, self.accelerator.device)
        x0 = self.modules.space.x0(batch, random, self.accelerator.device)
        condition = self.modules.conditioner(batch, random)
        if self.modules.has_dropout:  # the one draw that torch makes for itself: keyed by batch, micro-step and process
            torch.manual_seed(key(self.cfg.seed, "dropout", self.state.batches, micro, self.accelerator.process_index))
        masked = {} if batch.mask is None else {"mask": batch.mask.to(self.accelerator.device, non_blocking=True)}
        if self.cfg.train.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        terms = self.modules.objective.loss(bind(self.network, condition), x0, random, **masked)
        if batch.loss_weight is not None:
            terms = dataclasses.replace(terms, weight=terms.weight * to_device(batch.loss_weight, terms.weight.device))
        loss = (terms.per_sample * terms.weight).mean()
        terms = dataclasses.replace(terms, per_sample=terms.per_sample.detach())
        return MicroBatch(batch.rows, terms, x0.isfinite().flatten(1).all(1)), loss

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self, *, required: bool) -> None:
        """Write a checkpoint of this moment, or begin to (main process; the others wait).

        Raises, on all processes alike, NonFiniteError if there is nothing finite to save, and CheckpointError if it
        cannot be written although it is required, or for the third time in a row.
        """
        refuse_nonfinite(self)
        failed, parts = None, parts_of(self)
        if self.accelerator.is_main_process:
            try:
                write_checkpoint(self, parts, required=required)
            except CheckpointError as error:
                failed = error
        self.accelerator.wait_for_everyone()
        if largest(self.accelerator, failed is not None):
            raise failed or CheckpointError("the main process could not write a checkpoint: its own message says why")

    def rescue(self) -> bool:
        """Write the checkpoint of the last step before an error ends the run (main process; nobody waits).

        Returns whether it stands: not if the error came in the middle of changing the state, or left nothing finite, or
        if the weights are sharded over processes that may be gone.
        """
        possible = self.accelerator.is_main_process and self.whole and self.step and not self.accelerator.shards
        if not possible or nonfinite(self.state.parts()):
            return False
        try:
            write_checkpoint(self, parts_of(self), required=True)
        except Exception as error:  # the error that ends the run is another one, and is told
            log.error("%s", error)
            return False
        return True

    def snapshot(self) -> None:
        """Keep the power-function averages of this moment in ema_snapshots/ (main process; nobody waits)."""
        refuse_nonfinite(self)
        if self.accelerator.is_main_process:
            self.ema.snapshot(self.output_dir / "ema_snapshots")

    # -- validation and samples ----------------------------------------------------------------------------------------

    def validate(self, tracker: tracking.Tracker) -> None:
        """Measure the held-out loss of this step, unless it was before a resume. It may end the run: see `HeldOut`."""
        if line := self.validation.measure(self):
            tracker.log(line, step=self.step)
            self.saver.note(line)
        if self.validation.ends:
            self.steps = self.step

    def pipeline(self, *, hollow: bool = False) -> DiffusionPipeline:
        """The pipeline around the live modules (no copies). Inside `averaged_weights` it samples from the average.

        hollow: to look at only; frozen models that training does not need are not loaded for it.
        """
        for frozen in self.modules.frozen if not hollow else ():
            frozen.load("for pictures and the export")
        parts = (self.modules.unet, self.modules.space, self.modules.conditioner, self.modules.objective.scheduler)
        return build_pipeline(*parts, self.cfg, guide=self.modules.guide)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the UNet is in evaluation mode and holds the first average, if the run or its optimizer keeps one."""
        self.modules.unet.eval()
        try:
            averages = self.ema.swapped_in() if self.ema else evaluation_weights(self.optimizer.optimizer)
            with eager(self.cfg.train), averages:
                yield
        finally:
            self.modules.unet.train()

    def sample(self, *, again: bool = True) -> None:
        """Draw samples/step-N.png: see `previews.draw_samples`."""
        draw_samples(self, again=again)

    def unshard(self) -> None:
        """After the training: with FSDP2, give the main process the whole weights that are exported, and no average."""
        if self.accelerator.shards:
            with self.averaged_weights():
                unet = unsharded(self.modules.unet, keep=self.accelerator.is_main_process)
            self.modules, self.ema = dataclasses.replace(self.modules, unet=unet), None

    @property
    def sample_path(self) -> Path:
        """Where `sample` draws at this step."""
        return self.output_dir / "samples" / f"step-{self.step:08d}.png"

    # -- small parts ---------------------------------------------------------------------------------------------------

    def _due(self, every: int) -> bool:
        return tracking.due(self.step, every, self.steps)

    def loader(self, rank: int | None = None) -> DataLoader:
        """The samples of this process, or of another, from the present step on."""
        return make_loader(
            self.data,
            self.cfg,
            start=self.state.batches,
            rank=self.accelerator.process_index if rank is None else rank,
            world_size=self.accelerator.num_processes,
            accumulation=self.accumulation,
            micro_batch=self.micro_batch,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def _progress(self) -> tqdm:
        hidden = not self.accelerator.is_local_main_process
        return tqdm(total=self.steps, initial=self.step, desc="train", unit="step", disable=hidden)
