"""The pictures that a run draws of itself, by all of its processes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from finetune import sample
from finetune.batching import first_batch
from finetune.errors import surviving
from finetune.processes import largest
from finetune.signals import SIGNALS, Interrupted

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetune.trainer import Trainer


@torch.no_grad()
def draw_samples(trainer: Trainer, *, again: bool) -> None:
    """Draw samples/step-N.png, each process its share, and write it (main process). Touches no state of the training.

    again: also if it is there. A signal interrupts it, and sets `trainer.stop`. An OSError, such as of a full disk,
    ends the run if the picture is the last one, which is exported, and else costs this picture.
    """
    accelerator, cfg, path = trainer.accelerator, trainer.cfg, trainer.sample_path
    wanted = accelerator.is_main_process and (again or not path.exists())  # others may not see its disk
    if largest(accelerator, wanted):
        pipeline, drawn, shown = trainer.pipeline(), {}, None
        pipeline.set_progress_bar_config(desc="sampling", leave=False, disable=not accelerator.is_main_process)
        guarded = {"what": f"samples at step {trainer.step}", "required": trainer.step == trainer.steps}
        with (
            trainer.averaged_weights(),
            accelerator.autocast(),
            surviving(**guarded),
            contextlib.suppress(Interrupted),
            accelerator.interrupting(),
        ):
            if "low_res" in trainer.modules.conditioner.parts:
                shown = first_batch(trainer.data, cfg.sample.num_images)
            share = {"rank": accelerator.process_index, "processes": accelerator.num_processes}
            if accelerator.shards:  # of what the weights are spread over, each has to take part in every evaluation
                share = {}
            drawn = sample.draw(pipeline, cfg, shown, **share)
        for frozen in trainer.modules.frozen:
            frozen.put_aside()
        accelerator.wait_for_everyone()  # before the collectives, which do not wait for ever
        if not largest(accelerator, SIGNALS.received):
            images = _in_order(gather_object([drawn]))
            if accelerator.is_main_process:
                with surviving(**guarded):
                    if len(images) < sample.number_of(cfg, shown):
                        raise OSError("a process could not draw its share")
                    sample.write_grid(pipeline, cfg, path, images, shown)
    accelerator.wait_for_everyone()
    trainer.stop = int(largest(accelerator, SIGNALS.received))


def _in_order(shares: list[dict[int, Image]]) -> list[Image]:
    """The images of all processes by their number."""
    drawn = {number: image for share in shares for number, image in share.items()}
    return [drawn[number] for number in sorted(drawn)]
