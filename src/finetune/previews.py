"""The pictures that a run draws of itself, by all of its processes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from finetune import sample
from finetune.batching import first_batch
from finetune.errors import surviving
from finetune.processes import largest
from finetune.signals import SIGNALS, Interrupted
from finetune.space import LatentSpace

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetune.modules import Modules
    from finetune.text_conditions import Text
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
            decoding_alone(trainer.modules),
            surviving(**guarded),
            contextlib.suppress(Interrupted),
            accelerator.interrupting(),
        ):
            parts = trainer.modules.conditioner.parts
            if {"low_res", "inpaint"} & parts.keys():
                squares = dataclasses.replace(trainer.data, buckets=None)
                batch = first_batch(squares, cfg.sample.num_images)
                shown = sample.Shown(batch=batch, inpaint=parts.get("inpaint"))
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


@contextlib.contextmanager
def decoding_alone(modules: Modules) -> Iterator[None]:
    """Inside, text encoders that training does not need wait in the memory of the host while the VAE decodes.

    At 1024 pixels it takes 3 GB for it, as much as the text encoders of SDXL: a LoRA in 12 GB has room for one of them.
    """
    texts = [each for each in modules.frozen if not isinstance(each, LatentSpace)]
    hooks = []
    if isinstance(modules.space, LatentSpace):
        decoder = modules.space.vae.decoder
        hooks.append(decoder.register_forward_pre_hook(lambda *_: _each(texts, lambda text: text.put_aside())))
        hooks.append(decoder.register_forward_hook(lambda *_: _each(texts, lambda text: text.load("for pictures"))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _each(texts: Sequence[Text], do: Callable[[Text], None]) -> None:
    for text in texts:
        do(text)


def _in_order(shares: list[dict[int, Image]]) -> list[Image]:
    """The images of all processes by their number."""
    drawn = {number: image for share in shares for number, image in share.items()}
    return [drawn[number] for number in sorted(drawn)]
