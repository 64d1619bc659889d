"""The bare loop: what training the UNet of a workload costs with nothing around it.

    python benchmarks/bare.py NAME --root FOLDER [--ema] [--precision no] [--events FOLDER]

The latents (or pixels) and embeddings of one batch are in memory; a step is noise, the UNet forward, the mean squared
error, backward, clipping, fused AdamW and, if asked for, one average by a foreach lerp: the arithmetic and the levers
that the trainer has, and none of the rest of it. As a program it goes on for ever, and writes an event per step, as all
contenders of throughput.py.
"""

import argparse
import itertools
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel

from finetune.host_memory import keep_freed_memory
from workloads import Workload, described

TOKENS = 77


class Bare:
    """The bare loop of one workload."""

    def __init__(self, workload: Workload, *, ema: bool = False, precision: str = "no") -> None:
        """precision: no or bf16, for the network alone."""
        on_gpu = torch.accelerator.is_available()
        if not on_gpu:
            keep_freed_memory()
        self.device = torch.accelerator.current_accelerator() if on_gpu else torch.device("cpu")
        if workload.pretrained:
            unet = UNet2DConditionModel.from_pretrained(workload.model / "unet")
        else:
            unet = UNet2DModel.from_config(UNet2DModel.load_config(workload.model))
        self.unet = unet.to(self.device).train()
        self.precision = precision
        sample = (workload.batch, unet.config.in_channels, *(unet.config.sample_size,) * 2)
        self.x0 = torch.randn(sample, device=self.device)
        self.conditions = self._conditions(workload)
        self.scheduler = DDPMScheduler()
        self.parameters = list(unet.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=1e-6, fused=True)
        self.averages = [p.detach().clone() for p in self.parameters] if ema else None

    def _conditions(self, workload: Workload) -> dict:
        config, batch = self.unet.config, workload.batch
        if not workload.pretrained:
            return {}
        text = torch.randn(batch, TOKENS, config.cross_attention_dim, device=self.device)
        if config.addition_embed_type != "text_time":
            return {"encoder_hidden_states": text}
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = [workload.resolution, workload.resolution, 0, 0, workload.resolution, workload.resolution]
        added = {
            "text_embeds": torch.randn(batch, pooled, device=self.device),
            "time_ids": torch.tensor([sizes] * batch, dtype=torch.float32, device=self.device),
        }
        return {"encoder_hidden_states": text, "added_cond_kwargs": added}

    def step(self) -> torch.Tensor:
        """One step; returns the loss."""
        noise = torch.randn_like(self.x0)
        timesteps = torch.randint(0, 1000, (len(self.x0),), device=self.device)
        noisy = self.scheduler.add_noise(self.x0, noise, timesteps)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            predicted = self.unet(noisy, timesteps, **self.conditions).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.averages is not None:
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, self.parameters, 1e-4)
        return loss.detach()


def main() -> None:
    """Train for ever."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--root", type=Path, required=True, help="where workloads.make made it")
    parser.add_argument("--ema", action="store_true")
    parser.add_argument("--precision", default="no", choices=("no", "bf16"))
    parser.add_argument("--events", type=Path, required=True)
    asked = parser.parse_args()
    from torch.utils.tensorboard import SummaryWriter

    loop = Bare(described(asked.name, asked.root), ema=asked.ema, precision=asked.precision)
    writer = SummaryWriter(asked.events)
    for step in itertools.count(1):
        writer.add_scalar("loss", loop.step().item(), step)
        writer.flush()


if __name__ == "__main__":
    main()
